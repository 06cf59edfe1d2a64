//! bundle.json: what a bundle says of its model and engines.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain_kernels::ChainKernels;
use super::gate::FileEntry;
use super::plans::{PlanSet, PortableGraphs, Precision};
use crate::error::{Error, Result};
use crate::policy::{ExitRule, PolicySettings, Signal};

/// The schema of bundle.json that this crate reads.
pub const SCHEMA_VERSION: u64 = 2;

/// Numbers in the largest buffer that a bundle may ask for; no model needs more.
pub(crate) const MAX_BUFFER: usize = 1 << 40;

/// The largest tolerance that a build takes.
const MAX_TOLERANCE: f64 = 1e-2;

/// What the chain must know of the model.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelFacts {
    /// The model directory's name.
    pub name: String,
    /// transformers' model type.
    #[serde(rename = "type")]
    pub model_type: String,
    /// Numbers in the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Logits per token.
    pub vocab_size: usize,
    /// Tokens that end the text.
    pub eos_token_ids: Vec<u32>,
}

/// A tensor that the contexts engine gives and layers take, [1, tokens, ...]; -1 stands for tokens.
#[derive(Debug, Clone, Deserialize)]
pub struct ContextTensor {
    /// Its name in the graphs.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its element type.
    pub dtype: String,
}

impl ContextTensor {
    /// Numbers in it for `tokens` tokens; None where they are too many for any memory.
    pub(super) fn numbers(&self, tokens: usize) -> Option<usize> {
        let sizes = self.shape.iter();
        let sizes = sizes.map(|&size| usize::try_from(size).unwrap_or(tokens));
        let numbers = sizes.into_iter().try_fold(1, usize::checked_mul);
        numbers.filter(|&numbers| numbers < MAX_BUFFER)
    }

    /// Whether its only open axis can be the tokens, and it has no more numbers than any model's.
    fn is_sound(&self) -> bool {
        self.shape.iter().all(|&size| size > 0 || size == -1) && self.numbers(1).is_some()
    }
}

/// Cache geometry of one layer.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct KeyValueHeads {
    /// Key-value heads.
    pub heads: usize,
    /// Numbers in each head.
    pub head_size: usize,
}

/// An engine of consecutive decoder layers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Its graph, relative to the bundle.
    pub file: PathBuf,
    /// Its first layer, from 0.
    pub first_layer: usize,
    /// Its number of layers.
    pub num_layers: usize,
    /// The context tensors it takes.
    pub contexts: Vec<String>,
    /// Whether it gives the entropy probe's risk after its last layer.
    #[serde(default)]
    pub risk: bool,
}

impl LayerEntry {
    /// Its layers.
    pub fn range(&self) -> Range<usize> {
        self.first_layer..self.end()
    }

    /// The depth after its last layer.
    pub fn end(&self) -> usize {
        self.first_layer.saturating_add(self.num_layers)
    }
}

/// The engine that computes the signals for exiting after one depth.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExitEntry {
    /// The depth.
    pub depth: usize,
    /// Its graph, relative to the bundle.
    pub file: PathBuf,
    /// The graph that maps the residual stream here to what the head takes, if there is one (a
    /// tuned lens, Belrose et al. 2023, <https://arxiv.org/abs/2303.08112>).
    pub lens: Option<PathBuf>,
}

impl ExitEntry {
    /// Its graphs.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.file].into_iter().chain(&self.lens)
    }
}

/// A trained drafter's weights, of which its engines are made.
pub(crate) const DRAFTER_WEIGHTS: &str = "drafter.safetensors";

/// The engines of a trained drafter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DrafterEntry {
    /// The graph that makes a state of the model's hidden states.
    pub state: PathBuf,
    /// The graph that takes states and tokens to the next state and the draft vocabulary's logits.
    pub file: PathBuf,
    /// Depths whose hidden states it takes, ascending.
    pub feature_layers: Vec<usize>,
    /// Numbers in a key, and in a value, of its cache.
    pub key_value_size: usize,
    /// The tokens that it drafts, ascending.
    pub tokens: Vec<u32>,
}

impl DrafterEntry {
    /// Its graphs.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.state, &self.file].into_iter()
    }

    /// Every file of it.
    pub(crate) fn all_files(&self) -> impl Iterator<Item = &Path> {
        let weights = Path::new(DRAFTER_WEIGHTS);
        self.files().map(PathBuf::as_path).chain([weights])
    }

    /// Whether its layers and tokens are the model's.
    fn matches(&self, manifest: &Manifest) -> bool {
        let ascending = |a: &usize, b: &usize| a < b;
        let layers = manifest.engines.layers.iter();
        let ends: Vec<_> = layers.map(LayerEntry::end).collect();
        self.files().all(|file| manifest.is_engine(file))
            && !self.feature_layers.is_empty()
            && self.feature_layers.is_sorted_by(ascending)
            && self.feature_layers.iter().all(|depth| ends.contains(depth))
            && (1..MAX_BUFFER).contains(
                &self
                    .key_value_size
                    .saturating_mul(manifest.max_cache_length),
            )
            && !self.tokens.is_empty()
            && self.tokens.is_sorted_by(|a, b| a < b)
            && self
                .tokens
                .iter()
                .all(|&token| (token as usize) < manifest.model.vocab_size)
    }
}

