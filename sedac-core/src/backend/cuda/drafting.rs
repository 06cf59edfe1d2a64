//! Drafts by a trained drafter on the device, requested or begun when the pass before had ended.

use std::time::{Duration, Instant};

use super::abi::RowRace;
use super::chain_device::{ChainDevice, DraftPlan, FollowingDraft, MAX_DRAFTS, MAX_RACES};
use super::lane::{Lane, Piece};
use super::{CudaChain, run_race};
use crate::backend::{
    DraftEngine, DraftRequest, DraftedToken, Drafts, LogitsRequest, PositionLogits, SequenceStep,
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

/// Drafts that follow passes and batches.
#[derive(Debug, Default)]
pub(super) struct Following {
    /// After the last one, under way.
    begun: Vec<DraftPlan>,
    /// Of slots that have run nothing since.
    ended: Vec<(DraftPlan, FollowingDraft)>,
}

impl Following {
    /// The sequence in `slot` runs: what was drafted for it was not asked for.
    fn forget(&mut self, slot: usize) {
        self.ended.retain(|(plan, _)| plan.slot != slot);
    }

    /// What was drafted for `request`, if it is for the tokens that were chosen.
    fn take(&mut self, request: &DraftRequest<'_>) -> Option<FollowingDraft> {
        let mut plans = self.ended.iter();
        let index = plans.position(|(plan, _)| plan.slot == request.slot)?;
        let (plan, draft) = self.ended.swap_remove(index);
        answers(&plan, &draft, request).then_some(draft)
    }
}

/// Whether `draft`, by `plan`, is what `request` asks for.
fn answers(plan: &DraftPlan, draft: &FollowingDraft, request: &DraftRequest<'_>) -> bool {
    let accepted = &plan.tokens[..draft.positions.saturating_sub(1)];
    let positions = plan.start..plan.start + draft.positions;
    positions == request.positions
        && request.tokens.split_last() == Some((&draft.followed, accepted))
        && (1..=request.ahead.tokens).contains(&draft.drafted.len())
}

impl<D: ChainDevice> CudaChain<D> {
    /// What drafts after a pass or batch, where it is the last one of its step. It has a piece of each of
    /// `placed`, with its lane and the place of its first logits.
    pub(super) fn next_drafts<'a>(
        &self,
        placed: impl Iterator<Item = (usize, &'a Piece, usize)>,
        lanes: &[Lane],
        steps: &[SequenceStep<'_>],
    ) -> Vec<DraftPlan> {
        if lanes.iter().any(Lane::is_open) {
            return Vec::new();
        }
        let plans = placed.filter_map(|(lane, piece, first)| {
            next_draft(piece, first, &lanes[lane], &steps[lane])
        });
        let at_once = self.device.draft_rows();
        plans.filter(|plan| plan.positions() <= at_once).collect()
    }

    /// Wait for drafts under way, and forget those of `slots`, which run now.
    pub(super) fn end_drafts(&mut self, slots: impl Iterator<Item = i32>) -> Result<()> {
        self.await_drafts()?;
        slots.for_each(|slot| self.following.forget(slot as usize));
        Ok(())
    }

    /// Note that `plans` draft now.
    pub(super) fn begin_drafts(&mut self, plans: Vec<DraftPlan>) {
        self.following.begun = plans;
    }

    fn await_drafts(&mut self) -> Result<()> {
        let plans = std::mem::take(&mut self.following.begun);
        if !plans.is_empty() {
            let drafts = self.device.following_drafts()?;
            self.following.ended.extend(plans.into_iter().zip(drafts));
        }
        Ok(())
    }

    /// Give requests what was drafted for them already. Returns what that took.
    fn take_following(
        &mut self,
        requests: &[DraftRequest<'_>],
        pieces: &mut [Pieces<'_>],
    ) -> Result<Duration> {
        self.await_drafts()?;
        let (mut started, mut ended) = (u64::MAX, 0);
        for (request, pieces) in requests.iter().zip(pieces) {
            if let Some(draft) = self.following.take(request) {
                pieces.tokens = &[];
                pieces.drafted = draft.drafted;
                (started, ended) = (started.min(draft.span.start), ended.max(draft.span.end));
            }
        }
        Ok(Duration::from_nanos(ended.saturating_sub(started)))
    }
}

/// What is drafted after the rows of `piece`, whose logits are from the place `first` on, where these are
/// all that a step appends, and the device knows which tokens are chosen there.
fn next_draft(
    piece: &Piece,
    first: usize,
    lane: &Lane,
    step: &SequenceStep<'_>,
) -> Option<DraftPlan> {
    let (next, rows) = (step.next_draft.as_ref()?, &piece.wanted);
    let (_, drafted) = step.tokens.split_first()?;
    let is_known = match &step.logits {
        LogitsRequest::Tokens(_) => true,
        LogitsRequest::Sampled(race) => race.keeps_all(),
        LogitsRequest::None | LogitsRequest::Rows(_) => false,
    };
    let is_whole = rows.len() == step.tokens.len() && step.ahead.tokens == 1;
    (is_known && is_whole).then(|| DraftPlan {
        slot: step.sequence.slot(),
        start: lane.rows[rows.start].position as usize,
        tokens: drafted.to_vec(),
        verifying_row: Some(first),
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
    ) -> Result<Drafts> {
        let at_once = self.device.draft_rows();
        let mut pieces: Vec<_> = requests.iter_mut().map(Pieces::new).collect();
        let following = self.take_following(requests, &mut pieces)?;
        let before = Instant::now();
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
            if plans.iter().all(|plan| plan.ahead.is_none()) {
                self.device.take_in(&plans)?;
                continue;
            }
            for (pieces, drafted) in running.iter_mut().zip(self.device.draft(&plans)?) {
                pieces.drafted = drafted;
            }
        }
        let elapsed = following + before.elapsed();
        let drafted = pieces.into_iter().map(|pieces| pieces.drafted);
        let drafted: Vec<_> = drafted.collect();
        for (request, drafted) in requests.iter_mut().zip(&drafted) {
            for of in drafted {
                request.choice.choose(PositionLogits::Chosen(of.token));
            }
        }
        Ok(Drafts { drafted, elapsed })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Ahead, DraftChoice};

    struct NoChoice;

    impl DraftChoice for NoChoice {
        fn request(&mut self, positions: usize) -> LogitsRequest {
            LogitsRequest::Tokens(positions)
        }

        fn choose(&mut self, _: PositionLogits<'_>) -> u32 {
            0
        }
    }

    fn request(slot: usize, tokens: &[u32], ahead: usize) -> DraftRequest<'_> {
        DraftRequest {
            slot,
            positions: 10..10 + tokens.len(),
            tokens,
            ahead: Ahead::of(ahead),
            choice: Box::new(NoChoice),
        }
    }

    /// After a pass over a token at position 10 and the drafted ones 5, 6 and 7, of which two were
    /// accepted; 9 was chosen then.
    fn following(slots: &[usize]) -> Following {
        let plan = |&slot: &usize| DraftPlan {
            slot,
            start: 10,
            tokens: vec![5, 6, 7],
            verifying_row: Some(0),
            ..DraftPlan::default()
        };
        let drafted = DraftedToken {
            token: 1,
            probability: 0.5,
        };
        let draft = FollowingDraft {
            positions: 3,
            followed: 9,
            drafted: vec![drafted; 2],
            span: 100..200,
        };
        Following {
            begun: Vec::new(),
            ended: slots
                .iter()
                .map(|slot| (plan(slot), draft.clone()))
                .collect(),
        }
    }

    #[test]
    fn a_draft_is_for_the_tokens_that_were_chosen() {
        let is_given =
            |tokens: &[u32], ahead| following(&[1]).take(&request(1, tokens, ahead)).is_some();
        assert!(is_given(&[5, 6, 9], 2));
        assert!(is_given(&[5, 6, 9], 8));
        assert!(!is_given(&[5, 6, 9], 1), "more than was asked for");
        for tokens in [&[5, 6, 7][..], &[5, 8, 9], &[5, 9], &[5, 6, 7, 9]] {
            assert!(!is_given(tokens, 8), "{tokens:?}");
        }
    }

    #[test]
    fn a_draft_is_given_once_and_to_its_sequence() {
        let mut drafts = following(&[1, 2, 4]);
        let mut take = |slot| drafts.take(&request(slot, &[5, 6, 9], 8)).is_some();
        assert!(!take(3) && take(2) && !take(2) && take(4));
        drafts.forget(1);
        assert!(drafts.ended.is_empty());
    }
}
