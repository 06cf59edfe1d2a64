//! The compiled kernels of a bundle on a GPU.

use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaFunction, CudaModule, CudaStream, LaunchConfig};
use cudarc::nvrtc::Ptx;

use super::abi::{ABI, ChainFacts, LayerPointers, PassOutcome, PassParameters};
use super::batch_abi::{BATCH_KERNELS, BatchLaunch, BatchOutcome, BatchParameters};
use super::draft_abi::{DraftOutcome, DraftParameters};
use crate::backend::gpu::failed;
use crate::bundle::{Bundle, ChainKernels, ChainModule, KERNEL_ROWS};
use crate::error::{Error, Result};

/// What to do about engines that do not run.
const REMEDY: &str = "build them again with sedac-export engines --target cuda";

/// The kernels of the module for this GPU.
#[derive(Debug)]
pub(super) struct CompiledChain {
    pub(super) facts: ChainFacts,
    /// Blocks of a pass.
    pub(super) blocks: u32,
    /// By [`KERNEL_ROWS`].
    kernels: Vec<CudaFunction>,
    /// Writes the tables that blocks read.
    pub(super) prepare: CudaFunction,
    /// Copies rows out of a packed matrix.
    pub(super) gather_rows: CudaFunction,
    /// A trained drafter.
    draft: CudaFunction,
    /// By [`BATCH_KERNELS`].
    batch: Vec<CudaFunction>,
}

impl CompiledChain {
    /// Load the module of `kernels` for the stream's GPU, for caches of `capacity` positions.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none, the driver cannot load it, or it does not fit the GPU,
    /// this runtime or the capacity.
    pub(super) fn load(
        bundle: &Bundle,
        kernels: &ChainKernels,
        capacity: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        let module = choose(kernels, stream)?;
        let name = bundle.gate.shown(&module.file).display().to_string();
        let refused = |reason: String| Error::Device {
            what: name.clone(),
            reason,
        };
        let loaded = load_module(bundle, kernels, module, stream)?;
        let facts = read_facts(&loaded, stream)?;
        check_abi(&facts).map_err(refused)?;
        check_weight_blocks(&facts, kernels).map_err(refused)?;
        let multiprocessors = attribute(
            stream,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )?;
        let blocks = multiprocessors.min(facts.max_blocks);
        if blocks < facts.min_blocks {
            return Err(refused(format!(
                "its kernels need {} multiprocessors and the GPU has {multiprocessors}; use \
                 --backend onnxruntime",
                facts.min_blocks
            )));
        }
        let shared = facts.shared_bytes.into_iter().max().unwrap_or(0);
        let of_batches = facts.batch.into_iter().map(|launch| launch.shared_bytes);
        let shared = of_batches.fold(shared.max(facts.draft_shared_bytes), u32::max);
        let available = attribute(
            stream,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?;
        if shared > available {
            return Err(refused(format!(
                "its kernels need {shared} bytes of shared memory a block and the GPU has \
                 {available}; use --backend onnxruntime"
            )));
        }
        if capacity > facts.max_capacity as usize {
            return Err(refused(format!(
                "its kernels hold {} positions and the bundle's caches {capacity}; build it with \
                 a smaller --max-cache-length",
                facts.max_capacity
            )));
        }
        let function = |name: &str| {
            let function = loaded.load_function(name);
            function.map_err(failed(format!("the kernel {name}")))
        };
        let mut loaded_kernels = Vec::new();
        for (rows, shared) in KERNEL_ROWS.into_iter().zip(facts.shared_bytes) {
            let name = format!("chain_{rows}");
            let kernel = function(&name)?;
            allow_shared(&kernel, &name, shared)?;
            loaded_kernels.push(kernel);
        }
        let draft = function("draft")?;
        allow_shared(&draft, "draft", facts.draft_shared_bytes)?;
        let mut batch = Vec::new();
        for (name, launch) in BATCH_KERNELS.into_iter().zip(facts.batch) {
            let kernel = function(name)?;
            allow_shared(&kernel, name, launch.shared_bytes)?;
            prefer_shared(&kernel, name)?;
            batch.push(kernel);
        }
        Ok(Self {
            facts,
            blocks,
            kernels: loaded_kernels,
            prepare: function("prepare")?,
            gather_rows: function("gather_rows")?,
            draft,
            batch,
        })
    }

    /// The kernel for a pass of `rows` rows, and how it is launched.
    pub(super) fn kernel(&self, rows: usize) -> (&CudaFunction, LaunchConfig) {
        let index = KERNEL_ROWS.partition_point(|&most| most < rows);
        let shared = self.facts.shared_bytes[index];
        (&self.kernels[index], self.launch_config(shared))
    }

    /// The kernel of a trained drafter, and how it is launched with `blocks` blocks.
    pub(super) fn draft_kernel(&self, blocks: u32) -> (&CudaFunction, LaunchConfig) {
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (self.facts.draft_threads, 1, 1),
            ..self.launch_config(self.facts.draft_shared_bytes)
        };
        (&self.draft, config)
    }

