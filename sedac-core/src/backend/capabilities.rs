//! What engines can do beyond running layers.

use crate::error::{Error, Result};
use crate::policy::{ExitRule, Signal};

/// What a set of engines can do beyond running layers; known once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Sequences that can be under way at once.
    pub sequences: usize,
    /// Whether sequences of one call share passes. Otherwise they run one after another.
    pub shares_passes: bool,
    /// Whether drafts that are verified, and chunks of prompts, share them too.
    pub shares_drafts: bool,
    /// Depths after which an entropy probe gives a risk.
    pub probes: Vec<usize>,
    /// Depths with an exit head.
    pub exit_heads: Vec<usize>,
    /// Whether layers can run without their MLPs.
    pub attention_only: bool,
    /// Whether tokens come with a [margin](super::StepOutcome::margins).
    pub margins: bool,
    /// Whether there are [draft engines](super::DraftEngine).
    pub trained_drafter: bool,
    /// Sequences that one launch of such an engine drafts for; more take several, one after another.
    pub drafts_at_once: usize,
    /// Tokens that a step may give at most, where it goes [ahead](super::Ahead).
    pub ahead: usize,
    /// Tokens of prompts that are to be prefilled at once, where other sequences wait for it.
    pub prefill_chunk: usize,
    /// Whether verifying a token beside drafts chooses it as decoding it alone does. Rounding may say
    /// otherwise where weights are quantized: their products round what they are given to 8 bits,
    /// which makes of another bit another token.
    pub verifies_exactly: bool,
}

impl Default for Capabilities {
    /// Layers alone, for one sequence.
    fn default() -> Self {
        Self {
            sequences: 1,
            shares_passes: false,
            shares_drafts: false,
            probes: Vec::new(),
            exit_heads: Vec::new(),
            attention_only: false,
            margins: false,
            trained_drafter: false,
            drafts_at_once: 1,
            ahead: 1,
            prefill_chunk: Self::PREFILL_CHUNK,
            verifies_exactly: true,
        }
    }
}

impl Capabilities {
    /// Tokens of prompts that are to be prefilled at once where they run in passes: few enough that a
    /// step which prefills them takes less than three times as long as one that does not.
    pub const PREFILL_CHUNK: usize = 32;

    /// Check that a trained drafter can draft.
    ///
    /// # Errors
    /// [`Error::Setting`] otherwise.
    pub fn check_trained_drafter(&self) -> Result<()> {
        if self.trained_drafter {
            return Ok(());
        }
        let range = "another one: this bundle has no trained drafter, or this backend does not run \
                     it; train one with sedac-export train-drafter and use --backend cuda, or \
                     --backend onnxruntime --device cpu, or set drafter auto";
        Err(Error::setting("drafter", "trained", range))
    }

    /// Check that every signal that `rule` reads exists; `policy` names it.
    ///
    /// # Errors
    /// [`Error::Setting`] naming what is missing.
    pub fn check(&self, rule: &ExitRule, policy: &str, layers: usize) -> Result<()> {
        if rule.is_soft() && !self.attention_only {
            let range = "hard; this backend has no engines of attention alone";
            return Err(Error::setting("exit_kind", "soft", range));
        }
        for depth in 1..layers {
            for signal in rule.signals(depth) {
                let (known, missing) = match signal {
                    Signal::None | Signal::Stability => continue,
                    Signal::Risk => (&self.probes, "entropy probe"),
                    Signal::Margin | Signal::Learned => (&self.exit_heads, "exit head"),
                };
                if !known.contains(&depth) {
                    let range = format!(
                        "a policy that this backend's engines support; they have no {missing} at \
                         depth {depth}"
                    );
                    return Err(Error::setting("policy", policy, range));
                }
            }
        }
        Ok(())
    }
}
