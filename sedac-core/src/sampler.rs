//! Choose the next token from logits.

use std::collections::VecDeque;

use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};

use crate::error::{Error, Result};

/// How to sample. The defaults are greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens whose probabilities first reach this sum (nucleus sampling,
    /// Holtzman et al. 2020, <https://arxiv.org/abs/1904.09751>).
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the most likely one
    /// (<https://arxiv.org/abs/2407.01082>).
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens seen before (CTRL, Keskar et al.
    /// 2019, <https://arxiv.org/abs/1909.05858>); 1 does nothing.
    pub repetition_penalty: f32,
    /// Seed of the random choices.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether the most likely token is taken, and nothing else is set that could change that.
    pub fn is_argmax(self) -> bool {
        let Self { seed, .. } = self;
        self == Self {
            seed,
            ..Self::default()
        }
    }
}

/// Draws tokens; holds its random state and scratch space.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    random: ChaCha12Rng,
    /// Drawn for the next tokens, one each.
    keys: VecDeque<u64>,
    penalised: Vec<f32>,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler with `settings`.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the setting that is out of range.
    pub fn new(settings: Sampling) -> Result<Self> {
        let check = |name, value: f32, ok: bool, range: &str| {
            if ok {
                Ok(())
            } else {
                Err(Error::setting(name, value, range))
            }
        };
        let Sampling {
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            ..
        } = settings;
        check(
            "temperature",
            temperature,
            temperature >= 0.0 && temperature.is_finite(),
            "0 or more",
        )?;
        check(
            "top_p",
            top_p,
            top_p > 0.0 && top_p <= 1.0,
            "above 0, at most 1",
        )?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        check(
            "repetition_penalty",
            repetition_penalty,
            repetition_penalty > 0.0 && repetition_penalty.is_finite(),
            "above 0",
        )?;
        Ok(Self {
            settings,
            random: ChaCha12Rng::seed_from_u64(settings.seed),
            keys: VecDeque::new(),
            penalised: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The next token after `history` (prompt and output so far) given its `logits`.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let token = self.foresee(0, logits, history);
        self.keys.pop_front();
        token
    }

    /// What [`sample`](Self::sample) will give after `later` other tokens, for the same arguments.
    pub fn foresee(&mut self, later: usize, logits: &[f32], history: &[u32]) -> u32 {
        if self.settings.repetition_penalty == 1.0 {
            return self.choose(later, logits);
        }
        let mut penalised = std::mem::take(&mut self.penalised);
        penalised.clear();
        penalised.extend_from_slice(logits);
        penalise(
            &mut penalised,
            logits,
            history,
            self.settings.repetition_penalty,
        );
        let token = self.choose(later, &penalised);
        self.penalised = penalised;
        token
    }

    fn choose(&mut self, later: usize, logits: &[f32]) -> u32 {
        if self.settings.temperature == 0.0 {
            return argmax(logits);
        }
        self.keep_candidates(logits);
        while self.keys.len() <= later {
            self.keys.push_back(self.random.random());
        }
        let key = self.keys[later];
        let race = |&(token, weight): &(u32, f32)| exponential(key, token) / f64::from(weight);
        let first = self
            .candidates
            .iter()
            .min_by(|a, b| race(a).total_cmp(&race(b)));
        first.map_or_else(|| argmax(logits), |&(token, _)| token)
    }

    /// Fill `candidates` with the kept tokens and their unnormalised weights.
    fn keep_candidates(&mut self, logits: &[f32]) {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.settings;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0..).zip(logits.iter().copied()));
        let likeliest_first = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1);
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likeliest_first);
            candidates.truncate(top_k);
        }
        let logits = candidates.iter().map(|&(_, logit)| logit);
        let highest = logits.fold(f32::NEG_INFINITY, f32::max);
        for (_, logit) in candidates.iter_mut() {
            *logit = ((*logit - highest) / temperature).exp();
        }
        if top_p < 1.0 {
            candidates.sort_unstable_by(|a, b| likeliest_first(a, b).then(a.0.cmp(&b.0)));
            let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
            let mut sum = 0.0;
            let nucleus = candidates.iter().position(|(_, weight)| {
                sum += weight;
                sum >= top_p * total
            });
            candidates.truncate(nucleus.map_or(candidates.len(), |last| last + 1));
        }
        candidates.retain(|&(_, weight)| weight >= min_p);
    }
}

