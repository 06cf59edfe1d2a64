//! Which policy decides: the bundle's own, or what a caller sets instead.

use super::cascade::default_decay;
use super::{
    ByDepth, Cascade, ExitKind, Learned, Margin, PolicyKind, PolicySettings, Probe, Stability,
};
use crate::error::{Error, Result};

/// What a caller sets of a policy; None leaves it as the bundle has it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PolicyChoice {
    /// The policy. Without it, settings of `stability` choose that policy.
    pub policy: Option<PolicyKind>,
    /// The threshold at every depth the bundle was trained for, of any policy but `stability`.
    pub threshold: Option<f32>,
    /// Of `stability`.
    pub tau: Option<f32>,
    /// Of `stability`.
    pub consecutive_k: Option<usize>,
    /// Of `stability`.
    pub min_layer_ratio: Option<f64>,
}

impl PolicyChoice {
    /// The settings that decide where a bundle's own are `own`; those hold as far as they are of the
    /// same policy. `trained_depths` gives the depths that the bundle was trained for.
    ///
    /// # Errors
    /// [`Error::Misplaced`] when a setting belongs to another policy, [`Error::MissingThresholds`]
    /// when it has none.
    pub fn resolve(
        &self,
        own: &PolicySettings,
        trained_depths: impl FnOnce(PolicyKind) -> Vec<usize>,
    ) -> Result<PolicySettings> {
        let policy = self.kind(own);
        self.check_belongs_to(policy)?;
        if policy == PolicyKind::Stability {
            return Ok(PolicySettings::Stability(self.stability(own)));
        }
        let Some(threshold) = self.threshold else {
            return if own.kind() == policy {
                Ok(own.clone())
            } else {
                Err(missing_thresholds(policy))
            };
        };
        let at_all = |value| move |depth| (depth, value);
        let depths = trained_depths(policy);
        if depths.is_empty() {
            return Err(missing_thresholds(policy));
        }
        let thresholds: ByDepth = depths.iter().copied().map(at_all(threshold)).collect();
        Ok(match policy {
            PolicyKind::Stability => unreachable!("it has no thresholds"),
            PolicyKind::Probe => PolicySettings::Probe(Probe { thresholds }),
            PolicyKind::Margin => PolicySettings::Margin(Margin { thresholds }),
            PolicyKind::Learned => PolicySettings::Learned(Learned { thresholds }),
            PolicyKind::Cascade => {
                let (decay, exit_kind) = match own {
                    PolicySettings::Cascade(own) => (own.decay, own.exit_kind),
                    _ => (default_decay(), ExitKind::default()),
                };
                let ones: ByDepth = depths.into_iter().map(at_all(1.0)).collect();
                PolicySettings::Cascade(Cascade {
                    thresholds,
                    decay,
                    weights: ones.clone(),
                    targets: ones,
                    exit_kind,
                })
            }
        })
    }

    fn kind(&self, own: &PolicySettings) -> PolicyKind {
        let implied = self.of_stability().is_some() && self.threshold.is_none();
        let implied = implied.then_some(PolicyKind::Stability);
        self.policy.or(implied).unwrap_or(own.kind())
    }

    /// The name of the first thing that is set.
    pub fn first_set(&self) -> Option<&'static str> {
        let policy = self.policy.map(|_| "policy");
        let threshold = self.threshold.map(|_| "threshold");
        policy.or(threshold).or_else(|| self.of_stability())
    }

    /// The name of the first setting of `stability`.
    fn of_stability(&self) -> Option<&'static str> {
        let tau = self.tau.map(|_| "tau");
        let consecutive_k = self.consecutive_k.map(|_| "consecutive_k");
        let min_layer_ratio = self.min_layer_ratio.map(|_| "min_layer_ratio");
        tau.or(consecutive_k).or(min_layer_ratio)
    }

    fn check_belongs_to(&self, policy: PolicyKind) -> Result<()> {
        let (name, owner, place) = if policy == PolicyKind::Stability {
            let place = "stability; set tau, or another policy".to_owned();
            (
                self.threshold.map(|_| "threshold"),
                "the other policies",
                place,
            )
        } else {
            (
                self.of_stability(),
                "policy stability",
                policy.name().to_owned(),
            )
        };
        match name {
            Some(name) => Err(Error::Misplaced { name, owner, place }),
            None => Ok(()),
        }
    }

    fn stability(&self, own: &PolicySettings) -> Stability {
        let own = match own {
            PolicySettings::Stability(own) => own.clone(),
            _ => Stability::default(),
        };
        Stability {
            tau: self.tau.unwrap_or(own.tau),
            consecutive_k: self.consecutive_k.unwrap_or(own.consecutive_k),
            min_layer_ratio: self.min_layer_ratio.unwrap_or(own.min_layer_ratio),
        }
    }
}

