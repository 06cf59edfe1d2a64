//! Quantized weights as the kernels read them.

use half::f16;

use super::activations::PIECE;
use crate::backend::onnxruntime::huge_pages::HugeSlice;

/// Columns whose weights lie together.
pub(super) const GROUP: usize = 16;

/// Four weights of each column of a group, or eight of 4 bits: a column's four in the lower halves of its
/// four bytes, and the next four in the upper halves.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Chunk(pub(super) [u8; 4 * GROUP]);

/// How weights are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// 4 or 8
    pub(super) bits: usize,
    /// How many weights have a scale in common.
    pub(super) block_size: usize,
    /// How many weights a column has.
    pub(super) rows: usize,
    /// Blocks have zero points; those of all blocks are the middle of their range otherwise.
    pub(super) has_zero_points: bool,
}

/// A part of the columns of a matrix as graphs have it.
pub(super) struct Part<'a> {
    /// [columns, blocks, bytes of a block]
    pub(super) numbers: &'a [u8],
    /// [columns, blocks]
    pub(super) scales: &'a [f32],
    /// [columns, bytes of the blocks' zero points]
    pub(super) zero_points: Option<&'a [u8]>,
}

/// A matrix.
pub(super) struct Weights {
    pub(super) format: Format,
    pub(super) columns: usize,
    /// [groups, pieces, chunks of a piece: as many as there are bits]
    chunks: HugeSlice<Chunk>,
    scales: StoredScales,
    /// [groups, blocks, GROUP], or empty
    zero_points: HugeSlice<[u8; GROUP]>,
}

/// Scales, [groups, blocks, GROUP].
enum StoredScales {
    Fp32(HugeSlice<[f32; GROUP]>),
    /// Where all are such numbers: a tenth of the bytes of weights of 4 bits in blocks of 32 less.
    Fp16(HugeSlice<[u16; GROUP]>),
}

/// The scales of a group, [blocks].
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    Fp32(&'a [[f32; GROUP]]),
    Fp16(&'a [[u16; GROUP]]),
}

/// The weights of [`GROUP`] columns.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    /// [pieces, chunks of a piece]
    pub(super) chunks: &'a [Chunk],
    pub(super) scales: Scales<'a>,
    /// [blocks]
    pub(super) zero_points: Option<&'a [[u8; GROUP]]>,
}

impl Format {
    /// Whether kernels know it.
    pub(super) fn is_known(self) -> bool {
        matches!(self.bits, 4 | 8)
            && matches!(self.block_size, 32 | 64 | 128 | 256)
            && self.rows > 0
    }

    pub(super) fn blocks(self) -> usize {
        self.rows.div_ceil(self.block_size)
    }

    pub(super) fn pieces_per_block(self) -> usize {
        self.block_size / PIECE
    }

    /// What a block's sum of activations is multiplied with and added: minus the zero point that all blocks
    /// have in common, or minus 1.
    pub(super) fn factor(self) -> i32 {
        match self.has_zero_points {
            true => -1,
            false => -(1 << (self.bits - 1)),
        }
    }

    fn bytes_of_block(self) -> usize {
        self.block_size * self.bits / 8
    }

    fn bytes_of_zero_points(self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }
}

impl Weights {
    /// Lay out `parts`, one after another. None where their sizes do not fit together, or memory is short.
    pub(super) fn pack(format: Format, parts: &[Part<'_>]) -> Option<Self> {
        let blocks = format.blocks();
        let columns_of = |part: &Part<'_>| part.scales.len().checked_div(blocks);
        let columns: usize = parts.iter().map(columns_of).sum::<Option<_>>()?;
        let fits = |part: &Part<'_>| {
            let columns = part.scales.len() / blocks;
            let zero_points = part.zero_points.map(<[u8]>::len);
            part.scales.len() == columns * blocks
                && part.numbers.len() == columns * blocks * format.bytes_of_block()
                && zero_points
                    == format
                        .has_zero_points
                        .then_some(columns * format.bytes_of_zero_points())
        };
        if columns == 0 || !parts.iter().all(fits) {
            return None;
        }
        let groups = columns.div_ceil(GROUP);
        let chunks = groups * blocks * format.pieces_per_block() * format.bits;
        let mut weights = Self {
            format,
            columns,
            chunks: HugeSlice::filled(Chunk([0; 4 * GROUP]), chunks)?,
            scales: StoredScales::zeros(parts, groups * blocks)?,
            zero_points: HugeSlice::filled(
                [0; GROUP],
                usize::from(format.has_zero_points) * groups * blocks,
            )?,
        };
        let mut column = 0;
        for part in parts {
            for index in 0..part.scales.len() / blocks {
                weights.set_column(column, part, index);
                column += 1;
            }
        }
        Some(weights)
    }

