//! Entropy probes, from the bundle's file to what the kernel reads. They may be trained at any time
//! after the kernels were built.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::bundle::{Bundle, LayerEntry};
use crate::error::{Error, Result};

/// Where probes are kept.
const FILE: &str = "probes.safetensors";
/// Outputs of a probe's first matrix.
const WIDTH: usize = 64;

/// The probe after one depth.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ProbeWeights {
    pub(super) depth: usize,
    /// Down [64, hidden], the norm's weight and bias and up [64] each, and up's bias.
    pub(super) numbers: Vec<f32>,
}

/// The probes of `bundle`, shallowest first; none where it was not trained for any.
///
/// # Errors
/// [`Error::Bundle`] when one is missing or of another shape, and what reading the file reports.
pub(super) fn read(bundle: &Bundle) -> Result<Vec<ProbeWeights>> {
    let manifest = &bundle.manifest;
    let entries = manifest.engines.layers.iter().filter(|entry| entry.risk);
    let depths: Vec<_> = entries.map(LayerEntry::end).collect();
    if depths.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = bundle.gate.read(Path::new(FILE))?;
    parse(&bytes, &depths, manifest.model.hidden_size)
        .map_err(|reason| Error::bundle(&bundle.gate.shown(FILE), reason))
}

fn parse(
    bytes: &[u8],
    depths: &[usize],
    hidden: usize,
) -> std::result::Result<Vec<ProbeWeights>, String> {
    let refused = |reason: String| {
        format!(
            "not this bundle's probes ({reason}); train them again with sedac-export train-probes"
        )
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| refused(error.to_string()))?;
    let probe = |&depth: &usize| {
        let parts: [(&str, &[usize]); 5] = [
            ("down.weight", &[WIDTH, hidden]),
            ("norm.weight", &[WIDTH]),
            ("norm.bias", &[WIDTH]),
            ("up.weight", &[1, WIDTH]),
            ("up.bias", &[1]),
        ];
        let mut numbers = Vec::new();
        for (part, shape) in parts {
            let name = format!("risk.{depth}.{part}");
            let tensor = tensors.tensor(&name).ok();
            let tensor = tensor.filter(|t| t.dtype() == Dtype::F32 && t.shape() == shape);
            let tensor = tensor.ok_or_else(|| refused(format!("no {name} of F32 {shape:?}")))?;
            let (words, _) = tensor.data().as_chunks::<4>();
            numbers.extend(words.iter().map(|&word| f32::from_le_bytes(word)));
        }
        Ok(ProbeWeights { depth, numbers })
    };
    depths.iter().map(probe).collect()
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    const HIDDEN: usize = 3;

    /// A file with the probe of depth 4, but for `left_out`; numbers count up.
    fn file(left_out: &str) -> Vec<u8> {
        let sizes = [
            ("down.weight", vec![WIDTH, HIDDEN]),
            ("norm.weight", vec![WIDTH]),
            ("norm.bias", vec![WIDTH]),
            ("up.weight", vec![1, WIDTH]),
            ("up.bias", vec![1]),
        ];
        let mut next = 0;
        let tensors = sizes.map(|(part, shape)| {
            let count: usize = shape.iter().product();
            let numbers = (next..next + count).flat_map(|n| (n as f32).to_le_bytes());
            next += count;
            (part, shape, numbers.collect::<Vec<u8>>())
        });
        let kept = tensors.iter().filter(|(part, ..)| *part != left_out);
        let views = kept.map(|(part, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            (format!("risk.4.{part}"), view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    #[test]
    fn parts_follow_one_another() {
        let probes = parse(&file(""), &[4], HIDDEN).unwrap();
        let count = WIDTH * (HIDDEN + 3) + 1;
        let numbers: Vec<_> = (0..count).map(|n| n as f32).collect();
        assert_eq!(probes, [ProbeWeights { depth: 4, numbers }]);
    }

    #[test]
    fn missing_parts_and_other_shapes_are_refused() {
        for (bytes, depth, hidden, named) in [
            (file("up.bias"), 4, HIDDEN, "no risk.4.up.bias of F32 [1]"),
            (file(""), 4, 5, "no risk.4.down.weight of F32 [64, 5]"),
            (file(""), 2, HIDDEN, "no risk.2.down.weight"),
            (vec![0; 4], 4, HIDDEN, "not this bundle's probes"),
        ] {
            let reason = parse(&bytes, &[depth], hidden).unwrap_err();
            assert!(reason.contains(named), "{reason}");
            assert!(reason.contains("train-probes"), "{reason}");
        }
    }
}
