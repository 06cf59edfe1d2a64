//! The baseline cost: what tokens cost without drafts.

use super::full_depth_cost;
use crate::backend::{Capabilities, Costs};

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

    /// A token of a text in `company`, on a backend with such `capabilities`.
    pub(crate) fn beside(
        &self,
        company: Company,
        capabilities: &Capabilities,
        costs: &Costs,
    ) -> TokenCost {
        let texts = 1 + company.others;
        let alone = full_depth_cost(costs, self.layers, 1);
        let together = full_depth_cost(costs, self.layers, texts);
        let of_alone = match alone > 0.0 {
            true => together / (alone * texts as f64),
            false => 1.0,
        };
        TokenCost {
            seconds: of_alone * self.seconds(costs),
            of_alone,
            verified_beside: match capabilities.shares_drafts {
                true => company,
                false => Company::default(),
            },
            drafted_for: (1 + company.drafting).min(capabilities.drafts_at_once),
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

/// What a text's next token costs without a draft, and beside what one is verified.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenCost {
    /// Seconds, where it shares a pass its share of them.
    pub seconds: f64,
    /// The same relative to what it costs in a pass of its own.
    pub of_alone: f64,
    /// The texts with which it shares the pass that verifies a draft.
    pub verified_beside: Company,
    /// Sequences for which a launch of the trained drafter drafts.
    pub drafted_for: usize,
}

/// Other texts that share passes with one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Company {
    /// All of them.
    pub others: usize,
    /// Those that draft too, for full depth to verify.
    pub drafting: usize,
}

impl TokenCost {
    /// Of a text alone, whose tokens take `seconds` each.
    pub fn alone(seconds: f64) -> Self {
        Self {
            seconds,
            of_alone: 1.0,
            verified_beside: Company::default(),
            drafted_for: 1,
        }
    }

    /// Seconds of the pass that verifies a draft, for `tokens` tokens of the text, in a model of `layers`
    /// layers: its share, where all texts that draft have as many, less what it costs for those that do
    /// not. What a draft adds to a pass of single tokens would be another price: one more row may start a
    /// pass of its own, which then has room for the drafts of all, and the last row that a pass holds is
    /// nearly free to everyone but not to all.
    pub(super) fn verification(&self, costs: &Costs, layers: usize, tokens: usize) -> f64 {
        let Company { others, drafting } = self.verified_beside;
        let (drafted, single) = ((1 + drafting) * tokens, others - drafting);
        let pass = full_depth_cost(costs, layers, drafted + single);
        // passes that were measured at other times may say that the others pay for all
        let least = pass * drafted as f64 / (drafted + single) as f64 / 2.0;
        (pass - single as f64 * self.seconds).max(least) / (1 + drafting) as f64
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
        assert_eq!(
            mean.beside(Company::default(), &Capabilities::default(), &costs),
            TokenCost::alone(40.0)
        );
        let company = Company {
            others: 1,
            drafting: 0,
        };
        let beside = mean.beside(company, &Capabilities::default(), &costs);
        assert_eq!((beside.seconds, beside.of_alone), (22.0, 0.55));
        for _ in 0..1000 {
            mean.observe(2, &costs);
        }
        assert!((mean.seconds(&costs) - 22.0).abs() < 1e-6);
    }

    #[test]
    fn a_draft_beside_others_costs_its_share_of_the_drafts_of_all() {
        let mut costs = Costs::of_passes(9, 9);
        for (tokens, seconds) in [(1, 10), (3, 12), (4, 27), (9, 30)] {
            for _ in 0..2 {
                costs.note_layers(1, tokens, Duration::from_secs(seconds));
            }
        }
        let beside = |shares_drafts, drafting| {
            let capabilities = Capabilities {
                shares_drafts,
                drafts_at_once: 2,
                ..Capabilities::default()
            };
            let company = Company {
                others: 2,
                drafting,
            };
            BaselineCost::new(1).beside(company, &capabilities, &costs)
        };
        assert_eq!(
            (beside(true, 2).seconds, beside(true, 2).drafted_for),
            (4.0, 2)
        );
        let shares = [1, 3, 4].map(|tokens| beside(true, 2).verification(&costs, 1, tokens));
        // twelve tokens are two passes
        assert_eq!(shares, [4.0, 10.0, 14.0]);
        // two single tokens of others cost 8
        assert_eq!(beside(true, 0).verification(&costs, 1, 2), 19.0);
        assert_eq!(beside(true, 0).verification(&costs, 1, 1), 4.0);
        assert_eq!(beside(false, 2).verification(&costs, 1, 3), 12.0);
        assert_eq!(TokenCost::alone(10.0).verification(&costs, 1, 4), 27.0);
    }
}
