//! Stop after consecutive stable layers. No training. V7 of the original project.

use serde::{Deserialize, Serialize};

use super::rule::{Condition, Criterion, ExitRule, Signal};
use super::{ExitPolicy, ExitReason};
use crate::error::{Error, Result};

/// Stops a token once `consecutive_k` layers in a row had a stability of at least `tau`, but not
/// before `min_layer_ratio` of the layers ran.
///
/// Stability is at most 1, so a tau above 1 never stops a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stability {
    /// Stability a layer must reach.
    pub tau: f32,
    /// Layers in a row that must reach it.
    pub consecutive_k: usize,
    /// Share of the layers that always run.
    pub min_layer_ratio: f64,
}

impl Default for Stability {
    fn default() -> Self {
        Self {
            tau: 0.98,
            consecutive_k: 2,
            min_layer_ratio: 0.2,
        }
    }
}

impl Stability {
    fn check(&self, layers: usize) -> Result<()> {
        if !(self.tau >= 0.0 && self.tau.is_finite()) {
            return Err(Error::setting("tau", self.tau, "0 or more"));
        }
        if !(1..=layers).contains(&self.consecutive_k) {
            return Err(Error::setting(
                "consecutive_k",
                self.consecutive_k,
                format!("1 to {layers}, the model's layers"),
            ));
        }
        if !(0.0..=1.0).contains(&self.min_layer_ratio) {
            return Err(Error::setting(
                "min_layer_ratio",
                self.min_layer_ratio,
                "0 to 1",
            ));
        }
        Ok(())
    }
}

impl ExitPolicy for Stability {
    fn compile(&self, layers: usize) -> Result<ExitRule> {
        self.check(layers)?;
        let min_depth = min_depth(self.min_layer_ratio, layers);
        let condition = |depth| Condition {
            signal: Signal::Stability,
            threshold: self.tau,
            run_length: self.consecutive_k as u32,
            may_exit: u32::from(depth >= min_depth),
            ..Condition::default()
        };
        Ok(ExitRule::new(Criterion::new(
            ExitReason::Stability,
            layers,
            condition,
        )))
    }
}

/// The fewest of `layers` layers that are at least the share `ratio`. 0.28 of 25 layers are 7,
/// though 0.28 * 25 is a little more in floating point.
fn min_depth(ratio: f64, layers: usize) -> usize {
    (ratio * layers as f64 - 1e-9).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_is_the_shares_plain_reading_for_every_number_of_layers() {
        for layers in 1..=200 {
            for depth in 0..=layers {
                let ratio = depth as f64 / layers as f64;
                assert_eq!(min_depth(ratio, layers), depth, "{depth} of {layers}");
            }
            for percent in 0..=100 {
                let exact = (percent * layers).div_ceil(100);
                let ratio: f64 = format!("0.{percent:02}").parse().unwrap();
                let ratio = if percent == 100 { 1.0 } else { ratio };
                assert_eq!(min_depth(ratio, layers), exact, "{percent} % of {layers}");
            }
        }
    }

    #[test]
    fn every_layer_counts_and_those_below_the_minimum_hold_no_exit() {
        let policy = Stability {
            min_layer_ratio: 0.5,
            ..Stability::default()
        };
        let rule = policy.compile(6).unwrap();
        let exits: Vec<_> = (1..=6).map(|depth| rule.may_exit(depth)).collect();
        assert_eq!(exits, [false, false, true, true, true, true]);
        let rows = &rule.criteria()[0].conditions;
        assert!(
            rows.iter()
                .all(|row| row.signal == Signal::Stability && row.run_length == 2)
        );
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let refused = |tau, consecutive_k, min_layer_ratio| {
            let policy = Stability {
                tau,
                consecutive_k,
                min_layer_ratio,
            };
            policy.compile(4).is_err()
        };
        assert!(refused(f32::NAN, 2, 0.2));
        assert!(refused(-0.1, 2, 0.2));
        assert!(refused(0.9, 0, 0.2));
        assert!(refused(0.9, 5, 0.2));
        assert!(refused(0.9, 2, 1.1));
        assert!(!refused(2.0, 4, 1.0));
    }
}
