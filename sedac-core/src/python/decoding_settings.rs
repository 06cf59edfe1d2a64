//! How tokens are decoded and chosen.

use pyo3::prelude::*;

use super::policy_settings::PyPolicySettings;
use super::spellings::NO_DRAFTER;
use crate::bundle::DrafterKind;
use crate::chain::{DecodingMode, DecodingSetting, ModeName};
use crate::kv::KvFill;
use crate::sampler::Sampling;

/// When tokens exit.
#[pyclass(frozen, from_py_object, name = "DecodingMode")]
#[derive(Debug, Clone)]
pub(super) struct PyDecodingMode(pub(super) DecodingMode);

#[pymethods]
impl PyDecodingMode {
    /// Never.
    #[staticmethod]
    fn full() -> Self {
        Self(DecodingMode::Full)
    }

    /// Where `policy` says so; `drafter` drafts the tokens in between.
    #[staticmethod]
    #[pyo3(signature = (policy, drafter = None))]
    fn exit(policy: PyPolicySettings, drafter: Option<DrafterKind>) -> Self {
        Self(DecodingMode::Exit {
            policy: policy.0,
            drafter,
        })
    }

    /// Only to draft: full depth verifies what `drafter` drafts.
    #[staticmethod]
    fn lossless(drafter: DrafterKind) -> Self {
        Self(DecodingMode::Lossless { drafter })
    }

    /// After `depths` layers, taken in turn.
    #[staticmethod]
    fn forced(depths: Vec<usize>) -> Self {
        Self(DecodingMode::Forced { depths })
    }
}

/// When tokens exit, and what the caches of skipped layers get.
#[pyclass(frozen, from_py_object, name = "DecodingSetting")]
#[derive(Debug, Clone)]
pub(super) struct PyDecodingSetting(pub(super) DecodingSetting);

#[pymethods]
impl PyDecodingSetting {
    #[new]
    #[pyo3(signature = (mode, kv_fill = KvFill::Propagate))]
    fn new(mode: PyDecodingMode, kv_fill: KvFill) -> Self {
        Self(DecodingSetting {
            mode: mode.0,
            kv_fill,
        })
    }

    /// The mode's name; forced exits are exits.
    #[getter]
    fn mode(&self) -> ModeName {
        self.0.mode.name()
    }

    /// What the caches of skipped layers get.
    #[getter]
    fn kv_fill(&self) -> KvFill {
        self.0.kv_fill
    }

    /// What drafts, "none" where nothing does.
    #[getter]
    fn drafter(&self) -> &'static str {
        self.0.mode.drafter().map_or(NO_DRAFTER, DrafterKind::name)
    }
}

/// How tokens are chosen. The defaults are greedy.
#[pyclass(frozen, from_py_object, name = "Sampling")]
#[derive(Debug, Clone, Copy)]
pub(super) struct PySampling(pub(super) Sampling);

#[pymethods]
impl PySampling {
    #[new]
    #[pyo3(signature = (
        *, temperature = 0.0, top_k = 0, top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0,
        seed = 0
    ))]
    fn new(
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        seed: u64,
    ) -> Self {
        Self(Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
        })
    }
}
