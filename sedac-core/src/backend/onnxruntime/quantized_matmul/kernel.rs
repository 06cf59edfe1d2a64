//! Products of rows in 8 bits and weights of 4 or 8.
//!
//! A block's products are integers, whose sum is exact; blocks are added one after another in fp32. So a row
//! has the same bits whatever is computed beside it, and on any CPU.

use std::ops::Range;

use super::activations::{Activations, NewRow, PIECE, Row};
use super::lanes::{Avx2, Avx512, Lanes};
use super::weights::{Chunk, Format, GROUP, Group, Scales, Weights};

/// What the CPU multiplies with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Instructions {
    Avx512(Avx512),
    Avx2Vnni(Avx2<true>),
    Avx2(Avx2<false>),
}

impl Instructions {
    /// The best that the CPU has; None where it has none of them.
    pub(super) fn of_cpu() -> Option<Self> {
        let avx512 = Avx512::of_cpu().map(Self::Avx512);
        let avx2_vnni = || Avx2::of_cpu().map(Self::Avx2Vnni);
        let avx2 = || Avx2::of_cpu().map(Self::Avx2);
        avx512.or_else(avx2_vnni).or_else(avx2)
    }

    /// Round `numbers` to `row`, for weights in `format`.
    pub(super) fn round(self, numbers: &[f32], format: Format, row: &mut NewRow<'_>) {
        let factor = format.factor();
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
        fn with_avx512(lanes: Avx512, numbers: &[f32], factor: i32, row: &mut NewRow<'_>) {
            row.fill(lanes, numbers, factor);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2(lanes: impl Lanes, numbers: &[f32], factor: i32, row: &mut NewRow<'_>) {
            row.fill(lanes, numbers, factor);
        }
        // SAFETY: the CPU has the instructions.
        unsafe {
            match self {
                Self::Avx512(lanes) => with_avx512(lanes, numbers, factor, row),
                Self::Avx2Vnni(lanes) => with_avx2(lanes, numbers, factor, row),
                Self::Avx2(lanes) => with_avx2(lanes, numbers, factor, row),
            }
        }
    }

    /// Compute the columns of `group` of the product of `rows` and `weights`, and give each row's to `write`.
    pub(super) fn multiply(
        self,
        activations: &Activations,
        rows: Range<usize>,
        weights: &Weights,
        group: usize,
        write: impl FnMut(usize, &[f32; GROUP]),
    ) {
        let product = Product {
            activations,
            group: weights.group(group),
            pieces_per_block: weights.format.pieces_per_block(),
        };
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
        fn with_avx512<const BITS: usize>(
            lanes: Avx512,
            product: &Product<'_>,
            rows: Range<usize>,
            write: impl FnMut(usize, &[f32; GROUP]),
        ) {
            product.columns::<_, BITS>(lanes, rows, write);
        }
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn with_avx2_vnni<const BITS: usize>(
            lanes: Avx2<true>,
            product: &Product<'_>,
            rows: Range<usize>,
            write: impl FnMut(usize, &[f32; GROUP]),
        ) {
            product.columns::<_, BITS>(lanes, rows, write);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2<const BITS: usize>(
            lanes: Avx2<false>,
            product: &Product<'_>,
            rows: Range<usize>,
            write: impl FnMut(usize, &[f32; GROUP]),
        ) {
            product.columns::<_, BITS>(lanes, rows, write);
        }
        // SAFETY: the CPU has the instructions.
        unsafe {
            match (self, weights.format.bits) {
                (Self::Avx512(lanes), 4) => with_avx512::<4>(lanes, &product, rows, write),
                (Self::Avx512(lanes), _) => with_avx512::<8>(lanes, &product, rows, write),
                (Self::Avx2Vnni(lanes), 4) => with_avx2_vnni::<4>(lanes, &product, rows, write),
                (Self::Avx2Vnni(lanes), _) => with_avx2_vnni::<8>(lanes, &product, rows, write),
                (Self::Avx2(lanes), 4) => with_avx2::<4>(lanes, &product, rows, write),
                (Self::Avx2(lanes), _) => with_avx2::<8>(lanes, &product, rows, write),
            }
        }
    }
}

/// The product of rows and a group of columns.
struct Product<'a> {
    activations: &'a Activations,
    group: Group<'a>,
    pieces_per_block: usize,
}

impl Product<'_> {
    #[inline(always)]
    fn columns<L: Lanes, const BITS: usize>(
        &self,
        lanes: L,
        rows: Range<usize>,
        mut write: impl FnMut(usize, &[f32; GROUP]),
    ) {
        let mut row = rows.start;
        while row < rows.end {
            row += match (rows.end - row).min(L::ROWS) {
                1 => self.tile::<L, BITS, 1>(lanes, row, &mut write),
                2 => self.tile::<L, BITS, 2>(lanes, row, &mut write),
                3 => self.tile::<L, BITS, 3>(lanes, row, &mut write),
                4 => self.tile::<L, BITS, 4>(lanes, row, &mut write),
                5 => self.tile::<L, BITS, 5>(lanes, row, &mut write),
                6 => self.tile::<L, BITS, 6>(lanes, row, &mut write),
                7 => self.tile::<L, BITS, 7>(lanes, row, &mut write),
                _ => self.tile::<L, BITS, 8>(lanes, row, &mut write),
            };
        }
    }

