//! The tensors of passes: where they lie, their shapes, and their numbers on the host.

use std::collections::BTreeMap;
use std::ops::Range;

use half::{bf16, f16};

use super::device::{Bound, Buffer, Device, check_inside};
use crate::bundle::{Manifest, PortableContext, Precision};
use crate::error::Result;

/// Sizes that all passes share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) precision: Precision,
    pub(super) hidden: usize,
    pub(super) vocabulary: usize,
    /// Positions that caches hold.
    pub(super) length: usize,
    /// Tokens that one pass may have.
    pub(super) max_tokens: usize,
}

impl Sizes {
    /// Bytes of one position's residual stream.
    pub(super) fn row(&self) -> usize {
        self.hidden * self.precision.bytes()
    }

    /// Memory for the residual stream of so many positions.
    pub(super) fn rows(&self, device: &mut impl Device, positions: usize) -> Result<Buffer> {
        allocate(device, &[positions, self.hidden], self.precision.bytes())
    }

    /// The residual stream of `tokens` tokens at the start of `buffer`.
    pub(super) fn bound(&self, name: &str, buffer: Buffer, tokens: usize) -> Bound {
        bound(
            name,
            buffer,
            &[1, tokens, self.hidden],
            self.precision.bytes(),
        )
    }
}

impl Precision {
    /// Bytes of a number where a device computes with it; with quantized weights that is half.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Fp32 => 4,
            Self::Fp16 | Self::Bf16 | Self::Int8 | Self::Int4 => 2,
        }
    }

    /// The numbers in `bytes`, little-endian as on every device.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let two = |pair: &[u8]| [pair[0], pair[1]];
        match self {
            Self::Fp32 => decode_f32(bytes),
            Self::Fp16 | Self::Int8 | Self::Int4 => bytes
                .chunks_exact(2)
                .map(|pair| f16::from_le_bytes(two(pair)).to_f32())
                .collect(),
            Self::Bf16 => bytes
                .chunks_exact(2)
                .map(|pair| bf16::from_le_bytes(two(pair)).to_f32())
                .collect(),
        }
    }

    /// `values` as the device has them.
    pub(super) fn encode(self, values: &[f32]) -> Vec<u8> {
        let values = values.iter();
        match self {
            Self::Fp32 => values.flat_map(|value| value.to_le_bytes()).collect(),
            Self::Fp16 | Self::Int8 | Self::Int4 => values
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
                .collect(),
        }
    }
}

/// The fp32 numbers in `bytes`.
pub(super) fn decode_f32(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect()
}

/// Integers as the device has them.
pub(super) fn encode_i64(values: impl IntoIterator<Item = i64>) -> Vec<u8> {
    values.into_iter().flat_map(i64::to_le_bytes).collect()
}

/// Bytes of a tensor of `shape` with elements of `element` bytes, or more than there can be.
fn size(shape: &[usize], element: usize) -> usize {
    shape.iter().copied().fold(element, usize::saturating_mul)
}

/// Memory for a tensor of `shape` with elements of `element` bytes.
pub(super) fn allocate(
    device: &mut impl Device,
    shape: &[usize],
    element: usize,
) -> Result<Buffer> {
    device.allocate(size(shape, element))
}

/// The tensor `name` of `shape`, with elements of `element` bytes, at the start of `buffer`.
///
/// # Panics
/// When the buffer is smaller: an engine would write beyond it.
pub(super) fn bound(
    name: impl Into<String>,
    buffer: Buffer,
    shape: &[usize],
    element: usize,
) -> Bound {
    let bytes = size(shape, element);
    check_inside(buffer.bytes, 0, bytes);
    Bound {
        name: name.into(),
        address: buffer.address,
        shape: shape.to_vec(),
        bytes,
    }
}

/// What the embed and contexts engines read and write, and what goes on from there through the
/// layers.
pub(super) struct Frame {
    /// The residual stream [1, tokens, hidden]. Engines take turns reading one and writing the
    /// other; embed writes the first.
    pub(super) hidden: [Buffer; 2],
    input_ids: Buffer,
    position_ids: Buffer,
    write_index: Buffer,
    /// The newest position, which ONNX Runtime's attention reads.
    seqlens_k: Buffer,
    contexts: Vec<(String, PortableContext, Buffer)>,
}

