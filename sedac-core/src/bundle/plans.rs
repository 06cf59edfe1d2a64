//! What a bundle says of its portable graphs and of the TensorRT plans built from them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Bundle, LayerEntry, MAX_BUFFER, Manifest};
use crate::error::{Error, Result};

/// How a bundle's graphs store and, on a device, compute numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single.
    Fp32,
    /// IEEE half.
    Fp16,
    /// bfloat16.
    Bf16,
    /// 8 bits a weight in blocks with a scale each; computed in single precision on CPUs, on devices
    /// in half.
    Int8,
    /// The same with 4 bits.
    Int4,
}

impl Precision {
    /// Whether weights are in blocks of integers.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }
}

/// What TensorRT plans are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlanTarget {
    /// TensorRT.
    TensorRt,
    /// TensorRT for RTX.
    TensorRtRtx,
}

impl PlanTarget {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::TensorRt, Self::TensorRtRtx];

    /// The name used in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::TensorRt => "tensorrt",
            Self::TensorRtRtx => "tensorrt-rtx",
        }
    }
}

/// Element type of a context tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// IEEE single.
    Float32,
    /// IEEE half.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// Signed, 8 bytes.
    Int64,
    /// Signed, 4 bytes.
    Int32,
    /// A byte.
    Bool,
}

impl ElementType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Int64 => 8,
            Self::Float32 | Self::Int32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Bool => 1,
        }
    }
}

/// A context tensor as portable graphs have it; -1 stands for the sequences, first, and the tokens.
#[derive(Debug, Clone, Deserialize)]
pub struct PortableContext {
    /// Its element type.
    pub dtype: ElementType,
    shape: Vec<i64>,
}

impl PortableContext {
    /// Whether it has the axes that are needed, and no more numbers than any model's.
    fn is_sound(&self) -> bool {
        let numbers = self
            .shape_for(1)
            .into_iter()
            .try_fold(1, usize::checked_mul);
        self.shape.len() >= 2 && numbers.is_some_and(|numbers| (1..MAX_BUFFER).contains(&numbers))
    }

    /// Its shape for one sequence of `tokens` tokens.
    pub fn shape_for(&self, tokens: usize) -> Vec<usize> {
        let sizes = self.shape.iter().enumerate();
        sizes
            .map(|(axis, &size)| match (axis, usize::try_from(size)) {
                (_, Ok(size)) => size,
                (0, Err(_)) => 1,
                (_, Err(_)) => tokens,
            })
            .collect()
    }
}

/// A portable graph of consecutive decoder layers.
#[derive(Debug, Clone, Deserialize)]
pub struct PortableLayers {
    file: PathBuf,
    first_layer: usize,
    /// Its number of layers.
    pub num_layers: usize,
    /// Whether it gives the stability of its layers.
    #[serde(default = "given")]
    pub stability: bool,
}

fn given() -> bool {
    true
}

impl PortableLayers {
    /// Whether its layers' stability can be known: the host has the residual streams before and after
    /// an engine, and not those inside of it.
    fn tells_stability(&self) -> bool {
        self.stability || self.num_layers == 1
    }

    /// Its layers, from 0.
    pub fn range(&self) -> Range<usize> {
        self.first_layer..self.first_layer.saturating_add(self.num_layers)
    }
}

/// The graphs of all engines in the bundle's own precision: those that plans are built from, or those
/// that ONNX Runtime runs on a GPU.
#[derive(Debug, Clone, Deserialize)]
pub struct PortableGraphs {
    embed: PathBuf,
    /// What gives the contexts, where there are any.
    contexts_graph: Option<PathBuf>,
    /// Shallowest first.
    pub layers: Vec<PortableLayers>,
    key_value: Vec<PathBuf>,
    head: PathBuf,
    /// What layers take beside the residual stream, by name.
    pub contexts: BTreeMap<String, PortableContext>,
    /// By name of the mask input: positions that a token sees through it, 0 for all. None of ONNX
    /// Runtime's graphs has one.
    pub masks: BTreeMap<String, usize>,
}

impl PortableGraphs {
    /// Its files.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let layers = self.layers.iter().map(|entry| &entry.file);
        let ends = [&self.embed, &self.head].into_iter();
        let ends = ends.chain(&self.contexts_graph);
        ends.chain(layers).chain(&self.key_value)
    }

    /// Whether these are graphs of `manifest`'s engines.
    fn matches(&self, manifest: &Manifest) -> bool {
        let own = self.layers.iter().map(PortableLayers::range);
        let engines = manifest.engines.layers.iter();
        own.eq(engines.map(|entry: &LayerEntry| entry.first_layer..entry.end()))
            && self.layers.iter().all(PortableLayers::tells_stability)
            && self.key_value.len() == manifest.model.num_layers
            && self.contexts_graph.is_some() != self.contexts.is_empty()
            && self.contexts.values().all(PortableContext::is_sound)
    }
}

/// A target's plans.
#[derive(Debug, Clone, Deserialize)]
pub struct PlanSet {
    options: BuildOptions,
    plans: Vec<PlanEntry>,
}

