//! A bundle on disk: its files, its manifest and its exit configuration, checked before use.

mod certificate;
mod chain_kernels;
mod exit_config;
mod gate;
mod graphs;
mod manifest;
mod memory;
pub mod onnx;
mod plans;
mod verified;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest, Sha256};

#[cfg(test)]
pub(crate) use self::certificate::tests::certificate as test_certificate;
pub use self::certificate::{
    CalibrationMode, Certificate, CertifiedSetting, GenerationSpeeds, TokenChoice, drafter_name,
};
pub use self::chain_kernels::{
    Activation, Architecture, ChainKernels, ChainLayer, ChainModule, ChainOptions, ChainShape,
    CompiledKernel,
};
pub(crate) use self::chain_kernels::{HALF_BLOCK_BYTES, KERNEL_ROWS};
pub(crate) use self::exit_config::EXIT_CONFIG;
pub use self::exit_config::{DrafterKind, ExitConfig};
pub(crate) use self::gate::hex;
pub use self::gate::{FileEntry, Gate, Verify};
pub use self::manifest::{
    ContextTensor, DrafterEntry, EngineFiles, ExitEntry, KeyValueEntry, KeyValueHeads, LayerEntry,
    Manifest, ModelFacts, SCHEMA_VERSION, Target,
};
pub(crate) use self::manifest::{DRAFTER_WEIGHTS, MAX_BUFFER};
pub(crate) use self::memory::DeviceBudget;
pub use self::plans::{
    ElementType, PlanFiles, PlanSet, PlanTarget, PortableContext, PortableGraphs, PortableLayers,
    Precision,
};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;

const MANIFEST: &str = "bundle.json";
const MANIFEST_DIGEST: &str = "bundle.sha256";

/// Largest manifest, digest line or exit configuration that is read; they are text of some KB.
pub(crate) const MAX_TEXT: u64 = 1 << 26;

/// How a bundle is opened.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// Which files are hashed.
    pub verify: Verify,
    /// Threads that hash; 0 takes all processors.
    pub threads: usize,
    /// Bytes that the loaded bundle may take; None means what is available.
    pub memory_limit: Option<u64>,
    /// Where files below this directory of the bundle are about to be replaced, and are not looked
    /// at.
    pub replaced: Option<PathBuf>,
    /// Whether a bundle of an older schema is opened too, to upgrade it: nothing here runs it. Its
    /// files are checked, but its manifest and graphs are not compared with each other.
    pub older: bool,
    /// Ends the check of the files when raised.
    pub interrupt: Interrupt,
}

/// A bundle whose files have been checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Access to its files.
    pub gate: Arc<Gate>,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its exit configuration.
    pub exit_config: ExitConfig,
    /// SHA-256 of its manifest, in lower-case hexadecimal.
    pub digest: String,
    memory_limit: Option<u64>,
}

impl Bundle {
    /// Read the bundle in `directory` and check every file that the manifest lists.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn open(directory: &Path) -> Result<Self> {
        Self::open_with(directory, &Opening::default())
    }

    /// As [`open`](Self::open), as `opening` says.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is no bundle, of another schema or inconsistent, or when one of
    /// its files is no regular file inside of it, [`Error::DamagedFile`] naming a file that is
    /// missing, truncated or altered, [`Error::Io`] when a file cannot be read,
    /// [`Error::Cancelled`] when interrupted.
    pub fn open_with(directory: &Path, opening: &Opening) -> Result<Self> {
        let files = check_files(directory, opening)?;
        Ok(Self {
            exit_config: ExitConfig::read(&files.gate, &files.manifest)?,
            gate: Arc::new(files.gate),
            manifest: files.manifest,
            digest: files.digest,
            memory_limit: opening.memory_limit,
        })
    }
}

/// The checked files of a bundle.
pub(crate) struct Files {
    pub(crate) gate: Gate,
    /// The text of bundle.json.
    #[cfg_attr(
        not(feature = "python"),
        expect(dead_code, reason = "the binding reads it")
    )]
    pub(crate) text: Vec<u8>,
    pub(crate) manifest: Manifest,
    digest: String,
}

