//! A trained drafter.

use std::ops::Range;
use std::time::Instant;

use sedac_core::Result;
use sedac_core::backend::cuda::{BatchOutcome, BatchPlan, DraftPlan, PassOutcome, PassPlan};
use sedac_core::backend::{
    DraftEngine, DraftRequest, DraftedToken, Drafts, Engines, PositionLogits, margin_bin,
};
use sedac_core::interrupt::Interrupt;

use super::{CAPACITY, Cache, Hidden, Toy, mix};

/// Drafts as an exit would.
impl DraftEngine for Toy {
    fn draft(&mut self, requests: &mut [DraftRequest<'_>], _: &Interrupt) -> Result<Drafts> {
        let before = Instant::now();
        let requests = requests.iter_mut();
        Ok(Drafts {
            drafted: requests.map(|request| self.draft_one(request)).collect(),
            elapsed: before.elapsed(),
        })
    }
}

impl Toy {
    fn draft_one(&mut self, request: &mut DraftRequest<'_>) -> Vec<DraftedToken> {
        self.select(request.slot);
        self.take_in(request.positions.clone(), request.tokens);
        let (mut drafted, mut accepted) = (Vec::new(), 1.0);
        loop {
            let token = request
                .choice
                .choose(PositionLogits::All(&self.draft_logits));
            let probability = self.probability(token);
            drafted.push(DraftedToken { token, probability });
            accepted *= request.ahead.acceptance[margin_bin(probability)];
            if !request.ahead.goes_on(drafted.len(), accepted) {
                return drafted;
            }
            let mut text = self.draft_text.take().unwrap();
            text.push(token);
            self.set_draft_text(text);
        }
    }

    fn take_in(&mut self, positions: Range<usize>, tokens: &[u32]) {
        let slot = &mut self.slots[self.selected];
        let caches = slot.caches.lock().unwrap().clone();
        let text = taken_in(&caches, &mut slot.drafter_cache, positions, tokens);
        self.set_draft_text(text);
    }

    fn probability(&self, token: u32) -> f32 {
        probability(&self.draft_logits, token)
    }
}

/// A row of a pass, or a logits row of a batch, and the token that was chosen there, if that is known and
/// its logits are finite.
#[derive(Clone, Copy)]
pub(super) struct Verified {
    slot: i32,
    token: i32,
    position: i32,
    chosen: Option<u32>,
}

pub(super) fn verified_by_pass(pass: &PassPlan, outcome: &PassOutcome) -> Vec<Verified> {
    let verified = pass.rows.iter().enumerate().map(|(row, of)| {
        let is_sampled = pass.sampled_rows >> row & 1 == 1;
        let chosen = match is_sampled {
            true => outcome.race[row].token,
            false => outcome.row[row].token,
        };
        let is_known = pass.logits_rows >> row & 1 == 1 && outcome.row[row].finite == 1;
        Verified {
            slot: pass.sequences[of.sequence as usize].slot,
            token: of.token,
            position: of.position,
            chosen: is_known.then_some(chosen),
        }
    });
    verified.collect()
}

pub(super) fn verified_by_batch(plan: &BatchPlan, outcome: &BatchOutcome) -> Vec<Verified> {
    let rows = plan.logits_rows.iter().zip(&plan.races);
    let verified = rows.enumerate().map(|(index, (&row, by))| {
        let found = outcome.row[index];
        let chosen = by.map_or(found.token, |_| outcome.race[index].token);
        Verified {
            slot: plan.rows[row].slot,
            token: plan.rows[row].token,
            position: plan.rows[row].position,
            chosen: (found.finite == 1).then_some(chosen),
        }
    });
    verified.collect()
}

/// What `plan` is told that follows what was `verified`; None where a token is not known.
pub(super) fn told(plan: &DraftPlan, verified: &[Verified]) -> Option<DraftPlan> {
    let rows = &verified[plan.verifying_row.unwrap()..][..plan.positions()];
    let end = plan.start + rows.len() + plan.ahead.unwrap().tokens - 1;
    assert!(end <= CAPACITY, "whatever is accepted");
    let positions = rows.iter().map(|row| row.position as usize);
    assert!(positions.eq(plan.start..plan.start + rows.len()));
    assert!(rows.iter().all(|row| row.slot as usize == plan.slot));
    let drafted = rows[1..].iter().map(|row| row.token as u32);
    assert!(drafted.eq(plan.tokens.iter().copied()));
    let both = plan.tokens.iter().zip(rows);
    let accepted = both
        .take_while(|(token, row)| row.chosen == Some(**token))
        .count();
    let followed: Option<Vec<u32>> = rows[..=accepted].iter().map(|row| row.chosen).collect();
    Some(DraftPlan {
        tokens: followed?,
        verifying_row: None,
        races: plan.races.map(|mut races| {
            races.rotate_left(accepted);
            races
        }),
        ..plan.clone()
    })
}

/// The text after a trained drafter, whose cache holds `known`, has taken in `positions` and the
/// `tokens` that followed, which the model with `caches` must have run.
pub(super) fn taken_in(
    caches: &Cache,
    known: &mut Vec<u32>,
    positions: Range<usize>,
    tokens: &[u32],
) -> Vec<u32> {
    let run = |layer: &Vec<Option<(u32, u64)>>| {
        let tokens = layer[..positions.end].iter();
        tokens.map(|entry| entry.map(|(token, _)| token)).collect()
    };
    let first: Option<Vec<u32>> = run(&caches[0]);
    let mut text = first.expect("the model has run all verified positions");
    let last: Option<Vec<u32>> = run(&caches[caches.len() - 1]);
    assert_eq!(last.as_ref(), Some(&text), "through every layer");
    assert_eq!(text[positions.start + 1..], tokens[..tokens.len() - 1]);
    let own = &known[..positions.start];
    assert_eq!(*own, text[..positions.start], "the slot's own text");
    text.extend(tokens.last());
    *known = text[..positions.end].to_vec();
    text
}

/// What a trained drafter says after `text`.
pub(super) fn draft_logits(text: &[u32], layers: usize, agreement: u64) -> Vec<f32> {
    let mix_in = |digest, &token: &u32| mix(digest, u64::from(token));
    let hidden = Hidden {
        digest: text.iter().fold(0, mix_in),
        ..Hidden::default()
    };
    hidden.logits(0, layers, agreement)
}

pub(super) fn probability(logits: &[f32], token: u32) -> f32 {
    let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
    logits[token as usize].exp() / sum
}
