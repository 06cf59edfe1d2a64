//! Decisions over many tokens, and thresholds that move.

use std::collections::BTreeMap;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::error::InputError;
use super::policy_settings::PyPolicySettings;
use super::process;
use crate::backend::stability;
use crate::policy::{self, BatchDecision, BatchSignals, ExitSignals, Stability, Thresholds};

/// Where n tokens exit that go through the layers together.
#[pyclass(name = "BatchDecision")]
pub(super) struct PyBatchDecision {
    decision: BatchDecision,
    layers: usize,
    tokens: usize,
}

#[pymethods]
impl PyBatchDecision {
    /// Of tokens that exit by `policy`, after the depths `exit_layers`, in a model of `num_layers`
    /// layers. full_depth: bool [n], the tokens that never exit.
    #[new]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python's arguments arrive by value"
    )]
    fn new(
        py: Python<'_>,
        policy: PyPolicySettings,
        num_layers: usize,
        exit_layers: Vec<usize>,
        full_depth: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        process::check()?;
        let full_depth = flags(py, full_depth)?;
        let rule = policy.0.compile(num_layers)?;
        Ok(Self {
            decision: BatchDecision::new(rule, &exit_layers, num_layers, &full_depth),
            layers: num_layers,
            tokens: full_depth.len(),
        })
    }

    /// Whether what is decided after `depth` layers depends on the entropy probe's risk.
    fn reads_risk(&self, depth: usize) -> PyResult<bool> {
        self.check_depth(depth)?;
        Ok(self.decision.rule().reads_risk(depth))
    }

    /// Whether what is decided after `depth` layers depends on the exit head.
    fn reads_exit_head(&self, depth: usize) -> PyResult<bool> {
        self.check_depth(depth)?;
        Ok(self.decision.rule().reads_exit_head(depth))
    }

    /// `depth` layers have run; asked after every layer, in order. stability: float32 [n]. risk:
    /// float32 [n], and exit_signals: float32 [n, 3] (margin, entropy, learned), where they are
    /// read.
    #[pyo3(signature = (depth, stability, risk = None, exit_signals = None))]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python buffers arrive by value"
    )]
    fn observe(
        &mut self,
        py: Python<'_>,
        depth: usize,
        stability: PyBuffer<f32>,
        risk: Option<PyBuffer<f32>>,
        exit_signals: Option<PyBuffer<f32>>,
    ) -> PyResult<()> {
        process::check()?;
        self.check_depth(depth)?;
        for (name, buffer, read, shape) in [
            ("stability", Some(&stability), true, &[self.tokens][..]),
            (
                "risk",
                risk.as_ref(),
                self.reads_risk(depth)?,
                &[self.tokens],
            ),
            (
                "exit_signals",
                exit_signals.as_ref(),
                self.reads_exit_head(depth)?,
                &[self.tokens, 3],
            ),
        ] {
            check_signal(name, buffer, read, shape)?;
        }
        let stability = stability.to_vec(py)?;
        let risk = risk.map(|risk| risk.to_vec(py)).transpose()?;
        let exit = exit_signals.map(|signals| signals.to_vec(py)).transpose()?;
        let decision = &mut self.decision;
        py.detach(move || {
            let exit: Option<Vec<_>> =
                exit.map(|exit| exit.as_chunks().0.iter().map(exit_signal).collect());
            let signals = BatchSignals {
                stability: &stability,
                risk: risk.as_deref(),
                exit: exit.as_deref(),
            };
            decision.observe(depth, &signals);
        });
        Ok(())
    }

    /// The depth of each token's decision to exit, int64 [n]; the number of layers without one.
    #[getter]
    fn exit_layers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        depths(py, self.decision.exit_layers())
    }

    /// Whether each token has left, bool [n]; soft exits stay.
    #[getter]
    fn exited<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let bytes: Vec<_> = self.decision.exited().map(u8::from).collect();
        array(py, &bytes, "?")
    }

    /// The first layer that each token runs without its MLP, int64 [n]; the number of layers if
    /// none.
    #[getter]
    fn skip_from<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        depths(py, self.decision.skip_from())
    }
}

impl PyBatchDecision {
    fn check_depth(&self, depth: usize) -> PyResult<()> {
        if (1..=self.layers).contains(&depth) {
            return Ok(());
        }
        Err(InputError::new_err(format!(
            "depth {depth} is out of range: 1 to {}, the model's layers",
            self.layers
        )))
    }
}

/// Check that a signal is there if it is read, and that it is of `shape`.
fn check_signal(
    name: &str,
    buffer: Option<&PyBuffer<f32>>,
    read: bool,
    shape: &[usize],
) -> PyResult<()> {
    match buffer {
        None if read => Err(InputError::new_err(format!(
            "{name} is missing, which the policy reads at this depth"
        ))),
        Some(buffer) if buffer.shape() != shape => Err(InputError::new_err(format!(
            "{name} of shape {:?} is out of range: {shape:?}",
            buffer.shape()
        ))),
        _ => Ok(()),
    }
}

fn exit_signal(&[margin, entropy, learned]: &[f32; 3]) -> ExitSignals {
    ExitSignals {
        margin,
        entropy,
        learned,
    }
}

