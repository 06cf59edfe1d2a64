//! Products of rows in fp32 and weights of 16 bits.
//!
//! A column's products are added one after another, in fp32, so that a row has the same bits whatever is
//! computed beside it, and on any CPU.

use std::ops::Range;

use super::lanes::{Avx2, Avx512, Lanes};
use super::weights::{GROUP, Line, Weights};

/// Rows that go through the same weights before others do.
const TILE: usize = 64;
/// Rows from which on making weights fp32 once for all of them is faster than for a few at a time.
const MANY: usize = 16;
/// Weights of a column that are made fp32 at once: with those of its group they are in the CPU's first cache.
const LINES: usize = 128;

/// Rows whose numbers lie beside each other, where there are many.
pub(super) const INTERLEAVED: usize = 8;

/// A number of each of these rows.
pub(super) type Interleaved = [f32; INTERLEAVED];

/// Rows, and how they lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// [rows, width]
    Few(&'a [f32]),
    /// [rows / INTERLEAVED, width, INTERLEAVED], with zeros for rows that there are not.
    Many(&'a [Interleaved]),
}

impl Rows<'_> {
    /// Whether `count` rows lie together.
    pub(super) fn are_many(count: usize) -> bool {
        count >= MANY
    }
}

/// What the CPU multiplies with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Instructions {
    Avx512(Avx512),
    Avx2(Avx2),
}

impl Instructions {
    /// The best that the CPU has; None where it has none of them.
    pub(super) fn of_cpu() -> Option<Self> {
        let avx512 = Avx512::of_cpu().map(Self::Avx512);
        avx512.or_else(|| Avx2::of_cpu().map(Self::Avx2))
    }

    /// Compute the columns of `group` of the product of some `rows` of `x` and `weights`, and give each row's to
    /// `write`.
    pub(super) fn multiply(
        self,
        (x, rows): (Rows<'_>, Range<usize>),
        weights: &Weights,
        group: usize,
        write: impl FnMut(usize, &[f32; GROUP]),
    ) {
        let product = Product {
            x,
            width: weights.rows,
            lines: weights.group(group),
        };
        #[target_feature(enable = "avx512f")]
        fn with_avx512<S: Stored>(
            lanes: Avx512,
            product: &Product<'_>,
            rows: Range<usize>,
            write: impl FnMut(usize, &[f32; GROUP]),
        ) {
            product.columns::<_, S>(lanes, rows, write);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2<S: Stored>(
            lanes: Avx2,
            product: &Product<'_>,
            rows: Range<usize>,
            write: impl FnMut(usize, &[f32; GROUP]),
        ) {
            product.columns::<_, S>(lanes, rows, write);
        }
        // SAFETY: the CPU has the instructions.
        unsafe {
            match (self, weights.is_bfloat) {
                (Self::Avx512(lanes), true) => with_avx512::<Bf16>(lanes, &product, rows, write),
                (Self::Avx512(lanes), false) => with_avx512::<Fp16>(lanes, &product, rows, write),
                (Self::Avx2(lanes), true) => with_avx2::<Bf16>(lanes, &product, rows, write),
                (Self::Avx2(lanes), false) => with_avx2::<Fp16>(lanes, &product, rows, write),
            }
        }
    }
}

/// Lay `rows`, up to [`INTERLEAVED`] of as many numbers as `tile` has, beside each other.
pub(super) fn interleave(rows: &[f32], tile: &mut [Interleaved]) {
    let width = tile.len();
    for (place, together) in tile.iter_mut().enumerate() {
        for (index, number) in together.iter_mut().enumerate() {
            *number = rows.get(index * width + place).copied().unwrap_or(0.0);
        }
    }
}

/// How weights lie in memory.
trait Stored {
    /// The numbers that `weights` stand for.
    fn numbers<L: Lanes>(lanes: L, weights: &[u16]) -> L::Numbers;
}

struct Fp16;
struct Bf16;

impl Stored for Fp16 {
    #[inline(always)]
    fn numbers<L: Lanes>(lanes: L, weights: &[u16]) -> L::Numbers {
        lanes.of_fp16(weights)
    }
}

impl Stored for Bf16 {
    #[inline(always)]
    fn numbers<L: Lanes>(lanes: L, weights: &[u16]) -> L::Numbers {
        lanes.of_bf16(weights)
    }
}

/// Lines that begin where the CPU's cache lines do.
#[repr(align(64))]
struct Widened([[f32; GROUP]; LINES]);

/// The product of rows and a group of columns.
struct Product<'a> {
    x: Rows<'a>,
    width: usize,
    /// [width]
    lines: &'a [Line],
}

impl Product<'_> {
    /// Compute the columns of `rows`, a few rows at a time.
    #[inline(always)]
    fn columns<L: Lanes, S: Stored>(
        &self,
        lanes: L,
        mut rows: Range<usize>,
        mut write: impl FnMut(usize, &[f32; GROUP]),
    ) {
        let mut sums = [[0.0; GROUP]; TILE];
        while !rows.is_empty() {
            let tile = rows.start..(rows.start + TILE).min(rows.end);
            let sums = &mut sums[..tile.len()];
            sums.fill([0.0; GROUP]);
            match self.x {
                Rows::Few(x) => {
                    let x = &x[tile.start * self.width..tile.end * self.width];
                    self.add_few::<L, S>(lanes, x, sums);
                }
                Rows::Many(x) => {
                    let tiles = tile.start / INTERLEAVED..tile.end.div_ceil(INTERLEAVED);
                    let x = &x[tiles.start * self.width..tiles.end * self.width];
                    self.add_many::<L, S>(lanes, x, sums);
                }
            }
            for (row, sums) in tile.clone().zip(sums) {
                write(row, sums);
            }
            rows.start = tile.end;
        }
    }

