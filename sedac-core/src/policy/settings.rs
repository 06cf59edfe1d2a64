//! The policies by name, with their settings.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::{ByDepth, Cascade, Learned, Margin, Policy, Probe, Stability, Thresholds};
use crate::error::{Error, Result};

/// A policy and its settings; what is left out of `stability` has its default.
///
/// As JSON: the name as `policy`, and the settings beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "snake_case", deny_unknown_fields)]
pub enum PolicySettings {
    /// See [`Stability`].
    Stability {
        /// Stability a layer must reach.
        #[serde(default = "default_tau")]
        tau: f32,
        /// Layers in a row that must reach it.
        #[serde(default = "default_consecutive_k")]
        consecutive_k: usize,
        /// Share of the layers that always run.
        #[serde(default = "default_min_layer_ratio")]
        min_layer_ratio: f32,
    },
    /// See [`Probe`].
    Probe {
        /// Risk below which a token stops, by depth.
        #[serde(deserialize_with = "by_depth")]
        thresholds: ByDepth,
    },
    /// See [`Cascade`].
    Cascade {
        /// Risk that gives no confidence any more, by depth.
        #[serde(deserialize_with = "by_depth")]
        thresholds: ByDepth,
        /// What is left of the confidence at the next depth.
        #[serde(default = "default_decay")]
        decay: f32,
        /// Confidence that no risk at all gives, by depth.
        #[serde(deserialize_with = "by_depth")]
        weights: ByDepth,
        /// Confidence at which a token stops, by depth.
        #[serde(deserialize_with = "by_depth")]
        targets: ByDepth,
        /// What a token does that stops.
        #[serde(default)]
        exit_kind: ExitKind,
    },
    /// See [`Margin`].
    Margin {
        /// Margin at which a token stops, by depth.
        #[serde(deserialize_with = "by_depth")]
        thresholds: ByDepth,
    },
    /// See [`Learned`].
    Learned {
        /// Probability at which a token stops, by depth.
        #[serde(deserialize_with = "by_depth")]
        thresholds: ByDepth,
    },
}

/// What a token does that stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitKind {
    /// It leaves.
    #[default]
    Hard,
    /// It goes on, but skips the MLPs of the last layers; see [`Policy::skipped_share`].
    Soft,
}

/// JSON's keys are texts.
fn by_depth<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<ByDepth, D::Error> {
    let texts = BTreeMap::<String, f32>::deserialize(deserializer)?;
    texts
        .into_iter()
        .map(|(depth, value)| match depth.parse() {
            Ok(depth) => Ok((depth, value)),
            Err(_) => Err(D::Error::custom(format!("{depth:?} is no depth"))),
        })
        .collect()
}

fn default_tau() -> f32 {
    0.98
}

fn default_consecutive_k() -> usize {
    2
}

fn default_min_layer_ratio() -> f32 {
    0.2
}

fn default_decay() -> f32 {
    0.9
}

/// What a policy's thresholds are about, and hence what a bundle must have at their depths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A layer engine with a risk output.
    Risk,
    /// An exit engine.
    Exit,
}

impl PolicySettings {
    /// The defaults for a model of `layers` layers, which may have fewer than K.
    pub fn for_layers(layers: usize) -> Self {
        Self::Stability {
            tau: default_tau(),
            consecutive_k: default_consecutive_k().min(layers),
            min_layer_ratio: default_min_layer_ratio(),
        }
    }

