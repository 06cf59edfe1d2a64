//! The baseline cost: what tokens cost without drafts.

use super::full_depth_cost;
use crate::backend::Costs;

/// Tokens count less with every newer one: where text lets more of them exit, drafts pay less.
const DECAY: f64 = 0.98;

/// Mean cost of a token that only the exit rule decides about, relative to full depth.
#[derive(Debug)]
pub(crate) struct BaselineCost {
    layers: usize,
    mean: f64,
}

impl BaselineCost {
    /// For a model of `layers` layers; no token has exited yet.
    pub(crate) fn new(layers: usize) -> Self {
        Self { layers, mean: 1.0 }
    }

    /// Seconds for a token.
    pub(crate) fn seconds(&self, costs: &Costs) -> f64 {
        self.mean * full_depth_cost(costs, self.layers, 1)
    }

    /// Seconds for a token in a pass that tokens of `others` texts share.
    pub(crate) fn seconds_beside(&self, others: usize, costs: &Costs) -> f64 {
        let alone = full_depth_cost(costs, self.layers, 1);
        let together = full_depth_cost(costs, self.layers, 1 + others);
        match alone > 0.0 {
            true => self.seconds(costs) * together / (alone * (1 + others) as f64),
            false => self.seconds(costs),
        }
    }

    /// A token exits after `depth` layers.
    pub(crate) fn observe(&mut self, depth: usize, costs: &Costs) {
        let seconds = baseline_cost(costs, self.layers, depth);
        let full = full_depth_cost(costs, self.layers, 1);
        if full > 0.0 {
            self.mean = DECAY * self.mean + (1.0 - DECAY) * seconds / full;
        }
    }
}

/// Seconds for a token that exits after `depth` of `layers` layers: it goes through the others
/// later, in the pass of another token.
pub(super) fn baseline_cost(costs: &Costs, layers: usize, depth: usize) -> f64 {
    let rest = layers - depth;
    let waiting = costs.layers(rest, 2) - costs.layers(rest, 1);
    costs.layers(depth, 1) + waiting + costs.head(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn exits_make_tokens_cheaper_in_the_long_run() {
        let mut costs = Costs::default();
        let mut mean = BaselineCost::new(4);
        mean.observe(2, &costs);
        assert_eq!(mean.seconds(&costs), 0.0);
        for (tokens, seconds) in [(1, 10), (1, 10), (2, 11), (2, 11)] {
            costs.note_layers(1, tokens, Duration::from_secs(seconds));
        }
        assert_eq!(mean.seconds(&costs), 40.0);
        assert_eq!(mean.seconds_beside(0, &costs), 40.0);
        assert_eq!(mean.seconds_beside(1, &costs), 22.0);
        for _ in 0..1000 {
            mean.observe(2, &costs);
        }
        assert!((mean.seconds(&costs) - 22.0).abs() < 1e-6);
    }
}