#[derive(Debug, Clone, Deserialize)]
struct BuildOptions {
    max_prefill_chunk: usize,
}

#[derive(Debug, Clone, Deserialize)]
struct PlanEntry {
    file: PathBuf,
    graph: PathBuf,
}

/// The files of a target's plans, relative to the bundle.
#[derive(Debug, Clone)]
pub struct PlanFiles {
    /// Tokens that a pass may have, 1 or more.
    pub max_prefill_chunk: usize,
    /// Token ids, and position ids where the model embeds positions, to the residual stream.
    pub embed: PathBuf,
    /// Position ids to context tensors, where layers take any.
    pub contexts: Option<PathBuf>,
    /// Layer engines, shallowest first.
    pub layers: Vec<PathBuf>,
    /// One per layer.
    pub key_value: Vec<PathBuf>,
    /// The residual stream to logits.
    pub head: PathBuf,
}

impl PlanFiles {
    /// All of them.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let ends = [&self.embed, &self.head].into_iter();
        let ends = ends.chain(&self.contexts);
        let files = ends.chain(&self.layers).chain(&self.key_value);
        files.map(PathBuf::as_path)
    }
}

impl Manifest {
    /// Whether portable graphs and plans are among the checked files, and the graphs are graphs by
    /// their names.
    pub(crate) fn plan_references_hold(&self) -> bool {
        let plans = self.plans.values().flat_map(|set| &set.plans);
        let plans = plans.flat_map(|entry| [&entry.file, &entry.graph]);
        plans.into_iter().all(|file| self.files.contains_key(file))
            && self.device_graphs().all(|file| self.is_graph(file))
    }

    /// Whether `file` is there for GPUs only.
    pub(crate) fn is_for_devices(&self, file: &Path) -> bool {
        file.starts_with("engines") || self.device_graphs().any(|graph| graph == file)
    }

    fn device_graphs(&self) -> impl Iterator<Item = &PathBuf> {
        let graphs = self.portable.iter().chain(&self.onnxruntime_cuda);
        graphs.flat_map(PortableGraphs::files)
    }

    /// The graphs that ONNX Runtime runs on a GPU, as plans that need no building. None where the
    /// bundle has none of its engines.
    fn graphs_for_cuda(&self) -> Option<(&PortableGraphs, PlanFiles)> {
        let graphs = self.onnxruntime_cuda.as_ref()?;
        let layers = graphs.layers.iter().map(|entry| entry.file.clone());
        let files = PlanFiles {
            max_prefill_chunk: usize::MAX,
            embed: graphs.embed.clone(),
            contexts: graphs.contexts_graph.clone(),
            layers: layers.collect(),
            key_value: graphs.key_value.clone(),
            head: graphs.head.clone(),
        };
        graphs.matches(self).then_some((graphs, files))
    }

    /// The portable graphs and the plans of `target`, such as `tensorrt-rtx`. None where one of
    /// them is missing or of other engines than the bundle's.
    pub fn plans_for(&self, target: &str) -> Option<(&PortableGraphs, PlanFiles)> {
        let portable = self.portable.as_ref()?;
        let set = self.plans.get(target)?;
        let plan = |graph: &PathBuf| {
            let mut plans = set.plans.iter();
            plans
                .find(|entry| entry.graph == *graph)
                .map(|entry| entry.file.clone())
        };
        let layers = portable.layers.iter().map(|entry| plan(&entry.file));
        let plans = PlanFiles {
            max_prefill_chunk: set.options.max_prefill_chunk.max(1),
            embed: plan(&portable.embed)?,
            contexts: match &portable.contexts_graph {
                Some(graph) => Some(plan(graph)?),
                None => None,
            },
            layers: layers.collect::<Option<_>>()?,
            key_value: portable.key_value.iter().map(plan).collect::<Option<_>>()?,
            head: plan(&portable.head)?,
        };
        portable.matches(self).then_some((portable, plans))
    }
}

impl Bundle {
    /// The graphs that ONNX Runtime runs on a GPU, as plans that need no building.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it holds none of its engines.
    pub fn graphs_for_cuda(&self) -> Result<(&PortableGraphs, PlanFiles)> {
        let graphs = self.manifest.graphs_for_cuda();
        graphs.ok_or_else(|| {
            let reason = "holds no graphs for ONNX Runtime on a GPU; add them with sedac-export \
                          engines --target onnxruntime-cuda and --model";
            Error::bundle(&self.gate.shown_directory(), reason)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_axes_are_one_sequence_and_the_tokens() {
        let context = |shape: &str| -> PortableContext {
            let json = format!(r#"{{"dtype": "float16", "shape": {shape}}}"#);
            serde_json::from_str(&json).unwrap()
        };
        assert_eq!(context("[-1, -1, 32]").shape_for(7), [1, 7, 32]);
        assert_eq!(context("[1, -1, 32]").shape_for(1), [1, 1, 32]);
    }
}
