//! A trained drafter's weights, from the bundle's file to what the kernel reads. It may be added at
//! any time after the kernels were built.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tracing::warn;

use crate::bundle::{Bundle, ChainShape, DRAFTER_WEIGHTS, DrafterEntry};
use crate::error::{Error, Result};

/// Hidden states of the model that the kernel takes for a position, at most.
pub(super) const MAX_FEATURES: usize = 3;

/// Rows of the head that the kernel takes at once.
const FEWEST_TOKENS: usize = 4;

/// The file's `shape`, as far as the kernel depends on it.
#[derive(Debug, Deserialize)]
struct DrafterShape {
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    key_value_heads: usize,
    head_size: usize,
    rope_theta: f64,
    norm_epsilon: f32,
}

/// A trained drafter; matrices and vectors are fp16 as the file has them, rows of outputs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DrafterWeights {
    /// Depths whose hidden states it takes, ascending.
    pub(super) depths: Vec<usize>,
    /// Tokens that it drafts.
    pub(super) tokens: Vec<i32>,
    /// By pair of a head's elements, radians a position.
    pub(super) frequencies: Vec<f32>,
    pub(super) norm_epsilon: f32,
    /// In the order of [`parts`].
    pub(super) parts: Vec<Vec<u8>>,
}

/// The tensors of each part of the kernel's weights, one after the other, with their shapes.
fn parts(shape: &ChainShape, features: usize) -> Vec<Vec<(String, Vec<usize>)>> {
    let hidden = shape.hidden;
    let (queries, keys) = (shape.query_size(), shape.key_value_heads * shape.head_size);
    let one = |name: &str, size: Vec<usize>| vec![(format!("{name}.weight"), size)];
    let attention = |name: &str, size| one(&format!("layer.self_attn.{name}_proj"), size);
    let mlp = |name: &str, size| one(&format!("layer.mlp.{name}_proj"), size);
    let inner = vec![shape.intermediate, hidden];
    let feature_norm = |index| (format!("feature_norms.{index}.weight"), vec![hidden]);
    vec![
        one("combine", vec![hidden, features * hidden]),
        one("join", vec![hidden, 2 * hidden]),
        [
            attention("q", vec![queries, hidden]),
            attention("k", vec![keys, hidden]),
            attention("v", vec![keys, hidden]),
        ]
        .concat(),
        attention("o", vec![hidden, queries]),
        [mlp("gate", inner.clone()), mlp("up", inner)].concat(),
        mlp("down", vec![hidden, shape.intermediate]),
        (0..features).map(feature_norm).collect(),
        one("state_norm", vec![hidden]),
        one("embedding_norm", vec![hidden]),
        one("layer.input_layernorm", vec![hidden]),
        one("layer.post_attention_layernorm", vec![hidden]),
        one("norm", vec![hidden]),
    ]
}

impl DrafterWeights {
    /// The drafter of `bundle`, whose model has `shape`; None where it has none, or one whose layer is of
    /// another shape.
    ///
    /// # Errors
    /// [`Error::Bundle`] when the file lacks something, and what reading it reports.
    pub(super) fn read(bundle: &Bundle, shape: &ChainShape) -> Result<Option<Self>> {
        let Some(entry) = &bundle.manifest.drafter else {
            return Ok(None);
        };
        let bytes = bundle.gate.read(Path::new(DRAFTER_WEIGHTS))?;
        let weights = Self::parse(&bytes, entry, shape);
        weights.map_err(|reason| {
            let reason = format!(
                "not a drafter that the cuda backend runs ({reason}); train it again with \
                 sedac-export train-drafter, or use --backend onnxruntime"
            );
            Error::bundle(&bundle.gate.shown(DRAFTER_WEIGHTS), reason)
        })
    }

    fn parse(
        bytes: &[u8],
        entry: &DrafterEntry,
        model: &ChainShape,
    ) -> std::result::Result<Option<Self>, String> {
        let shape = read_shape(bytes)?;
        if let Some(reason) = difference(&shape, model) {
            warn!(%reason, "the kernel does not run the trained drafter");
            return Ok(None);
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let features = entry.feature_layers.len();
        if features > MAX_FEATURES {
            return Err(format!("it takes {features} hidden states of a position"));
        }
        if entry.tokens.len() < FEWEST_TOKENS {
            return Err(format!("it drafts {} tokens only", entry.tokens.len()));
        }
        let parts = parts(model, features).into_iter();
        let parts = parts.map(|part| concatenated(&tensors, &part));
        let half = shape.head_size / 2;
        let pairs = (0..half).map(|pair| pair as f64 / half as f64);
        Ok(Some(Self {
            depths: entry.feature_layers.clone(),
            tokens: entry.tokens.iter().map(|&token| token as i32).collect(),
            frequencies: pairs
                .map(|share| shape.rope_theta.powf(-share) as f32)
                .collect(),
            norm_epsilon: shape.norm_epsilon,
            parts: parts.collect::<std::result::Result<_, _>>()?,
        }))
    }

    /// Bytes on the device, with the tokens' rows of a head of `hidden` columns, and their numbers.
    pub(super) fn bytes(&self, hidden: usize) -> u64 {
        let parts: usize = self.parts.iter().map(Vec::len).sum();
        (parts + self.tokens.len() * (2 * hidden + 4) + 4 * self.frequencies.len()) as u64
    }
}

fn read_shape(bytes: &[u8]) -> std::result::Result<DrafterShape, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let fields = metadata.metadata().as_ref();
    let shape = fields.and_then(|fields| fields.get("shape"));
    serde_json::from_str(shape.ok_or("it has no shape in its metadata")?)
        .map_err(|error| error.to_string())
}

