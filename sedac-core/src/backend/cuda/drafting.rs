//! Drafts by a trained drafter on the device.

use super::abi::{MAX_ROWS, RowRace};
use super::chain_device::{ChainDevice, DraftPlan, MAX_DRAFTS};
use super::{CudaChain, run_race};
use crate::backend::{DraftEngine, DraftRequest, DraftedToken, LogitsRequest, PositionLogits};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::sampler::Race;

/// A request under way.
struct Pieces<'a> {
    /// What has not run, and where it starts.
    tokens: &'a [u32],
    start: usize,
    races: Option<[RowRace; MAX_ROWS]>,
    drafted: Vec<DraftedToken>,
}

impl<'a> Pieces<'a> {
    fn new(request: &mut DraftRequest<'a>) -> Self {
        Self {
            tokens: request.tokens,
            start: request.positions.start,
            races: match request.choice.request(request.ahead.tokens) {
                LogitsRequest::Sampled(race) => Some(races(&race)),
                // what else a sampler does to logits is not worth reading them
                _ => None,
            },
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
        };
        (self.tokens, self.start) = (rest, self.start + piece.len());
        plan
    }
}

impl<D: ChainDevice> DraftEngine for CudaChain<D> {
    fn draft(
        &mut self,
        requests: &mut [DraftRequest<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<Vec<DraftedToken>>> {
        let at_once = self.device.draft_rows();
        let mut pieces: Vec<_> = requests.iter_mut().map(Pieces::new).collect();
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

/// The races of a draft's tokens, in their order.
fn races(race: &Race) -> [RowRace; MAX_ROWS] {
    let tokens = race.positions();
    std::array::from_fn(|index| match index < tokens {
        true => run_race(race, tokens - 1 - index),
        false => RowRace::default(),
    })
}
