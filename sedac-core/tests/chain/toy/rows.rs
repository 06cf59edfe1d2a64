//! Passes of several sequences.

use std::ops::Range;

use sedac_core::Result;
use sedac_core::backend::{RowEngines, SequenceRows};
use sedac_core::policy::ExitSignals;

use super::{Hidden, Toy};

/// A sequence's rows in the pass.
pub(super) struct ToyRows {
    slot: usize,
    start: usize,
    places: Range<usize>,
}

impl Toy {
    fn newest_of(&self, sequence: usize) -> Hidden {
        self.pass[self.rows[sequence].places.end - 1]
    }
}

impl RowEngines for Toy {
    fn embed_rows(&mut self, sequences: &[SequenceRows<'_>]) -> Result<()> {
        self.rows.clear();
        self.pass.clear();
        for rows in sequences {
            let first = self.pass.len();
            self.pass
                .extend(rows.tokens.iter().copied().map(Hidden::of));
            self.rows.push(ToyRows {
                slot: rows.slot,
                start: rows.start,
                places: first..self.pass.len(),
            });
        }
        self.exited = vec![None; sequences.len()];
        self.depth = 0;
        Ok(())
    }

    fn run_rows(&mut self, engine: usize) -> Result<()> {
        for layer in self.layers[engine].clone() {
            assert_eq!(layer, self.depth, "engines run in order");
            for rows in &self.rows {
                let mut cache = self.slots[rows.slot].caches.lock().unwrap();
                for (hidden, position) in
                    self.pass[rows.places.clone()].iter_mut().zip(rows.start..)
                {
                    hidden.run(layer, position, &mut cache);
                }
            }
            self.depth += 1;
        }
        Ok(())
    }

    fn row_stability(&self, engine: usize, sequence: usize) -> Vec<f32> {
        // what signals depend on is the same after every layer
        let signal = |layer| self.newest_of(sequence).signal(layer + 1, 0);
        self.layers[engine].clone().map(signal).collect()
    }

    fn row_risk(&self, _: usize, sequence: usize) -> Option<f32> {
        Some(self.newest_of(sequence).signal(self.depth, 1))
    }

    fn row_exit_signals(
        &mut self,
        depth: usize,
        sequence: usize,
        _: [f32; 3],
    ) -> Result<Option<ExitSignals>> {
        Ok(Some(self.newest_of(sequence).exit_signals(depth)))
    }

    fn exit_row(&mut self, sequence: usize) -> Result<()> {
        let hidden = self.newest_of(sequence);
        let rows = &self.rows[sequence];
        let newest = rows.start + rows.places.len() - 1;
        self.slots[rows.slot].saved[newest] = hidden;
        self.exited[sequence] = Some(self.logits_of(hidden));
        Ok(())
    }

    fn rows_logits(&mut self, counts: &[usize]) -> Result<Vec<f32>> {
        let sequences = self.rows.iter().zip(&self.exited).zip(counts);
        let wanted = sequences.filter(|(_, count)| **count > 0);
        let logits = wanted.flat_map(|((rows, exited), &count)| match exited {
            Some(exited) => exited.clone(),
            None => {
                let newest = rows.places.end - count..rows.places.end;
                newest
                    .flat_map(|place| self.logits_of(self.pass[place]))
                    .collect()
            }
        });
        Ok(logits.collect())
    }
}