fn missing_thresholds(policy: PolicyKind) -> Error {
    let policy = policy.name();
    Error::MissingThresholds { policy }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: PolicyChoice = PolicyChoice {
        policy: None,
        threshold: None,
        tau: None,
        consecutive_k: None,
        min_layer_ratio: None,
    };

    fn probe() -> PolicySettings {
        let thresholds = ByDepth::from([(2, 0.5), (4, 0.3)]);
        PolicySettings::Probe(Probe { thresholds })
    }

    fn cascade() -> PolicySettings {
        let by_depth = ByDepth::from([(2, 0.5)]);
        PolicySettings::Cascade(Cascade {
            thresholds: by_depth.clone(),
            decay: 0.7,
            weights: by_depth.clone(),
            targets: by_depth,
            exit_kind: ExitKind::Soft,
        })
    }

    fn resolve(choice: PolicyChoice, own: &PolicySettings) -> Result<PolicySettings> {
        choice.resolve(own, |policy| match policy {
            PolicyKind::Learned => Vec::new(),
            _ => vec![2, 3],
        })
    }

    #[test]
    fn what_is_not_set_is_the_bundles() {
        for own in [probe(), cascade(), PolicySettings::for_layers(4)] {
            assert_eq!(resolve(NOTHING, &own).unwrap(), own);
            let policy = Some(own.kind());
            assert_eq!(
                resolve(PolicyChoice { policy, ..NOTHING }, &own).unwrap(),
                own
            );
        }
    }

    #[test]
    fn settings_of_stability_choose_it() {
        let tau = Some(0.5);
        let chosen = resolve(PolicyChoice { tau, ..NOTHING }, &probe()).unwrap();
        let defaults = Stability::default();
        assert_eq!(
            chosen,
            PolicySettings::Stability(Stability {
                tau: 0.5,
                ..defaults
            })
        );
        let own = PolicySettings::Stability(Stability {
            tau: 0.5,
            consecutive_k: 3,
            min_layer_ratio: 0.1,
        });
        let min_layer_ratio = Some(0.4);
        let chosen = resolve(
            PolicyChoice {
                min_layer_ratio,
                ..NOTHING
            },
            &own,
        )
        .unwrap();
        let expected = Stability {
            tau: 0.5,
            consecutive_k: 3,
            min_layer_ratio: 0.4,
        };
        assert_eq!(chosen, PolicySettings::Stability(expected));
    }

    #[test]
    fn a_threshold_is_one_at_every_trained_depth() {
        let threshold = Some(0.8);
        let chosen = resolve(
            PolicyChoice {
                threshold,
                ..NOTHING
            },
            &probe(),
        )
        .unwrap();
        let everywhere = |value| ByDepth::from([(2, value), (3, value)]);
        let thresholds = everywhere(0.8);
        assert_eq!(
            chosen,
            PolicySettings::Probe(Probe {
                thresholds: thresholds.clone()
            })
        );
        let policy = Some(PolicyKind::Cascade);
        for (own, decay, exit_kind) in [
            (cascade(), 0.7, ExitKind::Soft),
            (probe(), 0.9, ExitKind::Hard),
        ] {
            let chosen = resolve(
                PolicyChoice {
                    policy,
                    threshold,
                    ..NOTHING
                },
                &own,
            )
            .unwrap();
            let expected = Cascade {
                thresholds: thresholds.clone(),
                decay,
                weights: everywhere(1.0),
                targets: everywhere(1.0),
                exit_kind,
            };
            assert_eq!(chosen, PolicySettings::Cascade(expected));
        }
    }

    #[test]
    fn settings_of_another_policy_and_missing_thresholds_are_refused() {
        let (threshold, tau) = (Some(0.5), Some(0.9));
        let [stability, margin, learned] = [
            PolicyKind::Stability,
            PolicyKind::Margin,
            PolicyKind::Learned,
        ]
        .map(Some);
        for (choice, words) in [
            (
                PolicyChoice {
                    policy: stability,
                    threshold,
                    ..NOTHING
                },
                "threshold belongs to the other policies",
            ),
            (
                PolicyChoice {
                    tau,
                    threshold,
                    ..NOTHING
                },
                "tau belongs to policy stability",
            ),
            (
                PolicyChoice {
                    policy: margin,
                    tau,
                    ..NOTHING
                },
                "belongs to policy stability",
            ),
            (
                PolicyChoice {
                    policy: margin,
                    ..NOTHING
                },
                "policy margin has no thresholds",
            ),
            (
                PolicyChoice {
                    policy: learned,
                    threshold,
                    ..NOTHING
                },
                "run sedac-export",
            ),
        ] {
            let error = resolve(choice, &probe()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
