//! Passes over rows of several sequences.
//!
//! Where layers are cut around attention, it runs for a sequence with several rows in a pass of its slot,
//! and for those with one row each as a batch of neighbouring slots, if it takes one. Where layers are
//! whole, a pass has one row of each sequence, and all of it takes neighbouring slots. A slot among
//! neighbours that has no such row runs one that nothing reads, whose keys and values lie behind those
//! of its sequence: there has to be room.

use std::ops::Range;

use ort::session::Session;
use ort::value::Tensor;

use super::layer_session::{BoundLayer, LayerSession};
use super::pass::{Pass, Passes, Shared};
use super::runtime::{read, row_session, run};
use super::{OnnxRuntime, Slot};
use crate::backend::{EnginePart, RowEngines, SequenceRows};
use crate::error::Result;
use crate::policy::ExitSignals;

/// Passes of different slots, or over different numbers of rows, that are kept.
const MAX_READY: usize = 32;

/// Passes of several sequences, and the one under way.
#[derive(Default)]
pub(super) struct Rows {
    passes: ReadyPasses,
    /// Attention's passes over a row each of neighbouring slots, where layers are cut.
    batches: ReadyPasses,
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
    /// Its index in the batch that attention takes it in.
    batched: Option<usize>,
    /// What the head is given of the last row, where it exited.
    exited: Option<Vec<f32>>,
}

/// Passes that were made so far, and which is under way.
#[derive(Default)]
struct ReadyPasses {
    ready: Vec<SharedPass>,
    current: usize,
}

/// A pass over rows of several slots.
struct SharedPass {
    /// With the slots whose caches it sees: neighbours with a row each, or none where attention runs in
    /// other passes.
    shared: Shared,
    /// The one.
    passes: Passes,
}

impl ReadyPasses {
    fn current(&mut self) -> &mut SharedPass {
        &mut self.ready[self.current]
    }

    fn find(&mut self, tokens: usize, slots: &Range<usize>) -> bool {
        let found = self
            .ready
            .iter()
            .position(|pass| pass.passes.has(tokens) && pass.shared.slots == *slots);
        let Some(found) = found else {
            return false;
        };
        // those that were not used for longest come first, and go first
        self.ready[found..].rotate_left(1);
        self.current = self.ready.len() - 1;
        true
    }

    fn insert(&mut self, pass: SharedPass) {
        if self.ready.len() == MAX_READY {
            self.ready.remove(0);
        }
        self.current = self.ready.len();
        self.ready.push(pass);
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
        for cut in [true, false] {
            if let Some(layers) = self.row_sessions(cut)? {
                self.layers = layers;
                return Ok(Some(Rows::default()));
            }
        }
        Ok(None)
    }

