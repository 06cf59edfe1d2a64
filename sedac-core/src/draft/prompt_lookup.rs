//! Drafts what followed the newest tokens when they occurred before.

use std::time::Duration;

use super::{Draft, Drafter, Pacer};
use crate::backend::Backend;
use crate::error::Result;
use crate::interrupt::Interrupt;

/// The longest run of newest tokens that is looked for; longer matches are no surer.
const LONGEST_MATCH: usize = 6;
/// Shorter matches guess too badly.
const SHORTEST_MATCH: usize = 2;
/// Numbers of tokens to draft.
const LENGTHS: [usize; 3] = [3, 7, 15];

/// Looks for the newest tokens in the text so far, longest match first, the latest of equals, and
/// guesses that the same tokens follow.
#[derive(Debug)]
pub(super) struct PromptLookup {
    /// By length of the match, as longer ones guess better.
    pacers: Vec<Pacer>,
    matched: usize,
}

impl PromptLookup {
    pub(super) fn new() -> Self {
        Self {
            pacers: (SHORTEST_MATCH..=LONGEST_MATCH)
                .map(|_| Pacer::new(LENGTHS.len()))
                .collect(),
            matched: SHORTEST_MATCH,
        }
    }
}

impl Drafter for PromptLookup {
    fn draft(
        &mut self,
        history: &[u32],
        most: usize,
        _: &mut dyn Backend,
        _: &Interrupt,
    ) -> Result<Draft> {
        let Some((next, matched)) = find(history).filter(|_| most > 0) else {
            return Ok(Draft::default());
        };
        self.matched = matched;
        let Some(way) = self.pacers[matched - SHORTEST_MATCH].choose() else {
            return Ok(Draft::default());
        };
        let end = history.len().min(next + LENGTHS[way].min(most));
        Ok(Draft {
            tokens: history[next..end].to_vec(),
            depth: 0,
        })
    }

    fn learn(&mut self, tokens: usize, elapsed: Duration) {
        self.pacers[self.matched - SHORTEST_MATCH].learn(tokens, elapsed);
    }

    fn learn_without(&mut self, tokens: usize, elapsed: Duration) {
        for pacer in &mut self.pacers {
            pacer.learn_without(tokens, elapsed);
        }
    }
}

/// The index after an earlier occurrence of the newest tokens of `history`, and how many match.
fn find(history: &[u32]) -> Option<(usize, usize)> {
    let mut best = None;
    let mut longest = SHORTEST_MATCH - 1;
    for next in (SHORTEST_MATCH..history.len()).rev() {
        let before = history[..next].iter().rev();
        let same = before
            .zip(history.iter().rev())
            .take(LONGEST_MATCH)
            .take_while(|(a, b)| a == b)
            .count();
        if same > longest {
            (best, longest) = (Some((next, same)), same);
        }
        if longest == LONGEST_MATCH {
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_match_wins_then_the_latest() {
        assert_eq!(find(&[1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), Some((3, 3)));
        assert_eq!(find(&[2, 3, 9, 2, 3, 8, 2, 3]), Some((5, 2)));
        assert_eq!(find(&[1, 2, 3]), None);
        assert_eq!(find(&[5, 5, 5]), Some((2, 2)));
        assert_eq!(find(&[]), None);
    }
}
