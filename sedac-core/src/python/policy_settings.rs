//! Policies and their settings.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::policy::{ExitKind, PolicyKind, PolicySettings};

/// A policy and its settings, by the names that sedac_config.json has for them.
#[pyclass(frozen, eq, from_py_object, name = "PolicySettings")]
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PyPolicySettings(pub(super) PolicySettings);

type Numbers = BTreeMap<usize, f64>;

#[pymethods]
impl PyPolicySettings {
    /// Settings that are None have the policy's default.
    #[new]
    #[pyo3(signature = (
        policy, *, tau = None, consecutive_k = None, min_layer_ratio = None, thresholds = None,
        decay = None, weights = None, targets = None, exit_kind = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn new(
        policy: PolicyKind,
        tau: Option<f64>,
        consecutive_k: Option<usize>,
        min_layer_ratio: Option<f64>,
        thresholds: Option<Numbers>,
        decay: Option<f64>,
        weights: Option<Numbers>,
        targets: Option<Numbers>,
        exit_kind: Option<ExitKind>,
    ) -> Result<Self> {
        let given = [
            ("tau", tau.map(Value::from)),
            ("consecutive_k", consecutive_k.map(Value::from)),
            ("min_layer_ratio", min_layer_ratio.map(Value::from)),
            ("thresholds", thresholds.map(object)),
            ("decay", decay.map(Value::from)),
            ("weights", weights.map(object)),
            ("targets", targets.map(object)),
            ("exit_kind", exit_kind.map(|kind| kind.name().into())),
        ];
        let given = given
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)));
        let policy_name = [("policy".to_owned(), policy.name().into())];
        let fields: Map<_, _> = given.chain(policy_name).collect();
        serde_json::from_value(fields.into())
            .map(Self)
            .map_err(|error| Error::setting("policy", policy.name(), error.to_string()))
    }

    /// The policy's name.
    #[getter]
    fn policy(&self) -> PolicyKind {
        self.0.kind()
    }
}

fn object(numbers: Numbers) -> Value {
    let fields = numbers.into_iter();
    let fields = fields.map(|(depth, value)| (depth.to_string(), Value::from(value)));
    Value::Object(fields.collect())
}
