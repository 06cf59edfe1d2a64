//! Drafts by the trained drafter, for all texts that await one.

use tracing::debug;

use super::Decoding;
use super::decoding::Planned;
use super::growing_text::Text;
use crate::backend::{
    Backend, Costs, DraftRequest, DraftedToken, Drafts, LogitsRequest, MAX_AHEAD, NextDraft,
};
use crate::draft::Foresight;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;

impl Decoding {
    /// What the trained drafter is to do for the sequence in `slot` before the planned step, if anything.
    fn draft_request(&mut self, slot: usize) -> Option<DraftRequest<'_>> {
        let Planned::Draft { positions, ahead } = &self.planned else {
            return None;
        };
        let Text {
            tokens, sampler, ..
        } = &mut self.text;
        Some(DraftRequest {
            slot,
            positions: positions.clone(),
            tokens: &tokens[positions.start + 1..],
            ahead: *ahead,
            choice: Box::new(Foresight::new(sampler, tokens)),
        })
    }

    /// Verify what the trained drafter has drafted next.
    fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) {
        if let Some(drafting) = &mut self.drafting {
            let draft = drafting.take_drafted(drafted, costs);
            debug!(drafted = draft.tokens.len(), "trained draft");
            self.plan_verification(draft);
        }
    }

    /// What it is to draft after the planned step.
    pub(super) fn next_draft(&mut self) -> Option<NextDraft> {
        let Planned::Verify(draft) = &self.planned else {
            return None;
        };
        let ahead = draft.next?;
        let tokens = draft.tokens.len() + 1 + ahead.tokens;
        Some(NextDraft {
            ahead,
            choice: LogitsRequest::of(&mut self.text.sampler, tokens),
        })
    }

    /// Whether the trained drafter has to draft before the planned step.
    pub(crate) fn awaits_draft(&self) -> bool {
        matches!(self.planned, Planned::Draft { .. })
    }
}

/// Let the trained drafter of `backend` draft for those of `texts`, each with the slot of its sequence,
/// that await it: for all in one call, in which they share what it takes.
///
/// # Errors
/// What the backend reports; none of them has a draft then.
pub(crate) fn draft_together(
    texts: &mut [(&mut Decoding, usize)],
    backend: &mut dyn Backend,
    interrupt: &Interrupt,
) -> Result<()> {
    let requests = texts.iter_mut();
    let requests = requests.filter_map(|(text, slot)| text.draft_request(*slot));
    let mut requests: Vec<_> = requests.collect();
    if requests.is_empty() {
        return Ok(());
    }
    let count = requests.len();
    // what a prompt takes is no part of a round's cost
    let are_steps = requests
        .iter()
        .all(|request| request.positions.len() <= MAX_AHEAD);
    let engine = backend.draft_engine().ok_or_else(no_engine)?;
    let Drafts { drafted, elapsed } = engine.draft(&mut requests, interrupt)?;
    drop(requests);
    let tokens = drafted.iter().map(Vec::len).sum();
    assert_eq!(drafted.len(), count, "a draft for each request");
    if are_steps && tokens > 0 {
        let at_once = backend.capabilities().drafts_at_once;
        let costs = backend.costs_mut();
        costs.note_draft((count, at_once), tokens, elapsed);
    }
    let awaiting = texts.iter_mut().filter(|(text, _)| text.awaits_draft());
    for ((text, _), draft) in awaiting.zip(drafted) {
        text.take_drafted(&draft, backend.costs());
    }
    Ok(())
}

/// Drafting was asked for where there is no engine; the chain has checked that before.
fn no_engine() -> Error {
    Error::setting(
        "drafter",
        "trained",
        "another one; no trained drafter is loaded",
    )
}