/// Check the files of the bundle in `directory`: its manifest, what that lists, and the graphs.
///
/// # Errors
/// As [`Bundle::open_with`].
pub(crate) fn check_files(directory: &Path, opening: &Opening) -> Result<Files> {
    let mut gate = Gate::open(directory)?;
    let (text, schema) = read_schema(&gate, if opening.older { 1 } else { SCHEMA_VERSION })?;
    let is_current = schema == SCHEMA_VERSION;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| {
        let reason = format!("{error}; build the bundle again");
        Error::bundle(&gate.shown(MANIFEST), reason)
    })?;
    if is_current {
        manifest.check(&gate.shown(MANIFEST))?;
    }
    let mut files = manifest.files.clone();
    if let Some(replaced) = &opening.replaced {
        files.retain(|name, _| !name.starts_with(replaced));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(opening.threads);
    let pool = pool.build().map_err(|error| {
        let reason = format!("cannot be checked by several threads: {error}");
        Error::bundle(directory, reason)
    })?;
    let digest = hex(&Sha256::digest(&text));
    pool.install(|| gate.check(files, &digest, opening.verify, &opening.interrupt))?;
    memory::check_reading(&gate, &manifest, opening.memory_limit)?;
    // no digest covers it, but a file of the bundle it must be for those who copy or sign all
    gate.read_unlisted(Path::new(EXIT_CONFIG), MAX_TEXT)?;
    gate.graphs = graphs::check(&gate, &manifest, is_current)?;
    Ok(Files {
        gate,
        text,
        manifest,
        digest,
    })
}

/// The text of bundle.json, which has its digest and the schema that is read.
///
/// # Errors
/// [`Error::Bundle`] when there is none or it is of another schema, [`Error::DamagedFile`] when it
/// is not what its digest says, [`Error::Io`] when it cannot be read.
#[cfg_attr(
    not(feature = "python"),
    expect(dead_code, reason = "the binding reads it")
)]
pub(crate) fn read_manifest(gate: &Gate) -> Result<Vec<u8>> {
    read_schema(gate, SCHEMA_VERSION).map(|(text, _)| text)
}

/// As [`read_manifest`], of a schema not before `oldest`; that too.
fn read_schema(gate: &Gate, oldest: u64) -> Result<(Vec<u8>, u64)> {
    let text = gate.read_unlisted(Path::new(MANIFEST), MAX_TEXT)?;
    let text = text.ok_or_else(|| {
        let reason = "not a bundle (it holds no bundle.json); build one with sedac-export build";
        Error::bundle(&gate.shown_directory(), reason)
    })?;
    let schema = check_schema(gate, &text, oldest)?;
    check_manifest_digest(gate, &text)?;
    Ok((text, schema))
}

/// The schema comes first: a newer manifest need not parse, and must not be called damaged.
fn check_schema(gate: &Gate, text: &[u8], oldest: u64) -> Result<u64> {
    #[derive(Deserialize)]
    struct Schema {
        schema_version: u64,
    }
    let path = gate.shown(MANIFEST);
    let refused = |reason: String| Error::bundle(&path, reason);
    let Schema { schema_version } = serde_json::from_slice(text)
        .map_err(|error| refused(format!("not a manifest ({error}); build the bundle again")))?;
    match schema_version {
        newer if newer > SCHEMA_VERSION => Err(refused(format!(
            "schema {newer} is newer than {SCHEMA_VERSION}, the newest this runtime reads; update \
             sedac-runtime"
        ))),
        older if older < oldest => Err(refused(format!(
            "schema {older} is older than {SCHEMA_VERSION}, which this runtime reads; run \
             sedac-export upgrade {}",
            path.parent().unwrap_or(&path).display()
        ))),
        known => Ok(known),
    }
}

fn check_manifest_digest(gate: &Gate, text: &[u8]) -> Result<()> {
    let damaged = |name, state| {
        let path = gate.shown(name);
        Error::DamagedFile { path, state }
    };
    let line = gate.read_unlisted(Path::new(MANIFEST_DIGEST), MAX_TEXT)?;
    let line = line.ok_or_else(|| damaged(MANIFEST_DIGEST, "missing"))?;
    let line = String::from_utf8_lossy(&line);
    if line.split_whitespace().next() == Some(hex(&Sha256::digest(text)).as_str()) {
        return Ok(());
    }
    Err(damaged(MANIFEST, "altered"))
}
