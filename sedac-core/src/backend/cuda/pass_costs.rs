//! What passes cost, by the device's own clock.

use std::time::Duration;

use super::abi::PassOutcome;
use super::chain_device::PassPlan;
use crate::backend::{Costs, EnginePart, EngineTiming};

/// Rows of the longest verification, which takes two passes.
const MAX_VERIFIED: usize = 16;

/// What one pass took.
#[derive(Debug, Clone)]
pub(super) struct PassCost {
    rows: usize,
    /// The first layer that any row ran.
    first_layer: usize,
    /// The layers that every row ran; None where rows ran different ones.
    layers: Option<usize>,
    layers_elapsed: Duration,
    logits_rows: usize,
    head_elapsed: Duration,
}

impl PassCost {
    pub(super) fn new(pass: &PassPlan, outcome: &PassOutcome) -> Self {
        let first_layers = pass.rows.iter().map(|row| row.first_layer);
        let nanoseconds = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
        Self {
            rows: pass.rows.len(),
            first_layer: first_layers.min().unwrap_or(0) as usize,
            layers: shared_layers(pass, outcome),
            layers_elapsed: nanoseconds(outcome.started, outcome.layers_ended),
            logits_rows: pass.logits_rows.count_ones() as usize,
            head_elapsed: nanoseconds(outcome.layers_ended, outcome.ended),
        }
    }

    /// Its parts, which started at `start`, for a sequence that ran layers up to `depth`.
    pub(super) fn timings(&self, start: Duration, depth: usize) -> Vec<EngineTiming> {
        let layers = EngineTiming {
            part: EnginePart::Layers(self.first_layer..depth),
            tokens: self.rows,
            start,
            elapsed: self.layers_elapsed,
        };
        let head = EngineTiming {
            part: EnginePart::Head,
            tokens: self.logits_rows,
            start: start + self.layers_elapsed,
            elapsed: self.head_elapsed,
        };
        let head = (self.logits_rows > 0).then_some(head);
        [layers].into_iter().chain(head).collect()
    }

    /// It and `other` as one pass.
    fn and(&self, other: &Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            first_layer: self.first_layer.min(other.first_layer),
            layers: self.layers.filter(|_| self.layers == other.layers),
            layers_elapsed: self.layers_elapsed + other.layers_elapsed,
            logits_rows: self.logits_rows + other.logits_rows,
            head_elapsed: self.head_elapsed + other.head_elapsed,
        }
    }

    fn note(&self, costs: &mut Costs) {
        if let Some(layers) = self.layers {
            costs.note_layers(layers, self.rows, self.layers_elapsed);
        }
        if self.logits_rows > 0 {
            costs.note_head(self.logits_rows, self.head_elapsed);
        }
    }
}

/// Note what the passes of a step cost: each by itself, and both of a long verification together.
pub(super) fn note(costs: &mut Costs, passes: &[PassCost]) {
    passes.iter().for_each(|pass| pass.note(costs));
    if let [first, second] = passes {
        let both = first.and(second);
        if both.layers.is_some() && both.rows <= MAX_VERIFIED {
            both.note(costs);
        }
    }
}

/// The layers that every row of `pass` ran whole, where these are the same.
fn shared_layers(pass: &PassPlan, outcome: &PassOutcome) -> Option<usize> {
    let first = pass.rows.first()?.first_layer;
    let depth = outcome.sequence[0].depth;
    let stopped = &outcome.sequence[..pass.sequences.len()];
    let same = pass.rows.iter().all(|row| row.first_layer == first)
        && stopped.iter().all(|sequence| sequence.depth == depth)
        && pass.sequences.iter().all(|sequence| sequence.frozen == 0);
    (same && first < depth).then_some((depth - first) as usize)
}

#[cfg(test)]
mod tests {
    use super::super::abi::{PassRow, SequenceRows};
    use super::*;

    fn cost(first_layers: &[i32]) -> PassCost {
        let row = |&first_layer| PassRow {
            first_layer,
            ..PassRow::default()
        };
        let plan = PassPlan {
            rows: first_layers.iter().map(row).collect(),
            sequences: vec![SequenceRows::default()],
            logits_rows: 1,
            ..PassPlan::default()
        };
        let mut outcome = PassOutcome {
            started: 1_000_000_000,
            layers_ended: 9_000_000_000,
            ended: 10_000_000_000,
            ..PassOutcome::default()
        };
        outcome.sequence[0].depth = 4;
        PassCost::new(&plan, &outcome)
    }

    #[test]
    fn timings_are_of_what_ran() {
        let start = Duration::from_secs(5);
        let [layers, head] = &cost(&[3, 2]).timings(start, 4)[..] else {
            panic!("layers and head");
        };
        assert_eq!(
            (&layers.part, layers.tokens),
            (&EnginePart::Layers(2..4), 2)
        );
        assert_eq!((head.part.clone(), head.tokens), (EnginePart::Head, 1));
        assert_eq!(head.start, layers.start + layers.elapsed);
    }

    #[test]
    fn passes_whose_rows_ran_the_same_layers_count() {
        let mut costs = Costs::default();
        for _ in 0..2 {
            note(&mut costs, &[cost(&[2, 0])]);
        }
        assert_eq!((costs.layers(1, 2), costs.head(1)), (0.0, 1.0));
        for _ in 0..2 {
            note(&mut costs, &[cost(&[0; 8]), cost(&[0; 3])]);
        }
        // passes over other numbers of rows have come since
        let seconds = [3, 8, 11].map(|rows| costs.layers(1, rows).round());
        assert_eq!(seconds, [2.0, 2.0, 4.0]);
        assert_eq!(costs.head(2).round(), 2.0);
    }
}