    /// Add the products of `x`, [rows, width], to `sums`.
    #[inline(always)]
    fn add_few<L: Lanes, S: Stored>(&self, lanes: L, x: &[f32], sums: &mut [[f32; GROUP]]) {
        let mut row = 0;
        while row < sums.len() {
            let (x, sums) = (&x[row * self.width..], &mut sums[row..]);
            row += match sums.len().min(L::ROWS) {
                1 => self.add_rows::<L, S, 1>(lanes, x, sums),
                2 => self.add_rows::<L, S, 2>(lanes, x, sums),
                3 => self.add_rows::<L, S, 3>(lanes, x, sums),
                4 => self.add_rows::<L, S, 4>(lanes, x, sums),
                5 => self.add_rows::<L, S, 5>(lanes, x, sums),
                6 => self.add_rows::<L, S, 6>(lanes, x, sums),
                7 => self.add_rows::<L, S, 7>(lanes, x, sums),
                _ => self.add_rows::<L, S, 8>(lanes, x, sums),
            };
        }
    }

    /// Add the products of the first `ROWS` rows of `x` to the first of `sums`.
    #[inline(always)]
    fn add_rows<L: Lanes, S: Stored, const ROWS: usize>(
        &self,
        lanes: L,
        x: &[f32],
        sums: &mut [[f32; GROUP]],
    ) -> usize {
        let width = self.lines.len();
        let mut rows = [&x[..width]; ROWS];
        for (index, row) in rows.iter_mut().enumerate() {
            *row = &x[index * width..][..width];
        }
        let sums = &mut sums[..ROWS];
        for start in (0..GROUP).step_by(L::COLUMNS) {
            let columns = start..start + L::COLUMNS;
            let mut totals = [lanes.zeros(); ROWS];
            for (place, line) in self.lines.iter().enumerate() {
                let weights = S::numbers(lanes, &line[columns.clone()]);
                for index in 0..ROWS {
                    totals[index] = lanes.add_product(totals[index], weights, rows[index][place]);
                }
            }
            for index in 0..ROWS {
                lanes.store(totals[index], &mut sums[index][columns.clone()]);
            }
        }
        ROWS
    }

    /// Add the products of `x`, [tiles, width, INTERLEAVED], to `sums`, with weights that are made fp32 once for
    /// all.
    #[inline(always)]
    fn add_many<L: Lanes, S: Stored>(
        &self,
        lanes: L,
        x: &[Interleaved],
        sums: &mut [[f32; GROUP]],
    ) {
        let Widened(widened) = &mut Widened([[0.0; GROUP]; LINES]);
        for (index, lines) in self.lines.chunks(LINES).enumerate() {
            for (line, widened) in lines.iter().zip(&mut *widened) {
                for start in (0..GROUP).step_by(L::COLUMNS) {
                    let columns = start..start + L::COLUMNS;
                    let numbers = S::numbers(lanes, &line[columns.clone()]);
                    lanes.store(numbers, &mut widened[columns]);
                }
            }
            let widened = &widened[..lines.len()];
            let x = x.chunks_exact(self.width);
            for (x, sums) in x.zip(sums.chunks_mut(INTERLEAVED)) {
                let x = &x[index * LINES..][..lines.len()];
                match L::ROWS {
                    4 => add_tile::<L, 4>(lanes, x, widened, sums),
                    _ => add_tile::<L, 8>(lanes, x, widened, sums),
                }
            }
        }
    }
}

