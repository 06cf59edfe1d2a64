//! The engines of a trained drafter.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use ort::session::{IoBinding, Session};
use ort::value::Tensor;

use super::MAX_REUSED_TOKENS;
use super::runtime::{bind_input, bind_output, binding, read, run, tensor, write};
use crate::backend::{
    DraftEngine, DraftRequest, DraftedToken, Drafts, MAX_TOKENS, PositionLogits, margin_bin,
};
use crate::bundle::{Bundle, DrafterEntry};
use crate::error::Result;
use crate::exponential::sum_of_exponentials;
use crate::interrupt::Interrupt;

/// The logit of tokens that are never drafted.
const NEVER: f32 = -1e30;
/// The cache grows by this number of positions at a time: attention computes all of them.
const GROWTH: usize = 256;

/// A trained drafter: its engines, and what it knows of the sequence in each slot.
pub(super) struct Drafter {
    entry: DrafterEntry,
    embed: Session,
    state: Session,
    layer: Session,
    hidden_size: usize,
    slots: Vec<DrafterSlot>,
    /// The slot that is drafted for.
    selected: usize,
    /// The state that the last token taken in gave.
    next_state: Vec<f32>,
    /// One for each token of the model's vocabulary.
    logits: Vec<f32>,
    /// The largest of the logits, and the sum of the exponentials of their differences from it.
    normaliser: (f32, f32),
}

/// The cache of one slot's sequence, and the hidden states that the drafter takes.
struct DrafterSlot {
    /// Hidden states by position, those of one position side by side.
    features: Vec<f32>,
    /// Keys and values, [1, positions, key_value_size].
    cache: [Tensor<f32>; 2],
    /// Positions that the cache has room for, and those that it holds.
    capacity: usize,
    length: usize,
    /// What passes read and write, by their number of tokens; they are bound to the cache.
    passes: HashMap<usize, DrafterPass>,
}

/// What the engines read and write for one number of tokens.
struct DrafterPass {
    input_ids: Tensor<i64>,
    position_ids: Tensor<i64>,
    features: Tensor<f32>,
    state: Tensor<f32>,
    new: [Tensor<f32>; 2],
    next_state: Tensor<f32>,
    logits: Tensor<f32>,
    embed: IoBinding,
    combine: IoBinding,
    layer: IoBinding,
}

impl Drafter {
    /// The drafter of `bundle`, whose graphs `open` loads; None where it has none.
    pub(super) fn load(
        bundle: &Bundle,
        open: impl Fn(&Path) -> Result<Session>,
    ) -> Result<Option<Self>> {
        let manifest = &bundle.manifest;
        let Some(entry) = &manifest.drafter else {
            return Ok(None);
        };
        Ok(Some(Self {
            embed: open(&manifest.engines.embed)?,
            state: open(&entry.state)?,
            layer: open(&entry.file)?,
            hidden_size: manifest.model.hidden_size,
            slots: vec![DrafterSlot::new(entry)?],
            selected: 0,
            next_state: Vec::new(),
            logits: vec![NEVER; manifest.model.vocab_size],
            normaliser: (0.0, 1.0),
            entry: entry.clone(),
        }))
    }

    /// Make room for the sequences of `slots` slots.
    pub(super) fn reserve_slots(&mut self, slots: usize) -> Result<()> {
        while self.slots.len() < slots {
            self.slots.push(DrafterSlot::new(&self.entry)?);
        }
        Ok(())
    }

    /// The hidden states of the first `length` positions in the slot `from` are those in `to`, too.
    pub(super) fn copy(&mut self, from: usize, length: usize, to: usize) {
        let source = &self.slots[from].features;
        let shared = source[..source.len().min(length * self.width())].to_vec();
        self.slots[to].features = shared;
    }

    /// Note the residual stream `rows` after `depth` layers, of positions from `start` on in `slot`,
    /// if the drafter takes it.
    pub(super) fn note(&mut self, depth: usize, slot: usize, start: usize, rows: &[f32]) {
        let mut layers = self.entry.feature_layers.iter();
        let Some(index) = layers.position(|&layer| layer == depth) else {
            return;
        };
        let (size, width) = (self.hidden_size, self.width());
        let end = start + rows.len() / size;
        let features = &mut self.slots[slot].features;
        if features.len() < end * width {
            features.resize(end * width, 0.0);
        }
        for (row, position) in rows.chunks_exact(size).zip(start..) {
            let place = position * width + index * size;
            features[place..place + size].copy_from_slice(row);
        }
    }

