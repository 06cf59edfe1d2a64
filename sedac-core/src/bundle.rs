//! A bundle on disk: its manifest, its exit configuration, and the check that all files are whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::exit_config::ExitConfig;
use crate::plans::{PlanSet, PortableGraphs, Precision};
use crate::policy::{PolicySettings, Source};

/// The newest schema of bundle.json that this crate reads.
pub const SCHEMA_VERSION: u64 = 1;

/// Numbers in the largest buffer that a bundle may ask for; more is no model's but an error's.
pub(crate) const LARGEST_BUFFER: usize = 1 << 40;

const MANIFEST: &str = "bundle.json";
const MANIFEST_DIGEST: &str = "bundle.sha256";

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

/// An embed output that layers take, of shape [1, tokens, ...]; -1 stands for tokens.
#[derive(Debug, Clone, Deserialize)]
pub struct ContextTensor {
    /// Its name in the graphs.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its element type.
    pub dtype: String,
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
#[derive(Debug, Clone, Deserialize)]
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
    /// The depth after its last layer.
    pub fn end(&self) -> usize {
        self.first_layer.saturating_add(self.num_layers)
    }
}

/// The engine that tells about exiting after one depth.
#[derive(Debug, Clone, Deserialize)]
pub struct ExitEntry {
    /// The depth.
    pub depth: usize,
    /// Its graph, relative to the bundle.
    pub file: PathBuf,
    /// The graph that maps the residual stream here to what the head takes, if there is one (a
    /// tuned lens, Belrose et al. 2023, <https://arxiv.org/abs/2303.08112>).
    pub lens: Option<PathBuf>,
}

/// An engine that fills the cache of one skipped layer.
#[derive(Debug, Clone, Deserialize)]
pub struct KeyValueEntry {
    /// Its graph, relative to the bundle.
    pub file: PathBuf,
    /// The context tensors it takes.
    pub contexts: Vec<String>,
}

/// All engines of a bundle.
#[derive(Debug, Clone, Deserialize)]
pub struct Engines {
    /// Token and position ids to the residual stream and contexts.
    pub embed: PathBuf,
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

impl Engines {
    /// Whether every graph is among the checked files and every context is one that embed gives.
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
        references
            .all(|(file, contexts)| manifest.files.contains_key(file) && contexts.iter().all(known))
            && [&self.embed, &self.head]
                .into_iter()
                .chain(self.exits.iter().map(|exit| &exit.file))
                .chain(self.exits.iter().filter_map(|exit| exit.lens.as_ref()))
                .all(|file| manifest.files.contains_key(file))
    }
}

/// Size and digest of a file.
#[derive(Debug, Clone, Deserialize)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// What a bundle's engines are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// ONNX Runtime.
    Onnxruntime,
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
    /// What embed hands to the layers.
    pub contexts: Vec<ContextTensor>,
    /// The engines.
    pub engines: Engines,
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
    files: BTreeMap<PathBuf, FileEntry>,
}

/// What builds allow that say nothing else, older bundles' among them.
fn default_tolerance() -> f64 {
    1e-4
}

impl Manifest {
    /// Whether `file` is among those whose size and digest are checked.
    pub(crate) fn is_checked(&self, file: &Path) -> bool {
        self.files.contains_key(file)
    }

    /// The depths at which tokens may exit and an engine tells what a policy reads, ascending.
    pub fn trained_depths(&self, source: Source) -> Vec<usize> {
        let has_source = |depth: &usize| match source {
            Source::Risk => {
                let mut layers = self.engines.layers.iter();
                layers.any(|entry| entry.risk && entry.end() == *depth)
            }
            Source::Exit => self.engines.exits.iter().any(|exit| exit.depth == *depth),
        };
        let exits = self.exit_layers.iter().copied();
        exits
            .filter(|&depth| depth < self.model.num_layers)
            .filter(has_source)
            .collect()
    }

    /// Check that tokens may exit where `policy` decides, and that there is an engine there which
    /// tells what it reads.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the depth.
    pub fn check_policy(&self, policy: &PolicySettings) -> Result<()> {
        if policy.is_soft() && self.engines.attention.is_empty() {
            let range = "hard; this bundle has no attention engines, build it again";
            return Err(Error::setting("exit_kind", "soft", range));
        }
        let Some((source, thresholds)) = policy.reads() else {
            return Ok(());
        };
        let known = self.trained_depths(source);
        match thresholds.keys().find(|depth| !known.contains(depth)) {
            Some(depth) => {
                let known: Vec<_> = known.iter().map(usize::to_string).collect();
                let range = format!(
                    "this bundle was trained for depths {}; train others with sedac-export \
                     train-probes",
                    if known.is_empty() {
                        "none".into()
                    } else {
                        known.join(", ")
                    },
                );
                Err(Error::setting(
                    "thresholds",
                    format!("at depth {depth}"),
                    range,
                ))
            }
            None => Ok(()),
        }
    }
}

