//! What was trained for exits, on a GPU.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};

use super::compiled_chain::CompiledChain;
use super::exit_weights::{DepthWeights, ExitWeights};
use super::packed_weights::WeightAddresses;
use crate::backend::gpu::failed;
use crate::error::Result;

/// Threads that gather a row of the head.
const GATHERING: u32 = 128;

/// What a chain reads at exits.
pub(super) struct ExitMemory {
    /// Depths with an entropy probe.
    pub(super) probes: Vec<usize>,
    /// Depths with an exit head.
    pub(super) heads: Vec<usize>,
    pub(super) has_lenses: bool,
    /// The rows of the head that exit heads have, fp16 [tokens, hidden].
    pub(super) frequent_rows: u64,
    pub(super) frequent_tokens: usize,
    _numbers: Vec<CudaSlice<f32>>,
    _rows: CudaSlice<u16>,
}

impl ExitMemory {
    /// Copy `weights` to the GPU, note where they lie in `addresses`, and gather the rows that exit
    /// heads have of a head of `hidden` columns.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when the driver fails.
    pub(super) fn upload(
        weights: &ExitWeights,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        hidden: usize,
        addresses: &mut WeightAddresses,
    ) -> Result<Self> {
        let mut uploaded = Vec::new();
        let mut upload = |each: &DepthWeights| -> Result<u64> {
            let numbers = copied(stream, &each.numbers)?;
            let address = numbers.device_ptr(stream).0;
            uploaded.push(numbers);
            Ok(address)
        };
        for each in &weights.probes {
            addresses.layers[each.depth - 1].probe = upload(each)?;
        }
        for each in &weights.heads {
            addresses.layers[each.depth - 1].exit_head = upload(each)?;
        }
        for each in &weights.lenses {
            addresses.layers[each.depth - 1].lens = upload(each)?;
        }
        let rows = gather(
            &weights.frequent_tokens,
            stream,
            chain,
            hidden,
            addresses.head,
        )?;
        let frequent_rows = rows.device_ptr(stream).0;
        let depths = |each: &[DepthWeights]| each.iter().map(|each| each.depth).collect();
        Ok(Self {
            probes: depths(&weights.probes),
            heads: depths(&weights.heads),
            has_lenses: !weights.lenses.is_empty(),
            frequent_rows,
            frequent_tokens: weights.frequent_tokens.len(),
            _numbers: uploaded,
            _rows: rows,
        })
    }
}

/// A copy of `numbers` on the GPU.
pub(super) fn copied<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    numbers: &[T],
) -> Result<CudaSlice<T>> {
    let copy = stream.clone_htod(numbers);
    // they are read until then, also where the call failed
    let waited = stream.synchronize();
    let copy = copy.and_then(|copy| waited.map(|()| copy));
    copy.map_err(failed("a copy of weights to the GPU"))
}

/// The rows of `tokens` of the packed matrix at `head`, of `hidden` columns, fp16.
pub(super) fn gather(
    tokens: &[i32],
    stream: &Arc<CudaStream>,
    chain: &CompiledChain,
    hidden: usize,
    head: u64,
) -> Result<CudaSlice<u16>> {
    let what = || failed("the kernel gather_rows");
    // there is no allocation of nothing
    let rows = stream.alloc_zeros::<u16>((tokens.len() * hidden).max(1));
    let rows = rows.map_err(what())?;
    if tokens.is_empty() {
        return Ok(rows);
    }
    let tokens_there = copied(stream, tokens)?;
    let mut launch = stream.launch_builder(&chain.gather_rows);
    launch.arg(&head).arg(&tokens_there).arg(&rows);
    let config = LaunchConfig {
        grid_dim: (tokens.len() as u32, 1, 1),
        block_dim: (GATHERING, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: these are the kernel's parameters. A block writes the row of its number, of `hidden`
    // halves, which were allocated for as many, from that of its token, which the head has. The
    // tokens' copy lives until the kernel has ended.
    unsafe { launch.launch(config) }.map_err(what())?;
    stream.synchronize().map_err(what())?;
    Ok(rows)
}
