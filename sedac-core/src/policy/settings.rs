//! The policies by name, with their settings.

use serde::{Deserialize, Serialize};

use super::rule::{ExitRule, Signal};
use super::{Cascade, ExitPolicy, Learned, Margin, Probe, Stability};
use crate::error::Result;

/// The table of policies: a row gives one its name in settings.
macro_rules! policies {
    ($($name:literal => $policy:ident,)*) => {
        /// A policy and its settings; what is left out of `stability` has its default.
        ///
        /// As JSON: the name as `policy`, and the settings beside it.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "policy")]
        pub enum PolicySettings {
            $(
                #[doc = concat!("See [`", stringify!($policy), "`](super::", stringify!($policy), ").")]
                #[serde(rename = $name)]
                $policy($policy),
            )*
        }

        /// A policy without its settings.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum PolicyKind {
            $(
                #[doc = concat!("See [`", stringify!($policy), "`](super::", stringify!($policy), ").")]
                $policy,
            )*
        }

        impl PolicyKind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$policy),*];

            /// The name used in settings.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$policy => $name,)*
                }
            }
        }

        impl PolicySettings {
            /// The policy.
            pub fn kind(&self) -> PolicyKind {
                match self {
                    $(Self::$policy(_) => PolicyKind::$policy,)*
                }
            }

            fn policy(&self) -> &dyn ExitPolicy {
                match self {
                    $(Self::$policy(policy) => policy,)*
                }
            }
        }
    };
}

policies! {
    "stability" => Stability,
    "probe" => Probe,
    "cascade" => Cascade,
    "margin" => Margin,
    "learned" => Learned,
}

impl PolicyKind {
    /// The signal that the policy compares.
    pub fn signal(self) -> Signal {
        match self {
            Self::Stability => Signal::Stability,
            Self::Probe | Self::Cascade => Signal::Risk,
            Self::Margin => Signal::Margin,
            Self::Learned => Signal::Learned,
        }
    }
}

impl PolicySettings {
    /// The defaults for a model of `layers` layers, which may have fewer than K.
    pub fn for_layers(layers: usize) -> Self {
        let defaults = Stability::default();
        Self::Stability(Stability {
            consecutive_k: defaults.consecutive_k.min(layers),
            ..defaults
        })
    }

    /// The exit rule, for a model of `layers` layers.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) when a setting is out of range.
    pub fn compile(&self, layers: usize) -> Result<ExitRule> {
        self.policy().compile(layers)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ByDepth;
    use super::*;

    fn parse(json: &str) -> std::result::Result<PolicySettings, String> {
        let settings: PolicySettings = serde_json::from_str(json).map_err(|e| e.to_string())?;
        settings.compile(6).map_err(|e| e.to_string())?;
        Ok(settings)
    }

    #[test]
    fn json_names_the_policy_and_its_settings() {
        let defaults = parse(r#"{"policy": "stability"}"#).unwrap();
        assert_eq!(defaults, PolicySettings::for_layers(6));
        let probe = parse(r#"{"policy": "probe", "thresholds": {"2": 0.5}}"#).unwrap();
        let thresholds = ByDepth::from([(2, 0.5)]);
        assert_eq!(probe, PolicySettings::Probe(Probe { thresholds }));
        let text = serde_json::to_string(&probe).unwrap();
        assert_eq!(parse(&text).unwrap(), probe);
        let cascade = r#"{"policy": "cascade", "thresholds": {"2": 1}, "weights": {"2": 1}, "targets": {"2": 0.5}}"#;
        assert!(matches!(
            parse(cascade),
            Ok(PolicySettings::Cascade(Cascade { decay: 0.9, .. }))
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
