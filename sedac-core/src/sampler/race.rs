//! Sampled tokens as races: what a device may run in the sampler's place.

use super::{Sampling, argmax};

/// Relative error of a device's exponentials, and more.
const EXPONENTIAL_ERROR: f32 = 1e-4;

/// Chooses the tokens of consecutive positions from logits without penalties.
///
/// At each position every token gets an exponential variable, the same for the same key and token,
/// divided by its weight; the smallest wins among the tokens that the filters keep.
#[derive(Debug, Clone, PartialEq)]
pub struct Race {
    sampling: Sampling,
    keys: Vec<u64>,
}

/// How the race among all tokens of a position ended, whatever the filters keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RaceResult {
    /// The winner.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
    /// Whether it leads by more than rounding errors of the host and the device together.
    pub is_certain: bool,
    /// The token with the highest logit.
    pub most_probable: u32,
    /// The highest logit.
    pub highest: f32,
    /// Whether no other token has it.
    pub is_unique: bool,
    /// The sum of exp(logit - highest) over all tokens.
    pub total: f32,
    /// The number of tokens.
    pub vocabulary: usize,
}

impl Race {
    pub(super) fn new(sampling: Sampling, keys: Vec<u64>) -> Self {
        Self { sampling, keys }
    }

    /// The number of positions.
    pub fn positions(&self) -> usize {
        self.keys.len()
    }

    /// What logits are divided by.
    pub fn temperature(&self) -> f32 {
        self.sampling.temperature
    }

    /// The key of the position that `later` others follow.
    ///
    /// # Panics
    /// When there is no such position.
    pub fn key(&self, later: usize) -> u64 {
        self.keys[self.keys.len() - 1 - later]
    }

    /// The token at the position that `later` others follow.
    ///
    /// # Panics
    /// When there is no such position.
    pub fn choose(&self, later: usize, logits: &[f32]) -> u32 {
        choose(&self.sampling, self.key(later), logits, &mut Vec::new())
    }

    /// The token that [`choose`](Self::choose) gives for the logits of `result`, where that follows
    /// from it. The winner among all tokens also wins among fewer, so only whether the filters keep
    /// it is left to show.
    pub fn settle(&self, result: &RaceResult) -> Option<u32> {
        (result.is_certain && self.keeps(result)).then_some(result.token)
    }

    fn keeps(&self, result: &RaceResult) -> bool {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let weight = weight(result.logit, result.highest, temperature);
        if weight < min_p {
            return false;
        }
        if result.token == result.most_probable && result.is_unique {
            return true;
        }
        // below 1, the temperature makes weights smaller
        let tokens = result.vocabulary as f32;
        let total = if temperature <= 1.0 {
            result.total
        } else {
            tokens
        };
        // of sums over the vocabulary, in whatever order
        let error = EXPONENTIAL_ERROR + tokens * f32::EPSILON;
        let min_probability = weight / total * (1.0 - error);
        let in_top_k = top_k == 0 || min_probability * top_k as f32 > 1.0;
        in_top_k && (top_p == 1.0 || min_probability > 1.0 - top_p + error)
    }
}

/// The token that wins the race of `key` among those of `logits` that the filters keep.
/// `candidates` is scratch space.
pub(super) fn choose(
    sampling: &Sampling,
    key: u64,
    logits: &[f32],
    candidates: &mut Vec<(u32, f32)>,
) -> u32 {
    keep_candidates(sampling, logits, candidates);
    let time = |&(token, weight): &(u32, f32)| exponential(key, token) / f64::from(weight);
    let first = candidates.iter().min_by(|a, b| time(a).total_cmp(&time(b)));
    first.map_or_else(|| argmax(logits), |&(token, _)| token)
}

/// Fill `candidates` with the kept tokens and their unnormalised weights.
fn keep_candidates(sampling: &Sampling, logits: &[f32], candidates: &mut Vec<(u32, f32)>) {
    let &Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        ..
    } = sampling;
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
        *logit = weight(*logit, highest, temperature);
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

/// Relative to the most probable token's.
fn weight(logit: f32, highest: f32, temperature: f32) -> f32 {
    ((logit - highest) / temperature).exp()
}

/// An exponential variable of rate 1, the same for the same `key` and `token`.
///
/// Of such variables divided by weights, each is the smallest with its weight's probability
/// (Gumbel-max, <https://arxiv.org/abs/1611.00712>). Against logits that were rounded otherwise,
/// as passes over one or several tokens do, this choice hardly ever changes; a point drawn on the
/// sum of all weights would fall beside some boundary once in a few hundred tokens.
fn exponential(key: u64, token: u32) -> f64 {
    // SplitMix64, Steele et al. 2014, <https://doi.org/10.1145/2660193.2660195>; race.cuh computes
    // the same
    let mut z = key.wrapping_add(u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let uniform = ((z >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -uniform.ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a device says of `logits`, of which all are considered.
    fn result(sampling: Sampling, key: u64, logits: &[f32]) -> RaceResult {
        let everything = Sampling {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..sampling
        };
        let token = choose(&everything, key, logits, &mut Vec::new());
        let most_probable = argmax(logits);
        let highest = logits[most_probable as usize];
        RaceResult {
            token,
            logit: logits[token as usize],
            is_certain: true,
            most_probable,
            highest,
            is_unique: logits.iter().filter(|&&logit| logit == highest).count() == 1,
            total: logits.iter().map(|logit| (logit - highest).exp()).sum(),
            vocabulary: logits.len(),
        }
    }

    fn samplings() -> impl Strategy<Value = Sampling> {
        let top_p = prop_oneof![Just(1.0), 0.01..1.0_f32];
        let min_p = prop_oneof![Just(0.0), 0.0..1.0_f32];
        (0.1..3.0_f32, 0..20_usize, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| {
            Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                ..Sampling::default()
            }
        })
    }

    proptest! {
        #[test]
        fn what_a_result_settles_is_what_logits_give(
            sampling in samplings(),
            key in any::<u64>(),
            // equal logits among them
            logits in prop::collection::vec((0..20_u8).prop_map(|n| f32::from(n) / 2.0), 1..50),
        ) {
            let race = Race::new(sampling, vec![key]);
            let mut result = result(sampling, key, &logits);
            let settled = race.settle(&result);
            prop_assert!(settled.is_none_or(|token| token == race.choose(0, &logits)));
            result.is_certain = false;
            prop_assert_eq!(race.settle(&result), None);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many numbers for Miri")]
    fn most_results_settle_the_token() {
        let logits: Vec<f32> = (1..4000).map(|n| 12.0 - (n as f32).ln() * 2.0).collect();
        let settled = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling {
                temperature: 0.8,
                ..Sampling::default()
            };
            change(&mut sampling);
            let race = Race::new(sampling, vec![0]);
            let results = (0..1000).map(|key| result(sampling, key, &logits));
            results.filter_map(|result| race.settle(&result)).count()
        };
        assert_eq!(settled(|_| ()), 1000);
        assert!(settled(|sampling| sampling.top_k = 40) > 900);
        assert!(settled(|sampling| sampling.top_p = 0.9) > 700);
        assert!(settled(|sampling| sampling.min_p = 0.05) > 700);
    }

    #[test]
    fn keys_are_counted_from_the_newest_position() {
        let race = Race::new(Sampling::default(), vec![7, 8, 9]);
        assert_eq!((race.positions(), race.key(0), race.key(2)), (3, 9, 7));
    }
}