/// In what its layer differs from the model's, for whose shape the kernel was compiled.
fn difference(shape: &DrafterShape, model: &ChainShape) -> Option<String> {
    let sizes = [
        ("hidden_size", shape.hidden_size, model.hidden),
        (
            "intermediate_size",
            shape.intermediate_size,
            model.intermediate,
        ),
        ("heads", shape.heads, model.heads),
        (
            "key_value_heads",
            shape.key_value_heads,
            model.key_value_heads,
        ),
        ("head_size", shape.head_size, model.head_size),
    ];
    let mut sizes = sizes.into_iter();
    let (name, own, models) = sizes.find(|(_, own, models)| own != models)?;
    Some(format!("its {name}: {own}, and the model's: {models}"))
}

fn concatenated(
    tensors: &SafeTensors<'_>,
    part: &[(String, Vec<usize>)],
) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    for (name, shape) in part {
        let tensor = tensors.tensor(name).ok();
        let tensor = tensor.filter(|t| t.dtype() == Dtype::F16 && t.shape() == shape);
        let tensor = tensor.ok_or_else(|| format!("no {name} of F16 {shape:?}"))?;
        bytes.extend_from_slice(tensor.data());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    const MODEL: ChainShape = ChainShape {
        hidden: 8,
        heads: 4,
        key_value_heads: 2,
        head_size: 4,
        rotary_size: 4,
        intermediate: 12,
        layers: 4,
        vocabulary: 9,
    };

    fn entry() -> DrafterEntry {
        DrafterEntry {
            state: "state.onnx".into(),
            file: "draft.onnx".into(),
            feature_layers: vec![2, 4],
            key_value_size: 8,
            tokens: vec![1, 2, 3, 8],
        }
    }

    /// A file of all parts but for `left_out`, whose bytes count up, for `heads` heads.
    fn file(left_out: &str, heads: usize) -> Vec<u8> {
        let mut next = 0_u8;
        let tensors = parts(&MODEL, 2).concat().into_iter().map(|(name, shape)| {
            let count = 2 * shape.iter().product::<usize>();
            let bytes: Vec<u8> = (0..count).map(|n| (n as u8).wrapping_add(next)).collect();
            next = next.wrapping_add(1);
            (name, shape, bytes)
        });
        let tensors: Vec<_> = tensors.filter(|(name, ..)| name != left_out).collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F16, shape.clone(), bytes);
            (name.clone(), view.unwrap())
        });
        let shape = format!(
            r#"{{"hidden_size": 8, "intermediate_size": 12, "heads": {heads}, "head_size": 4,
                "key_value_heads": 2, "rope_theta": 10000.0, "norm_epsilon": 1e-5,
                "vocab_size": 9, "feature_layers": [2, 4]}}"#
        );
        let metadata = HashMap::from([("shape".to_owned(), shape)]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    #[test]
    fn parts_are_the_files_tensors_one_after_the_other() {
        let weights = DrafterWeights::parse(&file("", 4), &entry(), &MODEL)
            .unwrap()
            .unwrap();
        assert_eq!(weights.tokens, [1, 2, 3, 8]);
        assert_eq!(weights.frequencies, [1.0, 0.01]);
        let sizes: Vec<_> = weights.parts.iter().map(Vec::len).collect();
        let matrices = [128, 128, 256, 128, 192, 96].map(|numbers| 2 * numbers);
        let sizes_of_norms = [2 * 8, 8, 8, 8, 8, 8].map(|numbers| 2 * numbers);
        assert_eq!(sizes, [matrices, sizes_of_norms].concat());
        // q is the third tensor and k the fourth
        assert_eq!(weights.parts[2][0], 2);
        assert_eq!(weights.parts[2][2 * 16 * 8], 3);
        let numbers: usize = sizes.iter().sum();
        assert_eq!(weights.bytes(8), (numbers + 4 * (2 * 8 + 4) + 2 * 4) as u64);
    }

    #[test]
    fn missing_parts_and_other_shapes_are_refused() {
        let refused = |bytes: &[u8]| DrafterWeights::parse(bytes, &entry(), &MODEL).unwrap_err();
        let missing = refused(&file("join.weight", 4));
        assert!(
            missing.contains("no join.weight of F16 [8, 16]"),
            "{missing}"
        );
        // another backend may run it
        let other = DrafterWeights::parse(&file("", 2), &entry(), &MODEL);
        assert_eq!(other.unwrap(), None);
        assert!(!refused(&[0; 4]).is_empty());
        let mut few = entry();
        few.tokens.truncate(3);
        assert!(DrafterWeights::parse(&file("", 4), &few, &MODEL).is_err());
        let mut deep = entry();
        deep.feature_layers = vec![1, 2, 3, 4];
        assert!(DrafterWeights::parse(&file("", 4), &deep, &MODEL).is_err());
    }
}
