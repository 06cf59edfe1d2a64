//! What passes cost: layers and head by the device's own clock, and the host's part.

use std::time::Duration;

use super::abi::{MAX_ROWS, PassOutcome, SequenceOutcome};
use super::chain_device::PassPlan;
use crate::backend::{Costs, EnginePart, EngineTiming};

/// What one pass took.
#[derive(Debug, Clone)]
pub(super) struct PassCost {
    rows: usize,
    /// The first layer that any row ran.
    first_layer: usize,
    logits_rows: usize,
    /// What the host saw beyond the device's time, for each step: a pass is launched and waited for
    /// once, so that steps which follow without the host cost less than passes of their own.
    host: Duration,
    /// What each of its steps took.
    steps: Vec<StepCost>,
}

/// What one step of a pass took.
#[derive(Debug, Clone, Copy)]
struct StepCost {
    /// When it began, of the device's clock.
    started: u64,
    layers: Duration,
    head: Duration,
    /// After how many layers each sequence of the pass stopped.
    depths: [i32; MAX_ROWS],
    /// The layers that every row ran; None where rows ran different ones, or also filled caches.
    shared_layers: Option<usize>,
}

impl PassCost {
    /// Of a pass over a chain of `layers` layers. `elapsed`: on the host.
    pub(super) fn new(
        pass: &PassPlan,
        outcome: &PassOutcome,
        layers: usize,
        elapsed: Duration,
    ) -> Self {
        let first_layers = pass.rows.iter().map(|row| row.first_layer);
        let nanoseconds = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
        let begins = [outcome.started].into_iter().chain(outcome.ended);
        let ends = outcome.layers_ended.into_iter().zip(outcome.ended);
        let stopped = outcome.sequence.chunks(pass.sequences.len());
        let steps = begins.zip(ends).zip(stopped);
        let steps = steps.map(|((started, (head, ended)), stopped)| StepCost {
            started,
            layers: nanoseconds(started, head),
            head: nanoseconds(head, ended),
            depths: depths(stopped),
            shared_layers: shared_layers(pass, stopped, layers),
        });
        let steps: Vec<_> = steps.take(outcome.steps as usize).collect();
        let on_device: Duration = steps.iter().map(|step| step.layers + step.head).sum();
        let host = elapsed.saturating_sub(on_device) / steps.len().max(1) as u32;
        Self {
            rows: pass.rows.len(),
            first_layer: first_layers.min().unwrap_or(0) as usize,
            logits_rows: pass.logits_rows.count_ones() as usize,
            host,
            steps,
        }
    }

    /// The parts of its steps, by a clock that began at `epoch`, for its sequence number `sequence`.
    pub(super) fn timings(&self, epoch: u64, sequence: usize) -> Vec<EngineTiming> {
        let mut timings = Vec::new();
        for step in &self.steps {
            let start = Duration::from_nanos(step.started.saturating_sub(epoch));
            timings.push(EngineTiming {
                part: EnginePart::Layers(self.first_layer..step.depths[sequence] as usize),
                tokens: self.rows,
                start,
                elapsed: step.layers,
            });
            if self.logits_rows > 0 {
                timings.push(EngineTiming {
                    part: EnginePart::Head,
                    tokens: self.logits_rows,
                    start: start + step.layers,
                    elapsed: step.head,
                });
            }
        }
        timings
    }

    fn note(&self, costs: &mut Costs) {
        for step in &self.steps {
            if let Some(layers) = step.shared_layers {
                costs.note_layers(layers, self.rows, step.layers);
            }
            if self.logits_rows > 0 {
                costs.note_head(self.logits_rows, step.head + self.host);
            }
        }
    }
}

/// Note what the passes of a step cost.
pub(super) fn note(costs: &mut Costs, passes: &[PassCost]) {
    passes.iter().for_each(|pass| pass.note(costs));
}

fn depths(stopped: &[SequenceOutcome]) -> [i32; MAX_ROWS] {
    let mut depths = [0; MAX_ROWS];
    let pairs = depths.iter_mut().zip(stopped);
    pairs.for_each(|(depth, sequence)| *depth = sequence.depth);
    depths
}

/// The layers of `layers` that every row of `pass` ran where its sequences `stopped`, if these are the
/// same, and nothing else was done.
fn shared_layers(pass: &PassPlan, stopped: &[SequenceOutcome], layers: usize) -> Option<usize> {
    let first = pass.rows.first()?.first_layer;
    let depth = stopped[0].depth;
    let same = pass.rows.iter().all(|row| row.first_layer == first)
        && stopped.iter().all(|sequence| sequence.depth == depth)
        && (depth as usize == layers || pass.sequences.iter().all(|sequence| sequence.fills == 0));
    (same && first < depth).then_some((depth - first) as usize)
}

#[cfg(test)]
mod tests {
    use super::super::abi::{PassRow, SequenceRows};
    use super::*;

    fn cost(first_layers: &[i32]) -> PassCost {
        cost_of_steps(first_layers, 1, 9)
    }

    /// Of `steps` steps, of 9 and 5 seconds; the host saw `elapsed`.
    fn cost_of_steps(first_layers: &[i32], steps: i32, elapsed: u64) -> PassCost {
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
            steps,
            ..PassOutcome::default()
        };
        (outcome.layers_ended[0], outcome.ended[0]) = (9_000_000_000, 10_000_000_000);
        (outcome.layers_ended[1], outcome.ended[1]) = (13_000_000_000, 15_000_000_000);
        outcome.sequence[0].depth = 4;
        PassCost::new(&plan, &outcome, 4, Duration::from_secs(elapsed))
    }

    #[test]
    fn timings_are_of_what_ran() {
        let [layers, head] = &cost(&[3, 2]).timings(1_000_000_000, 0)[..] else {
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
    fn each_step_has_the_depth_of_its_own_exit() {
        let filling = SequenceRows {
            fills: 1,
            ..SequenceRows::default()
        };
        let plan = PassPlan {
            rows: vec![PassRow::default()],
            sequences: vec![filling],
            ..PassPlan::default()
        };
        let mut outcome = PassOutcome {
            steps: 2,
            ..PassOutcome::default()
        };
        (outcome.sequence[0].depth, outcome.sequence[1].depth) = (4, 2);
        (outcome.layers_ended[0], outcome.ended[0]) = (4_000, 5_000);
        (outcome.layers_ended[1], outcome.ended[1]) = (8_500, 9_000);
        let cost = PassCost::new(&plan, &outcome, 4, Duration::from_nanos(9_000));
        let parts: Vec<_> = cost
            .timings(0, 0)
            .into_iter()
            .map(|timing| timing.part)
            .collect();
        assert_eq!(parts, [EnginePart::Layers(0..4), EnginePart::Layers(0..2)]);
        let mut costs = Costs::default();
        (0..2).for_each(|_| note(&mut costs, std::slice::from_ref(&cost)));
        // what the second step took filled caches, too
        assert!((costs.layers(1, 1) - 1e-6).abs() < 1e-9);
    }

    #[test]
    fn steps_share_what_the_host_takes() {
        let head = |steps, elapsed| {
            let mut costs = Costs::default();
            let pass = [cost_of_steps(&[0], steps, elapsed)];
            (0..2).for_each(|_| note(&mut costs, &pass));
            costs.head(1).round()
        };
        assert_eq!((head(1, 9), head(1, 13)), (1.0, 5.0));
        // the second step's head took 2
        assert_eq!((head(2, 14), head(2, 18)), (1.0, 3.0));
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
        let seconds = [3, 8].map(|rows| costs.layers(1, rows).round());
        assert_eq!(seconds, [2.0, 2.0]);
    }
}
