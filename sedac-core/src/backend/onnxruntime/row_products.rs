//! What operators that multiply rows with a stored matrix have in common.

use std::ops::Range;
use std::slice;

use super::operator::{Result, Run, Tensor};

/// Rows that a thread multiplies with the same weights before it takes others.
const ROWS_AT_ONCE: usize = 64;
/// Products of two numbers below which waking other threads takes longer.
const PARALLEL_THRESHOLD: usize = 100_000;

/// Takes the columns of a group of a row's product, those included that the matrix lacks.
pub(super) type Write<'a, const GROUP: usize> = &'a mut dyn FnMut(usize, &[f32; GROUP]);

/// Rows and where their products with a matrix go.
pub(super) struct RowProducts<'a> {
    /// fp32 [rows, width]
    pub(super) x: &'a [f32],
    /// How many numbers a row has.
    width: usize,
    /// fp32 [columns]
    bias: Option<&'a [f32]>,
    /// fp32 [rows, columns]
    output: &'a mut [f32],
    columns: usize,
}

impl<'a> RowProducts<'a> {
    /// Of a run whose first input are the rows, fp32 [..., width], and whose second one is a bias, fp32
    /// [columns], where it is there. The output is fp32 [..., columns].
    ///
    /// # Errors
    /// Where they are of other sizes.
    pub(super) fn of(run: &'a Run, width: usize, columns: usize) -> Result<Self> {
        let given = Tensor::<f32>::input(run, 0)?.ok_or("rows are missing")?;
        let Some((&last, outer)) = given.shape.split_last() else {
            return Err("a number and no rows");
        };
        if last as usize != width {
            return Err("rows of another width");
        }
        let bias = Tensor::<f32>::input(run, 1)?;
        let shape = [outer, &[columns as i64]].concat();
        let mut output = Tensor::<f32>::output(run, 0, &shape)?;
        if [Some(&given), bias.as_ref()]
            .into_iter()
            .flatten()
            .any(|input| input.overlaps(&output))
        {
            return Err("the output in the memory of an input");
        }
        // SAFETY: nothing but the operator writes its output, which shares no memory with inputs.
        let (x, bias) = unsafe { (given.numbers(), bias.map(|bias| bias.numbers())) };
        if bias.is_some_and(|bias| bias.len() != columns) {
            return Err("a bias of another size");
        }
        // SAFETY: as above.
        let output = unsafe { output.numbers_mut() };
        Ok(Self {
            x,
            width,
            bias,
            output,
            columns,
        })
    }

    /// Compute them on the threads of `run`: `multiply` gives the columns of a group, of some of the rows.
    ///
    /// # Errors
    /// Where the threads do not run.
    pub(super) fn compute<const GROUP: usize>(
        self,
        run: &Run,
        multiply: &(dyn Fn(Range<usize>, usize, Write<'_, GROUP>) + Sync),
    ) -> Result<()> {
        let (rows, columns) = (self.x.len() / self.width, self.columns);
        let output = Output {
            numbers: self.output.as_mut_ptr(),
            columns,
        };
        // a thread takes all rows through the weights of a group, which stay in its cache
        let parts = rows.div_ceil(ROWS_AT_ONCE);
        let multiply = |index: usize| {
            let (group, first) = (index / parts, index % parts * ROWS_AT_ONCE);
            let rows = first..(first + ROWS_AT_ONCE).min(rows);
            let columns = group * GROUP..((group + 1) * GROUP).min(columns);
            let bias = self.bias.map(|bias| &bias[columns.clone()]);
            multiply(rows, group, &mut |row, numbers| {
                // SAFETY: the row is one of the output's, and no other call is for it and these columns.
                let output = unsafe { output.part(row, columns.clone()) };
                match <&mut [f32; GROUP]>::try_from(&mut *output) {
                    Ok(output) => *output = *numbers,
                    Err(_) => output.copy_from_slice(&numbers[..output.len()]),
                }
                for (number, bias) in output.iter_mut().zip(bias.unwrap_or_default()) {
                    *number += bias;
                }
            });
        };
        let count = columns.div_ceil(GROUP) * parts;
        if self.x.len() * columns < PARALLEL_THRESHOLD {
            (0..count).for_each(multiply);
            return Ok(());
        }
        run.in_parallel(count, &multiply)
    }
}

/// Make `numbers` as many as `count`. None where memory is short; a vector alone would abort.
pub(super) fn resize<T: Copy + Default>(numbers: &mut Vec<T>, count: usize) -> Option<()> {
    numbers
        .try_reserve(count.saturating_sub(numbers.len()))
        .ok()?;
    numbers.resize(count, T::default());
    Some(())
}

/// Where products go, [rows, columns].
struct Output {
    numbers: *mut f32,
    columns: usize,
}

// SAFETY: threads write to other rows or columns each, as `part` asks for.
unsafe impl Sync for Output {}

impl Output {
    /// Some columns of a row.
    ///
    /// # Safety
    /// There are such a row and such columns, and nothing else uses them while they are borrowed.
    #[expect(clippy::mut_from_ref, reason = "each caller has another part")]
    unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        let first = row * self.columns + columns.start;
        // SAFETY: what the caller promises.
        unsafe { slice::from_raw_parts_mut(self.numbers.add(first), columns.len()) }
    }
}
