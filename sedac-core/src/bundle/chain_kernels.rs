//! What a bundle says of the kernels that run its whole chain on an NVIDIA GPU.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::Manifest;

/// Sizes are 32-bit in the kernels.
const MAX_SIZE: usize = i32::MAX as usize;

/// Bytes of 16 rows and 32 columns of fp16.
pub(crate) const HALF_BLOCK_BYTES: usize = 1024;

/// Rows that the passes of a module's kernels may have.
pub(crate) const KERNEL_ROWS: [usize; 4] = [1, 2, 4, 8];

/// The chain's kernels and their weights.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainKernels {
    /// Version of NVRTC, which compiled the modules.
    pub compiler: String,
    /// SHA-256 of sources and options, in hexadecimal.
    pub fingerprint: String,
    /// What they were compiled for.
    pub shape: ChainShape,
    /// The same, beyond sizes.
    pub options: ChainOptions,
    /// The layers, shallowest first.
    pub layers: Vec<ChainLayer>,
    /// The compiled kernels, one module for each architecture.
    pub modules: Vec<ChainModule>,
    /// The weights as the kernels read them, relative to the bundle.
    pub weights: PathBuf,
    /// Bytes of 16 rows and 32 columns of a matrix there.
    #[serde(default = "half_block_bytes")]
    pub block_bytes: usize,
}

/// Those of weights of fp16.
fn half_block_bytes() -> usize {
    HALF_BLOCK_BYTES
}

/// Sizes of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainShape {
    /// Numbers in the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub key_value_heads: usize,
    /// Numbers in each head.
    pub head_size: usize,
    /// The first numbers of each head, which are rotated.
    pub rotary_size: usize,
    /// Rows of the MLP's gate.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Logits per token.
    pub vocabulary: usize,
}

/// An MLP's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// Constants of the model; 0 stands for no soft cap.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainOptions {
    /// Of the MLPs.
    pub activation: Activation,
    /// Of the norms.
    pub norm_epsilon: f32,
    /// Factor of attention scores.
    pub attention_scale: f32,
    /// Of attention scores.
    pub attention_softcap: f32,
    /// Of logits.
    pub logits_softcap: f32,
    /// Factor of embeddings.
    pub embedding_scale: f32,
}

/// What layers differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainLayer {
    /// Positions that a token sees, 0 for all.
    pub window: usize,
    /// Index of its rotary tables.
    pub rotary: usize,
}

/// The kernels of one architecture.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainModule {
    /// The cubin or PTX, relative to the bundle.
    pub file: PathBuf,
    /// What runs it.
    pub architecture: Architecture,
    /// The kernels in it; none are listed of PTX, which drivers compile.
    pub kernels: Vec<CompiledKernel>,
}

/// What the compiler says of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompiledKernel {
    /// Rows that its passes may have.
    pub rows: usize,
    /// Registers of a thread.
    pub registers: usize,
    /// Shared memory of a block.
    pub shared_bytes: usize,
    /// Local memory of a thread that spilled registers take.
    pub spilled_bytes: usize,
}

/// What a module was compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Architecture {
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Whether it is PTX, which drivers compile for any GPU of this capability or above. A cubin
    /// runs on GPUs of the same major capability only.
    pub is_ptx: bool,
}

impl TryFrom<String> for Architecture {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let parse = || {
            let (kind, digits) = name.split_once('_')?;
            let is_ptx = match kind {
                "sm" => false,
                "compute" => true,
                _ => return None,
            };
            let known =
                (2..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
            let number: u32 = known.then(|| digits.parse().ok())??;
            let capability = (number / 10, number % 10);
            Some(Self { capability, is_ptx })
        };
        parse().ok_or_else(|| format!("architecture {name} is none such as sm_90 or compute_120"))
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_ptx { "compute" } else { "sm" };
        let (major, minor) = self.capability;
        write!(f, "{kind}_{major}{minor}")
    }
}

impl Architecture {
    fn runs_on(self, capability: (u32, u32)) -> bool {
        self.capability <= capability && (self.is_ptx || self.capability.0 == capability.0)
    }
}

impl ChainKernels {
    /// The module for a GPU of compute capability `capability`: the newest cubin that it runs, or
    /// else PTX.
    pub fn module_for(&self, capability: (u32, u32)) -> Option<&ChainModule> {
        let modules = self.modules.iter();
        modules
            .filter(|module| module.architecture.runs_on(capability))
            .max_by_key(|module| (!module.architecture.is_ptx, module.architecture.capability))
    }

