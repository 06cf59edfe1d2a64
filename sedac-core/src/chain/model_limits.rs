//! What a loaded model takes: requests are checked against it before anything runs.

use super::{DecodingMode, ExitSchedule, Request};
use crate::backend::Capabilities;
use crate::bundle::DrafterKind;
use crate::error::{Error, Result};
use crate::kv::KvFill;

/// The sizes and capabilities of a loaded model.
#[derive(Debug, Clone)]
pub(crate) struct ModelLimits {
    /// Decoder layers.
    pub(crate) layers: usize,
    /// Positions that a sequence may have.
    pub(crate) capacity: usize,
    /// Logits of a token.
    pub(crate) vocab_size: usize,
    /// What its engines can do beyond running layers.
    pub(crate) capabilities: Capabilities,
}

impl ModelLimits {
    /// Check that the model can decode in `mode`.
    ///
    /// # Errors
    /// [`Error::Setting`] otherwise.
    pub(crate) fn check_decoding(&self, mode: &DecodingMode, kv_fill: KvFill) -> Result<()> {
        self.exit_schedule(mode, kv_fill).map(drop)
    }

    /// When the tokens of `mode` exit.
    ///
    /// # Errors
    /// [`Error::Setting`] where the model cannot decode so.
    pub(super) fn exit_schedule(
        &self,
        mode: &DecodingMode,
        kv_fill: KvFill,
    ) -> Result<ExitSchedule> {
        let schedule = ExitSchedule::new(mode, kv_fill, self.layers)?;
        if mode.drafter() == Some(DrafterKind::Trained) {
            self.capabilities.check_trained_drafter()?;
        }
        if let (DecodingMode::Exit { policy, .. }, Some(rule)) = (mode, schedule.rule()) {
            let name = policy.kind().name();
            self.capabilities.check(rule, name, self.layers)?;
        }
        Ok(schedule)
    }

    /// # Errors
    /// [`Error::Setting`] and [`Error::Prompt`] naming what is wrong.
    pub(super) fn check_request(&self, request: &Request) -> Result<()> {
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "1 or more"));
        }
        self.check_tokens(&request.prompt)
    }

    /// # Errors
    /// [`Error::Prompt`] when there are none, too many, or some that the model does not know.
    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Prompt("holds no token; give some text".into()));
        }
        let capacity = self.capacity;
        if tokens.len() > capacity {
            return Err(Error::Prompt(format!(
                "of {} tokens is longer than the cache of {capacity} positions; shorten it, or give \
                 a larger cache: --cache-tokens where it is set, --max-cache-length of the build",
                tokens.len()
            )));
        }
        let vocabulary = self.vocab_size;
        if let Some(token) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Prompt(format!(
                "holds token {token}, but the model knows {vocabulary} tokens only"
            )));
        }
        Ok(())
    }
}
