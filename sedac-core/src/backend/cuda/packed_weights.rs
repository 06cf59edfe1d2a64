//! The weights of a chain, from the bundle's file to a GPU's memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::abi::LayerPointers;
use crate::backend::gpu::failed;
use crate::bundle::{Bundle, ChainKernels, HALF_BLOCK_BYTES};
use crate::error::{Error, Result};

/// Largest header; they have some KB a layer.
const MAX_HEADER: u64 = 1 << 26;

/// Bytes of a length, which the file begins with.
const LENGTH: u64 = size_of::<u64>() as u64;

/// Bytes that are read and copied at once.
const CHUNK: usize = 1 << 24;

/// Rows and columns of a block of a packed matrix, in which a row's columns are contiguous.
const TILE_ROWS: usize = 16;
const TILE_COLUMNS: usize = 32;

/// A safetensors file whose tensors are taken one by one.
#[derive(Debug)]
pub(super) struct PackedWeights {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Where the tensors begin.
    start: u64,
    unused: BTreeSet<String>,
}

/// Where a model's weights lie on the GPU.
#[derive(Debug)]
pub(super) struct WeightAddresses {
    pub(super) layers: Vec<LayerPointers>,
    pub(super) embed: u64,
    pub(super) head: u64,
    pub(super) final_norm: u64,
    pub(super) cos: u64,
    pub(super) sin: u64,
}

impl PackedWeights {
    /// Open the weights of `kernels`, which `bundle` holds.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is no such file, [`Error::DamagedFile`] when it changed since it was
    /// checked, [`Error::Io`] when it cannot be read.
    pub(super) fn open(bundle: &Bundle, kernels: &ChainKernels) -> Result<Self> {
        let path = bundle.gate.shown(&kernels.weights);
        match File::open(bundle.gate.path(&kernels.weights)?) {
            Ok(file) => Self::read(path, file),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    /// Read the header of `file`, which `path` names.
    fn read(path: PathBuf, mut file: File) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.clone(),
            source,
        };
        let bytes = file.metadata().map_err(io)?.len();
        let mut length = [0; LENGTH as usize];
        file.read_exact(&mut length).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length).min(MAX_HEADER);
        let mut header = Vec::new();
        let read = (&mut file).take(header_bytes).read_to_end(&mut header);
        read.map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| Error::bundle(&path, no_weights(&error.to_string())))?;
        let start = LENGTH + header_bytes;
        if start + metadata.data_len() as u64 != bytes {
            return Err(Error::bundle(
                &path,
                no_weights("its tensors are not all of it"),
            ));
        }
        Ok(Self {
            unused: metadata.offset_keys().into_iter().collect(),
            path,
            file,
            metadata,
            start,
        })
    }

    /// Copy all tensors, which must be those of `kernels`, with rotary tables of `capacity`
    /// positions. `memory` keeps what is allocated.
    ///
    /// # Errors
    /// [`Error::Bundle`] when one is missing, unknown or of another shape, [`Error::Io`] when the
    /// file cannot be read, [`Error::Device`] when the driver fails.
    pub(super) fn upload(
        mut self,
        kernels: &ChainKernels,
        capacity: usize,
        stream: &Arc<CudaStream>,
        memory: &mut Vec<CudaSlice<u8>>,
    ) -> Result<WeightAddresses> {
        let shape = kernels.shape;
        let mut uploading = Uploading {
            weights: &mut self,
            stream,
            memory,
            buffer: Vec::new(),
            block_bytes: kernels.block_bytes,
        };
        let head = uploading.matrix("head", [shape.vocabulary, shape.hidden])?;
        let embed = match uploading.weights.metadata.info("embed") {
            Some(_) => uploading.matrix("embed", [shape.vocabulary, shape.hidden])?,
            None => head,
        };
        let final_norm = uploading.vector("final_norm", shape.hidden)?;
        let half = shape.rotary_size / 2;
        let cos = uploading.rotary("cos", kernels.rotary_tables(), [capacity, half])?;
        let sin = uploading.rotary("sin", kernels.rotary_tables(), [capacity, half])?;
        let layers = 0..shape.layers;
        let layers = layers.map(|layer| uploading.layer(layer, kernels));
        let layers = layers.collect::<Result<_>>()?;
        if let Some(name) = self.unused.first() {
            let reason = format!("it holds {name}, which this runtime does not know");
            return Err(Error::bundle(&self.path, no_weights(&reason)));
        }
        Ok(WeightAddresses {
            layers,
            embed,
            head,
            final_norm,
            cos,
            sin,
        })
    }

    /// The bytes of the tensor `name`, which must be `dtype` of `shape`.
    fn take(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Range<u64>> {
        let info = self.metadata.info(name).ok_or_else(|| {
            let reason = format!("it holds no {name}");
            Error::bundle(&self.path, no_weights(&reason))
        })?;
        if info.dtype != dtype || info.shape != shape {
            let reason = format!(
                "its {name} is {:?} {:?}, where {dtype:?} {shape:?} is needed",
                info.dtype, info.shape
            );
            return Err(Error::bundle(&self.path, no_weights(&reason)));
        }
        self.unused.remove(name);
        let (start, end) = info.data_offsets;
        Ok(self.start + start as u64..self.start + end as u64)
    }
}

