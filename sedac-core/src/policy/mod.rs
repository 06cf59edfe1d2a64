//! What decides that a token may stop: policies, which compile to [`ExitRule`]s. Each policy is one
//! file, and one row in the table of `settings.rs`.
//!
//! ```
//! use sedac_core::policy::{ExitPolicy, ExitReason, Signals, Stability};
//!
//! # fn main() -> sedac_core::Result<()> {
//! let policy = Stability { tau: 0.9, consecutive_k: 2, min_layer_ratio: 0.0 };
//! let rule = policy.compile(4)?;
//! let mut token = rule.start();
//! let stabilities = [0.95, 0.8, 0.92, 0.97];
//! let exit = (1..).zip(stabilities).find_map(|(depth, stability)| {
//!     let signals = Signals { stability, ..Signals::default() };
//!     let decision = token.observe(&rule, depth, &signals)?;
//!     Some((depth, decision.reason))
//! });
//! assert_eq!(exit, Some((4, ExitReason::Stability)));
//! # Ok(())
//! # }
//! ```

mod batch;
mod by_depth;
mod cascade;
mod choice;
mod learned;
mod margin;
mod probe;
mod rule;
mod settings;
mod stability;
mod thresholds;

pub use batch::{BatchDecision, BatchSignals, exits_by_risk, exits_by_stability};
pub use by_depth::ByDepth;
pub use cascade::{Cascade, ExitKind};
pub use choice::PolicyChoice;
pub use learned::Learned;
pub use margin::Margin;
pub use probe::Probe;
pub use rule::{Comparison, Condition, Criterion, Decision, ExitRule, RuleState, Signal};
pub use settings::{PolicyKind, PolicySettings};
pub use stability::Stability;
pub use thresholds::Thresholds;

use crate::error::Result;

/// What is known of a token after a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Signals {
    /// (cos(h_l, h_{l-1}) + 1) / 2 of the residual stream after and before the layer.
    pub stability: f32,
    /// The entropy probe's risk, where the layer has a probe.
    pub risk: Option<f32>,
    /// What the exit head gives, where the rule [reads](ExitRule::reads_exit_head) it.
    pub exit: Option<ExitSignals>,
}

/// What an exit head gives for the token that would come of exiting here.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ExitSignals {
    /// Probability of the most probable token less that of the second, among the frequent tokens.
    pub margin: f32,
    /// Entropy of the frequent tokens' probabilities, in nats.
    pub entropy: f32,
    /// Probability that the token is the one that full depth would give.
    pub learned: f32,
}

/// Why a token stopped where it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// All layers ran.
    FullDepth,
    /// The step was limited to this depth.
    DepthLimit,
    /// Good enough for a draft that full depth verifies.
    Draft,
    /// Enough consecutive layers were stable.
    Stability,
    /// The entropy probe saw little risk.
    Probe,
    /// Confidence accumulated over the entropy probes.
    Cascade,
    /// The most probable token leads clearly.
    Margin,
    /// The learned probe expects full depth's token.
    Learned,
}

impl ExitReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::FullDepth,
        Self::DepthLimit,
        Self::Draft,
        Self::Stability,
        Self::Probe,
        Self::Cascade,
        Self::Margin,
        Self::Learned,
    ];

    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::FullDepth => "full_depth",
            Self::DepthLimit => "depth_limit",
            Self::Draft => "draft",
            Self::Stability => "stability",
            Self::Probe => "probe",
            Self::Cascade => "cascade",
            Self::Margin => "margin",
            Self::Learned => "learned",
        }
    }
}

/// The settings of a policy, which compile to what backends interpret.
pub trait ExitPolicy {
    /// The rule, for a model of `layers` layers.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) when a setting is out of range.
    fn compile(&self, layers: usize) -> Result<ExitRule>;
}