/// An exponential variable of rate 1, the same for the same `key` and `token`.
///
/// Of such variables divided by weights, each is the smallest with its weight's probability
/// (Gumbel-max, <https://arxiv.org/abs/1611.00712>). Against logits that were rounded otherwise,
/// as passes over one or several tokens do, this choice hardly ever changes; a point drawn on the
/// sum of all weights would fall beside some boundary once in a few hundred tokens.
fn exponential(key: u64, token: u32) -> f64 {
    // SplitMix64, Steele et al. 2014, <https://doi.org/10.1145/2660193.2660195>
    let mut z = key.wrapping_add(u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let uniform = ((z >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -uniform.ln()
}

/// The index of the largest logit, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

/// Penalise each token of `history` once, however often it occurs.
fn penalise(penalised: &mut [f32], logits: &[f32], history: &[u32], penalty: f32) {
    for &token in history {
        let Some(&logit) = logits.get(token as usize) else {
            continue;
        };
        penalised[token as usize] = if logit > 0.0 {
            logit / penalty
        } else {
            logit * penalty
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(settings: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(settings).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, &[]) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(sampler.sample(&[0.0, 2.0, 2.0], &[]), 1);
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many numbers for Miri")]
    fn frequencies_follow_the_softmax() {
        let settings = Sampling {
            temperature: 1.0,
            seed: 7,
            ..Sampling::default()
        };
        let logits = [0.0, 1.0_f32.exp().ln(), 2.0];
        let counts = counts(settings, &logits, 30_000);
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = logit.exp() / total;
            assert!((*count as f32 / 30_000.0 - expected).abs() < 0.01);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many numbers for Miri")]
    fn rounding_hardly_ever_changes_the_choice() {
        let settings = Sampling {
            temperature: 1.5,
            ..Sampling::default()
        };
        let logits: Vec<f32> = (0..8192_u32)
            .map(|n| (n * 7919 % 1000) as f32 / 100.0)
            .collect();
        let rounded: Vec<f32> = logits.iter().map(|logit| logit * (1.0 + 2e-6)).collect();
        let draws = |logits: &[f32]| {
            let mut sampler = Sampler::new(settings).unwrap();
            (0..500)
                .map(|_| sampler.sample(logits, &[]))
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(&logits), draws(&rounded));
    }

    #[test]
    fn filters_leave_only_what_they_keep() {
        let logits = [3.0, 2.0, 1.0, 0.0];
        let warm = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let top_k = counts(Sampling { top_k: 2, ..warm }, &logits, 2_000);
        assert!(top_k[0] > 0 && top_k[1] > 0 && top_k[2] + top_k[3] == 0);
        let top_p = counts(Sampling { top_p: 0.6, ..warm }, &logits, 2_000);
        assert_eq!(top_p[0], 2_000);
        let min_p = counts(Sampling { min_p: 0.3, ..warm }, &logits, 2_000);
        assert!(min_p[1] > 0 && min_p[2] + min_p[3] == 0);
    }

    #[test]
    fn a_seed_repeats() {
        let settings = Sampling {
            temperature: 1.0,
            seed: 3,
            ..Sampling::default()
        };
        let logits = [0.1, 0.2, 0.3];
        let draw = || {
            let mut sampler = Sampler::new(settings).unwrap();
            (0..50)
                .map(|_| sampler.sample(&logits, &[]))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }

    #[test]
    fn what_is_foreseen_comes() {
        let settings = Sampling {
            temperature: 1.0,
            repetition_penalty: 1.5,
            ..Sampling::default()
        };
        let logits = [0.1, 0.2, 0.3];
        let mut sampler = Sampler::new(settings).unwrap();
        let mut untouched = Sampler::new(settings).unwrap();
        for later in [2, 0, 4, 1] {
            let foreseen: Vec<u32> = (0..=later)
                .map(|n| sampler.foresee(n, &logits, &[0]))
                .collect();
            for token in foreseen {
                assert_eq!(sampler.sample(&logits, &[0]), token);
                assert_eq!(untouched.sample(&logits, &[0]), token);
            }
        }
    }

    #[test]
    fn the_penalty_counts_a_token_once() {
        let settings = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        let mut sampler = Sampler::new(settings).unwrap();
        assert_eq!(sampler.sample(&[3.0, 2.0], &[0, 0, 0]), 1);
        assert_eq!(sampler.sample(&[3.0, 1.0], &[0, 0, 0]), 0);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let plain = Sampling::default();
        for settings in [
            Sampling {
                temperature: -1.0,
                ..plain
            },
            Sampling {
                temperature: f32::NAN,
                ..plain
            },
            Sampling {
                top_p: 0.0,
                ..plain
            },
            Sampling {
                min_p: 1.5,
                ..plain
            },
            Sampling {
                repetition_penalty: 0.0,
                ..plain
            },
        ] {
            assert!(Sampler::new(settings).is_err());
        }
    }
}
