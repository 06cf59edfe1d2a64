//! Drafts by a trained drafter on the device, requested or begun when the pass before had ended.

use super::abi::RowRace;
use super::chain_device::{ChainDevice, DraftPlan, FollowingDraft, MAX_DRAFTS, MAX_RACES};
use super::lane::Lane;
use super::{CudaChain, Placed, run_race};
use crate::backend::{
    DraftEngine, DraftRequest, DraftedToken, LogitsRequest, PositionLogits, SequenceStep,
};
use crate::error::Result;
use crate::interrupt::Interrupt;

/// A request under way.
struct Pieces<'a> {
    /// What has not run, and where it starts.
    tokens: &'a [u32],
    start: usize,
    races: Option<[RowRace; MAX_RACES]>,
    drafted: Vec<DraftedToken>,
}

impl<'a> Pieces<'a> {
    fn new(request: &mut DraftRequest<'a>) -> Self {
        Self {
            tokens: request.tokens,
            start: request.positions.start,
            races: races(&request.choice.request(request.ahead.tokens), 0),
            drafted: Vec::new(),
        }
    }

    /// The next piece, of up to `at_once` positions; drafts follow the last one.
    fn take(&mut self, request: &DraftRequest<'_>, at_once: usize) -> DraftPlan {
        let (piece, rest) = self.tokens.split_at(at_once.min(self.tokens.len()));
        let plan = DraftPlan {
            slot: request.slot,
            start: self.start,
            tokens: piece.to_vec(),
            ahead: rest.is_empty().then_some(request.ahead),
            races: self.races,
            verifying_row: None,
        };
        (self.tokens, self.start) = (rest, self.start + piece.len());
        plan
    }
}

/// Whether `draft`, by `plan`, is what `request` asks for.
fn answers(plan: &DraftPlan, draft: &FollowingDraft, request: &DraftRequest<'_>) -> bool {
    let accepted = &plan.tokens[..draft.positions.saturating_sub(1)];
    let positions = plan.start..plan.start + draft.positions;
    plan.slot == request.slot
        && positions == request.positions
        && request.tokens.split_last() == Some((&draft.followed, accepted))
}

impl<D: ChainDevice> CudaChain<D> {
    /// What drafts after a pass that has `placed`, where it is the last one of its step.
    pub(super) fn next_drafts(
        &self,
        placed: &[Placed],
        lanes: &[Lane],
        steps: &[SequenceStep<'_>],
    ) -> Vec<DraftPlan> {
        if lanes.iter().any(Lane::is_open) {
            return Vec::new();
        }
        let plans = placed
            .iter()
            .filter_map(|placed| next_draft(placed, &lanes[placed.lane], &steps[placed.lane]));
        let at_once = self.device.draft_rows();
        plans.filter(|plan| plan.positions() <= at_once).collect()
    }

    /// Wait for drafts that nobody asked for.
    pub(super) fn forget_drafts(&mut self) -> Result<()> {
        if !self.following.is_empty() {
            self.following.clear();
            self.device.following_drafts()?;
        }
        Ok(())
    }

    /// Give requests what was drafted for them after the last pass.
    fn take_following(
        &mut self,
        requests: &[DraftRequest<'_>],
        pieces: &mut [Pieces<'_>],
    ) -> Result<()> {
        let plans = std::mem::take(&mut self.following);
        if plans.is_empty() {
            return Ok(());
        }
        let drafts: Vec<_> = plans
            .into_iter()
            .zip(self.device.following_drafts()?)
            .collect();
        for (request, pieces) in requests.iter().zip(pieces) {
            let mut drafts = drafts.iter();
            if let Some((_, draft)) = drafts.find(|(plan, draft)| answers(plan, draft, request)) {
                pieces.tokens = &[];
                pieces.drafted.clone_from(&draft.drafted);
                pieces.drafted.truncate(request.ahead.tokens);
            }
        }
        Ok(())
    }
}

/// What is drafted after the rows of `placed`, where these are all that a step appends.
fn next_draft(placed: &Placed, lane: &Lane, step: &SequenceStep<'_>) -> Option<DraftPlan> {
    let (next, rows) = (step.next_draft.as_ref()?, &placed.piece.wanted);
    let (_, drafted) = step.tokens.split_first()?;
    (rows.len() == step.tokens.len()).then(|| DraftPlan {
        slot: step.sequence.slot(),
        start: lane.rows[rows.start].position as usize,
        tokens: drafted.to_vec(),
        verifying_row: Some(placed.first_row + rows.start - placed.piece.rows.start),
        ahead: Some(next.ahead),
        // the first of the tokens that are chosen is none of the draft
        races: races(&next.choice, 1),
    })
}

impl<D: ChainDevice> DraftEngine for CudaChain<D> {
    fn draft(
        &mut self,
        requests: &mut [DraftRequest<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<Vec<DraftedToken>>> {
        let at_once = self.device.draft_rows();
        let mut pieces: Vec<_> = requests.iter_mut().map(Pieces::new).collect();
        self.take_following(requests, &mut pieces)?;
        loop {
            interrupt.check()?;
            let open = pieces.iter_mut().zip(&*requests);
            let open = open.filter(|(pieces, _)| !pieces.tokens.is_empty());
            let (mut running, plans): (Vec<_>, Vec<_>) = open
                .take(MAX_DRAFTS)
                .map(|(pieces, request)| {
                    let plan = pieces.take(request, at_once);
                    (pieces, plan)
                })
                .unzip();
            if plans.is_empty() {
                break;
            }
            for (pieces, drafted) in running.iter_mut().zip(self.device.draft(&plans)?) {
                pieces.drafted = drafted;
            }
        }
        let drafts = pieces.into_iter().map(|pieces| pieces.drafted);
        let drafts: Vec<_> = drafts.collect();
        for (request, drafted) in requests.iter_mut().zip(&drafts) {
            for of in drafted {
                request.choice.choose(PositionLogits::Chosen(of.token));
            }
        }
        Ok(drafts)
    }
}

/// The races of the tokens that `request` chooses, in their order, from number `first` on; None where it
/// samples none. (What else a sampler does to logits is not worth reading them.)
fn races(request: &LogitsRequest, first: usize) -> Option<[RowRace; MAX_RACES]> {
    let LogitsRequest::Sampled(race) = request else {
        return None;
    };
    let tokens = race.positions() - first;
    Some(std::array::from_fn(|index| match index < tokens {
        true => run_race(race, tokens - 1 - index),
        false => RowRace::default(),
    }))
}