fn no_weights(reason: &str) -> String {
    format!(
        "not the chain's weights ({reason}); build them again with sedac-export engines --target \
         cuda"
    )
}

/// Dtype and shape of a packed [rows, columns] matrix: tiles of rows, blocks of columns, and for fp16
/// halves of a tile, rows of a half, columns of a block; for quantized weights a block's bytes.
fn packed([rows, columns]: [usize; 2], block_bytes: usize) -> (Dtype, Vec<usize>) {
    let (tiles, blocks) = (rows.div_ceil(TILE_ROWS), columns.div_ceil(TILE_COLUMNS));
    if block_bytes == HALF_BLOCK_BYTES {
        let shape = vec![tiles, blocks, 2, TILE_ROWS / 2, TILE_COLUMNS];
        return (Dtype::F16, shape);
    }
    (Dtype::U8, vec![tiles, blocks, block_bytes])
}

/// Tensors on their way to the GPU.
struct Uploading<'a> {
    weights: &'a mut PackedWeights,
    stream: &'a Arc<CudaStream>,
    memory: &'a mut Vec<CudaSlice<u8>>,
    buffer: Vec<u8>,
    block_bytes: usize,
}

impl Uploading<'_> {
    /// The weights of the layer numbered `index`.
    fn layer(&mut self, index: usize, kernels: &ChainKernels) -> Result<LayerPointers> {
        let (shape, entry) = (kernels.shape, kernels.layers[index]);
        let mut layer = LayerPointers {
            window: entry.window as i32,
            rotary: entry.rotary as i32,
            ..LayerPointers::default()
        };
        let (hidden, gate_up) = (shape.hidden, 2 * shape.intermediate);
        let matrices = [
            (&mut layer.qkv, "qkv", [shape.qkv_rows(), hidden]),
            (&mut layer.o, "o", [hidden, shape.query_size()]),
            (&mut layer.gate_up, "gate_up", [gate_up, hidden]),
            (&mut layer.down, "down", [hidden, shape.intermediate]),
        ];
        for (pointer, name, size) in matrices {
            *pointer = self.matrix(&format!("layers.{index}.{name}"), size)?;
        }
        let vectors = [
            (&mut layer.attention_norm, "attention_norm", hidden),
            (
                &mut layer.attention_post_norm,
                "attention_post_norm",
                hidden,
            ),
            (&mut layer.mlp_norm, "mlp_norm", hidden),
            (&mut layer.mlp_post_norm, "mlp_post_norm", hidden),
            (&mut layer.query_norm, "query_norm", shape.head_size),
            (&mut layer.key_norm, "key_norm", shape.head_size),
            (&mut layer.qkv_bias, "qkv_bias", shape.qkv_rows()),
            (&mut layer.o_bias, "o_bias", hidden),
            (&mut layer.gate_up_bias, "gate_up_bias", gate_up),
            (&mut layer.down_bias, "down_bias", hidden),
        ];
        for (pointer, name, size) in vectors {
            // in all layers or in none
            let first = format!("layers.0.{name}");
            if self.weights.metadata.info(&first).is_some() {
                *pointer = self.vector(&format!("layers.{index}.{name}"), size)?;
            }
        }
        Ok(layer)
    }

    fn matrix(&mut self, name: &str, size: [usize; 2]) -> Result<u64> {
        let (dtype, shape) = packed(size, self.block_bytes);
        let bytes = self.weights.take(name, dtype, &shape)?;
        self.copy(name, &[bytes])
    }

    fn vector(&mut self, name: &str, size: usize) -> Result<u64> {
        let bytes = self.weights.take(name, Dtype::F32, &[size])?;
        self.copy(name, &[bytes])
    }

    /// All tables of `function`, one after the other.
    fn rotary(&mut self, function: &str, tables: usize, size: [usize; 2]) -> Result<u64> {
        let names = (0..tables).map(|table| format!("rotary.{table}.{function}"));
        let bytes = names.map(|name| self.weights.take(&name, Dtype::F32, &size));
        let bytes = bytes.collect::<Result<Vec<_>>>()?;
        self.copy("rotary", &bytes)
    }

    /// Copy `parts` of the file into new memory, one after the other; its address. `name` is for
    /// messages.
    fn copy(&mut self, name: &str, parts: &[Range<u64>]) -> Result<u64> {
        let sizes = parts.iter().map(|part| (part.end - part.start) as usize);
        let bytes: usize = sizes.sum();
        let allocated = self.stream.alloc_zeros::<u8>(bytes.max(1));
        let mut slice = allocated.map_err(failed(format!("{bytes} bytes for {name}")))?;
        let mut written = 0;
        for part in parts {
            for start in part.clone().step_by(CHUNK) {
                let size = ((part.end - start) as usize).min(CHUNK);
                self.buffer.resize(size, 0);
                let read = self.weights.file.read_exact_at(&mut self.buffer, start);
                read.map_err(|source| Error::Io {
                    path: self.weights.path.clone(),
                    source,
                })?;
                let mut to = slice.slice_mut(written..written + size);
                let copied = self.stream.memcpy_htod(&self.buffer, &mut to);
                // the buffer is read until then, also where the call failed
                let waited = self.stream.synchronize();
                copied
                    .and(waited)
                    .map_err(failed(format!("a copy of {name} to the GPU")))?;
                written += size;
            }
        }
        let address = slice.device_ptr(self.stream).0;
        self.memory.push(slice);
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Weights whose file holds `header` and `bytes` bytes of tensors.
    fn read(name: &str, header: &str, bytes: usize) -> Result<PackedWeights> {
        let path = std::env::temp_dir().join(format!("sedac-{}-{name}", std::process::id()));
        let mut contents = (header.len() as u64).to_le_bytes().to_vec();
        contents.extend(header.bytes());
        contents.resize(contents.len() + bytes, 0);
        fs::write(&path, contents).unwrap();
        let file = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        PackedWeights::read(path, file)
    }

    #[test]
    fn rows_are_padded_to_whole_tiles() {
        let half = |rows, columns| packed([rows, columns], HALF_BLOCK_BYTES);
        assert_eq!(half(151_936, 896), (Dtype::F16, vec![9496, 28, 2, 8, 32]));
        assert_eq!(half(17, 32), (Dtype::F16, vec![2, 1, 2, 8, 32]));
        assert_eq!(packed([17, 64], 288), (Dtype::U8, vec![2, 2, 288]));
    }

    #[test]
    fn tensors_have_the_dtype_and_shape_that_are_needed() {
        let header = r#"{"norm":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let mut weights = read("tensors", header, 8).unwrap();
        let start = LENGTH + header.len() as u64;
        let missing = weights.take("head", Dtype::F16, &[2]).unwrap_err();
        assert!(missing.to_string().contains("holds no head"), "{missing}");
        for (dtype, shape) in [(Dtype::F16, 2), (Dtype::F32, 3)] {
            let other = weights.take("norm", dtype, &[shape]).unwrap_err();
            assert!(other.to_string().contains("its norm is F32 [2]"), "{other}");
        }
        assert_eq!(weights.unused.len(), 1);
        let bytes = weights.take("norm", Dtype::F32, &[2]).unwrap();
        assert_eq!(bytes, start..start + 8);
        assert!(weights.unused.is_empty());
    }

    #[test]
    fn files_that_are_no_weights_are_refused() {
        let header = r#"{"norm":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        for (header, bytes) in [(header, 7), (header, 9), ("{", 0), ("[]", 0)] {
            let reason = read("damaged", header, bytes).unwrap_err().to_string();
            assert!(reason.contains("not the chain's weights"), "{reason}");
        }
    }
}
