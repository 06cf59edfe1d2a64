//! Weights of 16 bits as the kernels read them.

use crate::backend::onnxruntime::huge_pages::HugeSlice;

/// Columns whose weights lie together.
pub(super) const GROUP: usize = 32;

/// A row's weights of the columns of a group.
pub(super) type Line = [u16; GROUP];

/// A part of the columns of a matrix as graphs have it.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) numbers: &'a [u16],
    pub(super) columns: usize,
}

/// A matrix.
pub(super) struct Weights {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) is_bfloat: bool,
    /// [groups, rows]
    lines: HugeSlice<Line>,
}

impl Weights {
    /// Lay out `parts` of `rows` weights for each column, one after another: [columns, rows] each where it
    /// `is_transposed`, or else [rows, columns]. None where their sizes do not fit together, or memory is short.
    pub(super) fn pack(
        (rows, is_bfloat): (usize, bool),
        parts: &[Part<'_>],
        is_transposed: bool,
    ) -> Option<Self> {
        let fits = |part: &Part<'_>| part.columns.checked_mul(rows) == Some(part.numbers.len());
        if rows == 0 || !parts.iter().all(fits) {
            return None;
        }
        let columns: usize = parts.iter().map(|part| part.columns).sum();
        if columns == 0 {
            return None;
        }
        let mut lines = HugeSlice::filled([0; GROUP], columns.div_ceil(GROUP) * rows)?;
        let mut column = 0;
        for part in parts {
            for index in 0..part.columns {
                let (first, step) = match is_transposed {
                    true => (index * rows, 1),
                    false => (index, part.columns),
                };
                let numbers = part.numbers[first..].iter().step_by(step);
                let lines = &mut lines[column / GROUP * rows..][..rows];
                for (line, number) in lines.iter_mut().zip(numbers) {
                    line[column % GROUP] = *number;
                }
                column += 1;
            }
        }
        Some(Self {
            rows,
            columns,
            is_bfloat,
            lines,
        })
    }

    /// The weights of the columns of `group`, by row.
    pub(super) fn group(&self, group: usize) -> &[Line] {
        &self.lines[group * self.rows..(group + 1) * self.rows]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: [u16; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

    fn part(numbers: &[u16], columns: usize) -> Part<'_> {
        Part { numbers, columns }
    }

    #[test]
    fn parts_lie_side_by_side() {
        let parts = [part(&NUMBERS[..6], 3), part(&NUMBERS[6..], 3)];
        let weights = Weights::pack((2, false), &parts, true).unwrap();
        assert_eq!(weights.group(0)[0][..7], [0, 2, 4, 6, 8, 10, 0]);
        assert_eq!(weights.group(0)[1][..7], [1, 3, 5, 7, 9, 11, 0]);
        let weights = Weights::pack((2, false), &parts[..1], false).unwrap();
        assert_eq!(weights.group(0)[1][..4], [3, 4, 5, 0]);
        let columns: Vec<u16> = (0..GROUP as u16 + 2).collect();
        let weights = Weights::pack((1, false), &[part(&columns, GROUP + 2)], true).unwrap();
        assert_eq!(
            weights.group(1)[0][..3],
            [GROUP as u16, GROUP as u16 + 1, 0]
        );
    }

    #[test]
    fn parts_of_other_sizes_are_refused() {
        for (rows, parts) in [
            (2, vec![part(&NUMBERS[..5], 3)]),
            (0, vec![part(&[], 3)]),
            (2, Vec::new()),
        ] {
            assert!(Weights::pack((rows, false), &parts, true).is_none());
        }
    }
}
