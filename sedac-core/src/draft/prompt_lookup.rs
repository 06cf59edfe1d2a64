//! Drafts what followed the newest tokens when they occurred before.

use super::suffix_automaton::{Continuation, Match, SuffixAutomaton};
use super::{Acceptance, AcceptanceRate, Draft, DraftContext, Drafter, Proposal, TokenCost};
use crate::backend::Costs;
use crate::error::Result;

/// The longest draft.
const MAX_DRAFTED: usize = 15;
/// Tokens whose draft is accepted less often than this up to there are not worth a look.
const MIN_ACCEPTED: f64 = 0.02;
/// An earlier text has to match by more than this number of tokens beyond the current one, which
/// resembles itself more than it does others.
const EARLIER_EXCESS: usize = 2;
/// Earlier texts are forgotten once they have this number of tokens: some 6 MB.
const MAX_EARLIER: usize = 1 << 15;
/// Ends an earlier text.
const END: u32 = u32::MAX;
/// The shortest match of each class of lengths, and the acceptance rate in it where the token
/// followed once: means over code of two models and chats of another.
const LENGTHS: [(usize, f64); 8] = [
    (1, 0.4),
    (2, 0.6),
    (3, 0.7),
    (4, 0.75),
    (5, 0.85),
    (7, 0.9),
    (10, 0.92),
    (17, 0.97),
];
/// Classes of continuations, of the current text and of earlier ones.
const CONTINUATIONS: usize = 4;

/// Looks for the longest run of newest tokens that occurred before, in this text and in earlier ones,
/// and drafts the token that followed its latest occurrence; then again for each drafted token, since
/// the longest match may lie elsewhere from there on.
#[derive(Debug)]
pub(super) struct PromptLookup {
    layers: usize,
    current: SuffixAutomaton,
    earlier: SuffixAutomaton,
    /// The current text's match in the earlier ones.
    earlier_match: Match,
    text: Vec<u32>,
    /// By class, of tokens drafted after accepted ones.
    rates: Vec<AcceptanceRate>,
    /// The tokens of the draft and their classes.
    drafted: Vec<(u32, usize)>,
}

/// Where a context matches.
#[derive(Debug, Clone, Copy)]
struct Matches {
    current: Match,
    earlier: Match,
}

impl PromptLookup {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            layers,
            current: SuffixAutomaton::default(),
            earlier: SuffixAutomaton::default(),
            earlier_match: Match::default(),
            text: Vec::new(),
            rates: priors().map(AcceptanceRate::new).collect(),
            drafted: Vec::new(),
        }
    }

    /// Take up what `history` has beyond the text so far.
    fn follow(&mut self, history: &[u32]) {
        for &token in &history[self.text.len()..] {
            self.current.append(token);
            self.earlier_match = self.earlier.advance(self.earlier_match, token);
            self.text.push(token);
        }
    }

    /// The token to draft after a context that matches at `matches`, and its class.
    fn next(&self, matches: Matches) -> Option<(u32, usize)> {
        let Matches { current, earlier } = matches;
        if earlier.length > current.length + EARLIER_EXCESS {
            let known = self.earlier.continuation(earlier);
            if let Some(known) = known.filter(|known| known.token != END) {
                return Some((known.token, class(earlier.length, CONTINUATIONS - 1)));
            }
        }
        let known = self.current.continuation(current)?;
        Some((known.token, class(current.length, kind(known))))
    }

    fn advance(&self, matches: Matches, token: u32) -> Matches {
        Matches {
            current: self.current.advance(matches.current, token),
            earlier: self.earlier.advance(matches.earlier, token),
        }
    }
}

impl Drafter for PromptLookup {
    fn start(&mut self) {
        if self.earlier.len() + self.text.len() > MAX_EARLIER {
            self.earlier = SuffixAutomaton::default();
        }
        for token in self.text.drain(..).chain([END]) {
            self.earlier.append(token);
        }
        self.current = SuffixAutomaton::default();
        self.earlier_match = Match::default();
    }

    fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        costs: &Costs,
        baseline: TokenCost,
    ) -> f64 {
        self.rates.iter_mut().for_each(AcceptanceRate::decay);
        self.follow(history);
        self.drafted.clear();
        let mut matches = Matches {
            current: self.current.newest(),
            earlier: self.earlier_match,
        };
        // the expected number of tokens, and the probability that all drafted ones are accepted
        let (mut tokens, mut accepted) = (1.0, 1.0);
        let (mut best, mut best_length) = (0.0, 0);
        while self.drafted.len() < max_tokens.min(MAX_DRAFTED) && accepted > MIN_ACCEPTED {
            let Some((token, class)) = self.next(matches) else {
                break;
            };
            self.drafted.push((token, class));
            matches = self.advance(matches, token);
            accepted *= self.rates[class].estimate();
            tokens += accepted;
            let length = self.drafted.len();
            let cost = baseline.verification(costs, self.layers, length + 1);
            let speedup = baseline.seconds * tokens / cost;
            if speedup > best {
                (best, best_length) = (speedup, length);
            }
        }
        self.drafted.truncate(best_length);
        best
    }

    fn propose(&mut self, _: &[u32], _: usize, _: &mut DraftContext<'_>) -> Result<Proposal> {
        Ok(Proposal::Draft(Draft {
            tokens: self.drafted.iter().map(|&(token, _)| token).collect(),
            ..Draft::default()
        }))
    }

    fn observe(&mut self, tokens: &[u32], _: &Costs) {
        for (&token, &(drafted, class)) in tokens.iter().zip(&self.drafted) {
            self.rates[class].observe(token == drafted);
        }
    }

    fn recall(&mut self, acceptance: &Acceptance) {
        for (rate, &remembered) in self.rates.iter_mut().zip(&acceptance.prompt_lookup) {
            rate.recall(remembered);
        }
    }

    fn record(&self, acceptance: &mut Acceptance) {
        let rates = self.rates.iter().map(AcceptanceRate::estimate);
        acceptance.prompt_lookup = rates.collect();
    }
}

