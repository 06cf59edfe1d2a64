//! Attention of a few queries over the keys and values of one head, in fp32.
//!
//! The sums of a query have one order, whatever else is computed beside it, so that it has the same bits
//! alone, in a draft's verification and in a batch. A dot product is sixteen sums of every sixteenth
//! product, which then are added two by two; the sum of values is in the order of positions.

use std::ops::Range;

use fearless_simd::prelude::*;
use fearless_simd::{Level, Simd, dispatch, f32x4, f32x16};

use crate::exponential::exponential;

/// Numbers that are computed side by side.
const LANES: usize = 16;
/// Keys whose scores are computed side by side.
const KEYS: usize = 4;
/// Queries that values are read for at once. Three for each of three heads take 19 us over 500 positions,
/// and 24 one by one (64 numbers, one core of an Intel machine with AVX-512).
pub(super) const QUERIES: usize = 4;

/// How scores become weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scores {
    /// What a dot product is multiplied with.
    pub(super) scale: f32,
    /// Scores are bent below it, as softcap * tanh(score / softcap); 0 for none.
    pub(super) softcap: f32,
}

/// A query, [head size], which of the keys it sees, and where what it attends to goes, [head size].
pub(super) struct Query<'a> {
    pub(super) numbers: &'a [f32],
    pub(super) seen: Range<usize>,
    pub(super) attended: &'a mut [f32],
}

