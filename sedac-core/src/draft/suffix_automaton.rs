//! The suffix automaton of a text that grows: where its newest tokens occurred before, in constant
//! time a token.
//!
//! Blumer et al. 1985, <https://doi.org/10.1016/0304-3975(85)90157-4>; for speculative decoding, SAM
//! decoding, Hu et al. 2024, <https://arxiv.org/abs/2411.10666>.

/// The state of the empty string.
const ROOT: usize = 0;

/// Suffixes of the text whose continuation an appended token updates, the longest first. Only texts
/// that repeat themselves without a break have more, and matches in those are long.
const MAX_UPDATED: usize = 64;

/// All substrings of a text. A state stands for those that end at the same positions.
#[derive(Debug)]
pub(super) struct SuffixAutomaton {
    states: Vec<State>,
    /// The state of the whole text.
    last: usize,
    length: usize,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// Length of the longest substring.
    length: usize,
    /// The state of its longest suffix that ends at other positions too.
    link: usize,
    /// States by the token that follows, in the order of tokens.
    transitions: Vec<(u32, usize)>,
    continuation: Option<Continuation>,
}

/// What followed a substring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Continuation {
    /// The token that followed its latest occurrence.
    pub(super) token: u32,
    /// The number of latest occurrences, without a break, that it followed.
    pub(super) run: usize,
    /// Whether another token followed an earlier occurrence.
    pub(super) changed: bool,
}

/// The longest suffix of a context that occurs in the text with a token after it; empty where none
/// does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Match {
    state: usize,
    /// Its length in tokens.
    pub(super) length: usize,
}

impl Default for SuffixAutomaton {
    /// Of the empty text.
    fn default() -> Self {
        Self {
            states: vec![State::default()],
            last: ROOT,
            length: 0,
        }
    }
}

impl SuffixAutomaton {
    /// Tokens in the text.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Append `token` to the text.
    pub(super) fn append(&mut self, token: u32) {
        self.update_continuations(token);
        self.length += 1;
        let new = self.push(State {
            length: self.length,
            ..State::default()
        });
        let mut state = self.last;
        self.last = new;
        while let Err(index) = self.transition(state, token) {
            self.states[state].transitions.insert(index, (token, new));
            if state == ROOT {
                return;
            }
            state = self.states[state].link;
        }
        self.states[new].link = self.suffix_state(state, token);
    }

    /// The match of the text itself.
    pub(super) fn newest(&self) -> Match {
        self.with_continuation(self.states[self.last].link, usize::MAX)
    }

    /// The match of a context, whose match is `current`, followed by `token`.
    pub(super) fn advance(&self, current: Match, token: u32) -> Match {
        let Match {
            mut state,
            mut length,
        } = current;
        loop {
            if let Ok(index) = self.transition(state, token) {
                let next = self.states[state].transitions[index].1;
                return self.with_continuation(next, length + 1);
            }
            if state == ROOT {
                return Match::default();
            }
            state = self.states[state].link;
            length = self.states[state].length;
        }
    }

    /// What followed `found`; None for the empty match.
    pub(super) fn continuation(&self, found: Match) -> Option<Continuation> {
        self.states[found.state].continuation
    }

    /// The longest suffix, of the substring of `length` or fewer tokens in `state`, with a token
    /// after it.
    fn with_continuation(&self, mut state: usize, length: usize) -> Match {
        while state != ROOT && self.states[state].continuation.is_none() {
            state = self.states[state].link;
        }
        let length = length.min(self.states[state].length);
        Match { state, length }
    }

    /// Where `state` has the transition by `token`, or where it belongs.
    fn transition(&self, state: usize, token: u32) -> Result<usize, usize> {
        let transitions = &self.states[state].transitions;
        transitions.binary_search_by_key(&token, |&(token, _)| token)
    }

    fn push(&mut self, state: State) -> usize {
        self.states.push(state);
        self.states.len() - 1
    }

    /// `token` follows each suffix of the text but the empty one.
    fn update_continuations(&mut self, token: u32) {
        let mut state = self.last;
        for _ in 0..MAX_UPDATED {
            if state == ROOT {
                return;
            }
            let continuation = &mut self.states[state].continuation;
            *continuation = Some(match *continuation {
                Some(known) if known.token == token => Continuation {
                    run: known.run + 1,
                    ..known
                },
                known => Continuation {
                    token,
                    run: 1,
                    changed: known.is_some(),
                },
            });
            state = self.states[state].link;
        }
    }