    /// The columns of the `ROWS` rows from `first` on.
    #[inline(always)]
    fn tile<L: Lanes, const BITS: usize, const ROWS: usize>(
        &self,
        lanes: L,
        first: usize,
        write: &mut impl FnMut(usize, &[f32; GROUP]),
    ) -> usize {
        let mut rows = [self.activations.row(first); ROWS];
        for (index, row) in rows.iter_mut().enumerate() {
            *row = self.activations.row(first + index);
        }
        let mut columns = [[0.0; GROUP]; ROWS];
        for start in (0..GROUP).step_by(L::COLUMNS) {
            let numbers = self.lanes_of::<L, BITS, ROWS>(lanes, start, &rows);
            for index in 0..ROWS {
                lanes.store(
                    numbers[index],
                    &mut columns[index][start..start + L::COLUMNS],
                );
            }
        }
        for (index, columns) in columns.iter().enumerate() {
            write(first + index, columns);
        }
        ROWS
    }

    /// The columns from `start` on, as many as there are lanes, of `rows`.
    #[inline(always)]
    fn lanes_of<L: Lanes, const BITS: usize, const ROWS: usize>(
        &self,
        lanes: L,
        start: usize,
        rows: &[Row<'_>; ROWS],
    ) -> [L::Numbers; ROWS] {
        let mut numbers = [lanes.zeros(); ROWS];
        let (pieces, _) = self.group.chunks.as_chunks::<BITS>();
        let columns = start..start + L::COLUMNS;
        for block in 0..pieces.len() / self.pieces_per_block {
            let mut sums = [lanes.all(0); ROWS];
            for index in 0..ROWS {
                let sum = rows[index].sums[block];
                sums[index] = match self.group.zero_points {
                    Some(zero_points) => lanes.times(&zero_points[block][columns.clone()], sum),
                    None => lanes.all(sum),
                };
            }
            let first = block * self.pieces_per_block;
            let chunks = &pieces[first..first + self.pieces_per_block];
            for (piece, chunks) in (first..).zip(chunks) {
                sums = add_piece::<L, BITS, ROWS>(lanes, sums, chunks, start, rows, piece);
            }
            let scales = match self.group.scales {
                Scales::Fp32(scales) => lanes.load(&scales[block][columns.clone()]),
                Scales::Fp16(scales) => lanes.of_fp16(&scales[block][columns.clone()]),
            };
            for index in 0..ROWS {
                let scale = rows[index].scales[block];
                numbers[index] = lanes.add_scaled(numbers[index], sums[index], scales, scale);
            }
        }
        numbers
    }
}

/// `sums` and the products of a piece of `rows` and its weights.
#[inline(always)]
fn add_piece<L: Lanes, const BITS: usize, const ROWS: usize>(
    lanes: L,
    mut sums: [L::Sums; ROWS],
    chunks: &[Chunk; BITS],
    start: usize,
    rows: &[Row<'_>; ROWS],
    piece: usize,
) -> [L::Sums; ROWS] {
    let mut words = [&rows[0].pieces[piece]; ROWS];
    for index in 0..ROWS {
        words[index] = &rows[index].pieces[piece];
    }
    for (place, chunk) in chunks.iter().enumerate() {
        let bytes = lanes.weights(&chunk.0[4 * start..4 * (start + L::COLUMNS)]);
        if BITS == 4 {
            let [first, second] = lanes.halves(bytes);
            for index in 0..ROWS {
                let word = words[index][2 * place];
                sums[index] = lanes.add_products::<BITS>(sums[index], first, word);
            }
            for index in 0..ROWS {
                let word = words[index][2 * place + 1];
                sums[index] = lanes.add_products::<BITS>(sums[index], second, word);
            }
        } else {
            for index in 0..ROWS {
                sums[index] = lanes.add_products::<BITS>(sums[index], bytes, words[index][place]);
            }
        }
    }
    sums
}

const _: () = assert!(PIECE == 32, "chunks of a piece are as many as bits");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::weights::examples::{Matrix, matrix, matrix_with};
    use super::*;

    fn all_instructions() -> Vec<Instructions> {
        let avx512 = Avx512::of_cpu().map(Instructions::Avx512);
        let avx2_vnni = Avx2::of_cpu().map(Instructions::Avx2Vnni);
        let avx2 = Avx2::of_cpu().map(Instructions::Avx2);
        [avx512, avx2_vnni, avx2].into_iter().flatten().collect()
    }

    /// Numbers of several sizes, some of them zero.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        let number = |place: usize| {
            let size = [1.0, 0.01, 30.0, 0.0][place / 40 % 4];
            ((place * 7919 + seed * 104_729) as f32 * 0.618).sin() * size
        };
        (0..count).map(number).collect()
    }

    /// The product of `rows` and the matrix, as `instructions` compute it.
    fn product(
        instructions: Instructions,
        rows: &[Vec<f32>],
        (format, weights): (Format, &Weights),
    ) -> Vec<Vec<f32>> {
        let mut activations = Activations::default();
        activations.resize(rows.len(), format).unwrap();
        for (numbers, mut row) in rows.iter().zip(activations.new_rows()) {
            instructions.round(numbers, format, &mut row);
        }
        let mut products = vec![Vec::new(); rows.len()];
        for group in 0..weights.columns.div_ceil(GROUP) {
            instructions.multiply(
                &activations,
                0..rows.len(),
                weights,
                group,
                |row, columns| {
                    products[row].extend_from_slice(columns);
                },
            );
        }
        for product in &mut products {
            product.truncate(weights.columns);
        }
        products
    }

    /// The same of one row, one number after another.
    fn exactly(row: &[f32], format: Format, matrix: &Matrix) -> Vec<f32> {
        let column = |column: usize| {
            let mut sum = 0.0_f32;
            for block in 0..format.blocks() {
                let places =
                    block * format.block_size..((block + 1) * format.block_size).min(row.len());
                let numbers = &row[places.clone()];
                let largest = numbers
                    .iter()
                    .fold(0.0_f32, |most, number| most.max(number.abs()));
                let scale = largest / 127.0;
                let inverse = if largest == 0.0 { 0.0 } else { 127.0 / largest };
                let (weights, weight_scale) = matrix.block(format, column, block);
                let products = numbers
                    .iter()
                    .zip(weights)
                    .map(|(number, weight)| (number * inverse).round_ties_even() as i32 * weight);
                let products: i32 = products.sum();
                sum = (products as f32).mul_add(weight_scale * scale, sum);
            }
            sum
        };
        (0..matrix.columns).map(column).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_row_has_the_same_bits_on_any_cpu_and_in_any_company(
            bits in prop::sample::select(&[4, 8][..]),
            block_size in prop::sample::select(&[32, 64, 128][..]),
            rows in 1..200_usize,
            columns in 1..40_usize,
            count in 1..20_usize,
            has_zero_points: bool,
            is_fp16: bool,
        ) {
            let format = Format { bits, block_size, rows, has_zero_points };
            let matrix = matrix_with(format, columns, is_fp16);
            let weights = Weights::pack(format, &matrix.parts(format)).unwrap();
            let x: Vec<_> = (0..count).map(|seed| numbers(rows, seed)).collect();
            let exact: Vec<_> = x.iter().map(|row| exactly(row, format, &matrix)).collect();
            for instructions in all_instructions() {
                prop_assert_eq!(&product(instructions, &x, (format, &weights)), &exact);
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_noticed() {
        let format = Format {
            bits: 4,
            block_size: 32,
            rows: 70,
            has_zero_points: false,
        };
        let weights = Weights::pack(format, &matrix(format, 20).parts(format)).unwrap();
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 31, 69] {
                let mut rows = vec![numbers(70, 1), numbers(70, 2)];
                rows[1][place] = bad;
                for instructions in all_instructions() {
                    let products = product(instructions, &rows, (format, &weights));
                    assert!(products[0].iter().all(|number| number.is_finite()));
                    assert!(products[1].iter().all(|number| number.is_nan()), "{bad}");
                }
            }
        }
    }

    #[test]
    fn zeros_and_the_smallest_numbers_give_finite_products() {
        let format = Format {
            bits: 8,
            block_size: 32,
            rows: 32,
            has_zero_points: false,
        };
        let weights = Weights::pack(format, &matrix(format, 3).parts(format)).unwrap();
        for number in [
            0.0,
            -0.0,
            f32::from_bits(1),
            f32::MIN_POSITIVE,
            1e-37,
            f32::MAX,
        ] {
            for instructions in all_instructions() {
                let products = product(instructions, &[vec![number; 32]], (format, &weights));
                assert!(
                    products[0].iter().all(|number| !number.is_nan()),
                    "{number}"
                );
            }
        }
    }
}
