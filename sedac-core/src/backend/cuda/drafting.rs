//! Drafts by a trained drafter on the device.

use std::ops::Range;

use super::abi::{MAX_ROWS, RowRace};
use super::chain_device::{ChainDevice, DraftPlan};
use super::{CudaChain, run_race};
use crate::backend::{
    Ahead, DraftChoice, DraftEngine, DraftedToken, LogitsRequest, PositionLogits,
};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::sampler::Race;

impl<D: ChainDevice> DraftEngine for CudaChain<D> {
    fn draft(
        &mut self,
        positions: Range<usize>,
        tokens: &[u32],
        ahead: &Ahead,
        choice: &mut dyn DraftChoice,
        interrupt: &Interrupt,
    ) -> Result<Vec<DraftedToken>> {
        let at_once = self.device.draft_rows();
        let pieces = tokens
            .chunks(at_once)
            .zip(positions.clone().step_by(at_once));
        let races = match choice.request(ahead.tokens) {
            LogitsRequest::Sampled(race) => Some(races(&race)),
            // what else a sampler does to logits is not worth reading them
            _ => None,
        };
        let mut drafted = Vec::new();
        for (piece, start) in pieces {
            interrupt.check()?;
            let is_last = start + piece.len() == positions.end;
            let plan = DraftPlan {
                slot: self.draft_slot,
                start,
                tokens: piece.to_vec(),
                ahead: is_last.then_some(*ahead),
                races,
            };
            drafted = self.device.draft(&plan)?;
        }
        for of in &drafted {
            choice.choose(PositionLogits::Chosen(of.token));
        }
        Ok(drafted)
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