/// Whether a token followed once, several times in a row, or after another one.
fn kind(known: Continuation) -> usize {
    match known {
        Continuation { run: 2.., .. } => 1,
        Continuation { changed: true, .. } => 2,
        _ => 0,
    }
}

/// The class of a token that followed a match of `length` tokens, and is a continuation of `kind`.
fn class(length: usize, kind: usize) -> usize {
    let longer = LENGTHS.iter().filter(|(min, _)| length >= *min).count();
    (longer - 1) * CONTINUATIONS + kind
}

/// By class, the acceptance rate where nothing is known.
fn priors() -> impl Iterator<Item = f64> {
    LENGTHS.into_iter().flat_map(|(_, once)| {
        let repeated = 1.0 - 0.6 * (1.0 - once);
        let (changed, earlier) = (0.6 * once, 0.8 * once);
        [once, repeated, changed, earlier]
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Where further tokens in a pass cost `per_token` of the first.
    fn costs(per_token: f64) -> Costs {
        let mut costs = Costs::default();
        for tokens in [1, MAX_DRAFTED + 1] {
            let elapsed = Duration::from_secs_f64(1.0 + per_token * (tokens - 1) as f64);
            for _ in 0..2 {
                costs.note_layers(1, tokens, elapsed);
            }
        }
        costs
    }

    fn draft(lookup: &mut PromptLookup, text: &[u32], max_tokens: usize) -> (f64, Vec<u32>) {
        let speedup = lookup.expected_speedup(text, max_tokens, &costs(0.0), TokenCost::alone(1.0));
        let tokens = lookup.drafted.iter().map(|&(token, _)| token);
        (speedup, tokens.collect())
    }

    #[test]
    fn each_drafted_token_follows_the_longest_match() {
        let mut lookup = PromptLookup::new(1);
        // 6 followed the latest 3 and 4, but 5 where 9 and 2 came before them
        let text = [9, 2, 3, 4, 5, 1, 2, 3, 7, 3, 4, 6, 9, 2];
        let (speedup, tokens) = draft(&mut lookup, &text, 3);
        assert_eq!(tokens, [3, 4, 5]);
        assert!(speedup > 1.0);
    }

    #[test]
    fn drafts_are_no_longer_than_allowed_and_none_without_a_match() {
        let mut lookup = PromptLookup::new(1);
        assert_eq!(draft(&mut lookup, &[1, 2, 3], 9), (0.0, vec![]));
        let mut lookup = PromptLookup::new(1);
        let text = [1, 2].repeat(20);
        assert_eq!(draft(&mut lookup, &text, 3).1, [1, 2, 1]);
        assert_eq!(draft(&mut lookup, &text, 40).1.len(), MAX_DRAFTED);
    }

    #[test]
    fn drafts_end_where_tokens_cost_more_than_they_promise() {
        let lengths = [0.0, 0.5, 2.0].map(|per_token| {
            let mut lookup = PromptLookup::new(1);
            let text = [1, 2, 3, 4, 5, 6, 1, 2];
            let speedup =
                lookup.expected_speedup(&text, 9, &costs(per_token), TokenCost::alone(1.0));
            (lookup.drafted.len(), speedup > 1.0)
        });
        assert_eq!(lengths[0], (9, true));
        assert!(
            (1..9).contains(&lengths[1].0) && lengths[1].1,
            "{lengths:?}"
        );
        assert!(!lengths[2].1, "{lengths:?}");
    }

    #[test]
    fn earlier_texts_are_looked_up_where_they_match_by_more() {
        let mut lookup = PromptLookup::new(1);
        let earlier = [5, 6, 7, 8, 9, 10];
        draft(&mut lookup, &earlier, 1);
        lookup.start();
        assert!(draft(&mut lookup, &[6, 7], 9).1.is_empty());
        assert_eq!(draft(&mut lookup, &[6, 7, 8], 9).1, [9, 10]);
        lookup.start();
        // the current text matches by one token, and says something else
        assert_eq!(draft(&mut lookup, &[8, 1, 6, 7, 8], 1).1, [1]);
        assert_eq!(draft(&mut lookup, &[8, 1, 6, 7, 8, 9], 1).1, [10]);
    }

    #[test]
    fn old_texts_are_forgotten_in_time() {
        let mut lookup = PromptLookup::new(1);
        let text: Vec<u32> = (0..MAX_EARLIER as u32 - 1).collect();
        draft(&mut lookup, &text, 1);
        lookup.start();
        assert_eq!(draft(&mut lookup, &[6, 7, 8], 1).1, [9]);
        lookup.start();
        assert_eq!(lookup.earlier.len(), 4);
    }

    #[test]
    fn acceptance_is_remembered_by_class() {
        let text = [1, 2, 3, 1, 2];
        let mut lookup = PromptLookup::new(1);
        for _ in 0..100 {
            draft(&mut lookup, &text, 1);
            lookup.observe(&[9], &Costs::default());
        }
        let mut acceptance = Acceptance::default();
        lookup.record(&mut acceptance);
        let (mut cold, mut warm) = (PromptLookup::new(1), PromptLookup::new(1));
        warm.recall(&acceptance);
        let ((cold, _), (warm, _)) = (draft(&mut cold, &text, 1), draft(&mut warm, &text, 1));
        assert!(warm < cold, "{warm} {cold}");
        // rare enough to be tried again
        assert!(warm > 1.0 + (cold - 1.0) / 3.0);
    }
}
