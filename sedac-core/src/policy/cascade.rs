//! Stop when confidence has accumulated over the probes. V6.1 of the original project.

use serde::{Deserialize, Serialize};

use super::by_depth::{self, ByDepth};
use super::rule::{Comparison, Condition, Criterion, ExitRule, Signal};
use super::{ExitPolicy, ExitReason};
use crate::error::{Error, Result};

/// Stops a token where the confidence C reaches the depth's target. At each probe,
/// C = C * decay + clamp((threshold - risk) / threshold, 0, 1) * weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cascade {
    /// Risk from which on nothing is gained, by depth, each above 0.
    #[serde(deserialize_with = "by_depth::deserialize")]
    pub thresholds: ByDepth,
    /// What is left of the confidence at the next depth, 0 to 1.
    #[serde(default = "default_decay")]
    pub decay: f32,
    /// Confidence that no risk at all gives, by depth.
    #[serde(deserialize_with = "by_depth::deserialize")]
    pub weights: ByDepth,
    /// Confidence at which a token stops, by depth.
    #[serde(deserialize_with = "by_depth::deserialize")]
    pub targets: ByDepth,
    /// What a token does that stops.
    #[serde(default)]
    pub exit_kind: ExitKind,
}

/// What a token does that stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitKind {
    /// It leaves.
    #[default]
    Hard,
    /// It goes on, but skips the MLPs of the last layers; see
    /// [`Decision::skipped_mlps`](super::Decision::skipped_mlps).
    Soft,
}

impl ExitKind {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Hard, Self::Soft];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hard => "hard",
            Self::Soft => "soft",
        }
    }
}

pub(super) fn default_decay() -> f32 {
    0.9
}

impl Cascade {
    fn check(&self, layers: usize) -> Result<()> {
        by_depth::check_risks(&self.thresholds, layers)?;
        if !(0.0..=1.0).contains(&self.decay) {
            return Err(Error::setting("decay", self.decay, "0 to 1"));
        }
        for (name, values) in [("weights", &self.weights), ("targets", &self.targets)] {
            let sound = |value: f32| value >= 0.0 && value.is_finite();
            by_depth::check_values(name, values, sound, "0 or more")?;
            if !values.keys().eq(self.thresholds.keys()) {
                let depths: Vec<_> = values.keys().map(usize::to_string).collect();
                let range = "the depths of thresholds";
                return Err(Error::setting(name, depths.join(", "), range));
            }
        }
        Ok(())
    }

    fn condition(&self, depth: usize) -> Option<Condition> {
        Some(Condition {
            signal: Signal::Risk,
            comparison: Comparison::Accumulated,
            threshold: *self.thresholds.get(&depth)?,
            run_length: 1,
            decay: self.decay,
            weight: *self.weights.get(&depth)?,
            target: *self.targets.get(&depth)?,
            may_exit: 1,
        })
    }
}

impl ExitPolicy for Cascade {
    fn compile(&self, layers: usize) -> Result<ExitRule> {
        self.check(layers)?;
        let rule = ExitRule::new(Criterion::new(ExitReason::Cascade, layers, |depth| {
            self.condition(depth).unwrap_or_default()
        }));
        Ok(match self.exit_kind {
            ExitKind::Hard => rule,
            ExitKind::Soft => rule.soft(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Signals;
    use super::*;

    fn rule() -> ExitRule {
        let by_depth = |low, high| ByDepth::from([(2, low), (4, high)]);
        let policy = Cascade {
            thresholds: by_depth(1.0, 2.0),
            decay: 0.5,
            weights: by_depth(1.0, 0.5),
            targets: by_depth(0.9, 0.6),
            exit_kind: ExitKind::Soft,
        };
        policy.compile(6).unwrap()
    }

    fn risky(risk: f32) -> Signals {
        Signals {
            risk: Some(risk),
            ..Signals::default()
        }
    }

    #[test]
    fn confidence_decays_and_accumulates() {
        let rule = rule();
        let mut state = rule.start();
        assert_eq!(state.observe(&rule, 2, &risky(0.2)), None);
        assert_eq!(state.observe(&rule, 3, &risky(0.0)), None);
        let decision = state.observe(&rule, 4, &risky(1.0)).unwrap();
        assert_eq!(decision.reason, ExitReason::Cascade);
        // C = 0.8 * 0.5 + 1 / 2 * 0.5, tanh(2C - 1) / 2 + 1 / 2
        assert!((decision.skipped_mlps.unwrap() - 0.645_656).abs() < 1e-5);
        assert_eq!(rule.start().observe(&rule, 4, &risky(1.0)), None);
    }

    #[test]
    fn nothing_is_gained_from_much_risk_or_nan() {
        let rule = rule();
        for risk in [9.0, f32::NAN] {
            let mut state = rule.start();
            assert_eq!(state.observe(&rule, 2, &risky(risk)), None);
            // without the first probe's gain the second does not suffice
            assert_eq!(state.observe(&rule, 4, &risky(0.0)), None);
        }
    }
}
