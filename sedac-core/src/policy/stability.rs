//! V7: stop after K consecutive stable layers. No training.

use super::{ExitReason, Policy, Signals};
use crate::error::{Error, Result};

/// Stops a token once `consecutive_k` layers in a row had a stability of at least `tau`, but not
/// before `min_layer_ratio` of the layers ran.
///
/// Stability is at most 1, so a tau above 1 never stops a token.
#[derive(Debug, Clone)]
pub struct Stability {
    tau: f32,
    consecutive_k: usize,
    min_depth: usize,
    run: usize,
}

impl Stability {
    /// A policy for a model of `layers` layers.
    ///
    /// # Errors
    /// [`Error::Setting`] when tau is negative or no number, K is not in 1..=layers, or the ratio
    /// is not in 0..=1.
    pub fn new(
        tau: f32,
        consecutive_k: usize,
        min_layer_ratio: f32,
        layers: usize,
    ) -> Result<Self> {
        if !(tau >= 0.0 && tau.is_finite()) {
            return Err(Error::setting("tau", tau, "0 or more"));
        }
        if !(1..=layers).contains(&consecutive_k) {
            return Err(Error::setting(
                "consecutive_k",
                consecutive_k,
                format!("1 to {layers}, the model's layers"),
            ));
        }
        if !(0.0..=1.0).contains(&min_layer_ratio) {
            return Err(Error::setting("min_layer_ratio", min_layer_ratio, "0 to 1"));
        }
        Ok(Self {
            tau,
            consecutive_k,
            // rounding hides that 0.2 is not exactly representable
            min_depth: (f64::from(min_layer_ratio) * layers as f64 - 1e-6).ceil() as usize,
            run: 0,
        })
    }
}

impl Policy for Stability {
    fn begin(&mut self) {
        self.run = 0;
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        self.run = if signals.stability >= self.tau {
            self.run + 1
        } else {
            0
        };
        (self.run >= self.consecutive_k && depth >= self.min_depth).then_some(ExitReason::Stability)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_depth(policy: &mut Stability, stabilities: &[f32]) -> Option<usize> {
        policy.begin();
        (1..).zip(stabilities).find_map(|(depth, &stability)| {
            let signals = Signals {
                stability,
                ..Signals::default()
            };
            policy.observe(depth, signals).map(|_| depth)
        })
    }

    #[test]
    fn a_dip_restarts_the_run() {
        let mut policy = Stability::new(0.9, 2, 0.0, 6).unwrap();
        assert_eq!(exit_depth(&mut policy, &[0.95, 0.5, 0.95, 0.95]), Some(4));
    }

    #[test]
    fn a_new_token_starts_without_a_run() {
        let mut policy = Stability::new(0.9, 2, 0.0, 6).unwrap();
        assert_eq!(exit_depth(&mut policy, &[0.5, 0.95]), None);
        assert_eq!(exit_depth(&mut policy, &[0.95, 0.5]), None);
    }

    #[test]
    fn the_run_counts_before_the_minimum_but_exits_after() {
        let mut policy = Stability::new(0.9, 2, 0.5, 6).unwrap();
        assert_eq!(exit_depth(&mut policy, &[1.0; 6]), Some(3));
    }

    #[test]
    fn a_whole_number_of_layers_is_not_rounded_up() {
        let mut policy = Stability::new(0.0, 1, 0.2, 10).unwrap();
        assert_eq!(exit_depth(&mut policy, &[1.0; 10]), Some(2));
        let mut policy = Stability::new(0.0, 1, 0.2, 24).unwrap();
        assert_eq!(exit_depth(&mut policy, &[1.0; 24]), Some(5));
    }

    #[test]
    fn nan_is_never_stable() {
        let mut policy = Stability::new(0.0, 1, 0.0, 4).unwrap();
        assert_eq!(exit_depth(&mut policy, &[f32::NAN; 4]), None);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        assert!(Stability::new(f32::NAN, 2, 0.2, 4).is_err());
        assert!(Stability::new(-0.1, 2, 0.2, 4).is_err());
        assert!(Stability::new(0.9, 0, 0.2, 4).is_err());
        assert!(Stability::new(0.9, 5, 0.2, 4).is_err());
        assert!(Stability::new(0.9, 2, 1.1, 4).is_err());
    }
}