/// A bundle whose files have been checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Its directory.
    pub directory: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its exit configuration.
    pub exit_config: ExitConfig,
}

impl Bundle {
    /// Read the bundle in `directory` and check every file that the manifest lists.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is no bundle, of another schema or inconsistent,
    /// [`Error::DamagedFile`] naming a file that is missing, truncated or altered,
    /// [`Error::Io`] when a file cannot be read.
    pub fn open(directory: &Path) -> Result<Self> {
        let manifest = read_manifest(directory)?;
        manifest
            .files
            .par_iter()
            .map(|(name, entry)| check_file(&directory.join(name), entry))
            .collect::<Result<()>>()?;
        check_consistent(directory, &manifest)?;
        Ok(Self {
            directory: directory.to_owned(),
            exit_config: ExitConfig::read(directory, &manifest)?,
            manifest,
        })
    }
}

fn read_manifest(directory: &Path) -> Result<Manifest> {
    let path = directory.join(MANIFEST);
    let text = fs::read(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::bundle(
            directory,
            "not a bundle (it holds no bundle.json); build one with sedac-export build",
        ),
        _ => Error::Io {
            path: path.clone(),
            source,
        },
    })?;
    check_schema(&path, &text)?;
    check_manifest_digest(directory, &text)?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::bundle(&path, format!("{error}; build the bundle again")))
}

/// The schema comes first: a newer manifest need not parse, and must not be called damaged.
fn check_schema(path: &Path, text: &[u8]) -> Result<()> {
    #[derive(Deserialize)]
    struct Schema {
        schema_version: u64,
    }
    let Schema { schema_version } = serde_json::from_slice(text).map_err(|error| {
        Error::bundle(
            path,
            format!("not a manifest ({error}); build the bundle again"),
        )
    })?;
    if schema_version > SCHEMA_VERSION {
        return Err(Error::bundle(
            path,
            format!(
                "schema {schema_version} is newer than {SCHEMA_VERSION}, the newest this runtime \
                 reads; update sedac-runtime"
            ),
        ));
    }
    Ok(())
}

fn check_manifest_digest(directory: &Path, text: &[u8]) -> Result<()> {
    let path = directory.join(MANIFEST_DIGEST);
    let Ok(line) = fs::read_to_string(&path) else {
        let state = "missing";
        return Err(Error::DamagedFile { path, state });
    };
    if line.split_whitespace().next() == Some(hex(&Sha256::digest(text)).as_str()) {
        return Ok(());
    }
    Err(Error::DamagedFile {
        path: directory.join(MANIFEST),
        state: "altered",
    })
}

fn check_file(path: &Path, entry: &FileEntry) -> Result<()> {
    let damaged = |state| Error::DamagedFile {
        path: path.to_owned(),
        state,
    };
    let Ok(metadata) = fs::metadata(path) else {
        return Err(damaged("missing"));
    };
    if metadata.len() < entry.bytes {
        return Err(damaged("truncated"));
    }
    let digest = sha256(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })?;
    if digest != entry.sha256 {
        return Err(damaged("altered"));
    }
    Ok(())
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A manifest that is whole may still be one that nobody should have written.
fn check_consistent(directory: &Path, manifest: &Manifest) -> Result<()> {
    let layers = manifest.model.num_layers;
    let covers = |entries: &[LayerEntry]| {
        let mut next = 0;
        entries.iter().all(|entry| {
            let follows = entry.first_layer == next && entry.num_layers > 0;
            next = entry.num_layers.saturating_add(next);
            follows
        }) && next == layers
    };
    let ends: Vec<usize> = manifest
        .engines
        .layers
        .iter()
        .map(LayerEntry::end)
        .collect();
    let monolith = std::slice::from_ref(&manifest.engines.monolith);
    let sound = layers > 0
        && covers(&manifest.engines.layers)
        && covers(monolith)
        && (manifest.engines.attention.is_empty()
            || ends.iter().eq(&manifest
                .engines
                .attention
                .iter()
                .map(LayerEntry::end)
                .collect::<Vec<_>>())
                && covers(&manifest.engines.attention))
        && manifest.engines.key_value.len() == layers
        && manifest.key_value_heads.len() == layers
        && manifest.model.hidden_size > 0
        && manifest.max_cache_length > 0
        && manifest
            .model
            .hidden_size
            .saturating_mul(manifest.max_cache_length)
            < LARGEST_BUFFER
        && manifest
            .exit_layers
            .iter()
            .all(|depth| ends.contains(depth))
        && manifest.engines.references_hold(manifest);
    if sound {
        return Ok(());
    }
    let path = directory.join(MANIFEST);
    Err(Error::bundle(
        &path,
        "its engines do not add up to the model; build the bundle again",
    ))
}
