//! The first NVIDIA GPU as the device of a chain.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice,
    PushKernelArg, ValidAsZeroBits,
};

use super::CudaChain;
use super::abi::{LayerPointers, MAX_ROWS, PassOutcome, PassParameters};
use super::batch_abi::{BATCH_LOGITS_ROWS, BATCH_ROWS, BatchOutcome};
use super::batch_memory::BatchMemory;
use super::chain_device::{
    BatchLimits, BatchPlan, ChainDevice, DraftPlan, FollowingDraft, PassPlan,
};
use super::compiled_chain::CompiledChain;
use super::draft_memory::{DraftMemory, device_bytes};
use super::drafter_weights::DrafterWeights;
use super::exit_memory::ExitMemory;
use super::exit_weights::ExitWeights;
use super::memory::{free_memory, pinned, zeros};
use super::memory_sizes::MemorySizes;
use super::packed_weights::{PackedWeights, WeightAddresses};
use super::pass_check;
use super::rule_memory::RuleMemory;
use super::slot_memory::SlotMemory;
use crate::backend::DraftedToken;
use crate::backend::gpu::{failed, new_stream};
use crate::bundle::{Bundle, ChainKernels, DeviceBudget};
use crate::error::{Error, Result};
use crate::policy::Condition;

/// Bytes of a token.
const TOKEN: u64 = size_of::<i32>() as u64;

// SAFETY: it is repr(C) of integers and floats, and lies in the parameter as the kernel's struct does,
// whose size was compared.
unsafe impl DeviceRepr for PassParameters {}
// SAFETY: as above.
unsafe impl DeviceRepr for PassOutcome {}
// SAFETY: it is of integers and floats, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for PassOutcome {}
// SAFETY: it is repr(C) of integers, as the kernel's struct, whose size was compared.
unsafe impl DeviceRepr for LayerPointers {}

/// A GPU with the weights of a bundle, and caches for some sequences.
pub struct CudaDriver {
    stream: Arc<CudaStream>,
    chain: CompiledChain,
    /// What all passes have in common.
    parameters: PassParameters,
    /// Rows of the last pass.
    last_rows: usize,
    sizes: MemorySizes,
    budget: DeviceBudget,
    /// Where each layer's weights and caches lie.
    layer_pointers: Vec<LayerPointers>,
    slots: SlotMemory,
    /// Exit rules' tables.
    rules: RuleMemory,
    logits: CudaSlice<f32>,
    read_logits: PinnedHostSlice<f32>,
    outcome: PinnedHostSlice<PassOutcome>,
    /// What only the kernels read and write.
    _memory: Vec<CudaSlice<u8>>,
    exits: ExitMemory,
    batches: BatchMemory,
    drafter: Option<DraftMemory>,
    /// The end of a pass or batch that drafts follow, and how many followed the last one.
    ended: CudaEvent,
    following: usize,
}

impl CudaChain<CudaDriver> {
    /// Run the chain of `bundle` on the first GPU, for up to `sequences` sequences at once.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it holds no kernels, or exits that they do not run; [`Error::Device`]
    /// without a driver, a GPU or a module for it; [`Error::Memory`] when it does not fit.
    pub fn load(bundle: &Bundle, sequences: usize) -> Result<Self> {
        let manifest = &bundle.manifest;
        let driver = CudaDriver::load(bundle, sequences)?;
        let (layers, capacity) = (manifest.model.num_layers, manifest.max_cache_length);
        Ok(Self::new(
            driver,
            layers,
            &manifest.exit_layers,
            capacity,
            sequences,
        ))
    }
}

impl CudaDriver {
    fn load(bundle: &Bundle, sequences: usize) -> Result<Self> {
        let kernels = kernels_of(bundle)?;
        let capacity = bundle.manifest.max_cache_length;
        let stream = new_stream()?;
        let chain = CompiledChain::load(bundle, kernels, capacity, &stream)?;
        let weights = PackedWeights::open(bundle, kernels)?;
        let exits = ExitWeights::read(bundle)?;
        let drafter = DrafterWeights::read(bundle, &kernels.shape)?;
        let sizes = MemorySizes::new(kernels, &chain, capacity, sequences);
        let weight_bytes = bundle.gate.bytes(&kernels.weights).unwrap_or(0);
        let free = free_memory(&stream)?;
        let hidden = kernels.shape.hidden;
        let draft_scratch = chain.facts.draft_scratch_bytes;
        let of_drafter = drafter.iter();
        let of_drafter = of_drafter.map(|w| device_bytes(w, hidden, &sizes.slots, draft_scratch));
        let weight_bytes = weight_bytes + exits.bytes(hidden) + of_drafter.sum::<u64>();
        let (bytes, mut budget) = (sizes.total() + weight_bytes, bundle.device_budget());
        budget.check(bytes, free)?;
        budget.note(bytes, 0);
        let mut memory = Vec::new();
        let mut addresses = weights.upload(kernels, capacity, &stream, &mut memory)?;
        let exits = ExitMemory::upload(&exits, &stream, &chain, hidden, &mut addresses)?;
        let mut driver = Self::allocate(stream, chain, sizes, budget, addresses, exits, memory)?;
        driver.add_drafter(drafter.as_ref(), hidden)?;
        Ok(driver)
    }