    /// The state of the longest string of `state` followed by `token`, which is split off from the
    /// longer ones of its state where there are any.
    fn suffix_state(&mut self, mut state: usize, token: u32) -> usize {
        let length = self.states[state].length + 1;
        let Ok(index) = self.transition(state, token) else {
            unreachable!("the caller found the transition");
        };
        let whole = self.states[state].transitions[index].1;
        if self.states[whole].length == length {
            return whole;
        }
        let split = self.push(State {
            length,
            ..self.states[whole].clone()
        });
        self.states[whole].link = split;
        while let Ok(index) = self.transition(state, token) {
            let target = &mut self.states[state].transitions[index].1;
            if *target != whole {
                break;
            }
            *target = split;
            if state == ROOT {
                break;
            }
            state = self.states[state].link;
        }
        split
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &[u32]) -> SuffixAutomaton {
        let mut automaton = SuffixAutomaton::default();
        text.iter().for_each(|&token| automaton.append(token));
        automaton
    }

    /// The tokens that follow `pattern` in `text`, in the order of the text.
    fn followers<'a>(text: &'a [u32], pattern: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        let windows = text.windows(pattern.len() + 1);
        windows
            .filter(|window| window.starts_with(pattern))
            .map(|window| window[pattern.len()])
    }

    /// By search: the length of the longest suffix of `context` that occurs in `text` with a token
    /// after it, and what followed it.
    fn search(text: &[u32], context: &[u32]) -> (usize, Option<Continuation>) {
        for start in 0..context.len() {
            let pattern = &context[start..];
            let followers: Vec<u32> = followers(text, pattern).collect();
            if let Some(&token) = followers.last() {
                let run = followers.iter().rev().take_while(|&&other| other == token);
                let run = run.count();
                let changed = run < followers.len();
                let continuation = Continuation {
                    token,
                    run,
                    changed,
                };
                return (pattern.len(), Some(continuation));
            }
        }
        (0, None)
    }

    fn found(automaton: &SuffixAutomaton, found: Match) -> (usize, Option<Continuation>) {
        (found.length, automaton.continuation(found))
    }

    fn texts(tokens: u32) -> impl Strategy<Value = Vec<u32>> {
        prop::collection::vec(0..tokens, 0..MAX_UPDATED)
    }

    proptest! {
        #[test]
        fn the_newest_tokens_are_found_where_a_search_finds_them(
            text in (1..5_u32).prop_flat_map(texts),
        ) {
            let mut automaton = SuffixAutomaton::default();
            for (index, &token) in text.iter().enumerate() {
                automaton.append(token);
                let text = &text[..=index];
                prop_assert_eq!(found(&automaton, automaton.newest()), search(text, text));
                prop_assert_eq!(automaton.len(), text.len());
            }
        }

        #[test]
        fn other_contexts_are_found_where_a_search_finds_them(
            (text, context) in (1..5_u32).prop_flat_map(|tokens| (texts(tokens), texts(tokens + 1))),
        ) {
            let automaton = of(&text);
            let mut current = Match::default();
            for (index, &token) in context.iter().enumerate() {
                current = automaton.advance(current, token);
                prop_assert_eq!(found(&automaton, current), search(&text, &context[..=index]));
            }
        }

        #[test]
        fn states_are_at_most_two_a_token(text in (1..5_u32).prop_flat_map(texts)) {
            prop_assert!(of(&text).states.len() <= 2 * text.len() + 1);
        }
    }

    #[test]
    fn continuations_tell_runs_and_changes() {
        let automaton = of(&[1, 2, 7, 1, 2, 8, 1, 2, 8, 1, 2]);
        let (length, continuation) = found(&automaton, automaton.newest());
        assert_eq!(length, 5);
        assert_eq!(
            continuation,
            Some(Continuation {
                token: 8,
                run: 1,
                changed: false
            })
        );
        let two = [1, 2].into_iter();
        let two = two.fold(Match::default(), |current, token| {
            automaton.advance(current, token)
        });
        let known = Continuation {
            token: 8,
            run: 2,
            changed: true,
        };
        assert_eq!(automaton.continuation(two), Some(known));
    }
}