    /// The kernel of the launch number `index` of [`BATCH_KERNELS`], and how it is launched for `rows`
    /// rows.
    pub(super) fn batch_kernel(&self, index: usize, rows: usize) -> (&CudaFunction, LaunchConfig) {
        let launch = self.facts.batch[index];
        let blocks = match launch.blocks {
            0 => self.blocks,
            blocks => blocks,
        };
        let config = LaunchConfig {
            grid_dim: ((rows as u32).div_ceil(launch.rows), blocks, 1),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        (&self.batch[index], config)
    }

    /// One row of blocks with `shared_mem_bytes` each.
    pub(super) fn launch_config(&self, shared_mem_bytes: u32) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (self.blocks, 1, 1),
            block_dim: (self.facts.threads, 1, 1),
            shared_mem_bytes,
        }
    }
}

/// Let `kernel`, called `name`, have `bytes` of dynamic shared memory.
fn allow_shared(kernel: &CudaFunction, name: &str, bytes: u32) -> Result<()> {
    let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let allowed = kernel.set_attribute(limit, bytes as i32);
    allowed.map_err(failed(format!("{bytes} bytes of shared memory for {name}")))
}

/// Divide a multiprocessor's memory for `kernel`, called `name`, as for one that takes all it can
/// get: between kernels that divide it otherwise, a multiprocessor is idle.
fn prefer_shared(kernel: &CudaFunction, name: &str) -> Result<()> {
    let share = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    let preferred = kernel.set_attribute(share, 100);
    preferred.map_err(failed(format!("the shared memory of {name}")))
}

/// The module for the stream's GPU.
fn choose<'a>(kernels: &'a ChainKernels, stream: &CudaStream) -> Result<&'a ChainModule> {
    let context = stream.context();
    let capability = context.compute_capability().map_err(failed("the GPU"))?;
    let capability = (capability.0 as u32, capability.1 as u32);
    kernels.module_for(capability).ok_or_else(|| {
        let architectures = kernels.modules.iter();
        let built: Vec<_> = architectures
            .map(|module| module.architecture.to_string())
            .collect();
        Error::Device {
            what: context.name().unwrap_or_else(|_| "the GPU".into()),
            reason: format!(
                "it is of compute capability {}.{}, and the bundle's cuda engines are for {}; \
                 {REMEDY}",
                capability.0,
                capability.1,
                built.join(", ")
            ),
        }
    })
}

fn load_module(
    bundle: &Bundle,
    kernels: &ChainKernels,
    module: &ChainModule,
    stream: &CudaStream,
) -> Result<Arc<CudaModule>> {
    let image = if module.architecture.is_ptx {
        let text = bundle.gate.read_text(&module.file)?;
        if text.contains('\0') {
            let reason = "no PTX, it holds a zero; build the bundle again";
            return Err(Error::bundle(&bundle.gate.shown(&module.file), reason));
        }
        Ptx::from_src(text)
    } else {
        Ptx::from_binary(bundle.gate.read(&module.file)?)
    };
    stream.context().load_module(image).map_err(|error| {
        let what = bundle.gate.shown(&module.file).display().to_string();
        let reason = format!(
            "the driver cannot load it ({error}); install a driver for CUDA {} or newer, or {REMEDY}",
            kernels.compiler
        );
        Error::Device { what, reason }
    })
}

