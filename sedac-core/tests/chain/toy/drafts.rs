//! A trained drafter.

use std::ops::Range;

use sedac_core::Result;
use sedac_core::backend::cuda::{DraftPlan, PassOutcome, PassPlan};
use sedac_core::backend::{
    DraftEngine, DraftRequest, DraftedToken, Engines, PositionLogits, margin_bin,
};
use sedac_core::interrupt::Interrupt;

use super::{Cache, Hidden, Toy, mix};

/// Drafts as an exit would.
impl DraftEngine for Toy {
    fn draft(
        &mut self,
        requests: &mut [DraftRequest<'_>],
        _: &Interrupt,
    ) -> Result<Vec<Vec<DraftedToken>>> {
        let requests = requests.iter_mut();
        Ok(requests.map(|request| self.draft_one(request)).collect())
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

/// `plan`, which follows `pass`, told what came of that; None where a logit is not finite.
pub(super) fn told(plan: &DraftPlan, pass: &PassPlan, outcome: &PassOutcome) -> Option<DraftPlan> {
    let first = plan.verifying_row.unwrap();
    let rows = &pass.rows[first..first + plan.positions()];
    assert_eq!(rows[0].position as usize, plan.start);
    assert!(rows.iter().all(|row| row.sequence == rows[0].sequence));
    let drafted = rows[1..].iter().map(|row| row.token as u32);
    assert!(drafted.eq(plan.tokens.iter().copied()));
    let chosen = (first..first + rows.len()).map(|row| {
        assert!(pass.logits_rows >> row & 1 == 1);
        match pass.sampled_rows >> row & 1 {
            1 => outcome.race[row].token,
            _ => outcome.row[row].token,
        }
    });
    let chosen: Vec<u32> = chosen.collect();
    let both = plan.tokens.iter().zip(&chosen);
    let accepted = both.take_while(|(token, chosen)| token == chosen).count();
    let mut taken_in = first..=first + accepted;
    let is_finite = taken_in.all(|row| outcome.row[row].finite == 1);
    is_finite.then(|| DraftPlan {
        tokens: chosen[..=accepted].to_vec(),
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