    /// Tables of rotary positions.
    pub fn rotary_tables(&self) -> usize {
        let tables = self.layers.iter().map(|layer| layer.rotary + 1);
        tables.max().unwrap_or(0)
    }

    /// Whether they are of `manifest`'s model and their files are listed.
    pub(super) fn match_model(&self, manifest: &Manifest) -> bool {
        let (shape, model) = (self.shape, &manifest.model);
        let heads = |kv: &super::KeyValueHeads| {
            (kv.heads, kv.head_size) == (shape.key_value_heads, shape.head_size)
        };
        let mut files = self.modules.iter().map(|module| &module.file);
        shape.is_sound()
            && self.block_bytes > 0
            && self.block_bytes <= HALF_BLOCK_BYTES
            && shape.hidden == model.hidden_size
            && shape.layers == model.num_layers
            && shape.vocabulary == model.vocab_size
            && manifest.key_value_heads.iter().all(heads)
            && self.layers.len() == shape.layers
            && self
                .layers
                .iter()
                .all(|layer| layer.rotary < shape.layers && layer.window <= MAX_SIZE)
            && self.modules.iter().all(ChainModule::is_whole)
            && files.all(|file| manifest.files.contains_key(file))
            && manifest.files.contains_key(&self.weights)
    }
}

impl ChainModule {
    fn is_whole(&self) -> bool {
        let rows = self.kernels.iter().map(|kernel| kernel.rows);
        self.architecture.is_ptx || rows.eq(KERNEL_ROWS)
    }
}

impl ChainShape {
    /// Rows of the projection to queries, keys and values.
    pub fn qkv_rows(self) -> usize {
        self.query_size() + 2 * self.key_value_heads * self.head_size
    }

    /// Numbers in a token's queries.
    pub fn query_size(self) -> usize {
        self.heads * self.head_size
    }

    fn is_sound(self) -> bool {
        let sizes = [
            self.hidden,
            self.heads.saturating_mul(self.head_size),
            self.intermediate.saturating_mul(2),
            self.layers,
            self.vocabulary,
        ];
        sizes.iter().all(|size| (1..=MAX_SIZE / 4).contains(size))
            && self.key_value_heads > 0
            && self.heads.is_multiple_of(self.key_value_heads)
            && self.rotary_size <= self.head_size
            && self.rotary_size.is_multiple_of(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn architecture(name: &str) -> Result<Architecture, String> {
        name.to_owned().try_into()
    }

    #[test]
    fn architectures_have_a_kind_and_a_capability() {
        for name in ["sm_80", "sm_90", "compute_120"] {
            assert_eq!(architecture(name).unwrap().to_string(), name);
        }
        for name in [
            "sm_9",
            "sm_90a",
            "sm90",
            "gfx_90",
            "sm_+90",
            "compute_1200",
            "",
        ] {
            let reason = architecture(name).unwrap_err();
            assert!(reason.contains("none such as sm_90"), "{reason}");
        }
    }

    #[test]
    fn the_newest_cubin_that_runs_comes_before_ptx() {
        let names = ["compute_120", "sm_80", "sm_86", "sm_90", "compute_80"];
        let modules = names.map(|name| ChainModule {
            file: name.into(),
            architecture: architecture(name).unwrap(),
            kernels: Vec::new(),
        });
        let kernels = ChainKernels {
            compiler: "13.0.88".into(),
            fingerprint: String::new(),
            shape: ChainShape {
                hidden: 8,
                heads: 2,
                key_value_heads: 1,
                head_size: 4,
                rotary_size: 4,
                intermediate: 8,
                layers: 1,
                vocabulary: 16,
            },
            options: ChainOptions {
                activation: Activation::Silu,
                norm_epsilon: 1e-6,
                attention_scale: 0.5,
                attention_softcap: 0.0,
                logits_softcap: 0.0,
                embedding_scale: 1.0,
            },
            layers: vec![ChainLayer {
                window: 0,
                rotary: 0,
            }],
            modules: modules.into(),
            weights: PathBuf::new(),
            block_bytes: HALF_BLOCK_BYTES,
        };
        let chosen = |major, minor| {
            let module = kernels.module_for((major, minor));
            module.map(|module| module.file.to_str().unwrap())
        };
        assert_eq!(chosen(7, 5), None);
        assert_eq!(chosen(8, 0), Some("sm_80"));
        assert_eq!(chosen(8, 9), Some("sm_86"));
        assert_eq!(chosen(9, 0), Some("sm_90"));
        assert_eq!(chosen(10, 0), Some("compute_80"));
        assert_eq!(chosen(12, 1), Some("compute_120"));
        assert_eq!(kernels.rotary_tables(), 1);
    }
}