impl Frame {
    pub(super) fn new(
        device: &mut impl Device,
        contexts: &BTreeMap<String, PortableContext>,
        sizes: Sizes,
    ) -> Result<Self> {
        let most = sizes.max_tokens;
        let mut ids = || allocate(device, &[1, most], size_of::<i64>());
        let (input_ids, position_ids) = (ids()?, ids()?);
        let contexts = contexts
            .iter()
            .map(|(name, context)| {
                let buffer = allocate(device, &context.shape_for(most), context.dtype.bytes())?;
                Ok((name.clone(), context.clone(), buffer))
            })
            .collect::<Result<_>>()?;
        let mut hidden = || sizes.rows(device, most);
        Ok(Self {
            hidden: [hidden()?, hidden()?],
            input_ids,
            position_ids,
            contexts,
            write_index: allocate(device, &[1], size_of::<i64>())?,
            seqlens_k: allocate(device, &[1], size_of::<i32>())?,
        })
    }

    /// Write the ids of `positions` and where in the caches they begin.
    pub(super) fn write_positions(
        &self,
        device: &mut impl Device,
        positions: &Range<usize>,
    ) -> Result<()> {
        let ids = encode_i64(positions.clone().map(|position| position as i64));
        device.write(self.position_ids, 0, &ids)?;
        device.write(self.write_index, 0, &encode_i64([positions.start as i64]))?;
        let last = positions.end as i32 - 1;
        device.write(self.seqlens_k, 0, &last.to_le_bytes())
    }

    /// Write the ids of `tokens`.
    pub(super) fn write_tokens(&self, device: &mut impl Device, tokens: &[u32]) -> Result<()> {
        let ids = encode_i64(tokens.iter().map(|&token| i64::from(token)));
        device.write(self.input_ids, 0, &ids)
    }

    /// The embed engine's tensors.
    pub(super) fn embed(&self, tokens: usize, sizes: Sizes) -> Vec<Bound> {
        vec![
            ids("input_ids", self.input_ids, tokens),
            ids("position_ids", self.position_ids, tokens),
            sizes.bound("x", self.hidden[0], tokens),
        ]
    }

    /// The contexts engine's tensors.
    pub(super) fn positions(&self, tokens: usize) -> Vec<Bound> {
        let mut tensors = vec![ids("position_ids", self.position_ids, tokens)];
        tensors.extend(self.contexts(tokens));
        tensors
    }

    /// What layers and kv engines take of this frame beside the residual stream.
    pub(super) fn shared(&self, tokens: usize) -> Vec<Bound> {
        let mut tensors = vec![
            bound("write_index", self.write_index, &[1], size_of::<i64>()),
            bound("seqlens_k", self.seqlens_k, &[1], size_of::<i32>()),
        ];
        tensors.extend(self.contexts(tokens));
        tensors
    }

    fn contexts(&self, tokens: usize) -> impl Iterator<Item = Bound> {
        self.contexts.iter().map(move |(name, context, buffer)| {
            let shape = context.shape_for(tokens);
            bound(name, *buffer, &shape, context.dtype.bytes())
        })
    }
}

/// Token or position ids, [1, tokens] int64.
fn ids(name: &str, buffer: Buffer, tokens: usize) -> Bound {
    bound(name, buffer, &[1, tokens], size_of::<i64>())
}

/// Key and value cache of each layer, [1, heads, length, head size].
pub(super) struct Caches {
    layers: Vec<([usize; 4], [Buffer; 2])>,
    precision: Precision,
}

impl Caches {
    pub(super) fn new(device: &mut impl Device, manifest: &Manifest, sizes: Sizes) -> Result<Self> {
        let caches = manifest.key_value_heads.iter().map(|kv| {
            let shape = [1, kv.heads, sizes.length, kv.head_size];
            let mut cache = || allocate(device, &shape, sizes.precision.bytes());
            Ok((shape, [cache()?, cache()?]))
        });
        Ok(Self {
            layers: caches.collect::<Result<_>>()?,
            precision: sizes.precision,
        })
    }

    /// Fill all with zeros.
    pub(super) fn clear(&self, device: &mut impl Device) -> Result<()> {
        for (shape, buffers) in &self.layers {
            let zeros = vec![0; shape.iter().product::<usize>() * self.precision.bytes()];
            for &buffer in buffers {
                device.write(buffer, 0, &zeros)?;
            }
        }
        Ok(())
    }

