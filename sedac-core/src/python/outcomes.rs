//! What a generation gives.

use std::collections::BTreeMap;

use pyo3::prelude::*;

use crate::bundle::Certificate;
use crate::certification::Certification;
use crate::chain::{DraftSummary, FinishReason, Token};
use crate::policy::ExitReason;

/// One generated token: its id, the text it completes, the layers executed, and why no more.
#[pyclass(frozen, get_all, name = "Token")]
#[derive(Debug)]
pub(super) struct PyToken {
    id: u32,
    text: String,
    exit_layer: usize,
    exit_reason: ExitReason,
}

impl PyToken {
    pub(super) fn new(token: Token, text: String) -> Self {
        Self {
            id: token.id,
            text,
            exit_layer: token.exit.layer,
            exit_reason: token.exit.reason,
        }
    }
}

/// How the drafts of a generation went; all zero when nothing was drafted.
#[pyclass(frozen, get_all, name = "DraftSummary")]
#[derive(Debug, Clone)]
pub(super) struct PyDraftSummary {
    drafted: usize,
    accepted: usize,
    verify_passes: usize,
    draft_depths: BTreeMap<usize, usize>,
}

impl From<&DraftSummary> for PyDraftSummary {
    fn from(drafts: &DraftSummary) -> Self {
        Self {
            drafted: drafts.drafted,
            accepted: drafts.accepted,
            verify_passes: drafts.verify_passes,
            draft_depths: drafts.draft_depths.clone(),
        }
    }
}

/// A finished generation: its tokens, why it ended, times in milliseconds, text that no token
/// completed, and its drafts.
#[pyclass(frozen, get_all, name = "GenerationSummary")]
#[derive(Debug)]
pub(super) struct PyGenerationSummary {
    pub(super) tokens: Vec<Py<PyToken>>,
    pub(super) finish_reason: FinishReason,
    pub(super) prefill_ms: f64,
    pub(super) decode_ms: f64,
    pub(super) rest: String,
    /// A Chrome trace, as JSON, if asked for.
    pub(super) profile: Option<String>,
    pub(super) drafts: PyDraftSummary,
}

/// A text run with exits: the most probable token at each position but the first, and the layers
/// executed.
#[pyclass(frozen, get_all, name = "FollowedText")]
#[derive(Debug, Default)]
pub(super) struct PyFollowedText {
    pub(super) tokens: Vec<u32>,
    pub(super) exit_layers: Vec<usize>,
}

/// What is certified of tokens that exit, or why lossless mode's may not be full depth's; as a string,
/// one sentence.
#[pyclass(frozen, name = "Certification")]
#[derive(Debug)]
pub(super) struct PyCertification {
    certificate: Option<Box<Certificate>>,
    sentence: String,
}

impl From<&Certification> for PyCertification {
    fn from(certification: &Certification) -> Self {
        Self {
            certificate: match certification {
                Certification::Certified(certificate) => Some(certificate.clone()),
                Certification::Uncertified(_) | Certification::Rounded => None,
            },
            sentence: certification.to_string(),
        }
    }
}

#[pymethods]
impl PyCertification {
    /// The certificate as sedac_config.json has it; None where nothing is certified.
    #[getter]
    fn certificate<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(certificate) = &self.certificate else {
            return Ok(None);
        };
        let text = serde_json::to_string(certificate).expect("numbers and texts can be written");
        py.import("json")?.call_method1("loads", (text,)).map(Some)
    }

    fn __str__(&self) -> &str {
        &self.sentence
    }
}
