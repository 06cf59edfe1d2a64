//! Products of rows and quantized weights.
//!
//! In the place of ONNX Runtime's MatMulNBits, where eight rows take 4.5 times as long as one (int4, 1536 to
//! 576, one thread with AVX-512), and which on CPUs without AVX-512 computes a row alone by another kernel than
//! beside others, so that it has other bits.

mod activations;
mod graph;
mod kernel;
mod lanes;
mod weights;

use std::cell::RefCell;
use std::ffi::CStr;
use std::sync::Mutex;

use self::activations::Activations;
pub(super) use self::graph::replace_quantized_products;
use self::kernel::Instructions;
use self::weights::{Format, Part, Weights};
use super::operator::{CustomOperator, Input, NodeInfo, Result, Run};
use super::row_products::RowProducts;

/// The attribute that says whether blocks have zero points.
const HAS_ZERO_POINTS: &CStr = c"has_zero_points";

/// Numbers to round below which waking other threads takes longer.
const PARALLEL_THRESHOLD: usize = 16_384;

thread_local! {
    /// Of the product that the thread runs.
    static ACTIVATIONS: RefCell<Activations> = RefCell::default();
}

/// The operator with MatMulNBits' attributes K, N, bits and block_size. It takes
/// - the rows, fp32 [..., K];
/// - the bias, fp32 [N], where there is one;
/// - of each part of the matrix's columns the weights, uint8 [columns, blocks, bytes of a block], their
///   scales, fp32 [columns, blocks], and, where `has_zero_points` is 1, their zero points, uint8 [columns,
///   bytes of the zero points],
///
/// and gives their product, fp32 [..., N]. Rows are rounded to 8 bits, as MatMulNBits does at
/// `accuracy_level` 4.
pub(super) struct QuantizedMatMul {
    instructions: Instructions,
    weights: Weights,
}

impl CustomOperator for QuantizedMatMul {
    const NAME: &'static CStr = c"QuantizedMatMul";
    const INPUTS: &'static [Input] = &[Input::FLOATS, Input::FLOATS.optional(), Input::VARIADIC];
    const OUTPUTS: usize = 1;

    fn new(node: &NodeInfo) -> Result<Self> {
        let instructions = Instructions::of_cpu().ok_or("a CPU without AVX2")?;
        let format = Format {
            bits: node.integer(c"bits"),
            block_size: node.integer(c"block_size"),
            rows: node.integer(c"K"),
            has_zero_points: node.integer(HAS_ZERO_POINTS) == 1,
        };
        if !format.is_known() {
            return Err("weights in an unknown format");
        }
        let tensors = if format.has_zero_points { 3 } else { 2 };
        let part = |first: usize| -> Result<_> {
            let numbers = node.constant::<u8>(first)?;
            let scales = node.constant::<f32>(first + 1)?;
            let zero_points = match format.has_zero_points {
                true => Some(node.constant::<u8>(first + 2)?),
                false => None,
            };
            // SAFETY: nothing writes constants.
            Ok(unsafe {
                Part {
                    numbers: numbers.numbers(),
                    scales: scales.numbers(),
                    zero_points: zero_points.map(|zero_points| zero_points.numbers()),
                }
            })
        };
        let parts = (2..node.inputs()).step_by(tensors).map(part);
        let weights = Weights::pack(format, &parts.collect::<Result<Vec<_>>>()?);
        let weights = weights.filter(|weights| weights.columns == node.integer(c"N"));
        Ok(Self {
            instructions,
            weights: weights.ok_or("weights of other sizes")?,
        })
    }

    fn compute(&self, run: &Run) -> Result<()> {
        let (format, columns) = (self.weights.format, self.weights.columns);
        let products = RowProducts::of(run, format.rows, columns)?;
        ACTIVATIONS.with_borrow_mut(|activations| {
            self.round(run, products.x, activations)?;
            products.compute(run, &|rows, group, write| {
                self.instructions
                    .multiply(activations, rows, &self.weights, group, write);
            })
        })
    }
}

impl QuantizedMatMul {
    /// Round the rows `x`.
    fn round(&self, run: &Run, x: &[f32], activations: &mut Activations) -> Result<()> {
        let format = self.weights.format;
        let rows = x.len() / format.rows;
        activations
            .resize(rows, format)
            .ok_or("no memory for rows")?;
        let x = x.chunks_exact(format.rows);
        let rounded = x.zip(activations.new_rows());
        if rows * format.rows < PARALLEL_THRESHOLD {
            for (numbers, mut row) in rounded {
                self.instructions.round(numbers, format, &mut row);
            }
            return Ok(());
        }
        // no thread waits for one: each has another row
        let rounded: Vec<_> = rounded.map(Mutex::new).collect();
        run.in_parallel(rows, &|row| {
            if let Ok(mut row) = rounded[row].lock() {
                let (numbers, row) = &mut *row;
                self.instructions.round(numbers, format, row);
            }
        })
    }
}