    /// The name used in settings.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stability { .. } => "stability",
            Self::Probe { .. } => "probe",
            Self::Cascade { .. } => "cascade",
            Self::Margin { .. } => "margin",
            Self::Learned { .. } => "learned",
        }
    }

    /// The policy, for a model of `layers` layers.
    ///
    /// # Errors
    /// [`Error::Setting`] when a setting is out of range.
    pub fn policy(&self, layers: usize) -> Result<Box<dyn Policy>> {
        self.check_depths()?;
        let none = ByDepth::new();
        let thresholds = || Thresholds::new(self.thresholds().unwrap_or(&none));
        Ok(match self {
            &Self::Stability {
                tau,
                consecutive_k,
                min_layer_ratio,
            } => Box::new(Stability::new(tau, consecutive_k, min_layer_ratio, layers)?),
            Self::Probe { .. } => Box::new(Probe::new(thresholds())),
            Self::Cascade {
                decay,
                weights,
                targets,
                exit_kind,
                ..
            } => {
                let (weights, targets) = (weights.clone(), targets.clone());
                let soft = *exit_kind == ExitKind::Soft;
                Box::new(Cascade::new(*decay, thresholds(), weights, targets, soft))
            }
            Self::Margin { .. } => Box::new(Margin::new(thresholds())),
            Self::Learned { .. } => Box::new(Learned::new(thresholds())),
        })
    }

    /// What is compared with the thresholds, by depth; None for a policy without.
    pub fn reads(&self) -> Option<(Source, &ByDepth)> {
        let source = match self {
            Self::Stability { .. } => return None,
            Self::Probe { .. } | Self::Cascade { .. } => Source::Risk,
            Self::Margin { .. } | Self::Learned { .. } => Source::Exit,
        };
        Some((source, self.thresholds()?))
    }

    /// Whether a token may stop after `depth` layers, as far as the settings tell.
    pub fn may_exit(&self, depth: usize) -> bool {
        self.thresholds()
            .is_none_or(|thresholds| thresholds.contains_key(&depth))
    }

    /// Whether tokens that stop go on without MLPs.
    pub fn is_soft(&self) -> bool {
        let exit_kind = match self {
            Self::Cascade { exit_kind, .. } => *exit_kind,
            _ => ExitKind::Hard,
        };
        exit_kind == ExitKind::Soft
    }

    fn thresholds(&self) -> Option<&ByDepth> {
        match self {
            Self::Stability { .. } => None,
            Self::Probe { thresholds }
            | Self::Cascade { thresholds, .. }
            | Self::Margin { thresholds }
            | Self::Learned { thresholds } => Some(thresholds),
        }
    }

    fn check_depths(&self) -> Result<()> {
        let Some((source, thresholds)) = self.reads() else {
            return Ok(());
        };
        if thresholds.is_empty() {
            return Err(Error::setting("thresholds", "(none)", "one or more depths"));
        }
        let (sound, range): (fn(f32) -> bool, _) = match source {
            Source::Risk => (|value| value > 0.0 && value.is_finite(), "above 0"),
            Source::Exit => (|value| (0.0..=1.0).contains(&value), "0 to 1"),
        };
        check_values("thresholds", thresholds, sound, range)?;
        if let Self::Cascade {
            decay,
            weights,
            targets,
            ..
        } = self
        {
            if !(0.0..=1.0).contains(decay) {
                return Err(Error::setting("decay", decay, "0 to 1"));
            }
            for (name, values) in [("weights", weights), ("targets", targets)] {
                check_values(
                    name,
                    values,
                    |value| value >= 0.0 && value.is_finite(),
                    "0 or more",
                )?;
                if !values.keys().eq(thresholds.keys()) {
                    let depths: Vec<_> = values.keys().map(usize::to_string).collect();
                    let range = "the depths of thresholds";
                    return Err(Error::setting(name, depths.join(", "), range));
                }
            }
        }
        Ok(())
    }
}

fn check_values(
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> std::result::Result<PolicySettings, String> {
        let settings: PolicySettings = serde_json::from_str(json).map_err(|e| e.to_string())?;
        settings.policy(6).map_err(|e| e.to_string())?;
        Ok(settings)
    }

    #[test]
    fn json_names_the_policy_and_its_settings() {
        let defaults = parse(r#"{"policy": "stability"}"#).unwrap();
        assert_eq!(defaults, PolicySettings::for_layers(6));
        let probe = parse(r#"{"policy": "probe", "thresholds": {"2": 0.5}}"#).unwrap();
        let thresholds = ByDepth::from([(2, 0.5)]);
        assert_eq!(probe, PolicySettings::Probe { thresholds });
        let text = serde_json::to_string(&probe).unwrap();
        assert_eq!(parse(&text).unwrap(), probe);
        let cascade = r#"{"policy": "cascade", "thresholds": {"2": 1}, "weights": {"2": 1}, "targets": {"2": 0.5}}"#;
        assert!(matches!(
            parse(cascade),
            Ok(PolicySettings::Cascade { decay: 0.9, .. })
        ));
    }

    #[test]
    fn settings_out_of_range_or_of_another_policy_are_refused() {
        for (json, reason) in [
            (r#"{"policy": "guess"}"#, "unknown variant"),
            (
                r#"{"policy": "probe", "thresholds": {"2": 0.5}, "tau": 1}"#,
                "unknown field",
            ),
            (r#"{"policy": "probe"}"#, "missing field"),
            (r#"{"policy": "probe", "thresholds": {}}"#, "one or more"),
            (r#"{"policy": "probe", "thresholds": {"2": 0}}"#, "above 0"),
            (
                r#"{"policy": "margin", "thresholds": {"2": 1.5}}"#,
                "at depth 2",
            ),
            (
                r#"{"policy": "cascade", "thresholds": {"2": 1}, "weights": {"3": 1}, "targets": {"2": 1}}"#,
                "weights 3",
            ),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }
}
