//! Drafts what followed the newest tokens when they occurred before.

use super::{Draft, Drafter, Share, Tools, full_depth};
use crate::backend::Costs;
use crate::error::Result;

/// The longest run of newest tokens that is looked for; longer matches are no surer.
const LONGEST_MATCH: usize = 6;
/// Shorter matches guess too badly.
const SHORTEST_MATCH: usize = 2;
/// Numbers of tokens to draft; engines run best over powers of two, the newest token included.
const LENGTHS: [usize; 4] = [1, 3, 7, 15];

/// Looks for the newest tokens in the text so far, longest match first, the latest of equals, and
/// guesses that the same tokens follow.
#[derive(Debug)]
pub(super) struct PromptLookup {
    layers: usize,
    /// By length of the match: how often a guess after right ones was right.
    shares: Vec<Share>,
    matched: usize,
    guesses: Vec<u32>,
}

impl PromptLookup {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            layers,
            // what is believed at first: the longer the match the surer
            shares: (0..=LONGEST_MATCH)
                .map(|matched| Share::new(1.0 - 1.0 / matched.max(1) as f64))
                .collect(),
            matched: 0,
            guesses: Vec::new(),
        }
    }

    /// Tokens a second with `length` guesses, each right with probability `share` if those before
    /// are.
    fn speed(&self, length: usize, share: f64, costs: &Costs) -> f64 {
        let tokens: f64 = (0..=length as i32).map(|n| share.powi(n)).sum();
        tokens / full_depth(costs, self.layers, length + 1)
    }
}

impl Drafter for PromptLookup {
    fn promise(&mut self, history: &[u32], most: usize, costs: &Costs, plain: f64) -> f64 {
        self.shares.iter_mut().for_each(Share::fade);
        self.guesses.clear();
        let Some((next, matched)) = find(history) else {
            return 0.0;
        };
        self.matched = matched;
        let share = self.shares[matched].estimate();
        let most = most.min(history.len() - next);
        let promises = LENGTHS
            .map(|length| length.min(most))
            .map(|length| (length, plain * self.speed(length, share, costs)));
        let best = promises.into_iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (length, promise) = best.unwrap_or_default();
        self.guesses.extend(&history[next..next + length]);
        promise
    }

    fn draft(&mut self, _: &[u32], _: usize, _: &mut Tools<'_>) -> Result<Draft> {
        Ok(Draft {
            tokens: self.guesses.clone(),
            ..Draft::default()
        })
    }

    fn learn(&mut self, tokens: &[u32], _: &Costs) {
        for (token, guess) in tokens.iter().zip(&self.guesses) {
            self.shares[self.matched].note(token == guess);
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
