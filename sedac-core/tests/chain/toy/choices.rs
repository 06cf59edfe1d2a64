//! What a device chooses and decides by itself.

use sedac_core::backend::cuda::{RaceOutcome, RowRace};
use sedac_core::policy::{Comparison, Condition, Signal};
use sedac_core::sampler::argmax;

use super::{Hidden, mix};

/// The race among all tokens. A quarter of the time, rounding is said to leave it open.
pub(super) fn race(by: RowRace, logits: &[f32]) -> RaceOutcome {
    let noise = |token: u64| {
        let mut z = by
            .key
            .wrapping_add(token.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let uniform = ((z ^ (z >> 31)) as f64 + 1.0) / 2_f64.powi(64);
        -(-uniform.ln()).ln()
    };
    let score =
        |token: usize| f64::from(logits[token] * by.inverse_temperature) + noise(token as u64);
    let mut order: Vec<_> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    let (first, lead) = (order[0], score(order[0]) - score(order[1]));
    let highest = logits[argmax(logits) as usize];
    RaceOutcome {
        token: first as u32,
        logit: logits[first],
        total: logits.iter().map(|logit| (logit - highest).exp()).sum(),
        is_certain: (lead > 1e-4 && mix(by.key, 0) & 3 > 0).into(),
    }
}

/// The probability of the most probable token less that of the second.
pub(super) fn margin(logits: &[f32]) -> f32 {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let total: f32 = logits.iter().map(|logit| (logit - sorted[0]).exp()).sum();
    (1.0 - (sorted[1] - sorted[0]).exp()) / total
}

/// What is remembered of one criterion.
#[derive(Clone, Copy, Default)]
pub(super) struct State {
    run: u32,
    accumulator: f32,
}

impl State {
    pub(super) fn stops(&mut self, row: Condition, newest: Hidden, depth: usize) -> bool {
        let value = match row.signal {
            Signal::None => return false,
            Signal::Stability => newest.signal(depth, 0),
            Signal::Risk => newest.signal(depth, 1),
            Signal::Margin => newest.signal(depth, 2),
            Signal::Learned => newest.signal(depth, 4),
        };
        let satisfied = match row.comparison {
            Comparison::AtLeast => value >= row.threshold,
            Comparison::Below => value < row.threshold,
            Comparison::Accumulated => {
                let gained = (1.0 - value / row.threshold).clamp(0.0, 1.0);
                self.accumulator = self.accumulator * row.decay + gained * row.weight;
                self.accumulator >= row.target
            }
        };
        self.run = if satisfied { self.run + 1 } else { 0 };
        row.may_exit == 1 && self.run >= row.run_length
    }
}