/// Add the products of `x` and `widened` to `sums`, `ROWS` rows at a time.
#[inline(always)]
fn add_tile<L: Lanes, const ROWS: usize>(
    lanes: L,
    x: &[Interleaved],
    widened: &[[f32; GROUP]],
    sums: &mut [[f32; GROUP]],
) {
    for first in (0..INTERLEAVED).step_by(ROWS) {
        for start in (0..GROUP).step_by(L::COLUMNS) {
            let columns = start..start + L::COLUMNS;
            let mut totals = [lanes.zeros(); ROWS];
            for (totals, sums) in totals.iter_mut().zip(sums.iter().skip(first)) {
                *totals = lanes.load(&sums[columns.clone()]);
            }
            for (x, weights) in x.iter().zip(widened) {
                let weights = lanes.load(&weights[columns.clone()]);
                for index in 0..ROWS {
                    totals[index] = lanes.add_product(totals[index], weights, x[first + index]);
                }
            }
            for (totals, sums) in totals.iter().zip(sums.iter_mut().skip(first)) {
                lanes.store(*totals, &mut sums[columns.clone()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::super::weights::Part;
    use super::*;

    fn all_instructions() -> Vec<Instructions> {
        let avx512 = Avx512::of_cpu().map(Instructions::Avx512);
        let avx2 = Avx2::of_cpu().map(Instructions::Avx2);
        [avx512, avx2].into_iter().flatten().collect()
    }

    /// Numbers of several sizes.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        let number = |place: usize| ((place * 7919 + seed * 104_729) as f32 * 0.618).sin();
        (0..count)
            .map(|place| number(place) * [1.0, 0.001, 40.0][place % 3])
            .collect()
    }

    /// The bits of `number` in 16, and what they stand for.
    fn rounded(number: f32, is_bfloat: bool) -> (u16, f32) {
        match is_bfloat {
            true => (
                bf16::from_f32(number).to_bits(),
                bf16::from_f32(number).to_f32(),
            ),
            false => (
                f16::from_f32(number).to_bits(),
                f16::from_f32(number).to_f32(),
            ),
        }
    }

    fn product(instructions: Instructions, x: &[f32], weights: &Weights) -> Vec<Vec<f32>> {
        let rows = x.len() / weights.rows;
        let mut tiles = Vec::new();
        let x = match Rows::are_many(rows) {
            true => {
                for rows in x.chunks(INTERLEAVED * weights.rows) {
                    let start = tiles.len();
                    tiles.resize(start + weights.rows, [f32::NAN; INTERLEAVED]);
                    interleave(rows, &mut tiles[start..]);
                }
                Rows::Many(&tiles)
            }
            false => Rows::Few(x),
        };
        let mut products = vec![Vec::new(); rows];
        for group in 0..weights.columns.div_ceil(GROUP) {
            instructions.multiply((x, 0..rows), weights, group, |row, columns| {
                products[row].extend_from_slice(columns);
            });
        }
        for product in &mut products {
            product.truncate(weights.columns);
        }
        products
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_row_has_the_same_bits_on_any_cpu_and_in_any_company(
            width in 1..150_usize,
            columns in 1..80_usize,
            rows in 1..90_usize,
            is_bfloat: bool,
            is_transposed: bool,
        ) {
            let matrix = numbers(width * columns, 100);
            let at = |row: usize, column: usize| match is_transposed {
                true => column * width + row,
                false => row * columns + column,
            };
            let stored: Vec<_> = matrix.iter().map(|&number| rounded(number, is_bfloat)).collect();
            let bits: Vec<_> = stored.iter().map(|&(bits, _)| bits).collect();
            let part = Part { numbers: &bits, columns };
            let weights = Weights::pack((width, is_bfloat), &[part], is_transposed).unwrap();
            let x = numbers(rows * width, 1);
            let exact: Vec<Vec<f32>> = x.chunks(width).map(|row| {
                (0..columns).map(|column| {
                    let products = row.iter().enumerate();
                    products.fold(0.0, |sum, (place, number)| {
                        stored[at(place, column)].1.mul_add(*number, sum)
                    })
                }).collect()
            }).collect();
            for instructions in all_instructions() {
                prop_assert_eq!(&product(instructions, &x, &weights), &exact);
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_stay_in_their_row() {
        let bits: Vec<_> = numbers(40 * 50, 3)
            .iter()
            .map(|&n| f16::from_f32(n).to_bits())
            .collect();
        let part = Part {
            numbers: &bits,
            columns: 50,
        };
        let weights = Weights::pack((40, false), &[part], true).unwrap();
        let mut x = numbers(9 * 40, 1);
        x[8 * 40 + 7] = f32::NAN;
        for instructions in all_instructions() {
            let products = product(instructions, &x, &weights);
            assert!(products[8].iter().all(|number| number.is_nan()));
            assert!(
                products[..8]
                    .iter()
                    .flatten()
                    .all(|number| number.is_finite())
            );
        }
    }
}
