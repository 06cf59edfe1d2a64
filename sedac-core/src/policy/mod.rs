//! What decides that a token may stop. Each policy is one file.

mod batch;
mod cascade;
mod forced;
mod learned;
mod margin;
mod probe;
mod settings;
mod stability;
mod thresholds;

use std::collections::BTreeMap;

pub use batch::{exits_by_risk, exits_by_stability};
pub use cascade::Cascade;
pub use forced::Forced;
pub use learned::Learned;
pub use margin::Margin;
pub use probe::Probe;
pub use settings::{ExitKind, PolicySettings, Source};
pub use stability::Stability;
pub use thresholds::Thresholds;

/// Numbers by depth, which is the layers run.
pub type ByDepth = BTreeMap<usize, f32>;

/// What a layer tells about a token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Signals {
    /// (cos(h_l, h_{l-1}) + 1) / 2 of the residual stream after and before the layer.
    pub stability: f32,
    /// The entropy probe's risk, where the layer has a probe.
    pub risk: Option<f32>,
    /// What the exit engine says, where the policy [asked](Policy::reads_exit) for it.
    pub exit: Option<ExitSignals>,
}

/// What an exit engine tells about the token that would come of exiting here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExitSignals {
    /// Probability of the likeliest token less that of the second, among the frequent tokens.
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
    /// Enough consecutive layers were stable.
    Stability,
    /// The entropy probe saw little risk.
    Probe,
    /// Confidence gathered over the entropy probes.
    Cascade,
    /// The likeliest token leads clearly.
    Margin,
    /// The learned probe expects full depth's token.
    Learned,
    /// The depth was prescribed.
    Forced,
}

impl ExitReason {
    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::FullDepth => "full_depth",
            Self::Stability => "stability",
            Self::Probe => "probe",
            Self::Cascade => "cascade",
            Self::Margin => "margin",
            Self::Learned => "learned",
            Self::Forced => "forced",
        }
    }
}

/// Decides, layer by layer, whether a token may stop.
pub trait Policy: Send {
    /// A new token starts at the first layer.
    fn begin(&mut self);

    /// Whether the decision after `depth` layers depends on the exit engine there.
    fn reads_exit(&self, depth: usize) -> bool {
        let _ = depth;
        false
    }

    /// `depth` layers have run (1 to the number of layers); `signals` are the last one's.
    ///
    /// Returns the reason if the token may stop here. It is asked after every layer, also where
    /// the bundle allows no exit, so that a run of layers is counted whole.
    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason>;

    /// Of how many of the newest positions the logits are wanted when the token has run every layer;
    /// those before its own waited, and ran with it.
    fn rows(&self) -> usize {
        1
    }

    /// Where exits are soft, the share of the remaining layers whose MLPs the token that just
    /// stopped skips, the last ones; their attention always runs. None where tokens leave.
    fn skipped_share(&self) -> Option<f32> {
        None
    }
}