    /// Make the column `index` of `part` that of the matrix at `column`.
    fn set_column(&mut self, column: usize, part: &Part<'_>, index: usize) {
        let format = self.format;
        let (group, lane) = (column / GROUP, column % GROUP);
        let blocks = format.blocks();
        let width = blocks * format.bytes_of_block();
        let numbers = &part.numbers[index * width..][..width];
        let chunks_per_group = blocks * format.pieces_per_block() * format.bits;
        let chunks = &mut self.chunks[group * chunks_per_group..][..chunks_per_group];
        for (chunk, bytes) in chunks.iter_mut().zip(numbers.as_chunks::<4>().0) {
            chunk.0[4 * lane..][..4].copy_from_slice(&match format.bits {
                4 => interleaved(*bytes),
                _ => *bytes,
            });
        }
        for block in 0..blocks {
            let place = group * blocks + block;
            let scale = part.scales[index * blocks + block];
            self.scales.set(place, lane, scale);
            if let Some(zero_points) = part.zero_points {
                let width = format.bytes_of_zero_points();
                let zero_points = &zero_points[index * width..][..width];
                self.zero_points[place][lane] = match format.bits {
                    4 => zero_points[block / 2] >> (block % 2 * 4) & 15,
                    _ => zero_points[block],
                };
            }
        }
    }

    pub(super) fn group(&self, group: usize) -> Group<'_> {
        let blocks = self.format.blocks();
        let chunks = blocks * self.format.pieces_per_block() * self.format.bits;
        let blocks = group * blocks..(group + 1) * blocks;
        Group {
            chunks: &self.chunks[group * chunks..(group + 1) * chunks],
            scales: match &self.scales {
                StoredScales::Fp32(scales) => Scales::Fp32(&scales[blocks.clone()]),
                StoredScales::Fp16(scales) => Scales::Fp16(&scales[blocks.clone()]),
            },
            zero_points: self
                .format
                .has_zero_points
                .then(|| &self.zero_points[blocks]),
        }
    }
}

impl StoredScales {
    /// Room for those of `parts`, of `blocks` in all groups. None where memory is short.
    fn zeros(parts: &[Part<'_>], blocks: usize) -> Option<Self> {
        let mut scales = parts.iter().flat_map(|part| part.scales);
        Some(
            match scales.all(|&scale| f16::from_f32(scale).to_f32() == scale) {
                true => Self::Fp16(HugeSlice::filled([0; GROUP], blocks)?),
                false => Self::Fp32(HugeSlice::filled([0.0; GROUP], blocks)?),
            },
        )
    }

    fn set(&mut self, block: usize, lane: usize, scale: f32) {
        match self {
            Self::Fp32(scales) => scales[block][lane] = scale,
            Self::Fp16(scales) => scales[block][lane] = f16::from_f32(scale).to_bits(),
        }
    }
}

/// Eight weights of 4 bits, two in a byte: the first four in the lower halves, and the others in the upper.
fn interleaved(bytes: [u8; 4]) -> [u8; 4] {
    let weights: [u8; 8] = std::array::from_fn(|index| bytes[index / 2] >> (index % 2 * 4) & 15);
    std::array::from_fn(|index| weights[index] | weights[index + 4] << 4)
}

/// Matrices as graphs have them.
#[cfg(test)]
pub(super) mod examples {
    use super::*;

    /// A matrix whose weights, scales and zero points are all different.
    pub(in super::super) struct Matrix {
        pub(in super::super) columns: usize,
        numbers: Vec<u8>,
        scales: Vec<f32>,
        zero_points: Vec<u8>,
    }

    pub(in super::super) fn matrix(format: Format, columns: usize) -> Matrix {
        matrix_with(format, columns, false)
    }

    /// The same with scales that are numbers of fp16, or not.
    pub(in super::super) fn matrix_with(format: Format, columns: usize, is_fp16: bool) -> Matrix {
        let scale = |block: usize, is_fp16| {
            let scale = (block as f32).sin() * 0.1;
            if is_fp16 {
                f16::from_f32(scale).to_f32()
            } else {
                scale
            }
        };
        let bytes = |count: usize, seed: usize| -> Vec<u8> {
            let byte = |place: usize| ((place + seed).wrapping_mul(2_654_435_761) >> 13) as u8;
            (0..count).map(byte).collect()
        };
        let blocks = columns * format.blocks();
        Matrix {
            columns,
            numbers: bytes(blocks * format.bytes_of_block(), 1),
            scales: (0..blocks).map(|block| scale(block, is_fp16)).collect(),
            zero_points: bytes(columns * format.bytes_of_zero_points(), 2),
        }
    }

