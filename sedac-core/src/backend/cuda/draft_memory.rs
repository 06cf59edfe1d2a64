//! A trained drafter on a GPU: its weights, what it keeps of each slot, and its launches.

use std::collections::BTreeSet;
use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, PushKernelArg, ValidAsZeroBits,
};

use super::abi::{MAX_ROWS, PassParameters, RowRace};
use super::batch_abi::BATCH_LOGITS_ROWS;
use super::chain_device::{DraftPlan, FollowingDraft, MAX_DRAFTS, MAX_RACES};
use super::compiled_chain::CompiledChain;
use super::draft_abi::{DraftOutcome, DraftParameters, DraftSequence};
use super::drafter_weights::DrafterWeights;
use super::exit_memory::{copied, gather};
use super::memory::{pinned, zeros};
use super::slot_memory::{SlotSizes, copy_within};
use crate::backend::gpu::failed;
use crate::backend::{Ahead, DraftedToken};
use crate::error::Result;

/// Bytes of a number of caches and hidden states.
const HALF: u64 = 2;

// SAFETY: it is repr(C) of integers and floats, and lies in the parameter as the kernel's struct
// does, whose size was compared.
unsafe impl DeviceRepr for DraftParameters {}
// SAFETY: as above.
unsafe impl DeviceRepr for DraftOutcome {}
// SAFETY: it is of integers and floats, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for DraftOutcome {}

/// Bytes of what a drafter keeps of slots.
#[derive(Debug, Clone, Copy)]
struct DraftSizes {
    slots: usize,
    capacity: usize,
    /// Of a position's hidden states.
    features: u64,
    /// Of a position's keys, or values.
    keys: u64,
}

impl DraftSizes {
    fn new(weights: &DrafterWeights, hidden: usize, slots: &SlotSizes) -> Self {
        Self {
            slots: slots.slots,
            capacity: slots.capacity,
            features: (weights.depths.len() * hidden) as u64 * HALF,
            keys: (slots.key_value_heads * slots.head_size) as u64 * HALF,
        }
    }

    fn with(self, slots: usize) -> Self {
        Self { slots, ..self }
    }

    /// Bytes of what a position takes `bytes` of.
    fn all(&self, bytes: u64) -> u64 {
        (self.slots * self.capacity) as u64 * bytes
    }
}

/// A drafter, and where the kernels find what it needs.
pub(super) struct DraftMemory {
    parameters: DraftParameters,
    depths: Vec<usize>,
    vocabulary: usize,
    sizes: DraftSizes,
    /// Hidden states of the model, [slot, capacity, depths, hidden].
    features: CudaSlice<u8>,
    /// [slot, key-value heads, capacity, head size], as values.
    keys: CudaSlice<u8>,
    values: CudaSlice<u8>,
    outcome: PinnedHostSlice<DraftOutcome>,
    _memory: Vec<CudaSlice<u8>>,
    _numbers: (CudaSlice<i32>, CudaSlice<f32>, CudaSlice<u16>),
}

/// Bytes that `weights` take on the device, with what they keep of `slots`, for a model of `hidden`
/// numbers.
pub(super) fn device_bytes(
    weights: &DrafterWeights,
    hidden: usize,
    slots: &SlotSizes,
    scratch: u64,
) -> u64 {
    let sizes = DraftSizes::new(weights, hidden, slots);
    weights.bytes(hidden) + sizes.all(sizes.features + 2 * sizes.keys) + scratch
}

