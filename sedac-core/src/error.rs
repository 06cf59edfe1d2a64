//! Everything that can go wrong, one variant a kind, each carrying what it is about.

use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong: the thing, the reason and the remedy, in one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory is not a bundle, or its manifest cannot be used.
    #[error("{}: {reason}", path.display())]
    Bundle {
        /// The bundle's directory or the file concerned.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },

    /// A file of a bundle is not what the manifest says.
    #[error("{} is {state}; build or copy the bundle again", path.display())]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// "missing", "truncated" or "altered".
        state: &'static str,
    },

    /// A bundle needs more memory than it may take.
    #[error(
        "{} needs {} MiB of memory and may take {} MiB; free some, raise the memory limit, run fewer \
         sequences at once or build it with a smaller --max-cache-length",
        path.display(),
        needed.div_ceil(1 << 20),
        limit >> 20
    )]
    Memory {
        /// The bundle's directory.
        path: PathBuf,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that it may take.
        limit: u64,
    },

    /// A setting is out of range.
    #[error("{name} {value} is out of range: {range}")]
    Setting {
        /// The setting's name as users write it.
        name: &'static str,
        /// The value given.
        value: String,
        /// What is allowed.
        range: String,
    },

    /// A setting would do nothing where it is.
    #[error("{name} belongs to {owner}, not to {place}")]
    Misplaced {
        /// The setting's name as users write it.
        name: &'static str,
        /// What the setting is of.
        owner: &'static str,
        /// Where it was set, and what to do.
        place: String,
    },

    /// A policy has no thresholds to decide by.
    #[error(
        "policy {policy} has no thresholds in this bundle; run sedac-export train-probes, \
         then calibrate or set a threshold"
    )]
    MissingThresholds {
        /// The policy's name.
        policy: &'static str,
    },

    /// A prompt does not fit, or holds nothing, or holds something that is not a token.
    #[error("the prompt {0}")]
    Prompt(String),

    /// ONNX Runtime could not be loaded.
    #[error("ONNX Runtime cannot be loaded from {}: {reason}; install onnxruntime 1.31 or newer", path.display())]
    Library {
        /// The shared library tried.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },

    /// ONNX Runtime failed.
    #[error("{what}: {}", one_line(source))]
    Engine {
        /// The engine and what it was doing.
        what: String,
        /// ONNX Runtime's error.
        source: ort::Error,
    },

    /// A logit is NaN or infinite.
    #[error(
        "the logits of position {position} are not finite{}; build the bundle again from sound \
         weights, or in a --precision that holds the model's numbers",
        engine.as_ref().map_or(String::new(), |name| format!(": {name} is the first to give such numbers"))
    )]
    NotFinite {
        /// The first position concerned, counted from 0.
        position: usize,
        /// The engine that the numbers come from, where it could be found.
        engine: Option<String>,
    },

    /// A device or an engine on it failed.
    #[error("{what}: {reason}")]
    Device {
        /// What was used.
        what: String,
        /// What it says, and what to do.
        reason: String,
    },

    /// The tokenizer failed.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),

    /// Reading a file failed.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },

    /// The caller asked to stop.
    #[error("stopped")]
    Cancelled,
}

/// ONNX Runtime's messages have several lines.
fn one_line(error: &ort::Error) -> String {
    let message = error.to_string();
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Error {
    /// A [`Error::Bundle`] about `path`.
    pub(crate) fn bundle(path: &Path, reason: impl Into<String>) -> Self {
        Self::Bundle {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// A [`Error::Setting`] with `value` as given.
    pub(crate) fn setting(
        name: &'static str,
        value: impl ToString,
        range: impl Into<String>,
    ) -> Self {
        Self::Setting {
            name,
            value: value.to_string(),
            range: range.into(),
        }
    }
}
