//! Rotary position embedding, as ONNX Runtime's RotaryEmbedding computes it (Su et al. 2021).

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
    pub(super) fn apply(&self, head: &mut [f32]) {
        let angles = self.cosines.iter().zip(self.sines);
        let (pairs, _) = head.as_chunks_mut::<2>();
        if self.is_interleaved {
            for ([one, other], angle) in pairs.iter_mut().zip(angles) {
                turn(one, other, angle);
            }
            return;
        }
        let (first, second) = head.split_at_mut(self.cosines.len());
        for ((one, other), angle) in first.iter_mut().zip(second).zip(angles) {
            turn(one, other, angle);
        }
    }
}

#[inline(always)]
fn turn(one: &mut f32, other: &mut f32, (cosine, sine): (&f32, &f32)) {
    (*one, *other) = (*one * cosine - *other * sine, *other * cosine + *one * sine);
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
        rotary.at(position).unwrap().apply(&mut head);
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
