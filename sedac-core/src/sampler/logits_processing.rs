//! What a request changes about logits before a token is chosen, and what it wants to know of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::{Error, Result};
use crate::exponential::sum_of_exponentials;

/// A request's logit bias and constraint, and the log-probabilities it asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogitsProcessing {
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Whether each token is chosen among those that a [`TokenMask`] allows.
    pub constrained: bool,
    /// Each token comes with its log-probability and those of this number of most probable tokens.
    pub top_logprobs: Option<usize>,
    /// So do the prompt's tokens, but for the first.
    pub prompt_logprobs: bool,
}

impl LogitsProcessing {
    /// Check the bias against a vocabulary of `vocabulary` tokens, and that it is known how many
    /// log-probabilities a prompt's tokens come with.
    ///
    /// # Errors
    /// [`Error::Setting`] where a token does not exist, its bias is not finite, or
    /// `prompt_logprobs` lacks `top_logprobs`.
    pub fn check(&self, vocabulary: usize) -> Result<()> {
        if self.prompt_logprobs && self.top_logprobs.is_none() {
            return Err(Error::setting(
                "prompt_logprobs",
                true,
                "false without top_logprobs",
            ));
        }
        for &(token, bias) in &self.bias {
            if token as usize >= vocabulary {
                let range = format!("for tokens below {vocabulary}, which are all there are");
                return Err(Error::setting("logit_bias", token, range));
            }
            if !bias.is_finite() {
                return Err(Error::setting("logit_bias", bias, "finite"));
            }
        }
        Ok(())
    }

    /// Whether all logits of a position are needed, not only the token chosen there.
    pub(super) fn needs_logits(&self) -> bool {
        *self != Self::default()
    }

    /// Whether tokens may be chosen from other logits than the model's.
    pub(super) fn changes_logits(&self) -> bool {
        self.constrained || !self.bias.is_empty()
    }

    /// Add the bias to `logits`, and exclude what `mask` does not allow.
    pub(super) fn apply(&self, logits: &mut [f32], mask: Option<&TokenMask>) {
        for &(token, bias) in &self.bias {
            logits[token as usize] += bias;
        }
        if let Some(mask) = mask {
            for (token, logit) in logits.iter_mut().enumerate() {
                if !mask.allows(token) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The tokens that may come next, one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask(Vec<u32>);

impl TokenMask {
    /// Token t is allowed where bit t % 32 of word t / 32 is set; tokens beyond the words are not.
    ///
    /// # Errors
    /// [`Error::Setting`] when no token of `vocabulary` is allowed.
    pub fn new(words: Vec<u32>, vocabulary: usize) -> Result<Self> {
        let mask = Self(words);
        if (0..vocabulary).any(|token| mask.allows(token)) {
            return Ok(mask);
        }
        let range = format!("one that allows at least one of {vocabulary} tokens");
        Err(Error::setting("mask", "of no token", range))
    }

    fn allows(&self, token: usize) -> bool {
        let word = self.0.get(token / 32).copied().unwrap_or(0);
        word >> (token % 32) & 1 == 1
    }
}

/// How probable the model finds a token and the most probable ones, whatever was changed about the
/// logits and at temperature 1.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most probable tokens and theirs, the most probable first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Of `token` and the `top` most probable ones of `logits`.
    pub(super) fn new(logits: &[f32], token: u32, top: usize) -> Self {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_total = sum_of_exponentials(logits, highest).ln();
        let logprob = |logit: f32| (f64::from(logit - highest) - log_total) as f32;
        let ranked = highest_first(logits, top);
        Self {
            logprob: logprob(logits[token as usize]),
            top: ranked
                .into_iter()
                .map(|(token, logit)| (token, logprob(logit)))
                .collect(),
        }
    }
}

/// The `top` highest of `logits` with their tokens, the highest first and of equals the lowest token.
fn highest_first(logits: &[f32], top: usize) -> Vec<(u32, f32)> {
    if top == 0 {
        return Vec::new();
    }
    let mut kept = BinaryHeap::new();
    let mut lowest = f32::NEG_INFINITY; // of `top` that are kept
    for (token, &logit) in (0..).zip(logits) {
        if logit < lowest {
            continue;
        }
        kept.push(Reverse(rank(token, logit)));
        if kept.len() > top {
            kept.pop();
        }
        if let (true, Some(&Reverse(worst))) = (kept.len() == top, kept.peek()) {
            lowest = logits[token_of(worst) as usize];
        }
    }
    let ranks = kept.into_sorted_vec().into_iter();
    ranks
        .map(|Reverse(rank)| (token_of(rank), logits[token_of(rank) as usize]))
        .collect()
}

/// The higher, the higher the logit by `total_cmp`, and of equals the lower the token.
fn rank(token: u32, logit: f32) -> u64 {
    let bits = logit.to_bits();
    let ordered = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    u64::from(ordered) << 32 | u64::from(!token)
}

fn token_of(rank: u64) -> u32 {
    !(rank as u32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn logprobs_are_of_a_softmax() {
        let logits = [0.2_f32.ln(), 0.7_f32.ln(), 0.1_f32.ln()].map(|logit| logit + 50.0);
        let logprobs = TokenLogprobs::new(&logits, 2, 2);
        assert!((logprobs.logprob.exp() - 0.1).abs() < 1e-5);
        let top: Vec<_> = logprobs.top.iter().map(|&(token, _)| token).collect();
        assert_eq!(top, [1, 0]);
        assert!((logprobs.top[0].1.exp() - 0.7).abs() < 1e-5);
        assert_eq!(TokenLogprobs::new(&logits, 0, 9).top.len(), 3);
        assert!(TokenLogprobs::new(&logits, 0, 0).top.is_empty());
    }

    #[test]
    fn a_mask_ends_with_its_words() {
        let mask = TokenMask::new(vec![0b101], 40).unwrap();
        assert!(mask.allows(0) && !mask.allows(1) && mask.allows(2) && !mask.allows(33));
        assert!(TokenMask::new(vec![0b101], 0).is_err());
        assert!(TokenMask::new(vec![0, 1 << 8], 40).is_err());
        assert!(TokenMask::new(Vec::new(), 40).is_err());
    }

    #[test]
    fn a_bias_names_a_token_and_is_finite() {
        let check = |bias| {
            LogitsProcessing {
                bias: vec![bias],
                ..LogitsProcessing::default()
            }
            .check(6)
        };
        assert!(check((5, -100.0)).is_ok());
        assert!(check((6, 1.0)).is_err());
        assert!(check((0, f32::NAN)).is_err());
    }

    #[test]
    fn a_prompt_is_scored_with_a_number_of_most_probable_tokens() {
        let check = |top_logprobs| {
            LogitsProcessing {
                top_logprobs,
                prompt_logprobs: true,
                ..LogitsProcessing::default()
            }
            .check(6)
        };
        assert!(check(Some(0)).is_ok());
        assert!(check(None).is_err());
    }

    proptest! {
        #[test]
        fn the_highest_are_those_of_all_in_order(
            logits in prop::collection::vec(
                prop_oneof![(-4..4_i8).prop_map(f32::from), -9.0..9.0_f32, Just(f32::NEG_INFINITY)],
                0..80,
            ),
            top in 0..90_usize,
        ) {
            let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            all.truncate(top);
            prop_assert_eq!(highest_first(&logits, top), all);
        }
    }
}
