//! Sampled tokens as races: what a device may run in the sampler's place.

use std::cmp::Ordering;

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

    /// Whether no filter keeps a winner out.
    pub fn keeps_all(&self) -> bool {
        let Sampling {
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        (top_k, top_p, min_p) == (0, 1.0, 0.0)
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
    let most_probable = argmax(logits);
    let highest = logits[most_probable as usize];
    if sampling.top_k == 0 && sampling.top_p == 1.0 {
        let all = (0..).zip(logits.iter().copied());
        return run(sampling, key, (most_probable, highest), all);
    }
    candidates.clear();
    candidates.extend((0..).zip(logits.iter().copied()));
    keep_top_k(candidates, sampling.top_k);
    keep_nucleus(candidates, highest, sampling);
    let kept = candidates.iter().copied();
    run(sampling, key, (most_probable, highest), kept)
}

/// The winner among those of `tokens`, each with its logit, that min_p keeps. `first` is the most
/// probable.
///
/// A token's time is -ln(u) exp(y), where y says how far its logit is below the highest. Most cannot
/// win, which shows without a logarithm and an exponential: -ln(u) is at least 1 - u, and exp(y) at
/// least the first terms of its series.
fn run(
    sampling: &Sampling,
    key: u64,
    first: (u32, f32),
    tokens: impl Iterator<Item = (u32, f32)>,
) -> u32 {
    /// Of what is rounded in the bound.
    const ROUNDING: f32 = 1e-4;
    let &Sampling {
        temperature, min_p, ..
    } = sampling;
    let (mut winner, highest) = first;
    let mut fastest = -uniform(bits(key, winner)).ln();
    let mut limit = fastest as f32 * (1.0 + ROUNDING);
    for (token, logit) in tokens {
        let bits = bits(key, token);
        let y = (highest - logit) / temperature;
        let bound = below_one(bits) * (1.0 + y * (1.0 + y * (0.5 + y * (1.0 / 6.0))));
        // false for NaN
        if bound < limit {
            let weight = weight(logit, highest, temperature);
            let time = -uniform(bits).ln() / f64::from(weight);
            if time < fastest && weight >= min_p {
                (winner, fastest) = (token, time);
                limit = fastest as f32 * (1.0 + ROUNDING);
            }
        }
    }
    winner
}

/// The `top_k` most probable of `candidates`, tokens with their logits; all where it is 0.
fn keep_top_k(candidates: &mut Vec<(u32, f32)>, top_k: usize) {
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, likeliest_first);
        candidates.truncate(top_k);
    }
}

/// The most probable of `candidates` whose probabilities first reach top_p.
fn keep_nucleus(candidates: &mut Vec<(u32, f32)>, highest: f32, sampling: &Sampling) {
    let &Sampling {
        temperature, top_p, ..
    } = sampling;
    if top_p == 1.0 {
        return;
    }
    let weight = |&(_, logit): &(u32, f32)| f64::from(weight(logit, highest, temperature));
    let wanted = f64::from(top_p) * candidates.iter().map(weight).sum::<f64>();
    // to sort them all would take longer than all the rest
    let mut width = 4.0 * temperature;
    let is_near = |width: f32| move |of: &(u32, f32)| of.1 >= highest - width;
    let sum_near = |width| -> f64 {
        let near = candidates.iter().copied().filter(is_near(width));
        near.map(|of| weight(&of)).sum()
    };
    while width.is_finite() && sum_near(width) < wanted {
        width *= 2.0;
    }
    candidates.retain(is_near(width));
    candidates.sort_unstable_by(likeliest_first);
    let mut sum = 0.0;
    let last = candidates.iter().position(|of| {
        sum += weight(of);
        sum >= wanted
    });
    candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
}

/// Of equals the lowest token.
fn likeliest_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Relative to the most probable token's.
fn weight(logit: f32, highest: f32, temperature: f32) -> f32 {
    ((logit - highest) / temperature).exp()
}

/// The numbers below this are equally probable [`bits`].
const RANGE: u64 = 1 << 53;

/// What a token's exponential variable of rate 1 is made of: the same for the same `key` and `token`.
///
/// Of such variables divided by weights, each is the smallest with its weight's probability
/// (Gumbel-max, <https://arxiv.org/abs/1611.00712>). Against logits that were rounded otherwise,
/// as passes over one or several tokens do, this choice hardly ever changes; a point drawn on the
/// sum of all weights would fall beside some boundary once in a few hundred tokens.
fn bits(key: u64, token: u32) -> u64 {
    // SplitMix64, Steele et al. 2014, <https://doi.org/10.1145/2660193.2660195>; race.cuh computes
    // the same
    let mut z = key.wrapping_add(u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) >> 11
}

