//! What a pass says of a sequence: where it stopped, its logits and its tokens.

use std::ops::Range;

use super::CudaChain;
use super::abi::{PassOutcome, SequenceOutcome};
use super::chain_device::ChainDevice;
use super::lane::{Lane, Piece};
use crate::backend::{Backend, Logits, LogitsRequest, SequenceStep, StepExit};
use crate::error::{Error, Result};
use crate::policy::{ExitReason, ExitRule, ExitSignals};
use crate::sampler::{Race, RaceResult};

impl<D: ChainDevice> CudaChain<D> {
    /// Where the pass over `piece` ended, as the device says it.
    pub(super) fn exit(
        &self,
        piece: &Piece,
        rule: Option<&ExitRule>,
        outcome: SequenceOutcome,
    ) -> Result<StepExit> {
        let layers = self.num_layers();
        let layer = usize::try_from(outcome.depth).unwrap_or(0);
        let criteria = rule
            .filter(|_| piece.is_last)
            .map_or(&[][..], ExitRule::criteria);
        let criterion = usize::try_from(outcome.criterion).ok();
        let reason = match criterion.map(|index| criteria.get(index)) {
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
                    "it stopped after {} layers by criterion {}, which cannot be; build its \
                     engines again with sedac-export engines --target cuda",
                    outcome.depth, outcome.criterion
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

    /// Take the logits of `piece`, whose first row was number `first_row` of the pass. Where it
    /// exited, those of the newest row are all.
    pub(super) fn take_logits(
        &mut self,
        lane: &mut Lane,
        piece: &Piece,
        exit: StepExit,
        first_row: usize,
        outcome: &PassOutcome,
        request: &LogitsRequest,
    ) -> Result<()> {
        let mut wanted = piece.wanted.clone();
        if exit.reason != ExitReason::FullDepth && !wanted.is_empty() {
            wanted.start = wanted.end - 1;
            lane.logits = Logits::None;
            lane.margins.clear();
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let in_pass = |row: usize| first_row + row - piece.rows.start;
        let rows = in_pass(wanted.start)..in_pass(wanted.end);
        let outcomes = &outcome.row[rows.clone()];
        if let Some(index) = outcomes.iter().position(|row| row.finite == 0) {
            let position = lane.rows[wanted.start + index].position as usize;
            return Err(Error::NotFinite {
                position,
                engine: None,
            });
        }
        if let LogitsRequest::Rows(_) = request {
            let logits = self.device.logits(rows)?;
            match &mut lane.logits {
                Logits::Rows(earlier) => earlier.extend(logits),
                other => *other = Logits::Rows(logits),
            }
            return Ok(());
        }
        for (row, in_pass) in wanted.zip(rows) {
            let token = self.token(lane.later(row, 0), in_pass, outcome, request)?;
            lane.take_token(token, outcome.row[in_pass].margin);
        }
        Ok(())
    }

    /// Take what further steps gave the lane whose only row was the first of `rows`, of which the
    /// pass had as many as come after it: up to a token that the device did not go on with.
    pub(super) fn take_further_steps(
        &mut self,
        lane: &mut Lane,
        rows: Range<usize>,
        outcome: &PassOutcome,
        step: &mut SequenceStep<'_>,
    ) -> Result<()> {
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
            for layer in 0..lane.exit.layer {
                step.sequence.kv_mut().fill(layer, appended.end);
            }
            let token = self.token(lane.later(0, index), in_pass, outcome, &step.logits)?;
            lane.take_token(token, outcome.row[in_pass].margin);
        }
        Ok(())
    }

    /// The token at `in_pass` of the outcome, of whose sequence `later` positions follow.
    fn token(
        &mut self,
        later: usize,
        in_pass: usize,
        outcome: &PassOutcome,
        request: &LogitsRequest,
    ) -> Result<u32> {
        match request {
            LogitsRequest::Sampled(race) => self.sample(race, later, in_pass, outcome),
            _ => Ok(outcome.row[in_pass].token),
        }
    }

    /// The token sampled at `in_pass` of the outcome, of whose sequence `later` positions follow.
    /// Where the device's race does not settle it, the logits do.
    fn sample(
        &mut self,
        race: &Race,
        later: usize,
        in_pass: usize,
        outcome: &PassOutcome,
    ) -> Result<u32> {
        let (row, won) = (&outcome.row[in_pass], &outcome.race[in_pass]);
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
                let logits = self.device.logits(in_pass..in_pass + 1)?;
                Ok(race.choose(later, &logits))
            }
        }
    }
}
