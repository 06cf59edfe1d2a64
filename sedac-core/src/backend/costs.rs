//! What passes cost on this machine.

use std::collections::BTreeMap;
use std::time::Duration;

/// A measurement may be too low by this much for each newer one: passes are only ever slowed down
/// by what else the machine does, but caches that grow slow them for good.
const RISE: f64 = 1.03;
/// And too high by this much for each later pass over another number of tokens, so that what once
/// seemed too slow to pay is tried again.
const FALL: f64 = 0.9998;

/// Seconds that passes over some numbers of tokens took, in a layer and in the head.
///
/// Decoding waits for weights to arrive from memory, so a pass over a few tokens takes little
/// longer than over one. How much is what decides whether a draft pays.
#[derive(Debug, Clone, Default)]
pub struct Costs {
    layer: Curve,
    head: Curve,
}

impl Costs {
    /// `layers` layers took `elapsed` for `tokens` tokens.
    pub fn note_layers(&mut self, layers: usize, tokens: usize, elapsed: Duration) {
        self.layer
            .note(tokens, elapsed.as_secs_f64() / layers as f64);
    }

    /// The head, which ends a pass, took `elapsed` for `tokens` tokens.
    pub fn note_head(&mut self, tokens: usize, elapsed: Duration) {
        self.head.note(tokens, elapsed.as_secs_f64());
        for curve in [&mut self.layer, &mut self.head] {
            curve.fall(tokens);
        }
    }

    /// Seconds for `tokens` tokens through `layers` layers.
    pub fn layers(&self, layers: usize, tokens: usize) -> f64 {
        layers as f64 * self.layer.at(tokens)
    }

    /// Seconds for the logits of `tokens` tokens.
    pub fn head(&self, tokens: usize) -> f64 {
        self.head.at(tokens)
    }
}

/// Measurements by the number of tokens; none yet after the first, which makes buffers too.
#[derive(Debug, Clone, Default)]
struct Curve(BTreeMap<usize, Option<f64>>);

impl Curve {
    fn note(&mut self, tokens: usize, seconds: f64) {
        if let Some(known) = self.0.get_mut(&tokens) {
            *known = Some(known.map_or(seconds, |known| seconds.min(known * RISE)));
        } else {
            self.0.insert(tokens, None);
        }
    }

    fn fall(&mut self, except: usize) {
        for (&tokens, seconds) in &mut self.0 {
            if tokens != except {
                *seconds = seconds.map(|seconds| seconds * FALL);
            }
        }
    }

    /// What is not known lies on a line between what is, and costs as much as the nearest known
    /// beyond. More tokens never cost less than fewer.
    fn at(&self, tokens: usize) -> f64 {
        let known = |(&tokens, seconds): (&usize, &Option<f64>)| Some((tokens, (*seconds)?));
        let below = self.0.range(..=tokens).rev().find_map(known);
        let above = self.0.range(tokens..).find_map(known);
        let least = self
            .0
            .iter()
            .find_map(known)
            .map_or(0.0, |(_, least)| least);
        let between = match (below, above) {
            (Some((n, low)), Some((m, high))) if n < m => {
                low + (high - low) * (tokens - n) as f64 / (m - n) as f64
            }
            (Some((_, seconds)), _) | (None, Some((_, seconds))) => seconds,
            (None, None) => 0.0,
        };
        between.max(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measured twice, as the first time does not count.
    fn note(costs: &mut Costs, tokens: usize, seconds: u64) {
        for _ in 0..2 {
            costs.note_layers(2, tokens, Duration::from_secs(seconds));
        }
    }

    #[test]
    fn costs_between_measurements_lie_on_a_line() {
        let mut costs = Costs::default();
        assert_eq!(costs.layers(1, 1), 0.0);
        note(&mut costs, 1, 2);
        note(&mut costs, 5, 4);
        let layer = |tokens| costs.layers(1, tokens);
        assert_eq!(
            [layer(1), layer(3), layer(5), layer(9)],
            [1.0, 1.5, 2.0, 2.0]
        );
        assert_eq!(costs.layers(3, 1), 3.0);
        assert_eq!(costs.head(1), 0.0);
    }

    #[test]
    fn neither_the_first_pass_nor_a_slow_one_counts() {
        let mut costs = Costs::default();
        for seconds in [5, 2, 1, 9] {
            costs.note_head(1, Duration::from_secs(seconds));
        }
        assert_eq!(costs.head(1), RISE);
    }

    #[test]
    fn what_is_not_measured_any_more_is_believed_to_get_cheaper() {
        let mut costs = Costs::default();
        note(&mut costs, 1, 2);
        note(&mut costs, 4, 8);
        for _ in 0..1000 {
            costs.note_head(1, Duration::from_secs(1));
        }
        assert!((3.2..3.3).contains(&costs.layers(1, 4)));
        for _ in 0..10_000 {
            costs.note_head(1, Duration::from_secs(1));
        }
        assert_eq!(costs.layers(1, 4), costs.layers(1, 1));
    }
}