impl DraftMemory {
    /// Copy `weights`, for a model of `hidden` numbers and `vocabulary` tokens, to the GPU, beside a
    /// chain whose passes have `chain_parameters`, and let these passes write what it takes.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when the driver fails.
    pub(super) fn upload(
        weights: &DrafterWeights,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        (hidden, vocabulary): (usize, usize),
        slots: &SlotSizes,
        chain_parameters: &mut PassParameters,
    ) -> Result<Self> {
        let mut memory = Vec::new();
        for part in &weights.parts {
            memory.push(copied(stream, part)?);
        }
        memory.push(zeros(stream, chain.facts.draft_scratch_bytes)?);
        let addresses: Vec<u64> = memory
            .iter()
            .map(|part| part.device_ptr(stream).0)
            .collect();
        let head = gather(
            &weights.tokens,
            stream,
            chain,
            hidden,
            chain_parameters.head,
        )?;
        let tokens = copied(stream, &weights.tokens)?;
        let frequencies = copied(stream, &weights.frequencies)?;
        let sizes = DraftSizes::new(weights, hidden, slots);
        let features = zeros(stream, sizes.all(sizes.features))?;
        let [keys, values] = [
            zeros(stream, sizes.all(sizes.keys))?,
            zeros(stream, sizes.all(sizes.keys))?,
        ];
        // what a batch verifies has one logits row or more each
        let outcome = pinned(stream, BATCH_LOGITS_ROWS, DraftOutcome::default())?;
        let [
            combine,
            join,
            qkv,
            o,
            gate_up,
            down,
            feature_norms,
            state_norm,
            embedding_norm,
            attention_norm,
            mlp_norm,
            norm,
            scratch,
        ] = addresses[..]
        else {
            unreachable!("parts of a drafter's weights, and the scratch");
        };
        let parameters = DraftParameters {
            combine,
            join,
            qkv,
            o,
            gate_up,
            down,
            head: head.device_ptr(stream).0,
            feature_norms,
            state_norm,
            embedding_norm,
            attention_norm,
            mlp_norm,
            norm,
            frequencies: frequencies.device_ptr(stream).0,
            tokens: tokens.device_ptr(stream).0,
            embed: chain_parameters.embed,
            scratch,
            chosen: chain_parameters.chosen,
            capacity: sizes.capacity as i32,
            features_of_position: weights.depths.len() as i32,
            draft_tokens: weights.tokens.len() as i32,
            norm_epsilon: weights.norm_epsilon,
            ..DraftParameters::default()
        };
        let mut drafter = Self {
            parameters,
            depths: weights.depths.clone(),
            vocabulary,
            sizes,
            features,
            keys,
            values,
            outcome,
            _memory: memory,
            _numbers: (tokens, frequencies, head),
        };
        drafter.note_addresses(stream, chain_parameters);
        Ok(drafter)
    }

    /// Bytes that it keeps of a slot.
    pub(super) fn slot_bytes(&self) -> u64 {
        let sizes = self.sizes.with(1);
        sizes.all(sizes.features + 2 * sizes.keys)
    }

    /// Tell its own launches, and passes of the chain, where slots lie.
    fn note_addresses(&mut self, stream: &Arc<CudaStream>, chain: &mut PassParameters) {
        let features = self.features.device_ptr(stream).0;
        self.parameters.features = features;
        self.parameters.keys = self.keys.device_ptr(stream).0;
        self.parameters.values = self.values.device_ptr(stream).0;
        chain.features = self.depths.len() as i32;
        chain.feature_states = features;
        for (place, &depth) in chain.feature_depths.iter_mut().zip(&self.depths) {
            *place = depth as i32;
        }
    }

    /// Have `slots` slots, of which none holds anything; no launch may be under way.
    pub(super) fn reserve(
        &mut self,
        stream: &Arc<CudaStream>,
        slots: usize,
        chain: &mut PassParameters,
    ) -> Result<()> {
        let sizes = self.sizes.with(slots);
        let features = zeros(stream, sizes.all(sizes.features))?;
        let keys = zeros(stream, sizes.all(sizes.keys))?;
        self.values = zeros(stream, sizes.all(sizes.keys))?;
        (self.features, self.keys, self.sizes) = (features, keys, sizes);
        self.note_addresses(stream, chain);
        Ok(())
    }

    /// Copy the hidden states of the first `length` positions of the slot `from` to those of `to`.
    ///
    /// # Panics
    /// When both are the same slot, or there are no such slots or positions.
    pub(super) fn copy(
        &mut self,
        stream: &Arc<CudaStream>,
        from: usize,
        length: usize,
        to: usize,
    ) -> Result<()> {
        assert!(
            length <= self.sizes.capacity && from != to,
            "what is copied"
        );
        let position = self.sizes.features as usize;
        let (slot, bytes) = (position * self.sizes.capacity, position * length);
        copy_within(stream, &mut self.features, from * slot, to * slot, bytes)
    }

    /// Take in positions, and draft where `plans` say so; wait until that has ended.
    pub(super) fn run(
        &mut self,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        plans: &[DraftPlan],
    ) -> Result<Vec<Vec<DraftedToken>>> {
        assert!(plans.len() <= MAX_DRAFTS, "drafts of a launch");
        let launched = self.launch(stream, chain, plans);
        let outcomes = self.wait(stream, plans.len())?;
        launched?;
        let drafted = plans.iter().zip(outcomes);
        let drafted = drafted.map(|(plan, outcome)| match plan.ahead {
            Some(_) => outcome.drafted(),
            None => Vec::new(),
        });
        Ok(drafted.collect())
    }

    /// Wait for launches of so many plans, each of which followed a pass or a batch.
    pub(super) fn following(
        &self,
        stream: &Arc<CudaStream>,
        plans: usize,
    ) -> Result<Vec<FollowingDraft>> {
        let outcomes = self.wait(stream, plans)?.iter();
        let following = outcomes.map(|outcome| FollowingDraft {
            positions: outcome.rows as usize,
            followed: outcome.followed as u32,
            drafted: outcome.drafted(),
            span: outcome.started..outcome.ended,
        });
        Ok(following.collect())
    }