    /// Draft with `weights`, where there are any, for a model of `hidden` numbers.
    fn add_drafter(&mut self, weights: Option<&DrafterWeights>, hidden: usize) -> Result<()> {
        let Some(weights) = weights else {
            return Ok(());
        };
        let drafter = DraftMemory::upload(
            weights,
            &self.stream,
            &self.chain,
            (hidden, self.sizes.vocabulary),
            &self.slots.sizes,
            &mut self.parameters,
        )?;
        self.drafter = Some(drafter);
        Ok(())
    }

    /// Allocate what `sizes` says, and make tables.
    fn allocate(
        stream: Arc<CudaStream>,
        chain: CompiledChain,
        sizes: MemorySizes,
        budget: DeviceBudget,
        mut weights: WeightAddresses,
        exits: ExitMemory,
        mut memory: Vec<CudaSlice<u8>>,
    ) -> Result<Self> {
        let slots = SlotMemory::allocate(&stream, sizes.slots, &mut weights.layers)?;
        let mut allocate = |bytes| -> Result<u64> {
            let slice = zeros(&stream, bytes)?;
            let address = slice.device_ptr(&stream).0;
            memory.push(slice);
            Ok(address)
        };
        let mut parameters = PassParameters {
            embed: weights.embed,
            head: weights.head,
            final_norm: weights.final_norm,
            cos: weights.cos,
            sin: weights.sin,
            layers: slots.layers.device_ptr(&stream).0,
            saved: slots.saved.device_ptr(&stream).0,
            scratch: allocate(sizes.scratch)?,
            next_scratch: allocate(sizes.scratch)?,
            tables: allocate(sizes.tables)?,
            chosen: allocate(BATCH_LOGITS_ROWS as u64 * TOKEN)?,
            capacity: sizes.slots.capacity as i32,
            blocks: chain.blocks as i32,
            // scratch that nothing wrote to holds 0
            number: 1,
            has_lenses: exits.has_lenses.into(),
            frequent_tokens: exits.frequent_tokens as i32,
            frequent_rows: exits.frequent_rows,
            ..PassParameters::default()
        };
        let logits = stream.alloc_zeros::<f32>(sizes.logits());
        let logits = logits.map_err(failed("memory for logits"))?;
        parameters.logits = logits.device_ptr(&stream).0;
        let outcome = pinned(&stream, 1, PassOutcome::default())?;
        parameters.outcome = outcome.as_ptr().map_err(failed("pinned memory"))? as u64;
        let driver = Self {
            rules: RuleMemory::allocate(&stream, sizes.slots.layers)?,
            read_logits: pinned(&stream, MAX_ROWS * sizes.vocabulary, 0.0)?,
            last_rows: 0,
            _memory: memory,
            layer_pointers: weights.layers,
            slots,
            exits,
            batches: BatchMemory::allocate(&stream, &chain)?,
            drafter: None,
            ended: stream
                .context()
                .new_event(None)
                .map_err(failed("an event"))?,
            following: 0,
            stream,
            chain,
            parameters,
            sizes,
            budget,
            logits,
            outcome,
        };
        driver.prepare()?;
        Ok(driver)
    }

