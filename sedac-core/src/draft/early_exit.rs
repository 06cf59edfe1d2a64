//! Drafts by the model's own shallow layers.

use std::time::Duration;

use super::{Draft, Drafter, Pacer};
use crate::backend::Backend;
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::policy::Forced;
use crate::sampler::argmax;

/// Longer drafts are seldom accepted whole.
const LONGEST: usize = 8;
/// Shares of the layers that drafts go through; each at the nearest exit.
const DEPTH_SHARES: [f64; 4] = [0.125, 0.25, 0.375, 0.5];
/// Drafting goes on while the exit's likeliest token leads the next by so much in probability.
const MARGINS: [f32; 3] = [0.2, 0.5, 0.8];

/// Decodes to an exit layer and takes the likeliest token there as the guess, again and again,
/// until the lead of the likeliest token falls under a threshold. The tokens' hidden states at the
/// exit are kept, so that verification starts there.
#[derive(Debug)]
pub(super) struct EarlyExit {
    /// Depth and least margin.
    ways: Vec<(usize, f32)>,
    pacer: Pacer,
}

impl EarlyExit {
    pub(super) fn new(exit_layers: &[usize], layers: usize) -> Self {
        let mut depths: Vec<usize> = DEPTH_SHARES
            .iter()
            .filter_map(|share| nearest(exit_layers, layers, share * layers as f64))
            .collect();
        depths.dedup();
        let ways: Vec<_> = depths
            .iter()
            .flat_map(|&depth| MARGINS.map(|margin| (depth, margin)))
            .collect();
        Self {
            pacer: Pacer::new(ways.len()),
            ways,
        }
    }
}

impl Drafter for EarlyExit {
    fn draft(
        &mut self,
        history: &[u32],
        most: usize,
        backend: &mut dyn Backend,
        interrupt: &Interrupt,
    ) -> Result<Draft> {
        let Some(way) = self.pacer.choose().filter(|_| most > 0) else {
            return Ok(Draft::default());
        };
        let (depth, least_margin) = self.ways[way];
        let mut policy = Forced::new(vec![depth]);
        let mut tokens = Vec::new();
        let mut newest = history[history.len() - 1];
        loop {
            backend.decode(newest, &mut policy, interrupt)?;
            let logits = backend.logits();
            if tokens.len() == most.min(LONGEST) || margin(logits) < least_margin {
                return Ok(Draft { tokens, depth });
            }
            newest = argmax(logits);
            tokens.push(newest);
        }
    }

    fn learn(&mut self, tokens: usize, elapsed: Duration) {
        self.pacer.learn(tokens, elapsed);
    }

    fn learn_without(&mut self, tokens: usize, elapsed: Duration) {
        self.pacer.learn_without(tokens, elapsed);
    }
}

/// The exit above full depth that is nearest to `depth`.
fn nearest(exit_layers: &[usize], layers: usize, depth: f64) -> Option<usize> {
    let distance = |exit: usize| (exit as f64 - depth).abs();
    exit_layers
        .iter()
        .copied()
        .filter(|exit| (1..layers).contains(exit))
        .min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
}

/// The probability of the likeliest token less that of the second.
fn margin(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > first {
            (first, second) = (logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    let total: f32 = logits.iter().map(|logit| (logit - first).exp()).sum();
    (1.0 - (second - first).exp()) / total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_differences_of_probabilities() {
        let logits = [0.2_f32.ln(), 0.7_f32.ln(), 0.1_f32.ln()];
        assert!((margin(&logits) - 0.5).abs() < 1e-6);
        assert_eq!(margin(&[1.0, 1.0]), 0.0);
    }

    #[test]
    fn drafts_go_to_exits_above_full_depth() {
        assert_eq!(nearest(&[4, 8, 12], 12, 3.0), Some(4));
        assert_eq!(nearest(&[12], 12, 3.0), None);
    }
}
