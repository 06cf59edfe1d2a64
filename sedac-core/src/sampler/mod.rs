//! Choose the next token from logits.

mod logits_processing;
mod race;

use std::collections::VecDeque;

use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};

pub use self::logits_processing::{LogitsProcessing, TokenLogprobs, TokenMask};
use self::race::choose;
pub use self::race::{Race, RaceResult};
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
    processing: LogitsProcessing,
    /// What a constrained text's next token is chosen among.
    mask: Option<TokenMask>,
    random: ChaCha12Rng,
    /// Drawn for the next tokens, one each.
    keys: VecDeque<u64>,
    processed: Vec<f32>,
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
            "0 to 3.4e38",
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
            "above 0, at most 3.4e38",
        )?;
        Ok(Self {
            settings,
            processing: LogitsProcessing::default(),
            mask: None,
            random: ChaCha12Rng::seed_from_u64(settings.seed),
            keys: VecDeque::new(),
            processed: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The same, with logits processed as `processing` says.
    #[must_use]
    pub fn with_processing(self, processing: LogitsProcessing) -> Self {
        Self { processing, ..self }
    }

    /// The next token after `history` (prompt and output so far) given its `logits`.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let token = self.foresee(0, logits, history);
        self.skip();
        token
    }

    /// The race that gives the next `positions` tokens, in turn, of their logits alone; None where
    /// the most likely token is taken, or what is in the text changes the logits.
    pub fn race(&mut self, positions: usize) -> Option<Race> {
        let Sampling {
            temperature,
            repetition_penalty,
            ..
        } = self.settings;
        let keys = |sampler: &mut Self| (0..positions).map(|later| sampler.key(later)).collect();
        let races = temperature > 0.0 && repetition_penalty == 1.0;
        (races && !self.processing.needs_logits()).then(|| Race::new(self.settings, keys(self)))
    }

    /// Whether the most likely token is taken, and nothing else of its logits is needed.
    pub fn is_argmax(&self) -> bool {
        self.settings.is_argmax() && !self.processing.needs_logits()
    }

    /// The next token was chosen as [`sample`](Self::sample) would have.
    pub fn skip(&mut self) {
        self.keys.pop_front();
        self.mask = None;
    }

    /// Choose the next token of a constrained text among those of `mask`.
    pub fn allow(&mut self, mask: TokenMask) {
        self.mask = Some(mask);
    }

    /// Whether each token is chosen among those of a mask.
    pub fn is_constrained(&self) -> bool {
        self.processing.constrained
    }

    /// Whether it is not known yet among which tokens the next one is chosen.
    pub fn lacks_mask(&self) -> bool {
        self.is_constrained() && self.mask.is_none()
    }

    /// Whether it is asked for how probable the prompt's tokens are.
    pub fn scores_prompt(&self) -> bool {
        self.processing.prompt_logprobs
    }

    /// How probable `token` is by `logits`, where that was asked for.
    pub fn logprobs(&self, logits: &[f32], token: u32) -> Option<TokenLogprobs> {
        let top = self.processing.top_logprobs?;
        Some(TokenLogprobs::new(logits, token, top))
    }

    /// What [`sample`](Self::sample) will give after `later` other tokens, for the same arguments.
    pub fn foresee(&mut self, later: usize, logits: &[f32], history: &[u32]) -> u32 {
        let penalty = self.settings.repetition_penalty;
        if penalty == 1.0 && !self.processing.changes_logits() {
            return self.choose(later, logits);
        }
        let mut processed = std::mem::take(&mut self.processed);
        processed.clear();
        processed.extend_from_slice(logits);
        penalise(&mut processed, logits, history, penalty);
        self.processing.apply(&mut processed, self.mask.as_ref());
        let token = self.choose(later, &processed);
        self.processed = processed;
        token
    }

    fn choose(&mut self, later: usize, logits: &[f32]) -> u32 {
        if self.settings.temperature == 0.0 {
            return argmax(logits);
        }
        let key = self.key(later);
        choose(&self.settings, key, logits, &mut self.candidates)
    }

    /// The key of the token that `later` others precede.
    fn key(&mut self, later: usize) -> u64 {
        while self.keys.len() <= later {
            self.keys.push_back(self.random.random());
        }
        self.keys[later]
    }
}

/// The index of the largest logit, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    // maxima of pieces are vector instructions, which a comparison with the best so far is not
    const PIECE: usize = 256;
    let (mut highest, mut first) = (f32::NEG_INFINITY, 0);
    for (index, piece) in logits.chunks(PIECE).enumerate() {
        let high = maximum(piece);
        if high > highest {
            (highest, first) = (high, index * PIECE);
        }
    }
    let within = logits[first..].iter().position(|&logit| logit == highest);
    (first + within.unwrap_or(0)) as u32
}

/// The largest of `logits`; what is no number is none of them.
fn maximum(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let rows = logits.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        for (lane, &logit) in lanes.iter_mut().zip(row) {
            *lane = larger(*lane, logit);
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
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
    use proptest::collection::vec;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn the_largest_is_found_wherever_it_is(
            logits in vec(prop_oneof![-3_i8..3, Just(i8::MIN)], 1..700),
        ) {
            let number = |&logit: &i8| match logit {
                i8::MIN => f32::NEG_INFINITY,
                _ => f32::from(logit),
            };
            let logits: Vec<f32> = logits.iter().map(number).collect();
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = logits.iter().position(|&logit| logit == highest);
            prop_assert_eq!(Some(argmax(&logits) as usize), first);
        }
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
    fn races_give_the_tokens_to_come() {
        let settings = Sampling {
            temperature: 1.0,
            top_k: 2,
            seed: 5,
            ..Sampling::default()
        };
        let logits = [0.1, 0.2, 0.3];
        let mut sampler = Sampler::new(settings).unwrap();
        let race = sampler.race(20).unwrap();
        sampler.skip();
        for later in (0..19).rev() {
            assert_eq!(sampler.sample(&logits, &[]), race.choose(later, &logits));
        }
        let greedy = Sampling::default();
        let penalised = Sampling {
            repetition_penalty: 1.1,
            ..settings
        };
        for settings in [greedy, penalised] {
            assert_eq!(Sampler::new(settings).unwrap().race(1), None);
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
    fn a_bias_and_a_mask_change_the_choice() {
        let processing = LogitsProcessing {
            bias: vec![(1, 5.0)],
            constrained: true,
            top_logprobs: Some(1),
            prompt_logprobs: false,
        };
        for temperature in [0.0, 0.5] {
            let settings = Sampling {
                temperature,
                ..Sampling::default()
            };
            let sampler = Sampler::new(settings).unwrap();
            let mut sampler = sampler.with_processing(processing.clone());
            assert!(!sampler.is_argmax() && sampler.race(1).is_none());
            assert!(sampler.lacks_mask());
            sampler.allow(TokenMask::new(vec![0b1000], 4).unwrap());
            assert!(!sampler.lacks_mask());
            assert_eq!(sampler.sample(&[9.0, 0.0, 0.0, 0.0], &[]), 3);
            assert!(sampler.lacks_mask(), "a mask is of one token");
            sampler.allow(TokenMask::new(vec![0b1010], 4).unwrap());
            assert_eq!(sampler.sample(&[900.0, 40.0, 0.0, 0.0], &[]), 1);
            let logprobs = sampler.logprobs(&[0.0; 4], 2).unwrap();
            assert_eq!(logprobs.top[0].0, 0, "of the model's own logits");
        }
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
