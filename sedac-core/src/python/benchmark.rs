//! What a benchmark is given and gives.

use pyo3::prelude::*;

use super::decoding_settings::PyDecodingMode;
use crate::bench::{BenchCase, BenchRow};
use crate::error::{Error, Result};
use crate::text::TextCodec;

/// A decoding mode to measure, and the name of its row.
#[pyclass(frozen, from_py_object, name = "BenchCase")]
#[derive(Debug, Clone)]
pub(super) struct PyBenchCase {
    name: String,
    mode: PyDecodingMode,
    pub(super) monolith: bool,
}

#[pymethods]
impl PyBenchCase {
    /// monolith: whether one engine that holds all layers runs it, which exits nowhere.
    #[new]
    #[pyo3(signature = (name, mode, *, monolith = false))]
    fn new(name: String, mode: PyDecodingMode, monolith: bool) -> Self {
        Self {
            name,
            mode,
            monolith,
        }
    }
}

impl From<PyBenchCase> for BenchCase {
    fn from(case: PyBenchCase) -> Self {
        Self {
            name: case.name,
            chain: usize::from(case.monolith),
            mode: case.mode.0,
        }
    }
}

/// A row; Python gets it as a dict.
#[derive(Debug, IntoPyObject)]
pub(super) struct PyBenchRow {
    name: String,
    ms_per_token: f64,
    tokens_per_second: f64,
    min_ms: f64,
    max_ms: f64,
    mean_exit_layer: f64,
    speedup: f64,
    agreement: f64,
}

impl From<BenchRow> for PyBenchRow {
    fn from(row: BenchRow) -> Self {
        Self {
            name: row.name,
            ms_per_token: row.ms_per_token,
            tokens_per_second: 1e3 / row.ms_per_token,
            min_ms: row.min_ms,
            max_ms: row.max_ms,
            mean_exit_layer: row.mean_exit_layer,
            speedup: row.speedup,
            agreement: row.agreement,
        }
    }
}

/// A text or its tokens.
#[derive(FromPyObject)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Its first `count` tokens.
    pub(super) fn first(self, count: usize, codec: Option<&TextCodec>) -> Result<Vec<u32>> {
        let mut tokens = match self {
            Self::Tokens(tokens) => tokens,
            Self::Text(text) => {
                let reason = "is a text, but this bundle has no tokenizer";
                let codec = codec.ok_or_else(|| Error::Prompt(reason.into()))?;
                codec.encode(&text, true)?
            }
        };
        if tokens.len() < count {
            let range = format!("at most the {} tokens of the text", tokens.len());
            return Err(Error::setting("prompt_tokens", count, range));
        }
        tokens.truncate(count);
        Ok(tokens)
    }
}
