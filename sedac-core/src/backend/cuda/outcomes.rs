//! What a pass says of a sequence: where it stopped, its logits and its tokens.

use std::ops::Range;

use super::CudaChain;
use super::abi::{PassOutcome, RaceOutcome, RowOutcome, SequenceOutcome};
use super::chain_device::ChainDevice;
use super::lane::{Lane, Piece};
use crate::backend::{Backend, Logits, LogitsRequest, SequenceStep, StepExit};
use crate::error::{Error, Result};
use crate::policy::{ExitReason, ExitRule, ExitSignals};
use crate::sampler::{Race, RaceResult};

/// What a pass or a batch found of rows, by the place of their logits.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) row: &'a [RowOutcome],
    /// Of those whose tokens are sampled.
    pub(super) race: &'a [RaceOutcome],
}

impl<D: ChainDevice> CudaChain<D> {
    /// Where the pass or batch over `piece` ended, as the device says it: the depth, and the criterion.
    pub(super) fn exit(
        &self,
        piece: &Piece,
        rule: Option<&ExitRule>,
        (depth, criterion): (i32, i32),
    ) -> Result<StepExit> {
        let layers = self.num_layers();
        let layer = usize::try_from(depth).unwrap_or(0);
        let criteria = rule
            .filter(|_| piece.is_last)
            .map_or(&[][..], ExitRule::criteria);
        let index = usize::try_from(criterion).ok();
        let reason = match index.map(|index| criteria.get(index)) {
            Some(Some(criterion)) if layer < layers => Some(criterion.reason),
            None if layer == layers => Some(ExitReason::FullDepth),
            None if layer < layers => Some(ExitReason::DepthLimit),
            _ => None,
        };
        match reason {
            Some(reason) if layer > 0 => Ok(StepExit { layer, reason }),
            _ => Err(Error::Device {
                what: "the chain's kernel".into(),
                reason: format!(
                    "it stopped after {depth} layers by criterion {criterion}, which cannot be; \
                     build its engines again with sedac-export engines --target cuda"
                ),
            }),
        }
    }

    /// What the exit head said where the pass over `piece` ended, if the rule asked it.
    pub(super) fn exit_signals(
        &self,
        piece: &Piece,
        rule: Option<&ExitRule>,
        outcome: SequenceOutcome,
    ) -> Option<ExitSignals> {
        let depth = outcome.depth as usize;
        let asked = rule.is_some_and(|rule| {
            let mut criteria = rule.criteria().iter();
            criteria.any(|criterion| self.condition(criterion, depth).signal.is_of_exit_head())
        });
        (piece.is_last && asked).then_some(ExitSignals {
            margin: outcome.margin,
            entropy: outcome.entropy,
            learned: outcome.learned,
        })
    }

    /// Take the logits of `piece` from `found`, where those that it wants are from number `first` on.
    /// Where it exited, those of the newest row are all.
    pub(super) fn take_logits(
        &mut self,
        lane: &mut Lane,
        piece: &Piece,
        exit: StepExit,
        (found, first): (Rows<'_>, usize),
        request: &LogitsRequest,
    ) -> Result<()> {
        let mut wanted = piece.wanted.clone();
        let mut places = first..first + wanted.len();
        if exit.reason != ExitReason::FullDepth && !wanted.is_empty() {
            wanted.start = wanted.end - 1;
            places.start = places.end - 1;
            lane.logits = Logits::None;
            lane.margins.clear();
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let outcomes = &found.row[places.clone()];
        if let Some(index) = outcomes.iter().position(|row| row.finite == 0) {
            let position = lane.rows[wanted.start + index].position as usize;
            return Err(Error::NotFinite {
                position,
                engine: None,
            });
        }
        if let LogitsRequest::Rows(_) = request {
            let logits = self.device.logits(places)?;
            match &mut lane.logits {
                Logits::Rows(earlier) => earlier.extend(logits),
                other => *other = Logits::Rows(logits),
            }
            return Ok(());
        }
        for (row, place) in wanted.zip(places) {
            let token = self.token(lane.later(row, 0), place, found, request)?;
            lane.take_token(token, found.row[place].margin);
        }
        Ok(())
    }

    /// Take what further steps gave the lane whose only row, of `piece`, was the first of `rows`, of
    /// which the pass had as many as come after it: up to a token that the device did not go on with.
    pub(super) fn take_further_steps(
        &mut self,
        lane: &mut Lane,
        piece: &Piece,
        rows: Range<usize>,
        outcome: &PassOutcome,
        step: &mut SequenceStep<'_>,
    ) -> Result<()> {
        let found = Rows {
            row: &outcome.row,
            race: &outcome.race,
        };
        for index in 1..outcome.steps as usize {
            let in_pass = index * rows.end + rows.start;
            let before = in_pass - rows.end;
            let chosen = match step.logits {
                LogitsRequest::Sampled(_) => outcome.race[before].token,
                _ => outcome.row[before].token,
            };
            let newest = lane.logits.tokens().last();
            lane.mispredicted = newest != Some(&chosen);
            if lane.mispredicted || outcome.row[in_pass].finite == 0 {
                break;
            }
            let appended = step.sequence.append(&[chosen])?;
            let stopped = &outcome.sequence[in_pass];
            let exit = self.exit(piece, step.rule, (stopped.depth, stopped.criterion))?;
            lane.exits_ahead.push(exit);
            for layer in 0..self.filled(lane, exit) {
                step.sequence.kv_mut().fill(layer, appended.end);
            }
            let token = self.token(lane.later(0, index), in_pass, found, &step.logits)?;
            lane.take_token(token, outcome.row[in_pass].margin);
        }
        Ok(())
    }

    /// The token at `place`, of whose sequence `later` positions follow.
    fn token(
        &mut self,
        later: usize,
        place: usize,
        found: Rows<'_>,
        request: &LogitsRequest,
    ) -> Result<u32> {
        match request {
            LogitsRequest::Sampled(race) => self.sample(race, later, place, found),
            _ => Ok(found.row[place].token),
        }
    }

    /// The token sampled at `place`, of whose sequence `later` positions follow. Where the device's
    /// race does not settle it, the logits do.
    fn sample(&mut self, race: &Race, later: usize, place: usize, found: Rows<'_>) -> Result<u32> {
        let (row, won) = (&found.row[place], &found.race[place]);
        let result = RaceResult {
            token: won.token,
            logit: won.logit,
            is_certain: won.is_certain != 0,
            most_probable: row.token,
            highest: row.logit,
            is_unique: row.margin > 0.0,
            total: won.total,
            vocabulary: self.device.vocabulary(),
        };
        match race.settle(&result) {
            Some(token) => Ok(token),
            None => {
                let logits = self.device.logits(place..place + 1)?;
                Ok(race.choose(later, &logits))
            }
        }
    }
}
