//! Products of rows in fp32 and weights of 16 bits.
//!
//! In the place of ONNX Runtime's products of matrices, for which such weights become fp32 as a graph is loaded:
//! a decode step reads half as many bytes here. And ONNX Runtime computes a row alone by another kernel than
//! beside others, so that it has other bits.

mod graph;
mod kernel;
mod lanes;
mod weights;

use std::cell::RefCell;
use std::ffi::CStr;
use std::sync::Mutex;

use half::{bf16, f16, slice::HalfFloatSliceExt};

pub(super) use self::graph::replace_half_products;
use self::kernel::{INTERLEAVED, Instructions, Interleaved, Rows, interleave};
use self::weights::{Part, Weights};
use super::operator::{CustomOperator, Element, Input, NodeInfo, Result, Run};
use super::row_products::{RowProducts, resize};

/// The attribute that says whether weights are those of columns, one after another.
const IS_TRANSPOSED: &CStr = c"is_transposed";
/// The attribute that says whether weights are bfloat16.
const IS_BFLOAT: &CStr = c"is_bfloat";

thread_local! {
    /// [tiles, width]: many rows of the product that the thread runs.
    static TILES: RefCell<Vec<Interleaved>> = const { RefCell::new(Vec::new()) };
}

/// The operator takes
/// - the rows, fp32 [..., width];
/// - the bias, fp32 [columns], where there is one;
/// - the weights of each part of the matrix's columns, fp16, or bf16 where `is_bfloat` is 1, [columns, width]
///   where `is_transposed` is 1, or else [width, columns],
///
/// and gives their product, fp32 [..., columns].
pub(super) struct HalfMatMul {
    instructions: Instructions,
    weights: Weights,
}

impl CustomOperator for HalfMatMul {
    const NAME: &'static CStr = c"HalfMatMul";
    const INPUTS: &'static [Input] = &[Input::FLOATS, Input::FLOATS.optional(), Input::VARIADIC];
    const OUTPUTS: usize = 1;

    fn new(node: &NodeInfo) -> Result<Self> {
        let instructions = Instructions::of_cpu().ok_or("a CPU without AVX2")?;
        let is_transposed = node.integer(IS_TRANSPOSED) == 1;
        let is_bfloat = node.integer(IS_BFLOAT) == 1;
        let parts = (2..node.inputs()).map(|index| match is_bfloat {
            true => sizes::<bf16>(node, index, is_transposed),
            false => sizes::<f16>(node, index, is_transposed),
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let rows = parts.first().map_or(0, |&(rows, _)| rows);
        if parts.iter().any(|&(width, _)| width != rows) {
            return Err("weights of other sizes");
        }
        let parts: Vec<_> = parts.into_iter().map(|(_, part)| part).collect();
        let weights = Weights::pack((rows, is_bfloat), &parts, is_transposed);
        Ok(Self {
            instructions,
            weights: weights.ok_or("weights of other sizes")?,
        })
    }

    fn compute(&self, run: &Run) -> Result<()> {
        let (width, columns) = (self.weights.rows, self.weights.columns);
        let products = RowProducts::of(run, width, columns)?;
        TILES.with_borrow_mut(|tiles| {
            let x = match Rows::are_many(products.x.len() / width) {
                true => {
                    self.interleave(run, products.x, tiles)?;
                    Rows::Many(tiles)
                }
                false => Rows::Few(products.x),
            };
            products.compute(run, &|rows, group, write| {
                self.instructions
                    .multiply((x, rows), &self.weights, group, write);
            })
        })
    }
}

impl HalfMatMul {
    /// Lay a few of the rows `x` each beside each other.
    fn interleave(&self, run: &Run, x: &[f32], tiles: &mut Vec<Interleaved>) -> Result<()> {
        let width = self.weights.rows;
        let rows = x.chunks(INTERLEAVED * width);
        resize(tiles, rows.len() * width).ok_or("no memory for rows")?;
        // no thread waits for one: each has another tile
        let tiles = tiles.chunks_exact_mut(width);
        let tiles: Vec<_> = rows.zip(tiles).map(Mutex::new).collect();
        run.in_parallel(tiles.len(), &|index| {
            if let Ok(mut tile) = tiles[index].lock() {
                let (rows, tile) = &mut *tile;
                interleave(rows, tile);
            }
        })
    }
}

/// How many weights a column of the input `index` has, and the input.
fn sizes<T: Element>(
    node: &NodeInfo,
    index: usize,
    is_transposed: bool,
) -> Result<(usize, Part<'_>)>
where
    [T]: HalfFloatSliceExt,
{
    let tensor = node.constant::<T>(index)?;
    let &[first, second] = tensor.shape else {
        return Err("weights that are no matrix");
    };
    let (rows, columns) = match is_transposed {
        true => (second, first),
        false => (first, second),
    };
    // SAFETY: nothing writes constants.
    let numbers = unsafe { tensor.numbers() }.reinterpret_cast();
    let columns = columns as usize;
    Ok((rows as usize, Part { numbers, columns }))
}
