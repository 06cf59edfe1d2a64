//! Decisions over many tokens, and thresholds that move.

use std::collections::BTreeMap;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use super::error::InputError;
use super::process;
use crate::policy::{self, Stability};

/// Thresholds by depth that threads read and move without locks.
#[pyclass(frozen)]
pub(super) struct Thresholds(policy::Thresholds);

#[pymethods]
impl Thresholds {
    #[new]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python dicts arrive by value"
    )]
    fn new(values: BTreeMap<usize, f32>) -> Self {
        Self(policy::Thresholds::new(&values))
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
    thresholds: &Thresholds,
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
