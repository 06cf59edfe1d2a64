//! Activations in 8 bits: what quantized weights are multiplied with.

use super::lanes::Lanes;
use super::weights::Format;
use crate::backend::onnxruntime::row_products::resize;

/// Numbers that are rounded together: a block is a number of pieces.
pub(super) const PIECE: usize = 32;

/// The numbers of a piece, four in an integer.
pub(super) type Piece = [i32; PIECE / 4];

/// Rows of activations.
#[derive(Debug, Default)]
pub(super) struct Activations {
    /// [rows, pieces]
    pieces: Vec<Piece>,
    /// [rows, blocks]
    scales: Vec<f32>,
    /// [rows, blocks]
    sums: Vec<i32>,
    pieces_per_row: usize,
    blocks_per_row: usize,
}

/// One row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) pieces: &'a [Piece],
    /// By block, what its integers are multiplied with.
    pub(super) scales: &'a [f32],
    /// By block, the sum of its integers, times a factor.
    pub(super) sums: &'a [i32],
}

/// A row that is to be filled.
pub(super) struct NewRow<'a> {
    pieces: &'a mut [Piece],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Activations {
    /// Have room for `rows` that are multiplied with weights in `format`. None where memory is short.
    pub(super) fn resize(&mut self, rows: usize, format: Format) -> Option<()> {
        let blocks = format.blocks();
        self.blocks_per_row = blocks;
        self.pieces_per_row = blocks * format.pieces_per_block();
        resize(&mut self.pieces, rows * self.pieces_per_row)?;
        resize(&mut self.scales, rows * blocks)?;
        resize(&mut self.sums, rows * blocks)
    }

    /// All rows, to be filled.
    pub(super) fn new_rows(&mut self) -> impl Iterator<Item = NewRow<'_>> {
        let pieces = self.pieces.chunks_exact_mut(self.pieces_per_row);
        let scales = self.scales.chunks_exact_mut(self.blocks_per_row);
        let sums = self.sums.chunks_exact_mut(self.blocks_per_row);
        let rows = pieces.zip(scales.zip(sums));
        rows.map(|(pieces, (scales, sums))| NewRow {
            pieces,
            scales,
            sums,
        })
    }

    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let blocks = row * self.blocks_per_row..(row + 1) * self.blocks_per_row;
        Row {
            pieces: &self.pieces[row * self.pieces_per_row..(row + 1) * self.pieces_per_row],
            scales: &self.scales[blocks.clone()],
            sums: &self.sums[blocks],
        }
    }
}

impl NewRow<'_> {
    /// Round `numbers`, which a row has or fewer, of which the rest are zeros.
    ///
    /// A block's scale is its largest number's 127th; NaN where a number is, or infinite. The sums of blocks
    /// are multiplied with `factor`.
    #[inline(always)]
    pub(super) fn fill<L: Lanes>(&mut self, lanes: L, numbers: &[f32], factor: i32) {
        let pieces_per_block = self.pieces.len() / self.scales.len();
        for block in 0..self.scales.len() {
            let start = (block * pieces_per_block * PIECE).min(numbers.len());
            let end = (start + pieces_per_block * PIECE).min(numbers.len());
            let pieces = &mut self.pieces[block * pieces_per_block..][..pieces_per_block];
            let (scale, sum) = round_block(lanes, &numbers[start..end], pieces);
            self.scales[block] = scale;
            self.sums[block] = sum.wrapping_mul(factor);
        }
    }
}

/// Round the numbers of a block to `pieces`, and give their scale and sum.
#[inline(always)]
fn round_block<L: Lanes>(lanes: L, numbers: &[f32], pieces: &mut [Piece]) -> (f32, i32) {
    let (whole, rest) = numbers.as_chunks::<PIECE>();
    let mut last = [0.0; PIECE];
    last[..rest.len()].copy_from_slice(rest);
    // of bits, where NaN is the largest
    let mut largest = lanes.largest(&last);
    for numbers in whole {
        largest = largest.max(lanes.largest(numbers));
    }
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    // of zeros, and of what is too small
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sum = 0_i32;
    for (index, piece) in pieces.iter_mut().enumerate() {
        let numbers = match whole.get(index) {
            Some(numbers) => numbers,
            None if index == whole.len() => &last,
            None => &[0.0; PIECE],
        };
        sum = sum.wrapping_add(lanes.round(numbers, inverse, piece));
    }
    let scale = if largest.is_finite() {
        largest / 127.0
    } else {
        f32::NAN
    };
    (scale, sum)
}
