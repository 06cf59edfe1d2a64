//! Passes over rows of several sequences.
//!
//! A row says which slot it belongs to, so that a pass may have any rows of any sequences.

use std::ops::Range;

use super::pass::{Pass, Passes, Shared};
use super::row_attention::SLOTS;
use super::runtime::read;
use super::{MAX_REUSED_ROWS, OnnxRuntime};
use crate::backend::{EnginePart, RowEngines, SequenceRows};
use crate::error::Result;
use crate::policy::ExitSignals;

/// Passes over the caches of all slots, and the one under way.
pub(super) struct Rows {
    shared: Shared,
    passes: Passes,
    /// The sequences in the pass under way.
    sequences: Vec<PlacedSequence>,
}

/// A sequence's rows.
struct PlacedSequence {
    slot: usize,
    /// Of the last row.
    position: usize,
    /// Their indices in the pass.
    places: Range<usize>,
    /// What the head is given of the last row, where it exited.
    exited: Option<Vec<f32>>,
}

impl OnnxRuntime {
    /// Passes of the sequences in `slots` slots, whose caches these are, where the layers' rows may be of
    /// several. None where they may not.
    pub(super) fn new_rows(&self, slots: usize) -> Result<Option<Rows>> {
        // what layers take of positions has to be in rows, too
        let mut contexts = self.bundle.manifest.contexts.iter();
        let of_rows = contexts.all(|context| matches!(context.shape[..], [1, -1, _]));
        let mut layers = self.layers.iter();
        let take_slots = layers.all(|layer| layer.inputs().iter().any(|i| i.name() == SLOTS));
        if !of_rows || !take_slots {
            return Ok(None);
        }
        let shared = Shared::new(&self.bundle.manifest, 0..slots)?;
        Ok(Some(Rows {
            passes: Passes::new(self.new_pass(1, &shared)?, MAX_REUSED_ROWS),
            shared,
            sequences: Vec::new(),
        }))
    }

    fn begin_rows(&self, rows: &mut Rows, tokens: usize) -> Result<()> {
        if !rows.passes.has(tokens) {
            rows.passes.insert(self.new_pass(tokens, &rows.shared)?);
        }
        rows.passes.begin(tokens);
        Ok(())
    }
}

impl RowEngines for OnnxRuntime {
    fn embed_rows(&mut self, sequences: &[SequenceRows<'_>]) -> Result<()> {
        let tokens = sequences.iter().map(|rows| rows.tokens.len()).sum();
        let mut rows = self.rows.take().expect("rows are run where there are any");
        let begun = self.begin_rows(&mut rows, tokens);
        let rows = self.rows.insert(rows);
        begun?;
        rows.sequences.clear();
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for of in sequences {
            self.slots[of.slot].note_run(of.positions());
            rows.sequences.push(PlacedSequence {
                slot: of.slot,
                position: of.positions().end - 1,
                places: ids.len()..ids.len() + of.tokens.len(),
                exited: None,
            });
            ids.extend_from_slice(of.tokens);
            positions.extend(of.positions());
            slots.extend(of.tokens.iter().map(|_| of.slot as i64));
        }
        let pass = rows.passes.current_mut();
        pass.contexts.set_slots(&slots);
        let session = self.contexts.as_mut();
        let positions = positions.into_iter();
        pass.contexts.run(session, positions, &mut self.stopwatch)?;
        self.stopwatch.time(EnginePart::Embed, tokens, || {
            pass.embed(&mut self.embed, &ids)
        })
    }

    fn run_rows(&mut self, engine: usize) -> Result<()> {
        let (session, entry) = (&mut self.layers[engine], &self.entries[engine]);
        let rows = self.rows.as_mut().expect("embedded before");
        let passes = &mut rows.passes;
        passes.run(engine, session, entry, &mut self.stopwatch)?;
        if let Some(drafter) = &mut self.drafter {
            let all = read(passes.current().hidden(engine + 1));
            let size = self.hidden_size;
            for of in &rows.sequences {
                let hidden = &all[of.places.start * size..of.places.end * size];
                let start = of.position + 1 - of.places.len();
                drafter.note(entry.end(), of.slot, start, hidden);
            }
        }
        Ok(())
    }

    fn row_stability(&self, engine: usize, sequence: usize) -> Vec<f32> {
        let (pass, place) = self.newest_row(sequence);
        pass.stability(engine, place)
    }

    fn row_risk(&self, engine: usize, sequence: usize) -> Option<f32> {
        let (pass, place) = self.newest_row(sequence);
        Some(read(pass.risk[engine].as_ref()?)[place])
    }

    fn row_exit_signals(
        &mut self,
        depth: usize,
        sequence: usize,
        stability: [f32; 3],
    ) -> Result<Option<ExitSignals>> {
        let hidden = self.hidden_of(sequence, 1);
        self.stopwatch.time(EnginePart::ExitHead(depth), 1, || {
            self.exits.signals(depth, &hidden, stability)
        })
    }

    fn exit_row(&mut self, sequence: usize) -> Result<()> {
        let hidden = self.hidden_of(sequence, 1);
        let rows = self.rows.as_mut().expect("embedded before");
        let depth = self.entries[rows.passes.engines_run - 1].end();
        let placed = &mut rows.sequences[sequence];
        let saved = &mut self.slots[placed.slot].saved;
        saved[placed.position * self.hidden_size..][..self.hidden_size].copy_from_slice(&hidden);
        placed.exited = Some(match self.exits.has_lens(depth) {
            true => self.stopwatch.time(EnginePart::Lens(depth), 1, || {
                let seen = self.exits.through_lens(depth, &hidden)?;
                Ok(seen.unwrap_or(&hidden).to_vec())
            })?,
            false => hidden,
        });
        Ok(())
    }

    fn rows_logits(&mut self, counts: &[usize]) -> Result<Vec<f32>> {
        let rows = self.rows.as_ref().expect("embedded before");
        let sequences = rows.sequences.iter().zip(counts).enumerate();
        let wanted = sequences.filter(|(_, (_, count))| **count > 0);
        let hidden = wanted.flat_map(|(sequence, (placed, &count))| {
            let exited = placed.exited.clone();
            exited.unwrap_or_else(|| self.hidden_of(sequence, count))
        });
        let hidden: Vec<f32> = hidden.collect();
        self.run_head(&hidden)?;
        Ok(self.head.logits().to_vec())
    }
}

impl OnnxRuntime {
    /// The pass under way, and the place of the newest row of `sequence` in it.
    fn newest_row(&self, sequence: usize) -> (&Pass, usize) {
        let rows = self.rows.as_ref().expect("embedded before");
        (
            rows.passes.current(),
            rows.sequences[sequence].places.end - 1,
        )
    }

    /// The residual stream of the newest `count` rows of `sequence`.
    fn hidden_of(&self, sequence: usize, count: usize) -> Vec<f32> {
        let rows = self.rows.as_ref().expect("embedded before");
        let passes = &rows.passes;
        let all = passes.newest(passes.current().contexts.tokens(), self.hidden_size);
        let end = rows.sequences[sequence].places.end;
        all[(end - count) * self.hidden_size..end * self.hidden_size].to_vec()
    }
}