/// The number u between 0 and 1 that `bits` stand for; -ln(u) is the exponential variable.
fn uniform(bits: u64) -> f64 {
    (bits as f64 + 0.5) / RANGE as f64
}

/// 1 - u, or less.
fn below_one(bits: u64) -> f32 {
    (RANGE - 1 - bits) as i64 as f32 * (1.0 / RANGE as f32)
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
        let top_k = prop_oneof![Just(0), 1..20_usize];
        (0.1..3.0_f32, top_k, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| {
            Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                ..Sampling::default()
            }
        })
    }

    /// As [`choose`] is defined: every token's time, of those that the filters keep.
    fn choose_by_definition(sampling: &Sampling, key: u64, logits: &[f32]) -> u32 {
        let mut kept: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1));
        if sampling.top_k > 0 {
            kept.truncate(sampling.top_k);
        }
        let highest = kept[0].1;
        let weight = |logit: f32| f64::from(weight(logit, highest, sampling.temperature));
        let total: f64 = kept.iter().map(|of| weight(of.1)).sum();
        let mut sum = 0.0;
        kept.retain(|of| {
            let before = sum;
            sum += weight(of.1);
            before < f64::from(sampling.top_p) * total
        });
        kept.retain(|of| weight(of.1) >= f64::from(sampling.min_p));
        let time = |of: &(u32, f32)| -uniform(bits(key, of.0)).ln() / weight(of.1);
        let first = kept.iter().min_by(|a, b| time(a).total_cmp(&time(b)));
        first.unwrap().0
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "too many numbers for Miri")]
        fn the_winner_is_the_fastest_of_all(
            sampling in samplings(),
            key in any::<u64>(),
            // no two are equal, and some are masked out
            unit in 0.001..0.02_f32,
            masked in 0..3_u32,
            order in Just((0..2000_u32).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let logit = |&rank: &u32| match rank % 3 < masked && rank > 0 {
                true => f32::NEG_INFINITY,
                false => -(rank as f32) * unit,
            };
            let logits: Vec<f32> = order.iter().map(logit).collect();
            let chosen = choose(&sampling, key, &logits, &mut Vec::new());
            prop_assert_eq!(chosen, choose_by_definition(&sampling, key, &logits));
        }

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
    #[cfg_attr(miri, ignore = "too many numbers for Miri")]
    fn a_nucleus_is_as_wide_as_it_has_to_be() {
        let candidates: Vec<_> = (0..2000_u32).map(|n| (n, -0.01 * n as f32)).collect();
        for top_p in [0.5, 0.9, 0.99, 0.999, 0.999_99] {
            let sampling = Sampling {
                temperature: 1.0,
                top_p,
                ..Sampling::default()
            };
            let mut kept = candidates.clone();
            keep_nucleus(&mut kept, 0.0, &sampling);
            // of weights that shrink by exp(-0.01) each
            let expected = -100.0 * (1.0 - f64::from(top_p)).ln();
            assert!(
                (kept.len() as f64 - expected).abs() <= 2.0,
                "{top_p}: {}",
                kept.len()
            );
        }
    }

    #[test]
    fn filters_keep_the_lowest_of_equals() {
        // enough for a selection that moves them about, the most probable ones last
        let logits: Vec<f32> = (0..600_u32).map(|n| (n / 200) as f32).collect();
        for (top_k, top_p) in [(40, 1.0), (0, 0.1)] {
            let sampling = Sampling {
                temperature: 0.5,
                top_k,
                top_p,
                ..Sampling::default()
            };
            let chosen = (0..100).map(|key| choose(&sampling, key, &logits, &mut Vec::new()));
            let chosen: Vec<_> = chosen.collect();
            assert!(
                chosen.iter().all(|token| (400..440).contains(token)),
                "{chosen:?}"
            );
        }
    }

    #[test]
    fn the_bound_is_below_the_variable() {
        for bits in [0, 1, 1 << 30, RANGE / 2, RANGE - 2, RANGE - 1] {
            assert!(f64::from(below_one(bits)) <= -uniform(bits).ln() * (1.0 + 1e-6));
        }
    }

    #[test]
    fn keys_are_counted_from_the_newest_position() {
        let race = Race::new(Sampling::default(), vec![7, 8, 9]);
        assert_eq!((race.positions(), race.key(0), race.key(2)), (3, 9, 7));
    }
}