/// An engine that fills the cache of one skipped layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyValueEntry {
    /// Its graph, relative to the bundle.
    pub file: PathBuf,
    /// The context tensors it takes.
    pub contexts: Vec<String>,
}

/// All engines of a bundle.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EngineFiles {
    /// Token ids, and position ids where the model embeds positions, to the residual stream.
    pub embed: PathBuf,
    /// Position ids to context tensors, where layers take any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<PathBuf>,
    /// Layer engines, shallowest first.
    pub layers: Vec<LayerEntry>,
    /// One per layer.
    pub key_value: Vec<KeyValueEntry>,
    /// The residual stream to logits.
    pub head: PathBuf,
    /// All layers in one engine, for comparison.
    pub monolith: LayerEntry,
    /// Exit engines, where the bundle was trained for them.
    #[serde(default)]
    pub exits: Vec<ExitEntry>,
    /// The layer engines without their MLPs, for soft exits; none, or one for each of `layers`.
    #[serde(default)]
    pub attention: Vec<LayerEntry>,
}

impl EngineFiles {
    /// Whether every graph is a checked graph of ONNX Runtime's and every context is one that the
    /// contexts engine gives.
    fn references_hold(&self, manifest: &Manifest) -> bool {
        let layers = self
            .layers
            .iter()
            .chain(&self.attention)
            .chain([&self.monolith]);
        let layers = layers.map(|entry| (&entry.file, &entry.contexts));
        let fills = self.key_value.iter();
        let fills = fills.map(|entry| (&entry.file, &entry.contexts));
        let known = |name: &String| {
            manifest
                .contexts
                .iter()
                .any(|context| context.name == *name)
        };
        let mut references = layers.chain(fills);
        references.all(|(file, contexts)| manifest.is_engine(file) && contexts.iter().all(known))
            && [&self.embed, &self.head]
                .into_iter()
                .chain(&self.contexts)
                .chain(self.exits.iter().flat_map(ExitEntry::files))
                .all(|file| manifest.is_engine(file))
    }
}

/// What a bundle's engines are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// ONNX Runtime.
    Onnxruntime,
}

impl Target {
    /// The name used in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Onnxruntime => "onnxruntime",
        }
    }
}

/// bundle.json.
#[derive(Debug, Clone, Deserialize)]
pub struct Manifest {
    /// The model's facts.
    pub model: ModelFacts,
    /// What runs the engines.
    pub target: Target,
    /// How numbers are stored.
    pub precision: Precision,
    /// Depths, in layers, at which a token may stop; the last is full depth.
    pub exit_layers: Vec<usize>,
    /// Positions a sequence may have.
    pub max_cache_length: usize,
    /// Cache geometry by layer.
    pub key_value_heads: Vec<KeyValueHeads>,
    /// What the contexts engine hands to the layers.
    pub contexts: Vec<ContextTensor>,
    /// The engines.
    pub engines: EngineFiles,
    /// The engines of a trained drafter, where there is one.
    pub drafter: Option<DrafterEntry>,
    /// Whether the bundle holds a tokenizer.
    pub tokenizer: bool,
    /// The largest difference from the original model that the build allowed.
    #[serde(default = "default_tolerance")]
    pub tolerance: f64,
    /// The graphs that TensorRT plans are built from, where the bundle has some.
    pub portable: Option<PortableGraphs>,
    /// TensorRT plans by target.
    #[serde(default)]
    pub plans: BTreeMap<String, PlanSet>,
    /// The graphs that ONNX Runtime runs on a GPU, where the bundle has some.
    pub onnxruntime_cuda: Option<PortableGraphs>,
    /// The kernels that run the whole chain, where the bundle has them.
    pub cuda: Option<ChainKernels>,
    /// Why no such kernels can run the model, where they were asked for.
    pub cuda_refusal: Option<String>,
    /// Size and digest of every file but bundle.json, its digest and sedac_config.json.
    pub files: BTreeMap<PathBuf, FileEntry>,
}

/// Whether `file` is a graph by its name.
pub(super) fn is_graph_name(file: &Path) -> bool {
    file.extension()
        .is_some_and(|extension| extension == "onnx")
}

/// What builds allow that say nothing else, older bundles' among them.
fn default_tolerance() -> f64 {
    1e-4
}

