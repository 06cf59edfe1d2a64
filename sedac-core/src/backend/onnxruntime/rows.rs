//! Passes over rows of several sequences.
//!
//! Attention takes neighbouring slots as a batch. A slot among them that has no row in the pass runs
//! one that nothing reads, whose keys and values lie behind those of its sequence: there has to be room.
//! Where layers are cut around attention, it takes one slot after another.

use std::ops::Range;

use ort::session::Session;
use ort::value::Tensor;

use super::layer_session::{BoundLayer, LayerSession};
use super::pass::{Pass, Passes, Shared};
use super::runtime::{read, row_session, run, write};
use super::{OnnxRuntime, Slot};
use crate::backend::{EnginePart, RowEngines, SequenceRow};
use crate::error::Result;
use crate::policy::ExitSignals;

/// Passes of different slots that are kept.
const MAX_READY: usize = 16;

/// Passes of several slots, and the one under way.
#[derive(Default)]
pub(super) struct Rows {
    ready: Vec<Neighbours>,
    current: usize,
    /// The sequences' rows in it.
    rows: Vec<PlacedRow>,
}

/// A sequence's row.
struct PlacedRow {
    slot: usize,
    position: usize,
    /// Its index in the pass.
    place: usize,
    /// What the head is given of it, where it exited.
    exited: Option<Vec<f32>>,
}

/// Neighbouring slots that run together, or places for as many rows.
struct Neighbours {
    shared: Shared,
    /// One, with a row of each slot.
    passes: Passes,
}

impl Rows {
    fn current(&mut self) -> &mut Neighbours {
        &mut self.ready[self.current]
    }

    fn find(&mut self, slots: &Range<usize>) -> bool {
        let mut ready = self.ready.iter();
        let found = ready.position(|neighbours| neighbours.shared.slots == *slots);
        self.current = found.unwrap_or(self.current);
        found.is_some()
    }

    fn insert(&mut self, neighbours: Neighbours) {
        if self.ready.len() == MAX_READY {
            self.ready.remove(0);
        }
        self.current = self.ready.len();
        self.ready.push(neighbours);
    }
}

impl OnnxRuntime {
    /// Load layers whose rows may be of several sequences, where this bundle's can. None where they
    /// cannot. Passes that were bound before are of no use any more.
    pub(super) fn load_rows(&mut self) -> Result<Option<Rows>> {
        if self.rows.is_some() {
            return Ok(Some(Rows::default()));
        }
        // what layers take of positions has to be in rows, too
        let mut contexts = self.bundle.manifest.contexts.iter();
        if !contexts.all(|context| matches!(context.shape[..], [1, -1, _])) {
            return Ok(None);
        }
        let mut widths = None;
        let mut sessions = Vec::new();
        for entry in &self.entries {
            let heads = &self.bundle.manifest.key_value_heads[entry.first_layer];
            let engine = (&*entry.file, heads.head_size);
            match row_session(&self.environment, &self.bundle, engine)? {
                // passes have the same crossing values for all layers
                Some(session)
                    if *widths.get_or_insert_with(|| session.widths()) == session.widths() =>
                {
                    sessions.push(session);
                }
                _ => return Ok(None),
            }
        }
        self.layers = sessions;
        Ok(Some(Rows::default()))
    }

    /// The slots whose places a pass over `rows` has: theirs and those between them, or as many as
    /// there are rows where attention takes one slot after another.
    fn neighbours(&self, rows: &[SequenceRow]) -> Range<usize> {
        if self.is_cut() {
            return 0..rows.len();
        }
        let slots = || rows.iter().map(|row| row.slot);
        slots().min().unwrap_or(0)..slots().max().map_or(0, |last| last + 1)
    }

    fn is_cut(&self) -> bool {
        matches!(self.layers.first(), Some(LayerSession::Cut(_)))
    }
}

/// Run attention for each of `rows`, in the pass of one token of its slot. Its query, key and value
/// are in `crossing`, and what it makes of them goes there.
fn attend(
    attention: &mut Session,
    engine: usize,
    rows: &[PlacedRow],
    slots: &mut [Slot],
    crossing: &mut [Tensor<f32>],
) -> Result<()> {
    for row in rows {
        let pass = slots[row.slot].passes.of_one();
        let of_row = |own: &Tensor<f32>| {
            let width = read(own).len();
            row.place * width..(row.place + 1) * width
        };
        let (attended, given) = crossing.split_last_mut().expect("cuts are crossed");
        for (own, all) in pass.crossing.iter_mut().zip(given) {
            let rows = of_row(own);
            write(own, &read(all)[rows]);
        }
        let BoundLayer::Cut(bound) = &pass.layers[engine] else {
            unreachable!("all passes are bound to the same layers");
        };
        let bound = bound.attention.as_ref().expect("it has one sequence");
        run(attention, bound, || format!("attention of engine {engine}"))?;
        let own = pass.crossing.last().expect("cuts are crossed");
        attended.extract_tensor_mut().1[of_row(own)].copy_from_slice(read(own));
    }
    Ok(())
}

