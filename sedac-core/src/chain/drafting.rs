//! The drafter of a text, and what tokens cost without it.

use super::ExitSchedule;
use crate::backend::{Capabilities, Costs, DraftedToken};
use crate::bundle::DrafterKind;
use crate::draft::{
    Acceptance, BaselineCost, Company, Draft, DraftContext, Drafter, Proposal, new_drafter,
};
use crate::error::Result;

/// Texts with the same drafter share what it learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DraftingKey {
    kind: DrafterKind,
    /// The fewest layers that its drafts run, None in lossless mode.
    min_depth: Option<usize>,
    /// Whether there is a trained drafter to choose from.
    has_trained: bool,
}

/// A drafter, and what tokens cost without it.
pub(super) struct Drafting {
    pub(super) key: DraftingKey,
    drafter: Box<dyn Drafter>,
    baseline: BaselineCost,
    /// Tokens since the last draft.
    pub(super) undrafted: usize,
}

impl Drafting {
    /// For a model of `layers` layers with exits after the depths `exit_layers`. In lossless mode it
    /// starts from what `acceptance` says.
    pub(super) fn new(
        key: DraftingKey,
        exit_layers: &[usize],
        layers: usize,
        acceptance: &Acceptance,
    ) -> Self {
        let min_depth = key.min_depth.unwrap_or(0);
        let mut drafter = new_drafter(key.kind, exit_layers, layers, min_depth, key.has_trained);
        if key.min_depth.is_none() {
            drafter.recall(acceptance);
        }
        Self {
            key,
            drafter,
            baseline: BaselineCost::new(layers),
            undrafted: 0,
        }
    }

    /// What `kind` of drafter between `exits` shares with others, on a backend that `has_trained`
    /// one, which drafts in lossless mode only.
    pub(super) fn key(
        kind: DrafterKind,
        exits: &ExitSchedule,
        exit_layers: &[usize],
        layers: usize,
        has_trained: bool,
    ) -> DraftingKey {
        let min_depth = exits.min_draft_depth(exit_layers, layers);
        DraftingKey {
            kind,
            min_depth,
            has_trained: has_trained && min_depth.is_none(),
        }
    }

    /// The next rounds are of another text.
    pub(super) fn start(&mut self) {
        self.drafter.start();
    }

    /// Whether tokens come from full depth only.
    pub(super) fn is_lossless(&self) -> bool {
        self.key.min_depth.is_none()
    }

    /// Write what was observed into `acceptance`.
    pub(super) fn record(&self, acceptance: &mut Acceptance) {
        self.drafter.record(acceptance);
    }

    /// Of a draft of at most `max_tokens` tokens after `history`; 0 where there is room for none.
    /// Without it the next token would share a pass with those of its `company`.
    pub(super) fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        company: Company,
        capabilities: &Capabilities,
        costs: &Costs,
    ) -> f64 {
        if max_tokens == 0 {
            return 0.0;
        }
        // where tokens exit, drafts decide about them too, and are made alike in any company
        let company = match self.is_lossless() {
            true => company,
            false => Company::default(),
        };
        let baseline = self.baseline.beside(company, capabilities, costs);
        self.drafter
            .expected_speedup(history, max_tokens, costs, baseline)
    }

    /// # Errors
    /// What the backend reports.
    pub(super) fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Proposal> {
        self.undrafted = 0;
        self.drafter.propose(history, max_tokens, context)
    }

    /// The draft of what the trained drafter drafted.
    pub(super) fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) -> Draft {
        self.drafter.take_drafted(drafted, costs)
    }

    /// A token came without a draft, after `depth` layers.
    pub(super) fn observe_undrafted(&mut self, depth: usize, costs: &Costs) {
        self.undrafted += 1;
        self.baseline.observe(depth, costs);
    }

    /// `tokens` came instead of `draft`, in a model of `layers` layers.
    pub(super) fn observe(&mut self, draft: &Draft, tokens: &[u32], layers: usize, costs: &Costs) {
        self.drafter.observe(tokens, costs);
        for taken in &draft.exits {
            let depth = taken.as_ref().map_or(layers, |taken| taken.exit.layer);
            self.baseline.observe(depth, costs);
        }
    }
}