    impl Matrix {
        /// It in one part.
        pub(in super::super) fn parts(&self, format: Format) -> Vec<Part<'_>> {
            self.in_parts(format, &[self.columns])
        }

        /// It in parts of so many columns.
        pub(in super::super) fn in_parts(&self, format: Format, counts: &[usize]) -> Vec<Part<'_>> {
            let mut start = 0;
            let part = |&count: &usize| {
                let columns = start..start + count;
                start += count;
                let of = |width: usize| columns.start * width..columns.end * width;
                let zero_points = &self.zero_points[of(format.bytes_of_zero_points())];
                Part {
                    numbers: &self.numbers[of(format.blocks() * format.bytes_of_block())],
                    scales: &self.scales[of(format.blocks())],
                    zero_points: format.has_zero_points.then_some(zero_points),
                }
            };
            counts.iter().map(part).collect()
        }

        /// The integers of a block of a column, and their scale.
        pub(in super::super) fn block(
            &self,
            format: Format,
            column: usize,
            block: usize,
        ) -> (Vec<i32>, f32) {
            let index = column * format.blocks() + block;
            let width = format.bytes_of_block();
            let bytes = &self.numbers[index * width..][..width];
            let zero_points = &self.zero_points[column * format.bytes_of_zero_points()..];
            let of = |bytes: &[u8], place: usize| match format.bits {
                4 => i32::from(bytes[place / 2] >> (place % 2 * 4) & 15),
                _ => i32::from(bytes[place]),
            };
            let zero_point = match format.has_zero_points {
                true => of(zero_points, block),
                false => 1 << (format.bits - 1),
            };
            let weights = (0..format.block_size).map(|place| of(bytes, place) - zero_point);
            (weights.collect(), self.scales[index])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::examples::matrix;
    use super::*;

    const FORMAT: Format = Format {
        bits: 4,
        block_size: 32,
        rows: 40,
        has_zero_points: true,
    };

    #[test]
    fn parts_are_one_matrix() {
        let matrix = matrix(FORMAT, 21);
        let whole = Weights::pack(FORMAT, &matrix.parts(FORMAT)).unwrap();
        let joined = Weights::pack(FORMAT, &matrix.in_parts(FORMAT, &[3, 17, 1])).unwrap();
        assert_eq!((whole.columns, joined.columns), (21, 21));
        let bytes = |weights: &Weights| {
            weights
                .chunks
                .iter()
                .map(|chunk| chunk.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(bytes(&whole), bytes(&joined));
        let Scales::Fp32(scales) = whole.group(1).scales else {
            panic!("scales that are no numbers of fp16")
        };
        assert!(matches!(joined.group(1).scales, Scales::Fp32(joined) if joined == scales));
        assert_eq!(*whole.zero_points, *joined.zero_points);
    }

    #[test]
    fn parts_of_other_sizes_are_refused() {
        let matrix = matrix(FORMAT, 4);
        let refused = |change: &dyn Fn(&mut Part<'_>)| {
            let mut parts = matrix.in_parts(FORMAT, &[2, 2]);
            change(&mut parts[1]);
            Weights::pack(FORMAT, &parts).is_none()
        };
        assert!(!refused(&|_| {}));
        assert!(refused(&|part| part.zero_points = None));
        assert!(refused(&|part| part.zero_points = Some(&[0])));
        assert!(refused(&|part| part.numbers = &part.numbers[1..]));
        assert!(refused(&|part| part.scales = &part.scales[1..]));
        assert!(Weights::pack(FORMAT, &[]).is_none());
        let without = Format {
            has_zero_points: false,
            ..FORMAT
        };
        assert!(Weights::pack(without, &matrix.parts(FORMAT)).is_none());
    }

    #[test]
    fn formats_that_kernels_do_not_know() {
        assert!(FORMAT.is_known());
        for (bits, block_size, rows) in [
            (8, 1 << 62, 40),
            (2, 32, 40),
            (4, 16, 40),
            (4, 0, 40),
            (4, 48, 40),
            (4, 32, 0),
        ] {
            let format = Format {
                bits,
                block_size,
                rows,
                ..FORMAT
            };
            assert!(!format.is_known(), "{format:?}");
        }
    }
}