/// The values of a buffer of bools.
fn flags(py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<Vec<bool>> {
    // PyO3 has no buffers of bools, whose elements are bytes
    let bytes = PyMemoryView::from(buffer)?.call_method1("cast", ("B",))?;
    let bytes = PyBuffer::<u8>::get(&bytes)?.to_vec(py)?;
    Ok(bytes.into_iter().map(|byte| byte != 0).collect())
}

fn depths<'py>(
    py: Python<'py>,
    depths: impl Iterator<Item = usize>,
) -> PyResult<Bound<'py, PyAny>> {
    let bytes: Vec<_> = depths
        .flat_map(|depth| (depth as i64).to_ne_bytes())
        .collect();
    array(py, &bytes, "q")
}

/// A memoryview of elements of `format`.
fn array<'py>(py: Python<'py>, bytes: &[u8], format: &str) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyMemoryView::from(&PyBytes::new(py, bytes))?;
    bytes.call_method1("cast", (format,))
}

/// Thresholds by depth that threads read and move without locks.
#[pyclass(frozen, name = "Thresholds")]
pub(super) struct PyThresholds(Thresholds);

#[pymethods]
impl PyThresholds {
    #[new]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python dicts arrive by value"
    )]
    fn new(values: BTreeMap<usize, f32>) -> Self {
        Self(Thresholds::new(&values))
    }

    /// The threshold at `depth`; None where there is none.
    fn get(&self, depth: usize) -> Option<f32> {
        self.0.get(depth)
    }

    /// Move a threshold towards the quantile of `risks` at `exit_rate`, and return it.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python buffers arrive by value"
    )]
    fn follow(
        &self,
        py: Python<'_>,
        depth: usize,
        risks: PyBuffer<f32>,
        exit_rate: f32,
        step: f32,
    ) -> PyResult<f32> {
        let mut risks = risks.to_vec(py)?;
        Ok(py.detach(|| self.0.follow(depth, &mut risks, exit_rate, step))?)
    }
}

/// The stability of a layer for each token, as where the host computes it.
///
/// before, after: float32 [tokens, hidden], the residual stream before the layer and after it.
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "Python buffers arrive by value"
)]
pub(super) fn stabilities(
    py: Python<'_>,
    before: PyBuffer<f32>,
    after: PyBuffer<f32>,
) -> PyResult<Vec<f32>> {
    process::check()?;
    let (tokens, hidden) = rows("before", &before)?;
    if rows("after", &after)? != (tokens, hidden) {
        let shape = after.shape();
        return Err(InputError::new_err(format!(
            "after of shape {shape:?} is out of range: [{tokens}, {hidden}], as before"
        )));
    }
    let (before, after) = (before.to_vec(py)?, after.to_vec(py)?);
    Ok(py.detach(|| {
        let rows = before.chunks_exact(hidden).zip(after.chunks_exact(hidden));
        rows.map(|(before, after)| stability(before, after))
            .collect()
    }))
}

/// The depth after which each token exits by consecutive stable layers.
///
/// stability: float32 [tokens, layers].
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "Python buffers arrive by value"
)]
pub(super) fn exits_by_stability(
    py: Python<'_>,
    stability: PyBuffer<f32>,
    tau: f32,
    consecutive_k: usize,
    min_layer_ratio: f64,
) -> PyResult<Vec<u32>> {
    process::check()?;
    let (tokens, layers) = rows("stability", &stability)?;
    let policy = Stability {
        tau,
        consecutive_k,
        min_layer_ratio,
    };
    let stability = stability.to_vec(py)?;
    Ok(py.detach(|| {
        let mut exits = vec![0; tokens];
        policy::exits_by_stability(&stability, layers, &policy, &mut exits).map(|()| exits)
    })?)
}

/// The depth after which each token exits by risk; `layers` where no risk is below its threshold.
///
/// risks: float32 [tokens, depths of thresholds, ascending].
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "Python buffers arrive by value"
)]
pub(super) fn exits_by_risk(
    py: Python<'_>,
    risks: PyBuffer<f32>,
    thresholds: &PyThresholds,
    layers: usize,
) -> PyResult<Vec<u32>> {
    process::check()?;
    let (tokens, depths) = rows("risks", &risks)?;
    if depths != thresholds.0.depths().len() {
        return Err(InputError::new_err(format!(
            "risks of {depths} depths are out of range: the {} of the thresholds",
            thresholds.0.depths().len()
        )));
    }
    let risks = risks.to_vec(py)?;
    Ok(py.detach(|| {
        let mut exits = vec![0; tokens];
        policy::exits_by_risk(&risks, &thresholds.0, layers, &mut exits).map(|()| exits)
    })?)
}

fn rows(name: &str, buffer: &PyBuffer<f32>) -> PyResult<(usize, usize)> {
    match buffer.shape() {
        &[tokens, width] if width > 0 => Ok((tokens, width)),
        shape => Err(InputError::new_err(format!(
            "{name} of shape {shape:?} is out of range: [tokens, depths]"
        ))),
    }
}