    /// Write the tables that blocks read.
    fn prepare(&self) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.chain.prepare);
        launch
            .arg(&self.parameters.tables)
            .arg(&self.parameters.blocks);
        let config: LaunchConfig = self.chain.launch_config(0);
        // SAFETY: these are the kernel's parameters, and it writes `table_bytes` for each block,
        // which were allocated for as many.
        unsafe { launch.launch(config) }.map_err(failed("the kernel prepare"))?;
        self.stream
            .synchronize()
            .map_err(failed("the kernel prepare"))
    }

    /// Wait until what was `launched` has ended, after which `drafts` begin. Where they cannot, nobody has
    /// asked for them yet: who does runs them anew, and is told why that fails.
    fn finish(&mut self, launched: Result<()>, drafts: &[DraftPlan]) -> Result<()> {
        self.following = match drafts {
            [_, ..] if launched.is_ok() => self.begin_drafts(drafts).map_or(0, |()| drafts.len()),
            _ => 0,
        };
        let waited = match self.following {
            0 => self.stream.synchronize(),
            _ => self.ended.synchronize(),
        };
        launched?;
        waited.map_err(failed("a pass of the chain"))
    }

    /// Note where what was launched last ends, and launch what drafts after it.
    fn begin_drafts(&mut self, plans: &[DraftPlan]) -> Result<()> {
        let noted = self.ended.record(&self.stream);
        noted.map_err(failed("the end of a pass"))?;
        let drafter = self.drafter.as_mut().expect("a drafter was loaded");
        drafter.launch(&self.stream, &self.chain, plans)
    }

    /// Bytes of a slot, with what a drafter keeps of it.
    fn slot_bytes(&self) -> u64 {
        let of_drafter = self.drafter.as_ref().map_or(0, DraftMemory::slot_bytes);
        self.slots.sizes.with(1).total() + of_drafter
    }

    /// Whether there may be a rule at that address, of so many criteria.
    fn holds_rule(&self, (address, criteria): (u64, i32)) -> bool {
        self.rules.holds(&self.stream, address, criteria)
    }

    /// The logits of up to [`MAX_ROWS`] rows.
    fn read_logits(&mut self, rows: Range<usize>) -> Result<&[f32]> {
        let width = self.sizes.vocabulary;
        let from = self.logits.slice(rows.start * width..rows.end * width);
        let pinned = self.read_logits.as_mut_slice();
        // a copy is as long as where it goes
        let read = &mut pinned.map_err(failed("a copy from the GPU"))?[..rows.len() * width];
        let copied = self.stream.memcpy_dtoh(&from, read);
        // waiting for the stream spins, where waiting for the copy's event would block
        let waited = self.stream.synchronize();
        copied.and(waited).map_err(failed("a copy from the GPU"))?;
        Ok(read)
    }
}

/// The kernels of `bundle`, where they can run all of it.
fn kernels_of(bundle: &Bundle) -> Result<&ChainKernels> {
    let refused = |reason: &str| Error::bundle(&bundle.gate.shown(""), reason);
    let kernels = bundle.manifest.cuda.as_ref();
    let kernels = kernels.ok_or_else(|| match &bundle.manifest.cuda_refusal {
        Some(reason) => refused(&format!(
            "holds no cuda engines, which cannot run this model: {reason}; use --backend onnxruntime"
        )),
        None => refused(&format!(
            "holds no cuda engines; add them with sedac-export engines {} --target cuda --model MODEL",
            bundle.gate.shown("").display()
        )),
    })?;
    Ok(kernels)
}

impl ChainDevice for CudaDriver {
    fn vocabulary(&self) -> usize {
        self.sizes.vocabulary
    }

    fn probes(&self) -> &[usize] {
        &self.exits.probes
    }

    fn exit_heads(&self) -> &[usize] {
        &self.exits.heads
    }

    fn write_conditions(&mut self, table: usize, conditions: &[Condition]) -> Result<u64> {
        self.rules.write(&self.stream, table, conditions)
    }

    fn run(&mut self, pass: &PassPlan) -> Result<PassOutcome> {
        let holds_rule = |rule| self.holds_rule(rule);
        pass_check::check(pass, &self.slots.sizes, self.sizes.vocabulary, holds_rule);
        let parameters = &mut self.parameters;
        parameters.rows = pass.rows.len() as i32;
        parameters.sequences = pass.sequences.len() as i32;
        parameters.clear_rows = self.last_rows as i32;
        parameters.logits_rows = pass.logits_rows;
        parameters.sampled_rows = pass.sampled_rows;
        parameters.race = pass.races;
        parameters.steps = pass.ahead.tokens as i32;
        parameters.min_accepted = pass.ahead.min_accepted;
        parameters.acceptance = pass.ahead.acceptance;
        parameters.row[..pass.rows.len()].copy_from_slice(&pass.rows);
        parameters.sequence[..pass.sequences.len()].copy_from_slice(&pass.sequences);
        let (kernel, config) = self.chain.kernel(pass.rows.len());
        let mut launch = self.stream.launch_builder(kernel);
        launch.arg(&self.parameters);
        // SAFETY: the kernel's one parameter is this struct, of the size that its facts say. What it
        // points to is allocated for the sizes that the bundle's manifest and facts give, and
        // `pass_check` has made sure that every row, slot and table is inside. `self` is borrowed until
        // the kernel has ended, which is waited for whatever the driver says here, or, where a check of
        // drafts panics, when this driver is dropped. The kernel itself is the bundle's, as plans are: its digest was checked, and whoever built it
        // answers for what it does.
        let launched = unsafe { launch.launch_cooperative(config) };
        let launched = launched.map(drop).map_err(failed("a pass of the chain"));
        self.finish(launched, &pass.drafts)?;
        self.last_rows = pass.rows.len();
        let parameters = &mut self.parameters;
        parameters.number = parameters.number.wrapping_add(pass.ahead.tokens as u32);
        std::mem::swap(
            &mut self.parameters.scratch,
            &mut self.parameters.next_scratch,
        );
        let outcome = self
            .outcome
            .as_slice()
            .map_err(failed("a pass of the chain"))?;
        Ok(outcome[0])
    }

    fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            rows: BATCH_ROWS,
            logits_rows: BATCH_LOGITS_ROWS,
            // batches know no lenses
            rules: !self.exits.has_lenses,
        }
    }

    fn run_batch(&mut self, plan: &BatchPlan) -> Result<BatchOutcome> {
        let rules = plan.rules.iter().flatten();
        let mut rules = rules.map(|rule| (rule.conditions, rule.criteria));
        assert!(rules.all(|rule| self.holds_rule(rule)), "rules of a batch");
        let sizes = (&self.slots.sizes, self.sizes.vocabulary);
        let (stream, chain) = (&self.stream, &self.chain);
        let launched = self
            .batches
            .launch(stream, chain, &self.parameters, sizes, plan);
        self.finish(launched, &plan.drafts)?;
        self.batches.outcome()
    }

    fn draft_rows(&self) -> usize {
        let rows = self.chain.facts.draft_rows as usize;
        self.drafter.as_ref().map_or(0, |_| rows)
    }

    fn take_in(&mut self, plans: &[DraftPlan]) -> Result<()> {
        let drafter = self.drafter.as_mut().expect("a drafter was loaded");
        drafter.launch(&self.stream, &self.chain, plans)
    }

    fn draft(&mut self, plans: &[DraftPlan]) -> Result<Vec<Vec<DraftedToken>>> {
        let drafter = self.drafter.as_mut().expect("a drafter was loaded");
        drafter.run(&self.stream, &self.chain, plans)
    }

    fn following_drafts(&mut self) -> Result<Vec<FollowingDraft>> {
        match &self.drafter {
            Some(drafter) => drafter.following(&self.stream, std::mem::take(&mut self.following)),
            None => Ok(Vec::new()),
        }
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>> {
        let width = self.sizes.vocabulary;
        let mut logits = Vec::with_capacity(rows.len() * width);
        for first in rows.clone().step_by(MAX_ROWS) {
            let some = first..rows.end.min(first + MAX_ROWS);
            logits.extend_from_slice(self.read_logits(some)?);
        }
        Ok(logits)
    }

    fn room(&self) -> Result<usize> {
        let left = self.budget.left(free_memory(&self.stream)?);
        Ok(((left - left / 10) / self.slot_bytes()) as usize)
    }

    fn reserve(&mut self, slots: usize) -> Result<()> {
        let sizes = self.slots.sizes.with(slots);
        // those that there are go back only once the new ones are there
        let (before, bytes) = (self.slots.sizes.slots as u64, self.slot_bytes());
        let needed = bytes.saturating_mul(slots as u64);
        self.budget.check(needed, free_memory(&self.stream)?)?;
        let mut layers = self.layer_pointers.clone();
        let slots = SlotMemory::allocate(&self.stream, sizes, &mut layers)?;
        // drafts that nobody asked for may be under way
        let waited = self.stream.synchronize();
        waited.map_err(failed("memory for sequences"))?;
        if let Some(drafter) = &mut self.drafter {
            drafter.reserve(&self.stream, sizes.slots, &mut self.parameters)?;
        }
        // nothing fails any more: passes go on with the memory that they had where it did
        self.parameters.layers = slots.layers.device_ptr(&self.stream).0;
        self.parameters.saved = slots.saved.device_ptr(&self.stream).0;
        // every pass was waited for, so that nothing uses the memory that goes back now
        self.slots = slots;
        self.layer_pointers = layers;
        self.budget.note(needed, before * bytes);
        Ok(())
    }

    fn copy(&mut self, from: usize, length: usize, to: usize) -> Result<()> {
        if let Some(drafter) = &mut self.drafter {
            drafter.copy(&self.stream, from, length, to)?;
        }
        self.slots.copy(&self.stream, from, length, to)
    }

    fn clear(&mut self, slot: usize) -> Result<()> {
        self.slots.clear(&self.stream, slot)
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        // memory goes back when nothing uses it any more; a driver that fails now has no one to tell
        let _ = self.stream.synchronize();
    }
}