    /// Wait until all launches have ended, the last ones of which were of `plans` plans.
    fn wait(&self, stream: &Arc<CudaStream>, plans: usize) -> Result<&[DraftOutcome]> {
        stream.synchronize().map_err(failed("a draft"))?;
        let outcomes = self.outcome.as_slice().map_err(failed("a draft"))?;
        Ok(&outcomes[..plans])
    }

    /// Do what `plans` say, once all that was launched before has ended. Nothing that it uses may be
    /// freed before it has.
    pub(super) fn launch(
        &mut self,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        plans: &[DraftPlan],
    ) -> Result<()> {
        // the device has the host's address for it, as for all memory that the driver pins
        let outcomes = self.outcome.as_ptr().map_err(failed("pinned memory"))?;
        assert!(plans.len() <= BATCH_LOGITS_ROWS, "drafts at once");
        for (index, some) in plans.chunks(MAX_DRAFTS).enumerate() {
            let outcome = outcomes as u64 + (index * MAX_DRAFTS * size_of::<DraftOutcome>()) as u64;
            self.launch_some(stream, chain, some, outcome)?;
        }
        Ok(())
    }

    /// The same of what one launch takes, with outcomes at that address.
    fn launch_some(
        &mut self,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        plans: &[DraftPlan],
        outcome: u64,
    ) -> Result<()> {
        assert!(
            (1..=MAX_DRAFTS).contains(&plans.len()),
            "drafts of a launch"
        );
        let sequences = plans.len() as u32;
        let blocks = chain.blocks / sequences;
        plans.iter().for_each(|plan| self.check(chain, plan));
        let slots: BTreeSet<_> = plans.iter().map(|plan| plan.slot).collect();
        assert_eq!(slots.len(), plans.len(), "a slot is drafted for once");
        let parameters = &mut self.parameters;
        parameters.outcome = outcome;
        parameters.sequences = sequences as i32;
        parameters.blocks = blocks as i32;
        for (place, plan) in parameters.sequence.iter_mut().zip(plans) {
            *place = sequence(plan);
        }
        let (kernel, config) = chain.draft_kernel(blocks * sequences);
        let mut launch = stream.launch_builder(kernel);
        launch.arg(&self.parameters);
        // SAFETY: the kernel's one parameter is this struct, of the size that its facts say. What it
        // points to is allocated for the sizes of the bundle's manifest and facts, and `check` has
        // made sure that slots, positions and tokens are inside; tokens that a pass chooses are of its
        // vocabulary, or end the launch. The driver waits for the stream before any of that memory
        // goes back, and the outcomes are read only when the kernel has ended.
        let launched = unsafe { launch.launch_cooperative(config) };
        launched.map(drop).map_err(failed("a draft"))
    }

    /// Check that a launch stays inside of what was allocated.
    ///
    /// # Panics
    /// When it does not.
    fn check(&self, chain: &CompiledChain, plan: &DraftPlan) {
        let rows = plan.positions();
        assert!(
            plan.verifying_row
                .is_none_or(|row| row + rows <= BATCH_LOGITS_ROWS)
        );
        assert!((1..=chain.facts.draft_rows as usize).contains(&rows));
        let steps = plan.ahead.map_or(0, |ahead: Ahead| ahead.tokens);
        assert!(steps <= MAX_ROWS && plan.slot < self.sizes.slots);
        let end = plan.start + rows + steps.saturating_sub(1);
        assert!(end <= self.sizes.capacity, "positions of a draft");
        let known = |&token: &u32| (token as usize) < self.vocabulary;
        assert!(plan.tokens.iter().all(known), "tokens of a draft");
    }
}

fn sequence(plan: &DraftPlan) -> DraftSequence {
    let ahead = plan.ahead.unwrap_or_default();
    let mut token = [0; MAX_ROWS];
    for (place, &followed) in token.iter_mut().zip(&plan.tokens) {
        *place = followed as i32;
    }
    DraftSequence {
        slot: plan.slot as i32,
        start: plan.start as i32,
        rows: plan.positions() as i32,
        steps: plan.ahead.map_or(0, |ahead| ahead.tokens as i32),
        sampled: plan.races.is_some().into(),
        verifying_row: plan.verifying_row.map_or(-1, |row| row as i32),
        token,
        race: plan.races.unwrap_or([RowRace::default(); MAX_RACES]),
        min_accepted: ahead.min_accepted,
        acceptance: ahead.acceptance,
    }
}