/// Compute what `queries`, up to [`QUERIES`] of one size, attend to among `keys` and `values`, [positions,
/// head size] each. `weights` is memory.
///
/// # Panics
/// When a query sees no key, or one that there is not.
pub(super) fn attend(
    level: Level,
    queries: &mut [Query<'_>],
    [keys, values]: [&[f32]; 2],
    scores: Scores,
    weights: &mut Vec<f32>,
) {
    let first = queries
        .iter()
        .map(|query| query.seen.start)
        .min()
        .unwrap_or(0);
    let end = queries
        .iter()
        .map(|query| query.seen.end)
        .max()
        .unwrap_or(0);
    let count = end - first;
    weights.resize(queries.len() * count, 0.0);
    dispatch!(level, simd => {
        let size = queries.first().map_or(0, |query| query.numbers.len());
        let keys = &keys[first * size..end * size];
        score(simd, queries, keys, scores.scale, weights);
        for (query, weights) in queries.iter().zip(weights.chunks_exact_mut(count)) {
            let (before, weights) = weights.split_at_mut(query.seen.start - first);
            let (weights, after) = weights.split_at_mut(query.seen.len());
            bend(weights, scores.softcap);
            soften(weights);
            // what another sees adds nothing
            before.fill(0.0);
            after.fill(0.0);
        }
        let values = &values[first * size..end * size];
        match queries {
            [one] => sum_values(simd, [one], weights, values),
            [one, two] => sum_values(simd, [one, two], weights, values),
            [one, two, three] => sum_values(simd, [one, two, three], weights, values),
            [one, two, three, four] => sum_values(simd, [one, two, three, four], weights, values),
            _ => unreachable!("as many queries as registers have room for"),
        }
    });
}

/// Write the scores of `keys`, [positions, head size], to `weights`, [queries, positions].
#[inline(always)]
fn score<S: Simd>(simd: S, queries: &[Query<'_>], keys: &[f32], scale: f32, weights: &mut [f32]) {
    let size = queries[0].numbers.len();
    let count = keys.len() / size;
    // a few keys for all queries, so that they are read from memory once
    for (place, keys) in keys.chunks(KEYS * size).enumerate() {
        for (index, query) in queries.iter().enumerate() {
            let weights = &mut weights[index * count + place * KEYS..(index + 1) * count];
            match keys.len() == KEYS * size {
                true => {
                    let (low, high) = keys.split_at(2 * size);
                    let (low, high) = (low.split_at(size), high.split_at(size));
                    let dots = dots(simd, query.numbers, [low.0, low.1, high.0, high.1]);
                    (dots * scale).store_slice(&mut weights[..KEYS]);
                }
                false => {
                    for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(size)) {
                        let dots = dots(simd, query.numbers, [key; KEYS]) * scale;
                        *weight = <[f32; KEYS]>::from(dots)[0];
                    }
                }
            }
        }
    }
}

/// Bend `scores` below `softcap`, if it is above 0.
#[inline(always)]
fn bend(scores: &mut [f32], softcap: f32) {
    if softcap > 0.0 {
        for score in scores {
            *score = softcap * (*score / softcap).tanh();
        }
    }
}

/// The dot products of `query` and each of `keys`.
#[inline(always)]
fn dots<S: Simd>(simd: S, query: &[f32], keys: [&[f32]; KEYS]) -> f32x4<S> {
    let size = query.len();
    let mut sums = [f32x16::splat(simd, 0.0); KEYS];
    let mut start = 0;
    while start + LANES <= size {
        let part = f32x16::from_slice(simd, &query[start..start + LANES]);
        for index in 0..KEYS {
            let key = f32x16::from_slice(simd, &keys[index][start..start + LANES]);
            sums[index] = part.mul_add(key, sums[index]);
        }
        start += LANES;
    }
    if start < size {
        let part = padded(simd, &query[start..]);
        for index in 0..KEYS {
            let key = padded(simd, &keys[index][start..]);
            sums[index] = part.mul_add(key, sums[index]);
        }
    }
    let [a, b, c, d] = sums;
    let [a, b, c, d] = [in_fours(a), in_fours(b), in_fours(c), in_fours(d)];
    // the first and third numbers' sums of a and c, then the others'
    let one = a.zip_low(c) + a.zip_high(c);
    let other = b.zip_low(d) + b.zip_high(d);
    one.zip_low(other) + one.zip_high(other)
}

/// `numbers`, fewer than there are lanes, and zeros.
#[inline(always)]
fn padded<S: Simd>(simd: S, numbers: &[f32]) -> f32x16<S> {
    let mut lanes = [0.0; LANES];
    lanes[..numbers.len()].copy_from_slice(numbers);
    f32x16::from_slice(simd, &lanes)
}

/// The sums of every fourth of `lanes`, two by two.
#[inline(always)]
fn in_fours<S: Simd>(lanes: f32x16<S>) -> f32x4<S> {
    let (low, high) = lanes.split();
    let (low, high) = (low + high).split();
    low + high
}

/// Make weights of scores: e to their power below the highest, over the sum of all; NaN where a score is
/// not finite, so that what a broken key gives is noticed.
#[inline(always)]
fn soften(scores: &mut [f32]) {
    let (groups, rest) = scores.as_chunks_mut::<LANES>();
    let mut highest = [f32::NEG_INFINITY; LANES];
    // 0, or NaN
    let mut poison = [0.0_f32; LANES];
    for group in &*groups {
        for lane in 0..LANES {
            highest[lane] = highest[lane].max(group[lane]);
            poison[lane] += group[lane] * 0.0;
        }
    }
    for lane in 0..rest.len() {
        highest[lane] = highest[lane].max(rest[lane]);
        poison[lane] += rest[lane] * 0.0;
    }
    let highest = highest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = poison;
    for group in groups {
        for lane in 0..LANES {
            group[lane] = exponential(group[lane] - highest);
            sums[lane] += group[lane];
        }
    }
    for (sum, score) in sums.iter_mut().zip(rest) {
        *score = exponential(*score - highest);
        *sum += *score;
    }
    let share = sums.into_iter().sum::<f32>().recip();
    for score in scores {
        *score *= share;
    }
}

/// Sum `values`, each times its weight, for each of `queries`: `weights` are [queries, positions].
#[inline(always)]
fn sum_values<S: Simd, const N: usize>(
    simd: S,
    mut queries: [&mut Query<'_>; N],
    weights: &[f32],
    values: &[f32],
) {
    let size = queries[0].numbers.len();
    let count = values.len() / size;
    let weights: [&[f32]; N] = std::array::from_fn(|index| &weights[index * count..][..count]);
    let mut start = 0;
    while start + 4 * LANES <= size {
        sum_block::<S, N, 4>(simd, &mut queries, weights, (values, start));
        start += 4 * LANES;
    }
    while start + LANES <= size {
        sum_block::<S, N, 1>(simd, &mut queries, weights, (values, start));
        start += LANES;
    }
    for (query, weights) in queries.iter_mut().zip(weights) {
        let rest = &mut query.attended[start..];
        rest.fill(0.0);
        for (&weight, value) in weights.iter().zip(values.chunks_exact(size)) {
            for (sum, value) in rest.iter_mut().zip(&value[start..]) {
                *sum += weight * value;
            }
        }
    }
}

/// The same of the numbers from `start` on, as many as `PARTS` registers hold.
#[inline(always)]
fn sum_block<S: Simd, const N: usize, const PARTS: usize>(
    simd: S,
    queries: &mut [&mut Query<'_>; N],
    weights: [&[f32]; N],
    (values, start): (&[f32], usize),
) {
    let size = queries[0].numbers.len();
    let mut sums = [[f32x16::splat(simd, 0.0); PARTS]; N];
    for (position, value) in values.chunks_exact(size).enumerate() {
        let value = &value[start..start + PARTS * LANES];
        for part in 0..PARTS {
            let numbers = f32x16::from_slice(simd, &value[part * LANES..][..LANES]);
            for query in 0..N {
                let weight = f32x16::splat(simd, weights[query][position]);
                sums[query][part] = weight.mul_add(numbers, sums[query][part]);
            }
        }
    }
    for (query, sums) in queries.iter_mut().zip(sums) {
        for (part, sum) in sums.into_iter().enumerate() {
            sum.store_slice(&mut query.attended[start + part * LANES..][..LANES]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: [usize; 7] = [4, 16, 20, 64, 80, 100, 128];

    /// As many numbers as `count`, about as large as those of models.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        let number = |place: usize| ((place * 7919 + seed * 104_729) as f32 * 0.618).sin() * 2.0;
        (0..count).map(number).collect()
    }

    /// What each query of `seen` attends to, all computed together.
    fn attended(
        level: Level,
        seen: &[Range<usize>],
        (size, positions): (usize, usize),
        (scores, seeds): (Scores, &[usize]),
    ) -> Vec<Vec<f32>> {
        let caches = [1, 2].map(|seed| numbers(positions * size, seed));
        let queries: Vec<_> = seeds.iter().map(|&seed| numbers(size, seed + 10)).collect();
        let mut outputs = vec![vec![f32::NAN; size]; seen.len()];
        let mut tile: Vec<_> = queries
            .iter()
            .zip(seen)
            .zip(&mut outputs)
            .map(|((numbers, seen), attended)| Query {
                numbers,
                seen: seen.clone(),
                attended,
            })
            .collect();
        let mut weights = vec![f32::NAN; 3];
        attend(
            level,
            &mut tile,
            caches.each_ref().map(|cache| &cache[..]),
            scores,
            &mut weights,
        );
        outputs
    }

    /// The same in fp64.
    fn exactly(
        seen: Range<usize>,
        (size, positions): (usize, usize),
        (scores, seed): (Scores, usize),
    ) -> Vec<f64> {
        let [keys, values] = [1, 2].map(|seed| numbers(positions * size, seed));
        let query = numbers(size, seed + 10);
        let score = |position: usize| {
            let key = &keys[position * size..(position + 1) * size];
            let dot: f64 = key
                .iter()
                .zip(&query)
                .map(|(&k, &q)| f64::from(k) * f64::from(q))
                .sum();
            let (score, cap) = (dot * f64::from(scores.scale), f64::from(scores.softcap));
            if cap > 0.0 {
                cap * (score / cap).tanh()
            } else {
                score
            }
        };
        let weights: Vec<f64> = seen.clone().map(|position| score(position).exp()).collect();
        let total: f64 = weights.iter().sum();
        let number = |place: usize| {
            let values = seen
                .clone()
                .map(|position| f64::from(values[position * size + place]));
            values
                .zip(&weights)
                .map(|(value, weight)| value * weight)
                .sum::<f64>()
                / total
        };
        (0..size).map(number).collect()
    }

    #[test]
    fn a_score_that_is_not_finite_is_noticed() {
        for (bad, count) in [(f32::NAN, 1), (f32::INFINITY, 20), (f32::NEG_INFINITY, 40)] {
            for place in [0, count - 1] {
                let mut scores = vec![1.0; count];
                scores[place] = bad;
                soften(&mut scores);
                assert!(
                    scores.iter().all(|weight| weight.is_nan()),
                    "{bad} at {place}"
                );
            }
        }
        let mut scores = vec![1.0; 20];
        soften(&mut scores);
        assert!(scores.iter().all(|weight| (weight - 0.05).abs() < 1e-6));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn attention_is_that_of_fp64_and_of_a_query_alone(
            size in prop::sample::select(&SIZES[..]),
            positions in 1..150_usize,
            ends in prop::collection::vec(0.0..1.0_f32, 1..=QUERIES),
            window in 1..200_usize,
            softcap in prop::sample::select(&[0.0, 3.0][..]),
        ) {
            let seen: Vec<_> = ends.iter().map(|share| {
                let end = 1 + (share * positions as f32) as usize;
                end.saturating_sub(window)..end
            }).collect();
            let scores = Scores { scale: 0.1, softcap };
            let seeds: Vec<_> = (0..seen.len()).collect();
            let shape = (size, positions);
            for level in [Level::new(), Level::baseline()] {
                let together = attended(level, &seen, shape, (scores, &seeds));
                for (index, together) in together.iter().enumerate() {
                    let one = &seen[index..=index];
                    let alone = attended(level, one, shape, (scores, &seeds[index..=index]));
                    prop_assert_eq!(&alone[0], together);
                    let exact = exactly(seen[index].clone(), shape, (scores, index));
                    for (number, exact) in together.iter().zip(exact) {
                        prop_assert!((f64::from(*number) - exact).abs() < 1e-5, "{} {}", number, exact);
                    }
                }
            }
        }
    }
}
