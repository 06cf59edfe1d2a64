//! Stop where a trained probe sees little risk. V6 of the original project.

use serde::{Deserialize, Serialize};

use super::by_depth::{self, ByDepth};
use super::rule::{Comparison, ExitRule, Signal};
use super::{ExitPolicy, ExitReason};
use crate::error::Result;

/// Stops a token where the entropy probe's risk is below the depth's threshold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Risk below which a token stops, by depth, each above 0.
    #[serde(deserialize_with = "by_depth::deserialize")]
    pub thresholds: ByDepth,
}

impl ExitPolicy for Probe {
    fn compile(&self, layers: usize) -> Result<ExitRule> {
        by_depth::check_risks(&self.thresholds, layers)?;
        let (reason, signal) = (ExitReason::Probe, Signal::Risk);
        let comparison = Comparison::Below;
        Ok(by_depth::rule(
            reason,
            signal,
            comparison,
            &self.thresholds,
            layers,
        ))
    }
}
