//! Drafts what followed the newest tokens when they occurred before.

use super::{AcceptanceRate, Draft, DraftContext, Drafter, full_depth_cost};
use crate::backend::Costs;
use crate::error::Result;

/// The longest run of newest tokens that is looked for; longer matches are no more reliable.
const MAX_MATCH: usize = 6;
/// Shorter matches are accepted too rarely.
const MIN_MATCH: usize = 2;
/// Numbers of tokens to draft; engines run best over powers of two, the newest token included.
const LENGTHS: [usize; 4] = [1, 3, 7, 15];

/// Looks for the newest tokens in the text so far, longest match first, the latest of equals, and
/// drafts the tokens that followed there.
#[derive(Debug)]
pub(super) struct PromptLookup {
    layers: usize,
    /// By length of the match, of tokens drafted after accepted ones.
    rates: Vec<AcceptanceRate>,
    matched: usize,
    drafted: Vec<u32>,
}

impl PromptLookup {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            layers,
            // longer matches are more reliable
            rates: (0..=MAX_MATCH)
                .map(|matched| AcceptanceRate::new(1.0 - 1.0 / matched.max(1) as f64))
                .collect(),
            matched: 0,
            drafted: Vec::new(),
        }
    }

    /// Expected tokens a second with `length` drafted tokens, each accepted with probability `rate`
    /// if those before are.
    fn speed(&self, length: usize, rate: f64, costs: &Costs) -> f64 {
        let tokens: f64 = (0..=length as i32).map(|n| rate.powi(n)).sum();
        tokens / full_depth_cost(costs, self.layers, length + 1)
    }
}

impl Drafter for PromptLookup {
    fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        costs: &Costs,
        baseline: f64,
    ) -> f64 {
        self.rates.iter_mut().for_each(AcceptanceRate::decay);
        self.drafted.clear();
        let Some((next, matched)) = find(history) else {
            return 0.0;
        };
        self.matched = matched;
        let rate = self.rates[matched].estimate();
        let max_tokens = max_tokens.min(history.len() - next);
        let speedups = LENGTHS
            .map(|length| length.min(max_tokens))
            .map(|length| (length, baseline * self.speed(length, rate, costs)));
        let best = speedups.into_iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (length, speedup) = best.unwrap_or_default();
        self.drafted.extend(&history[next..next + length]);
        speedup
    }

    fn propose(&mut self, _: &[u32], _: usize, _: &mut DraftContext<'_>) -> Result<Draft> {
        Ok(Draft {
            tokens: self.drafted.clone(),
            ..Draft::default()
        })
    }

    fn observe(&mut self, tokens: &[u32], _: &Costs) {
        for (token, drafted) in tokens.iter().zip(&self.drafted) {
            self.rates[self.matched].observe(token == drafted);
        }
    }
}

/// The index after an earlier occurrence of the newest tokens of `history`, and how many match.
fn find(history: &[u32]) -> Option<(usize, usize)> {
    let mut best = None;
    let mut longest = MIN_MATCH - 1;
    for next in (MIN_MATCH..history.len()).rev() {
        let before = history[..next].iter().rev();
        let same = before
            .zip(history.iter().rev())
            .take(MAX_MATCH)
            .take_while(|(a, b)| a == b)
            .count();
        if same > longest {
            (best, longest) = (Some((next, same)), same);
        }
        if longest == MAX_MATCH {
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