impl Manifest {
    /// Check that it is consistent; `path` names it.
    ///
    /// # Errors
    /// [`Error::Bundle`] when its engines and sizes fit no model.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let mut kernels = self.cuda.iter();
        let references_hold = self.engines.references_hold(self)
            && self.plan_references_hold()
            && kernels.all(|kernels| kernels.match_model(self))
            && self.drafter.iter().all(|entry| entry.matches(self));
        if self.engines_add_up() && self.sizes_are_sound() && references_hold {
            return Ok(());
        }
        let reason = "its engines do not add up to the model; build the bundle again";
        Err(Error::bundle(path, reason))
    }

    /// Whether `file` is a listed graph, and none that is there for GPUs.
    fn is_engine(&self, file: &Path) -> bool {
        self.is_graph(file) && !self.is_for_devices(file)
    }

    /// Whether `file` is listed and a graph by its name.
    pub(crate) fn is_graph(&self, file: &Path) -> bool {
        is_graph_name(file) && self.files.contains_key(file)
    }

    fn engines_add_up(&self) -> bool {
        let layers = self.model.num_layers;
        let covers = |entries: &[LayerEntry]| {
            let mut next = 0;
            entries.iter().all(|entry| {
                let follows = entry.first_layer == next && entry.num_layers > 0;
                next = entry.num_layers.saturating_add(next);
                follows
            }) && next == layers
        };
        let engines = &self.engines;
        let ends = |entries: &[LayerEntry]| entries.iter().map(LayerEntry::end).collect::<Vec<_>>();
        let exits = ends(&engines.layers);
        layers > 0
            && covers(&engines.layers)
            && covers(std::slice::from_ref(&engines.monolith))
            && (engines.attention.is_empty()
                || covers(&engines.attention) && ends(&engines.attention) == exits)
            && engines.contexts.is_some() != self.contexts.is_empty()
            && engines.key_value.len() == layers
            && self.key_value_heads.len() == layers
            && self.exit_layers.iter().all(|depth| exits.contains(depth))
            && self.exit_layers.is_sorted_by(|depth, next| depth < next)
            && self.exit_layers.last() == Some(&layers)
    }

    fn sizes_are_sound(&self) -> bool {
        let length = self.max_cache_length;
        // positions and lengths are int32 in the graphs
        let positions = 1..=i32::MAX as usize;
        let row = |numbers: usize| (1..MAX_BUFFER).contains(&numbers.saturating_mul(length));
        let caches = self.key_value_heads.iter();
        positions.contains(&length)
            && row(self.model.hidden_size)
            && (1..MAX_BUFFER).contains(&self.model.vocab_size)
            && caches
                .map(|kv| kv.heads.saturating_mul(kv.head_size))
                .all(row)
            && self.contexts.iter().all(ContextTensor::is_sound)
            && (0.0..=MAX_TOLERANCE).contains(&self.tolerance)
    }

    /// The digest of each file, by path.
    pub(crate) fn digests(&self) -> impl Iterator<Item = (&Path, &str)> {
        let files = self.files.iter();
        files.map(|(file, entry)| (file.as_path(), entry.sha256.as_str()))
    }

    /// The depths at which tokens may exit and an engine gives `signal`, ascending.
    pub fn trained_depths(&self, signal: Signal) -> Vec<usize> {
        let has_signal = |depth: &usize| match signal {
            Signal::None | Signal::Stability => true,
            Signal::Risk => {
                let mut layers = self.engines.layers.iter();
                layers.any(|entry| entry.risk && entry.end() == *depth)
            }
            Signal::Margin | Signal::Learned => {
                self.engines.exits.iter().any(|exit| exit.depth == *depth)
            }
        };
        let exits = self.exit_layers.iter().copied();
        exits
            .filter(|&depth| depth < self.model.num_layers)
            .filter(has_signal)
            .collect()
    }

    /// The rule that `policy` compiles to, if this bundle has all of its signals.
    ///
    /// # Errors
    /// [`Error::Setting`] when a setting is out of range, or naming the depth that lacks a signal.
    pub fn compile(&self, policy: &PolicySettings) -> Result<ExitRule> {
        let layers = self.model.num_layers;
        let rule = policy.compile(layers)?;
        if rule.is_soft() && self.engines.attention.is_empty() {
            let range = "hard; this bundle has no attention engines, build it again";
            return Err(Error::setting("exit_kind", "soft", range));
        }
        for depth in 1..=layers {
            for signal in rule.signals(depth) {
                if !matches!(signal, Signal::None | Signal::Stability) {
                    self.check_trained(signal, depth)?;
                }
            }
        }
        Ok(rule)
    }

    fn check_trained(&self, signal: Signal, depth: usize) -> Result<()> {
        let known = self.trained_depths(signal);
        if known.contains(&depth) {
            return Ok(());
        }
        let known: Vec<_> = known.iter().map(usize::to_string).collect();
        let known = match known.len() {
            0 => "none".into(),
            _ => known.join(", "),
        };
        let range = format!(
            "this bundle was trained for depths {known}; train others with sedac-export \
             train-probes"
        );
        Err(Error::setting(
            "thresholds",
            format!("at depth {depth}"),
            range,
        ))
    }
}
