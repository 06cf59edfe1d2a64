//! Rotary position embedding, as ONNX Runtime's RotaryEmbedding computes it (Su et al. 2021).

use fearless_simd::prelude::*;
use fearless_simd::{Level, Simd, dispatch, f32x16};

/// Pairs that are rotated side by side.
const LANES: usize = 16;

/// Tables of cosines and sines, [positions, half] each.
pub(super) struct Rotary<'a> {
    tables: [&'a [f32]; 2],
    half: usize,
    is_interleaved: bool,
}

/// The rotation at one position: by as many angles as pairs of numbers are rotated.
pub(super) struct Rotation<'a> {
    cosines: &'a [f32],
    sines: &'a [f32],
    is_interleaved: bool,
}

impl<'a> Rotary<'a> {
    /// `tables` for `half` angles at each of their positions, of heads of `size` numbers. None
    /// where they have different sizes or none, or more angles than heads have pairs.
    pub(super) fn new(
        tables: [&'a [f32]; 2],
        half: usize,
        is_interleaved: bool,
        size: usize,
    ) -> Option<Self> {
        let [cosines, sines] = tables;
        let fits = cosines.len() == sines.len() && (1..=size / 2).contains(&half);
        let fits = fits && cosines.len().is_multiple_of(half);
        fits.then_some(Self {
            tables,
            half,
            is_interleaved,
        })
    }

    /// The rotation at `position`; None where the tables end before it.
    pub(super) fn at(&self, position: usize) -> Option<Rotation<'a>> {
        let row = position * self.half..(position + 1) * self.half;
        let [cosines, sines] = self.tables.map(|table| table.get(row.clone()));
        Some(Rotation {
            cosines: cosines?,
            sines: sines?,
            is_interleaved: self.is_interleaved,
        })
    }
}

impl Rotation<'_> {
    /// Rotate the first numbers of `head`, twice as many as there are angles: each of the first half
    /// with one of the second, or with its neighbour.
    pub(super) fn apply(&self, level: Level, head: &mut [f32]) {
        dispatch!(level, simd => {
            let angles = self.cosines.chunks(LANES).zip(self.sines.chunks(LANES));
            for (place, (cosines, sines)) in angles.enumerate() {
                self.turn(simd, place * LANES, (cosines, sines), head);
            }
        });
    }

    /// Rotate up to sixteen pairs, from the number `first` on. The products and sums are those of ONNX
    /// Runtime's kernel with fused ones, which fills caches of layers that a token skips: keys have the
    /// same bits whoever writes them.
    #[inline(always)]
    fn turn<S: Simd>(
        &self,
        simd: S,
        first: usize,
        (cosines, sines): (&[f32], &[f32]),
        head: &mut [f32],
    ) {
        let (step, apart) = match self.is_interleaved {
            true => (2, 1),
            false => (1, self.cosines.len()),
        };
        let mut lanes = [[0.0; LANES]; 4];
        for (pair, angle) in cosines.iter().zip(sines).enumerate() {
            let place = step * (first + pair);
            lanes[0][pair] = head[place];
            lanes[1][pair] = head[place + apart];
            (lanes[2][pair], lanes[3][pair]) = (*angle.0, *angle.1);
        }
        let one = f32x16::from_slice(simd, &lanes[0]);
        let other = f32x16::from_slice(simd, &lanes[1]);
        let cosine = f32x16::from_slice(simd, &lanes[2]);
        let sine = f32x16::from_slice(simd, &lanes[3]);
        let turned: [f32; LANES] = one.mul_add(cosine, -(other * sine)).into();
        let others: [f32; LANES] = one.mul_add(sine, other * cosine).into();
        for pair in 0..cosines.len() {
            let place = step * (first + pair);
            head[place] = turned[pair];
            head[place + apart] = others[pair];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Quarter turns by position: of the first pair once for each, of the second once for every two.
    const COSINES: [f32; 6] = [1.0, 1.0, 0.0, 1.0, -1.0, 0.0];
    const SINES: [f32; 6] = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0];

    fn rotated(is_interleaved: bool, position: usize) -> Vec<f32> {
        let rotary = Rotary::new([&COSINES, &SINES], 2, is_interleaved, 5).unwrap();
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotary.at(position).unwrap().apply(Level::new(), &mut head);
        head.to_vec()
    }

    #[test]
    fn pairs_are_of_halves_or_neighbours() {
        for is_interleaved in [false, true] {
            assert_eq!(rotated(is_interleaved, 0), [1.0, 2.0, 3.0, 4.0, 5.0]);
        }
        assert_eq!(rotated(false, 1), [-3.0, 2.0, 1.0, 4.0, 5.0]);
        assert_eq!(rotated(false, 2), [-1.0, -4.0, -3.0, 2.0, 5.0]);
        assert_eq!(rotated(true, 1), [-2.0, 1.0, 3.0, 4.0, 5.0]);
        assert_eq!(rotated(true, 2), [-1.0, -2.0, -4.0, 3.0, 5.0]);
    }

    #[test]
    fn tables_of_other_sizes_are_refused() {
        assert!(Rotary::new([&COSINES, &SINES[..4]], 2, false, 4).is_none());
        assert!(Rotary::new([&COSINES[..5], &SINES[..5]], 2, false, 4).is_none());
        for half in [0, 3] {
            assert!(Rotary::new([&COSINES, &SINES], half, false, 4).is_none());
        }
        let rotary = Rotary::new([&COSINES, &SINES], 2, false, 4).unwrap();
        assert!(rotary.at(2).is_some() && rotary.at(3).is_none());
    }
}
