//! Numbers by depth, as policies have them, and the rules that compare one at each of some depths.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::ExitReason;
use super::rule::{Comparison, Condition, Criterion, ExitRule, Signal};
use crate::error::{Error, Result};

/// Numbers by depth, which is the number of layers run.
pub type ByDepth = BTreeMap<usize, f32>;

/// The keys of JSON objects are strings.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<ByDepth, D::Error> {
    let texts = BTreeMap::<String, f32>::deserialize(deserializer)?;
    texts
        .into_iter()
        .map(|(depth, value)| match depth.parse() {
            Ok(depth) => Ok((depth, value)),
            Err(_) => Err(D::Error::custom(format!("{depth:?} is not a depth"))),
        })
        .collect()
}

/// The rule that compares `signal` with the threshold of each depth that has one.
pub(super) fn rule(
    reason: ExitReason,
    signal: Signal,
    comparison: Comparison,
    thresholds: &ByDepth,
    layers: usize,
) -> ExitRule {
    ExitRule::new(Criterion::new(reason, layers, |depth| {
        let Some(&threshold) = thresholds.get(&depth) else {
            return Condition::default();
        };
        Condition {
            signal,
            comparison,
            threshold,
            run_length: 1,
            may_exit: 1,
            ..Condition::default()
        }
    }))
}

/// Check thresholds on a risk, which is an entropy.
///
/// # Errors
/// [`Error::Setting`] when there are none, one is not above 0, or its depth none of `layers` layers.
pub(super) fn check_risks(thresholds: &ByDepth, layers: usize) -> Result<()> {
    let sound = |value: f32| value > 0.0 && value.is_finite();
    check_thresholds(thresholds, layers, sound, "above 0")
}

/// Check thresholds on a probability.
///
/// # Errors
/// [`Error::Setting`] when there are none, one is not in 0..=1, or its depth none of `layers` layers.
pub(super) fn check_probabilities(thresholds: &ByDepth, layers: usize) -> Result<()> {
    let sound = |value| (0.0..=1.0).contains(&value);
    check_thresholds(thresholds, layers, sound, "0 to 1")
}

fn check_thresholds(
    thresholds: &ByDepth,
    layers: usize,
    sound: fn(f32) -> bool,
    range: &str,
) -> Result<()> {
    if thresholds.is_empty() {
        return Err(Error::setting("thresholds", "(none)", "one or more depths"));
    }
    check_values("thresholds", thresholds, sound, range)?;
    match thresholds
        .keys()
        .find(|depth| !(1..=layers).contains(depth))
    {
        Some(depth) => Err(Error::setting(
            "thresholds",
            format!("at depth {depth}"),
            format!("depths of the model's {layers} layers"),
        )),
        None => Ok(()),
    }
}

/// Check that each value of the setting `name` is sound.
///
/// # Errors
/// [`Error::Setting`] naming the first that is not, and its depth.
pub(super) fn check_values(
    name: &'static str,
    values: &ByDepth,
    sound: fn(f32) -> bool,
    range: &str,
) -> Result<()> {
    match values.iter().find(|&(_, &value)| !sound(value)) {
        Some((depth, value)) => Err(Error::setting(
            name,
            format!("{value} at depth {depth}"),
            range,
        )),
        None => Ok(()),
    }
}