    /// Numbers in the hidden states of one position.
    fn width(&self) -> usize {
        self.hidden_size * self.entry.feature_layers.len()
    }

    fn slot(&mut self) -> &mut DrafterSlot {
        &mut self.slots[self.selected]
    }

    /// Make room for `positions` positions.
    fn reserve(&mut self, positions: usize) -> Result<()> {
        let size = self.entry.key_value_size;
        self.slot().reserve(positions, size)
    }

    /// The pass for `tokens` tokens, taken out.
    fn take_pass(&mut self, tokens: usize) -> Result<DrafterPass> {
        match self.slot().passes.remove(&tokens) {
            Some(pass) => Ok(pass),
            None => DrafterPass::new(tokens, self),
        }
    }

    /// Take in the hidden states at `positions` and the `tokens` that followed.
    fn take_in(
        &mut self,
        positions: Range<usize>,
        tokens: &[u32],
        interrupt: &Interrupt,
    ) -> Result<()> {
        debug_assert_eq!(
            positions.len(),
            tokens.len(),
            "a token follows each position"
        );
        self.slot().length = positions.start;
        self.reserve(positions.end)?;
        for (piece, start) in tokens.chunks(MAX_TOKENS).zip(positions.step_by(MAX_TOKENS)) {
            interrupt.check()?;
            let mut pass = self.take_pass(piece.len())?;
            let width = self.width();
            let rows = &self.slot().features[start * width..(start + piece.len()) * width];
            write(&mut pass.features, rows);
            run(&mut self.state, &pass.combine, || {
                "draft state engine".into()
            })?;
            self.advance(pass, piece)?;
        }
        Ok(())
    }

    /// Take in `token`, drafted after the last state, with the drafter's own state.
    fn roll_out(&mut self, token: u32) -> Result<()> {
        let length = self.slot().length;
        self.reserve(length + 1)?;
        let mut pass = self.take_pass(1)?;
        write(&mut pass.state, &self.next_state);
        self.advance(pass, &[token])
    }

    fn draft_one(
        &mut self,
        request: &mut DraftRequest<'_>,
        interrupt: &Interrupt,
    ) -> Result<Vec<DraftedToken>> {
        self.selected = request.slot;
        self.take_in(request.positions.clone(), request.tokens, interrupt)?;
        let (mut drafted, mut accepted) = (Vec::new(), 1.0);
        loop {
            let token = request.choice.choose(PositionLogits::All(&self.logits));
            let probability = self.probability(token);
            drafted.push(DraftedToken { token, probability });
            accepted *= request.ahead.acceptance[margin_bin(probability)];
            if !request.ahead.goes_on(drafted.len(), accepted) {
                return Ok(drafted);
            }
            interrupt.check()?;
            self.roll_out(token)?;
        }
    }

    /// The probability that the last logits give `token`.
    fn probability(&self, token: u32) -> f32 {
        let (max, sum) = self.normaliser;
        (self.logits[token as usize] - max).exp() / sum
    }

    /// Take in `tokens` with the states of `pass`.
    fn advance(&mut self, mut pass: DrafterPass, tokens: &[u32]) -> Result<()> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        write(&mut pass.input_ids, &ids);
        let length = self.slot().length;
        let positions = length..length + tokens.len();
        let ids: Vec<i64> = positions.clone().map(|position| position as i64).collect();
        write(&mut pass.position_ids, &ids);
        run(&mut self.embed, &pass.embed, || "embed engine".into())?;
        run(&mut self.layer, &pass.layer, || "draft engine".into())?;
        let size = self.entry.key_value_size;
        let slot = self.slot();
        for (cache, new) in slot.cache.iter_mut().zip(&pass.new) {
            let rows = &mut cache.extract_tensor_mut().1[..positions.end * size];
            rows[positions.start * size..].copy_from_slice(read(new));
        }
        slot.length = positions.end;
        self.next_state.clear();
        self.next_state.extend_from_slice(read(&pass.next_state));
        let logits = read(&pass.logits);
        for (&token, &logit) in self.entry.tokens.iter().zip(logits) {
            self.logits[token as usize] = logit;
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.normaliser = (max, sum_of_exponentials(logits, max) as f32);
        if tokens.len() <= MAX_REUSED_TOKENS {
            self.slot().passes.insert(tokens.len(), pass);
        }
        Ok(())
    }
}

