//! Stop where the most probable token leads clearly.

use serde::{Deserialize, Serialize};

use super::by_depth::{self, ByDepth};
use super::rule::{Comparison, ExitRule, Signal};
use super::{ExitPolicy, ExitReason};
use crate::error::Result;

/// Stops a token where the exit head's margin reaches the depth's threshold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Margin {
    /// Margin at which a token stops, by depth, each 0 to 1.
    #[serde(deserialize_with = "by_depth::deserialize")]
    pub thresholds: ByDepth,
}

impl ExitPolicy for Margin {
    fn compile(&self, layers: usize) -> Result<ExitRule> {
        by_depth::check_probabilities(&self.thresholds, layers)?;
        let (reason, signal) = (ExitReason::Margin, Signal::Margin);
        let comparison = Comparison::AtLeast;
        Ok(by_depth::rule(
            reason,
            signal,
            comparison,
            &self.thresholds,
            layers,
        ))
    }
}
