//! Passes of several sequences.

use sedac_core::Result;
use sedac_core::backend::{RowEngines, SequenceRow};
use sedac_core::policy::ExitSignals;

use super::{Hidden, Toy};

impl RowEngines for Toy {
    fn may_idle(&self, slot: usize) -> bool {
        slot.is_multiple_of(2)
    }

    fn embed_rows(&mut self, rows: &[SequenceRow]) -> Result<()> {
        self.rows = rows.to_vec();
        self.exited = vec![None; rows.len()];
        self.pass = rows.iter().map(|row| Hidden::of(row.token)).collect();
        self.depth = 0;
        Ok(())
    }

    fn run_rows(&mut self, engine: usize) -> Result<()> {
        for layer in self.layers[engine].clone() {
            assert_eq!(layer, self.depth, "engines run in order");
            for (row, hidden) in self.rows.iter().zip(&mut self.pass) {
                let mut cache = self.slots[row.slot].caches.lock().unwrap();
                hidden.run(layer, row.position, &mut cache);
            }
            self.depth += 1;
        }
        Ok(())
    }

    fn row_stability(&self, engine: usize, row: usize) -> Vec<f32> {
        // what signals depend on is the same after every layer
        let signal = |layer| self.pass[row].signal(layer + 1, 0);
        self.layers[engine].clone().map(signal).collect()
    }

    fn row_risk(&self, _: usize, row: usize) -> Option<f32> {
        Some(self.pass[row].signal(self.depth, 1))
    }

    fn row_exit_signals(
        &mut self,
        depth: usize,
        row: usize,
        _: [f32; 3],
    ) -> Result<Option<ExitSignals>> {
        Ok(Some(self.pass[row].exit_signals(depth)))
    }

    fn exit_row(&mut self, row: usize) -> Result<()> {
        let SequenceRow { slot, position, .. } = self.rows[row];
        self.slots[slot].saved[position] = self.pass[row];
        self.exited[row] = Some(self.logits_of(self.pass[row]));
        Ok(())
    }

    fn rows_logits(&mut self) -> Result<Vec<f32>> {
        let rows = self.pass.iter().zip(&self.exited);
        let logits = rows.map(|(&row, exited)| {
            let exited = exited.clone();
            exited.unwrap_or_else(|| self.logits_of(row))
        });
        Ok(logits.collect::<Vec<_>>().concat())
    }
}