impl RowEngines for OnnxRuntime {
    fn may_idle(&self, slot: usize) -> bool {
        self.is_cut() || self.slots[slot].used < self.bundle.manifest.max_cache_length
    }

    fn embed_rows(&mut self, rows: &[SequenceRow]) -> Result<()> {
        let (slots, is_cut) = (self.neighbours(rows), self.is_cut());
        let mut passes = self.rows.take().expect("rows are run where there are any");
        if !passes.find(&slots) {
            let shared = Shared::new(&self.bundle.manifest, slots.clone())?;
            let pass = self.new_pass(slots.len(), &shared)?;
            let ready = Passes::new(pass);
            passes.insert(Neighbours {
                shared,
                passes: ready,
            });
        }
        let passes = self.rows.insert(passes);
        let mut tokens = vec![0; slots.len()];
        let mut positions = vec![0; slots.len()];
        let mut lengths: Vec<_> = self.slots[slots.clone()]
            .iter()
            .map(|slot| slot.used + 1)
            .collect();
        passes.rows.clear();
        for (index, row) in rows.iter().enumerate() {
            let place = if is_cut {
                index
            } else {
                row.slot - slots.start
            };
            passes.rows.push(PlacedRow {
                slot: row.slot,
                position: row.position,
                place,
                exited: None,
            });
            tokens[place] = row.token;
            positions[place] = row.position;
            lengths[place] = row.position + 1;
            let slot = &mut self.slots[row.slot];
            slot.shared.set_lengths(&[row.position + 1]);
            slot.note_run(row.position..row.position + 1);
        }
        let Neighbours { shared, passes } = passes.current();
        shared.set_lengths(&lengths);
        let pass = passes.begin(slots.len());
        let session = self.contexts.as_mut();
        let positions = positions.into_iter();
        pass.contexts.run(session, positions, &mut self.stopwatch)?;
        self.stopwatch.time(EnginePart::Embed, slots.len(), || {
            pass.embed(&mut self.embed, &tokens)
        })
    }

    fn run_rows(&mut self, engine: usize) -> Result<()> {
        let (session, entry) = (&mut self.layers[engine], &self.entries[engine]);
        let rows = self.rows.as_mut().expect("embedded before");
        let (placed, slots) = (&rows.rows, &mut self.slots);
        let passes = &mut rows.ready[rows.current].passes;
        let attend = |attention: &mut Session, crossing: &mut [Tensor<f32>]| {
            attend(attention, engine, placed, slots, crossing)
        };
        passes.run_with(engine, session, entry, &mut self.stopwatch, attend)?;
        if let Some(drafter) = &mut self.drafter {
            let all = read(rows.ready[rows.current].passes.current().hidden(engine + 1));
            for row in &rows.rows {
                let hidden = &all[row.place * self.hidden_size..][..self.hidden_size];
                drafter.note(entry.end(), row.slot, row.position, hidden);
            }
        }
        Ok(())
    }

    fn row_stability(&self, engine: usize, row: usize) -> Vec<f32> {
        let (pass, place) = self.row(row);
        let layers = self.entries[engine].num_layers;
        read(&pass.stability[engine])[place * layers..][..layers].to_vec()
    }

    fn row_risk(&self, engine: usize, row: usize) -> Option<f32> {
        let (pass, place) = self.row(row);
        Some(read(pass.risk[engine].as_ref()?)[place])
    }

    fn row_exit_signals(
        &mut self,
        depth: usize,
        row: usize,
        stability: [f32; 3],
    ) -> Result<Option<ExitSignals>> {
        let hidden = self.hidden_of(row);
        self.stopwatch.time(EnginePart::ExitHead(depth), 1, || {
            self.exits.signals(depth, &hidden, stability)
        })
    }

    fn exit_row(&mut self, row: usize) -> Result<()> {
        let hidden = self.hidden_of(row);
        let rows = self.rows.as_mut().expect("embedded before");
        let depth = self.entries[rows.current().passes.engines_run - 1].end();
        let placed = &mut rows.rows[row];
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

    fn rows_logits(&mut self) -> Result<Vec<f32>> {
        let rows = self.rows.as_ref().expect("embedded before");
        let hidden = rows.rows.iter().enumerate().flat_map(|(row, placed)| {
            let exited = placed.exited.clone();
            exited.unwrap_or_else(|| self.hidden_of(row))
        });
        let hidden: Vec<f32> = hidden.collect();
        self.run_head(&hidden)?;
        Ok(self.head.logits().to_vec())
    }
}

impl OnnxRuntime {
    /// The pass under way, and the place of the row `row` in it.
    fn row(&self, row: usize) -> (&Pass, usize) {
        let rows = self.rows.as_ref().expect("embedded before");
        let passes = &rows.ready[rows.current].passes;
        (passes.current(), rows.rows[row].place)
    }

    /// The residual stream of the row `row`.
    fn hidden_of(&self, row: usize) -> Vec<f32> {
        let rows = self.rows.as_ref().expect("embedded before");
        let Neighbours { shared, passes } = &rows.ready[rows.current];
        let all = passes.newest(shared.slots.len(), self.hidden_size);
        all[rows.rows[row].place * self.hidden_size..][..self.hidden_size].to_vec()
    }
}
