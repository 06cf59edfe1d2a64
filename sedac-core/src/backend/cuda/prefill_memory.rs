//! Prefill on a GPU: a kernel for each stage of a layer, over many tokens of one sequence.

use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, PushKernelArg, ValidAsZeroBits,
};

use super::abi::{PREFILL_LAUNCHES, PREFILL_ROWS, PassParameters, PrefillParameters};
use super::chain_device::{PrefillPlan, PrefillTimes};
use super::compiled_chain::CompiledChain;
use super::driver::zeros;
use super::slot_memory::SlotSizes;
use crate::backend::gpu::failed;
use crate::error::Result;

// SAFETY: it is repr(C) of integers, and lies in the parameter as the kernels' struct does, whose
// size was compared.
unsafe impl DeviceRepr for PrefillParameters {}
// SAFETY: it is repr(C) of two integers, which the last kernel writes.
unsafe impl DeviceRepr for PrefillTimes {}
// SAFETY: it is of integers, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for PrefillTimes {}

/// What prefill's kernels exchange, and what they tell the host.
pub(super) struct PrefillMemory {
    scratch: CudaSlice<u8>,
    times: PinnedHostSlice<PrefillTimes>,
}

impl PrefillMemory {
    pub(super) fn allocate(stream: &Arc<CudaStream>, chain: &CompiledChain) -> Result<Self> {
        // SAFETY: whatever it holds before the next lines is integers
        let times = unsafe {
            let context = stream.context();
            context.alloc_pinned_with_flags::<PrefillTimes>(1, 0)
        };
        let mut times = times.map_err(failed("pinned memory"))?;
        let cleared = times.as_mut_slice().map_err(failed("pinned memory"))?;
        cleared.fill(PrefillTimes::default());
        let scratch = zeros(stream, chain.facts.prefill_scratch_bytes)?;
        Ok(Self { scratch, times })
    }

    /// Run `plan` by the weights and caches of `passes`, for a model that knows `vocabulary` tokens, and
    /// wait until that has ended.
    pub(super) fn run(
        &self,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        passes: &PassParameters,
        (sizes, vocabulary): (&SlotSizes, usize),
        plan: &PrefillPlan,
    ) -> Result<PrefillTimes> {
        check(sizes, vocabulary, plan);
        let parameters = self.parameters(stream, passes, plan)?;
        let launched = launch(stream, chain, &parameters, sizes.layers);
        let waited = stream.synchronize();
        launched.and(waited).map_err(failed("a prefill"))?;
        let times = self.times.as_slice().map_err(failed("a prefill"))?;
        Ok(times[0])
    }

    fn parameters(
        &self,
        stream: &Arc<CudaStream>,
        passes: &PassParameters,
        plan: &PrefillPlan,
    ) -> Result<PrefillParameters> {
        let mut token = [0; PREFILL_ROWS];
        for (place, &wanted) in token.iter_mut().zip(&plan.tokens) {
            *place = wanted as i32;
        }
        // the device has the host's address for it, as for all memory that the driver pins
        let times = self.times.as_ptr().map_err(failed("pinned memory"))?;
        Ok(PrefillParameters {
            layers: passes.layers,
            embed: passes.embed,
            cos: passes.cos,
            sin: passes.sin,
            scratch: self.scratch.device_ptr(stream).0,
            times: times as u64,
            feature_states: passes.feature_states,
            capacity: passes.capacity,
            blocks: passes.blocks,
            features: passes.features,
            feature_depths: passes.feature_depths,
            slot: plan.slot as i32,
            start: plan.start as i32,
            rows: plan.tokens.len() as i32,
            token,
        })
    }
}

/// Launch all kernels of a prefill through `layers` layers.
fn launch(
    stream: &Arc<CudaStream>,
    chain: &CompiledChain,
    parameters: &PrefillParameters,
    layers: usize,
) -> std::result::Result<(), cudarc::driver::DriverError> {
    let before = [(0, 0)].into_iter();
    let of_layer = |layer| (1..PREFILL_LAUNCHES.len()).map(move |index| (layer, index));
    for (layer, index) in before.chain((0..layers as i32).flat_map(of_layer)) {
        let (kernel, config) = chain.prefill_kernel(index, parameters.rows as usize);
        let mut builder = stream.launch_builder(kernel);
        builder
            .arg(parameters)
            .arg(&layer)
            .arg(&PREFILL_LAUNCHES[index].1);
        // SAFETY: these are the kernel's parameters, the first of the size that its facts say. What it
        // points to is allocated for the sizes that the bundle's manifest and facts give, and `check`
        // has made sure that slot, positions and tokens are inside. It lives until the kernels have
        // ended, which is waited for whatever the driver says here.
        unsafe { builder.launch(config) }?;
    }
    Ok(())
}

/// Check that a prefill stays inside of what was allocated.
///
/// # Panics
/// When it does not.
fn check(sizes: &SlotSizes, vocabulary: usize, plan: &PrefillPlan) {
    let rows = plan.tokens.len();
    assert!((1..=PREFILL_ROWS).contains(&rows), "rows of a prefill");
    assert!(plan.slot < sizes.slots && plan.start + rows <= sizes.capacity);
    let known = |&token: &u32| (token as usize) < vocabulary;
    assert!(plan.tokens.iter().all(known), "tokens of a prefill");
}
