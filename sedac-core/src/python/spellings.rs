//! How enums are spelled in Python, which writes them as strings.

use std::convert::Infallible;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::bundle::{CalibrationMode, DrafterKind, PlanTarget, Target, TokenChoice, Verify};
use crate::chain::{DrafterChoice, FinishReason, ModeName};
use crate::error::Error;
use crate::kv::KvFill;
use crate::policy::{ExitKind, ExitReason, PolicyKind};

/// The drafter's name where tokens are not drafted.
pub(super) const NO_DRAFTER: &str = "none";

/// The name of the backend of CUDA kernels.
pub(super) const CUDA: &str = "cuda";

/// The name of the processor that others stand beside.
pub(super) const CPU: &str = "cpu";

/// The name of ONNX Runtime on a GPU where "auto" does not take it.
pub(super) const ONNXRUNTIME_CUDA: &str = "onnxruntime on cuda";

/// An enum whose values have names.
pub(super) trait Spelled: Copy + 'static {
    /// The setting's name.
    const SETTING: &'static str;

    /// All values and their names.
    fn all() -> impl Iterator<Item = (Self, &'static str)>;

    fn names() -> Vec<&'static str> {
        Self::all().map(|(_, name)| name).collect()
    }

    fn parse(name: &str) -> crate::Result<Self> {
        let known = Self::all().find(|&(_, known)| known == name);
        known
            .map(|(value, _)| value)
            .ok_or_else(|| Error::setting(Self::SETTING, name, Self::names().join(" or ")))
    }
}

macro_rules! spelled {
    ($($setting:literal: $type:ty,)*) => {
        $(
            impl Spelled for $type {
                const SETTING: &'static str = $setting;

                fn all() -> impl Iterator<Item = (Self, &'static str)> {
                    Self::ALL.iter().map(|&value| (value, value.name()))
                }
            }

            impl<'py> IntoPyObject<'py> for $type {
                type Target = PyString;
                type Output = Bound<'py, PyString>;
                type Error = Infallible;

                fn into_pyobject(self, py: Python<'py>) -> Result<Self::Output, Infallible> {
                    Ok(PyString::new(py, self.name()))
                }
            }

            impl<'py> FromPyObject<'_, 'py> for $type {
                type Error = PyErr;

                fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
                    Ok(Self::parse(object.extract::<&str>()?)?)
                }
            }
        )*

        /// The names of every enum, by the setting that takes them.
        pub(super) fn all<'py>(py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
            let spellings = PyDict::new(py);
            $(spellings.set_item($setting, PyTuple::new(py, <$type>::names())?)?;)*
            let engines = [Target::Onnxruntime.name()];
            let backends = engines.into_iter().chain(PlanTarget::names()).chain([CUDA]);
            spellings.set_item("backend", PyTuple::new(py, backends.collect::<Vec<_>>())?)?;
            Ok(spellings)
        }
    };
}

spelled! {
    "policy": PolicyKind,
    "exit_kind": ExitKind,
    "exit_reason": ExitReason,
    "kv_fill": KvFill,
    "drafter": DrafterKind,
    "mode": ModeName,
    "finish_reason": FinishReason,
    "verify": Verify,
    "target": PlanTarget,
    "device": PlanDevice,
    "calibration_mode": CalibrationMode,
    "decoding": TokenChoice,
}

/// Whose memory plans, or graphs for GPUs, run over.
#[derive(Debug, Clone, Copy)]
pub(super) enum PlanDevice {
    /// The first GPU's.
    Cuda,
    /// The host's: what an executor is told to run is done when it returns.
    Host,
}

impl PlanDevice {
    const ALL: [Self; 2] = [Self::Cuda, Self::Host];

    fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Host => "host",
        }
    }
}

/// What runs a bundle's chain where no executor has to run its plans.
#[derive(Debug, Clone, Copy)]
pub(super) enum BackendChoice {
    /// The first of these that can: the bundle's CUDA kernels, its plans, ONNX Runtime on a
    /// GPU, and on the CPU.
    Auto,
    /// ONNX Runtime.
    Onnxruntime,
    /// The bundle's CUDA kernels.
    Cuda,
}

impl<'py> FromPyObject<'_, 'py> for BackendChoice {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let known = [
            ("auto", Self::Auto),
            (Target::Onnxruntime.name(), Self::Onnxruntime),
            (CUDA, Self::Cuda),
        ];
        let name: &str = object.extract()?;
        let choice = known.into_iter().find(|&(known, _)| known == name);
        let choice = choice.map(|(_, choice)| choice);
        let range = "auto, onnxruntime or cuda, where no executor runs plans";
        Ok(choice.ok_or_else(|| Error::setting("backend", name, range))?)
    }
}

impl<'py> FromPyObject<'_, 'py> for DrafterChoice {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let name: &str = object.extract()?;
        if name == NO_DRAFTER {
            return Ok(Self::Off);
        }
        Ok(Self::By(DrafterKind::parse(name)?))
    }
}