    /// The caches of `layers` as an engine's inputs and outputs, in the same memory.
    pub(super) fn tensors(&self, layers: Range<usize>) -> Vec<Bound> {
        let mut tensors = Vec::new();
        let element = self.precision.bytes();
        for (index, (shape, buffers)) in self.layers[layers].iter().enumerate() {
            for (kind, buffer) in ["key", "value"].into_iter().zip(buffers) {
                for side in ["past", "present"] {
                    let name = format!("{side}_{kind}_{index}");
                    tensors.push(bound(name, *buffer, shape, element));
                }
            }
        }
        tensors
    }
}

/// The masks that layers attend through, bool [1, 1, tokens, length] each.
pub(super) struct Masks(Vec<(String, usize, Buffer)>);

impl Masks {
    /// Masks by name; each token sees so many positions, itself included, or with 0 all.
    pub(super) fn new<'a>(
        device: &mut impl Device,
        windows: impl IntoIterator<Item = (&'a String, &'a usize)>,
        sizes: Sizes,
    ) -> Result<Self> {
        let masks = windows.into_iter().map(|(name, &window)| {
            let buffer = allocate(device, &[sizes.max_tokens, sizes.length], size_of::<bool>())?;
            Ok((name.clone(), window, buffer))
        });
        Ok(Self(masks.collect::<Result<_>>()?))
    }

    /// Let each of `positions` see itself and those before it.
    pub(super) fn write(
        &self,
        device: &mut impl Device,
        positions: Range<usize>,
        sizes: Sizes,
    ) -> Result<()> {
        for &(_, window, buffer) in &self.0 {
            let mut rows = vec![0; positions.len() * sizes.length];
            for (row, position) in rows.chunks_exact_mut(sizes.length).zip(positions.clone()) {
                let first = match window {
                    0 => 0,
                    _ => (position + 1).saturating_sub(window),
                };
                row[first..=position].fill(1);
            }
            device.write(buffer, 0, &rows)?;
        }
        Ok(())
    }

    pub(super) fn tensors(&self, tokens: usize, sizes: Sizes) -> impl Iterator<Item = Bound> {
        let shape = [1, 1, tokens, sizes.length];
        self.0
            .iter()
            .map(move |(name, _, buffer)| bound(name, *buffer, &shape, size_of::<bool>()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::host_device::Host;
    use super::*;

    const SIZES: Sizes = Sizes {
        precision: Precision::Fp16,
        hidden: 4,
        vocabulary: 8,
        length: 6,
        max_tokens: 2,
    };

    #[test]
    fn masks_hide_what_comes_later_and_what_lies_outside_the_window() {
        let mut device = Host::default();
        let windows = [("mask".to_owned(), 0), ("mask_window_2".to_owned(), 2)];
        let windows = windows.iter().map(|(name, window)| (name, window));
        let masks = Masks::new(&mut device, windows, SIZES).unwrap();
        masks.write(&mut device, 3..5, SIZES).unwrap();
        let mut rows = [[0; 12]; 2];
        for (row, (_, _, buffer)) in rows.iter_mut().zip(&masks.0) {
            device.read(*buffer, 0, row).unwrap();
        }
        assert_eq!(rows[0], [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0]);
        assert_eq!(rows[1], [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]);
    }

    #[test]
    fn numbers_survive_the_way_to_the_device_and_back() {
        let values = [0.0, 1.5, -2.0, 65504.0];
        for precision in [Precision::Fp32, Precision::Fp16, Precision::Int4] {
            assert_eq!(precision.decode(&precision.encode(&values)), values);
        }
        let coarse = Precision::Bf16.decode(&Precision::Bf16.encode(&values));
        assert_eq!(coarse[..3], values[..3]);
    }

    #[test]
    #[should_panic(expected = "bytes 8 to Some(12) of a buffer of 10")]
    fn nothing_is_written_beyond_a_buffer() {
        let mut device = Host::default();
        let buffer = device.allocate(10).unwrap();
        let _ = device.write(buffer, 8, &[0; 4]);
    }

    #[test]
    #[should_panic(expected = "bytes 0 to Some(24) of a buffer of 16")]
    fn no_engine_is_given_more_than_a_buffer() {
        let mut device = Host::default();
        let buffer = SIZES.rows(&mut device, SIZES.max_tokens).unwrap();
        assert_eq!(SIZES.bound("x", buffer, 2).bytes, 16);
        SIZES.bound("x", buffer, 3);
    }

    #[test]
    fn sizes_that_no_memory_has_are_an_error() {
        let mut device = Host::default();
        for shape in [[usize::MAX, 2], [1 << 32, 1 << 32], [1 << 31, 1 << 31]] {
            assert!(allocate(&mut device, &shape, 4).is_err(), "{shape:?}");
        }
    }
}
