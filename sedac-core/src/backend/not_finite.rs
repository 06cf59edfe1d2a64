//! Logits that are NaN or infinite, and the engine that they come from.

use std::ops::Range;

use super::Engines;
use crate::error::Result;
use crate::interrupt::Interrupt;

/// Numbers looked at before the first that is not finite ends the search: enough to use a
/// processor's widest registers.
const BLOCK: usize = 1024;

/// Whether all of `values` are finite.
pub(super) fn all_finite(values: &[f32]) -> bool {
    let block_is_finite = |block: &[f32]| block.iter().fold(true, |all, x| all & x.is_finite());
    values.chunks(BLOCK).all(block_is_finite)
}

/// The first engine whose output is not finite when `tokens` run at full depth from an empty cache,
/// whose entries are replaced. None where all outputs up to the head are finite.
///
/// # Errors
/// [`Error::Cancelled`](crate::Error::Cancelled) when interrupted, and what the engines report.
pub(super) fn origin(
    engines: &mut impl Engines,
    tokens: &[u32],
    interrupt: &Interrupt,
) -> Result<Option<String>> {
    let max = engines.max_tokens();
    let layers = engines.layers();
    for (index, piece) in tokens.chunks(max).enumerate() {
        engines.embed(piece, index * max)?;
        if !all_finite(&engines.residual(piece.len())?) {
            return Ok(Some("the embed engine".into()));
        }
        for (engine, layers) in layers.iter().enumerate() {
            interrupt.check()?;
            engines.run(engine)?;
            if !all_finite(&engines.residual(piece.len())?) {
                return Ok(Some(name(layers)));
            }
        }
    }
    Ok(None)
}

fn name(layers: &Range<usize>) -> String {
    match layers.len() {
        1 => format!("the engine of layer {}", layers.start),
        _ => format!(
            "the engine of layers {} to {}",
            layers.start,
            layers.end - 1
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_in_any_block_is_found() {
        for index in [0, 1023, 1024, 2999] {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![f32::MAX; 3000];
                assert!(all_finite(&values));
                values[index] = wrong;
                assert!(!all_finite(&values));
            }
        }
    }
}
