//! The policy that drafts decode with.

use crate::policy::{ExitReason, Policy, Signals};

/// Lets a token exit where another policy does, and at `depth` at the latest: as a guess there,
/// which is [`ExitReason::Forced`].
pub(super) struct UpTo<'a> {
    depth: usize,
    policy: &'a mut dyn Policy,
}

impl<'a> UpTo<'a> {
    pub(super) fn new(depth: usize, policy: &'a mut dyn Policy) -> Self {
        Self { depth, policy }
    }
}

impl Policy for UpTo<'_> {
    fn begin(&mut self) {
        self.policy.begin();
    }

    fn reads_exit(&self, depth: usize) -> bool {
        self.policy.reads_exit(depth)
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let guess = (depth >= self.depth).then_some(ExitReason::Forced);
        self.policy.observe(depth, signals).or(guess)
    }
}