impl DraftEngine for Drafter {
    fn draft(
        &mut self,
        requests: &mut [DraftRequest<'_>],
        interrupt: &Interrupt,
    ) -> Result<Drafts> {
        let before = Instant::now();
        let requests = requests.iter_mut();
        let drafted = requests.map(|request| self.draft_one(request, interrupt));
        let drafted = drafted.collect::<Result<_>>()?;
        Ok(Drafts {
            drafted,
            elapsed: before.elapsed(),
        })
    }
}

impl DrafterPass {
    fn new(tokens: usize, drafter: &mut Drafter) -> Result<Self> {
        let (hidden, width) = (drafter.hidden_size, drafter.width());
        let key_value = [1, tokens, drafter.entry.key_value_size];
        let [input_ids, position_ids] = [tensor(&[1, tokens])?, tensor(&[1, tokens])?];
        let features = tensor(&[1, tokens, width])?;
        let mut state = tensor(&[1, tokens, hidden])?;
        let mut embedding = tensor::<f32>(&[1, tokens, hidden])?;
        let mut new = [tensor(&key_value)?, tensor(&key_value)?];
        let cache = &drafter.slots[drafter.selected].cache;
        let mut next_state = tensor(&[1, 1, hidden])?;
        let mut logits = tensor(&[1, 1, drafter.entry.tokens.len()])?;
        let mut embed = binding(&drafter.embed)?;
        bind_input(&mut embed, "input_ids", &input_ids)?;
        bind_output(&mut embed, "x", &mut embedding)?;
        let mut combine = binding(&drafter.state)?;
        bind_input(&mut combine, "features", &features)?;
        bind_output(&mut combine, "state", &mut state)?;
        let mut layer = binding(&drafter.layer)?;
        bind_input(&mut layer, "state", &state)?;
        bind_input(&mut layer, "embedding", &embedding)?;
        bind_input(&mut layer, "position_ids", &position_ids)?;
        for ((kind, past), new) in ["key", "value"].iter().zip(cache).zip(&mut new) {
            bind_input(&mut layer, &format!("past_{kind}"), past)?;
            bind_output(&mut layer, &format!("new_{kind}"), new)?;
        }
        bind_output(&mut layer, "next_state", &mut next_state)?;
        bind_output(&mut layer, "logits", &mut logits)?;
        Ok(Self {
            input_ids,
            position_ids,
            features,
            state,
            new,
            next_state,
            logits,
            embed,
            combine,
            layer,
        })
    }
}

impl DrafterSlot {
    fn new(entry: &DrafterEntry) -> Result<Self> {
        Ok(Self {
            features: Vec::new(),
            cache: new_cache(GROWTH, entry.key_value_size)?,
            capacity: GROWTH,
            length: 0,
            passes: HashMap::new(),
        })
    }

    /// Make room for `positions` positions of `size` numbers.
    fn reserve(&mut self, positions: usize, size: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        let capacity = positions.next_multiple_of(GROWTH);
        let mut cache = new_cache(capacity, size)?;
        for (new, old) in cache.iter_mut().zip(&self.cache) {
            let held = &read(old)[..self.length * size];
            new.extract_tensor_mut().1[..held.len()].copy_from_slice(held);
        }
        // their passes are bound to the old cache
        self.passes.clear();
        (self.cache, self.capacity) = (cache, capacity);
        Ok(())
    }
}

fn new_cache(positions: usize, size: usize) -> Result<[Tensor<f32>; 2]> {
    let shape = [1, positions, size];
    Ok([tensor(&shape)?, tensor(&shape)?])
}
