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

    /// A prompt does not fit, or holds nothing, or holds something that is no token.
    #[error("the prompt {0}")]
    Prompt(String),

    /// ONNX Runtime could not be loaded.
    #[error("ONNX Runtime cannot be loaded from {}: {reason}; install onnxruntime 1.30 or newer", path.display())]
    Library {
        /// The shared library tried.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },

    /// ONNX Runtime failed.
    #[error("{what}: {source}")]
    Engine {
        /// The engine and what it was doing.
        what: String,
        /// ONNX Runtime's error.
        source: ort::Error,
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