fn read_facts(module: &Arc<CudaModule>, stream: &Arc<CudaStream>) -> Result<ChainFacts> {
    let what = "the constant sedac_facts";
    let constant = module.get_global("sedac_facts", stream);
    let bytes = stream.clone_dtoh(&constant.map_err(failed(what))?);
    let bytes = bytes.map_err(failed(what))?;
    stream.synchronize().map_err(failed(what))?;
    ChainFacts::parse(&bytes).ok_or_else(|| Error::Device {
        what: what.into(),
        reason: format!(
            "it has {} bytes, which this runtime does not know; {REMEDY}",
            bytes.len()
        ),
    })
}

fn check_abi(facts: &ChainFacts) -> std::result::Result<(), String> {
    let theirs = [
        facts.layer_bytes,
        facts.pass_bytes,
        facts.outcome_bytes,
        facts.draft_pass_bytes,
        facts.draft_outcome_bytes,
        facts.batch_pass_bytes,
        facts.batch_outcome_bytes,
    ];
    let ours = [
        size_of::<LayerPointers>(),
        size_of::<PassParameters>(),
        size_of::<PassOutcome>(),
        size_of::<DraftParameters>(),
        size_of::<DraftOutcome>(),
        size_of::<BatchParameters>(),
        size_of::<BatchOutcome>(),
    ];
    if facts.abi != ABI || theirs.map(|bytes| bytes as usize) != ours {
        return Err(format!(
            "its kernels are of ABI {} ({theirs:?}) and this runtime has {ABI} ({ours:?}); {REMEDY}",
            facts.abi
        ));
    }
    let takes_rows = |launch: &BatchLaunch| launch.rows > 0;
    if !facts.batch.iter().all(takes_rows) {
        return Err(format!("its kernels of batches take no rows; {REMEDY}"));
    }
    Ok(())
}

/// Weights of another format would be read as others.
fn check_weight_blocks(
    facts: &ChainFacts,
    kernels: &ChainKernels,
) -> std::result::Result<(), String> {
    let theirs = facts.weight_block_bytes;
    if theirs as usize != kernels.block_bytes {
        return Err(format!(
            "its kernels read blocks of {theirs} bytes and the bundle's weights have {}; {REMEDY}",
            kernels.block_bytes
        ));
    }
    Ok(())
}

fn attribute(stream: &CudaStream, attribute: CUdevice_attribute) -> Result<u32> {
    let value = stream.context().attribute(attribute);
    value.map(|value| value as u32).map_err(failed("the GPU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_another_abi_are_refused() {
        let launch = BatchLaunch {
            rows: 1,
            ..BatchLaunch::default()
        };
        let facts = ChainFacts {
            abi: ABI,
            layer_bytes: size_of::<LayerPointers>() as u32,
            pass_bytes: size_of::<PassParameters>() as u32,
            outcome_bytes: size_of::<PassOutcome>() as u32,
            draft_pass_bytes: size_of::<DraftParameters>() as u32,
            draft_outcome_bytes: size_of::<DraftOutcome>() as u32,
            batch_pass_bytes: size_of::<BatchParameters>() as u32,
            batch_outcome_bytes: size_of::<BatchOutcome>() as u32,
            batch: [launch; BATCH_KERNELS.len()],
            ..ChainFacts::default()
        };
        assert_eq!(check_abi(&facts), Ok(()));
        let newer = ChainFacts {
            abi: ABI + 1,
            ..facts
        };
        let other = ChainFacts {
            pass_bytes: facts.pass_bytes + 8,
            ..facts
        };
        let mut without_rows = facts;
        without_rows.batch[8].rows = 0;
        for facts in [newer, other, without_rows] {
            let reason = check_abi(&facts).unwrap_err();
            assert!(reason.contains("sedac-export engines"), "{reason}");
        }
    }
}