    /// Layers whose rows may be of several sequences, cut around attention or whole.
    fn row_sessions(&self, cut: bool) -> Result<Option<Vec<LayerSession>>> {
        let mut widths = None;
        let mut sessions = Vec::new();
        for entry in &self.entries {
            let heads = &self.bundle.manifest.key_value_heads[entry.first_layer];
            let head_size = cut.then_some(heads.head_size);
            match row_session(&self.environment, &self.bundle, entry, head_size)? {
                // passes have the same crossing values for all layers
                Some(session)
                    if *widths.get_or_insert_with(|| session.widths()) == session.widths() =>
                {
                    sessions.push(session);
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(sessions))
    }

    pub(super) fn is_cut(&self) -> bool {
        matches!(self.layers.first(), Some(LayerSession::Cut(_)))
    }

    fn has_batches(&self) -> bool {
        matches!(self.layers.first(), Some(LayerSession::Cut(layer)) if layer.has_batches)
    }

    /// Whether the cache of `slot` has room for a row that nothing reads.
    fn has_room(&self, slot: usize) -> bool {
        self.slots[slot].used < self.bundle.manifest.max_cache_length
    }

    /// The neighbours whose attention runs as a batch: those of the sequences with one row, if there are
    /// several.
    fn batch(&self, sequences: &[SequenceRows<'_>]) -> Option<Range<usize>> {
        let of_one = sequences.iter().filter(|rows| rows.tokens.len() == 1);
        let slots: Vec<_> = of_one.map(|rows| rows.slot).collect();
        let neighbours = *slots.iter().min()?..slots.iter().max()? + 1;
        let mut others = neighbours.clone().filter(|slot| !slots.contains(slot));
        let fits = self.has_batches() && slots.len() > 1 && others.all(|slot| self.has_room(slot));
        fits.then_some(neighbours)
    }

    /// Begin a pass of `passes` over `tokens` rows, which sees the caches of `slots`: of those of
    /// `sequences` with one row, and of others.
    fn begin_shared(
        &self,
        passes: &mut ReadyPasses,
        tokens: usize,
        slots: &Range<usize>,
        sequences: &[SequenceRows<'_>],
    ) -> Result<()> {
        if !passes.find(tokens, slots) {
            let shared = Shared::new(&self.bundle.manifest, slots.clone())?;
            let pass = self.new_pass(tokens, &shared)?;
            let ready = Passes::new(pass);
            passes.insert(SharedPass {
                shared,
                passes: ready,
            });
        }
        let SharedPass { shared, passes } = passes.current();
        if !slots.is_empty() {
            let idles = |slot| {
                let mut sequences = sequences.iter();
                !sequences.any(|rows| rows.slot == slot && rows.tokens.len() == 1)
            };
            let length = |slot: usize| self.slots[slot].used + usize::from(idles(slot));
            shared.set_lengths(&slots.clone().map(length).collect::<Vec<_>>());
        }
        passes.begin(tokens);
        Ok(())
    }

    /// Note the positions of `rows`, and begin the pass of its slot in which its attention may run.
    fn place(&mut self, rows: &SequenceRows<'_>) -> Result<()> {
        let tokens = rows.tokens.len();
        if !self.slots[rows.slot].passes.has(tokens) {
            let pass = self.new_pass(tokens, &self.slots[rows.slot].shared)?;
            self.slots[rows.slot].passes.insert(pass);
        }
        let slot = &mut self.slots[rows.slot];
        slot.shared.set_lengths(&[rows.positions().end]);
        slot.note_run(rows.positions());
        slot.passes.begin(tokens);
        Ok(())
    }
}

/// Run attention for each of the sequences of `rows`: in the pass under way of its slot, or in the batch.
/// Their queries, keys and values are in `crossing`, and what it makes of them goes there.
fn attend(
    attention: &mut Session,
    engine: usize,
    (sequences, batches): (&[PlacedSequence], &mut ReadyPasses),
    slots: &mut [Slot],
    crossing: &mut [Tensor<f32>],
) -> Result<()> {
    let (batched, alone): (Vec<_>, Vec<_>) = sequences
        .iter()
        .partition(|sequence| sequence.batched.is_some());
    for sequence in alone {
        let pass = slots[sequence.slot].passes.current_mut();
        let places = [(sequence.places.clone(), 0)];
        attend_in(pass, attention, engine, &places, crossing)?;
    }
    if !batched.is_empty() {
        let places: Vec<_> = batched
            .iter()
            .filter_map(|sequence| Some((sequence.places.clone(), sequence.batched?)))
            .collect();
        let pass = batches.current().passes.current_mut();
        attend_in(pass, attention, engine, &places, crossing)?;
    }
    Ok(())
}

/// Run attention in `pass`, for the rows of `crossing` at `places`, each with the index of its first in
/// the pass.
fn attend_in(
    pass: &mut Pass,
    attention: &mut Session,
    engine: usize,
    places: &[(Range<usize>, usize)],
    crossing: &mut [Tensor<f32>],
) -> Result<()> {
    let tokens = pass.contexts.tokens();
    let (attended, given) = crossing.split_last_mut().expect("cuts are crossed");
    let (own_attended, own_given) = pass.crossing.split_last_mut().expect("cuts are crossed");
    for (all, own) in given.iter().zip(own_given) {
        let (all, own) = (read(all), own.extract_tensor_mut().1);
        let width = own.len() / tokens;
        for (places, first) in places {
            own[first * width..][..places.len() * width]
                .copy_from_slice(&all[places.start * width..places.end * width]);
        }
    }
    let BoundLayer::Cut(bound) = &pass.layers[engine] else {
        unreachable!("all passes are bound to the same layers");
    };
    let bound = bound.attention.as_ref().expect("it sees caches");
    run(attention, bound, || format!("attention of engine {engine}"))?;
    let (all, own) = (attended.extract_tensor_mut().1, read(own_attended));
    let width = own.len() / tokens;
    for (places, first) in places {
        all[places.start * width..places.end * width]
            .copy_from_slice(&own[first * width..][..places.len() * width]);
    }
    Ok(())
}

impl RowEngines for OnnxRuntime {
    fn take_several(&self) -> bool {
        self.is_cut()
    }

    fn may_idle(&self, slot: usize) -> bool {
        self.is_cut() || self.has_room(slot)
    }

    fn embed_rows(&mut self, sequences: &[SequenceRows<'_>]) -> Result<()> {
        for rows in sequences {
            self.place(rows)?;
        }
        let batch = self.batch(sequences);
        let slots = || sequences.iter().map(|rows| rows.slot);
        let neighbours = slots().min().unwrap_or(0)..slots().max().map_or(0, |last| last + 1);
        let (tokens, neighbours) = match self.is_cut() {
            true => (sequences.iter().map(|rows| rows.tokens.len()).sum(), 0..0),
            false => (neighbours.len(), neighbours),
        };
        let mut rows = self.rows.take().expect("rows are run where there are any");
        rows.sequences.clear();
        let (mut ids, mut positions) = (vec![0; tokens], vec![0; tokens]);
        let mut next = 0;
        for of in sequences {
            let first = match self.is_cut() {
                true => next,
                false => of.slot - neighbours.start,
            };
            next += of.tokens.len();
            let places = first..first + of.tokens.len();
            ids[places.clone()].copy_from_slice(of.tokens);
            positions[places.clone()].copy_from_slice(&of.positions().collect::<Vec<_>>());
            let batch = batch.as_ref().filter(|_| of.tokens.len() == 1);
            rows.sequences.push(PlacedSequence {
                slot: of.slot,
                position: of.positions().end - 1,
                places,
                batched: batch.map(|batch| of.slot - batch.start),
                exited: None,
            });
        }
        let batched = batch.as_ref().map_or(Ok(()), |batch| {
            self.begin_shared(&mut rows.batches, batch.len(), batch, sequences)
        });
        let begun = batched
            .and_then(|()| self.begin_shared(&mut rows.passes, tokens, &neighbours, sequences));
        let rows = self.rows.insert(rows);
        begun?;
        let pass = rows.passes.current().passes.current_mut();
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
        let (placed, slots) = ((&*rows.sequences, &mut rows.batches), &mut self.slots);
        let passes = &mut rows.passes.current().passes;
        let attend = |attention: &mut Session, crossing: &mut [Tensor<f32>]| {
            attend(attention, engine, placed, slots, crossing)
        };
        passes.run_with(engine, session, entry, &mut self.stopwatch, attend)?;
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
        let depth = self.entries[rows.passes.current().passes.engines_run - 1].end();
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
        let passes = &rows.passes.ready[rows.passes.current].passes;
        (passes.current(), rows.sequences[sequence].places.end - 1)
    }

    /// The residual stream of the newest `count` rows of `sequence`.
    fn hidden_of(&self, sequence: usize, count: usize) -> Vec<f32> {
        let rows = self.rows.as_ref().expect("embedded before");
        let passes = &rows.passes.ready[rows.passes.current].passes;
        let all = passes.newest(passes.current().contexts.tokens(), self.hidden_size);
        let end = rows.sequences[sequence].places.end;
        all[(end - count) * self.hidden_size..end * self.hidden_size].to_vec()
    }
}
