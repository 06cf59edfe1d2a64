//! What was trained for exits, from the bundle's files to what the kernel reads: entropy probes,
//! exit heads and lenses. They may be trained at any time after the kernels were built.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::bundle::{Bundle, LayerEntry};
use crate::error::{Error, Result};

/// Where probes are kept, and the tokens of exit heads.
const PROBES: &str = "probes.safetensors";
/// Where lenses are.
const LENSES: &str = "lens.safetensors";
/// Outputs of the first matrix of an entropy probe, and of an exit head's probe.
const WIDTH: usize = 64;
/// What an exit head's probe reads beside the state.
const SCALARS: usize = 8;

/// The numbers of what is after one depth.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DepthWeights {
    pub(super) depth: usize,
    pub(super) numbers: Vec<f32>,
}

/// What a bundle has for exits, shallowest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ExitWeights {
    /// Down [64, hidden], the norm's weight and bias and up [64] each, and up's bias.
    pub(super) probes: Vec<DepthWeights>,
    /// The state's matrix [64, hidden], the scalars' [64, 8] and its bias [64], the last [64], and
    /// the linear path's [8] and bias.
    pub(super) heads: Vec<DepthWeights>,
    /// [hidden, hidden] and a bias [hidden].
    pub(super) lenses: Vec<DepthWeights>,
    /// The tokens that exit heads know.
    pub(super) frequent_tokens: Vec<i32>,
}

/// The depths after which something was trained.
#[derive(Debug, Clone, Default)]
struct Depths {
    probes: Vec<usize>,
    heads: Vec<usize>,
    lenses: Vec<usize>,
}

impl ExitWeights {
    /// What `bundle` has; nothing where nothing was trained.
    ///
    /// # Errors
    /// [`Error::Bundle`] when something is missing or of another shape, and what reading the files
    /// reports.
    pub(super) fn read(bundle: &Bundle) -> Result<Self> {
        let model = &bundle.manifest.model;
        let engines = &bundle.manifest.engines;
        let probes = engines.layers.iter().filter(|entry| entry.risk);
        let lenses = engines.exits.iter().filter(|entry| entry.lens.is_some());
        let depths = Depths {
            probes: probes.map(LayerEntry::end).collect(),
            heads: engines.exits.iter().map(|entry| entry.depth).collect(),
            lenses: lenses.map(|entry| entry.depth).collect(),
        };
        let mut weights = Self::default();
        if !depths.probes.is_empty() || !depths.heads.is_empty() {
            read_file(bundle, PROBES, |tensors| {
                weights.take_probes(tensors, &depths, model.hidden_size, model.vocab_size)
            })?;
        }
        if !depths.lenses.is_empty() {
            read_file(bundle, LENSES, |tensors| {
                weights.lenses = all(&depths.lenses, |depth| {
                    tensors.numbers(&lens(depth, model.hidden_size))
                })?;
                Ok(())
            })?;
        }
        Ok(weights)
    }

    /// Bytes on the device, where the tokens' rows of a head of `hidden` columns are among them.
    pub(super) fn bytes(&self, hidden: usize) -> u64 {
        let each = self.probes.iter().chain(&self.heads).chain(&self.lenses);
        let numbers: usize = each.map(|each| each.numbers.len()).sum();
        // a row of halves, and its number
        (4 * numbers + self.frequent_tokens.len() * (2 * hidden + 4)) as u64
    }

    fn take_probes(
        &mut self,
        tensors: &Tensors<'_>,
        depths: &Depths,
        hidden: usize,
        vocabulary: usize,
    ) -> std::result::Result<(), String> {
        self.probes = all(&depths.probes, |depth| {
            tensors.numbers(&entropy_probe(depth, hidden))
        })?;
        self.heads = all(&depths.heads, |depth| {
            tensors.numbers(&learned_probe(depth, hidden))
        })?;
        if !depths.heads.is_empty() {
            self.frequent_tokens = tensors.frequent_tokens(vocabulary)?;
        }
        Ok(())
    }
}

/// Names and shapes.
type Parts = Vec<(String, Vec<usize>)>;

fn entropy_probe(depth: usize, hidden: usize) -> Parts {
    let parts = [
        ("down.weight", vec![WIDTH, hidden]),
        ("norm.weight", vec![WIDTH]),
        ("norm.bias", vec![WIDTH]),
        ("up.weight", vec![1, WIDTH]),
        ("up.bias", vec![1]),
    ];
    named(&format!("risk.{depth}"), parts)
}

fn learned_probe(depth: usize, hidden: usize) -> Parts {
    let parts = [
        ("state.weight", vec![WIDTH, hidden]),
        ("scalars.weight", vec![WIDTH, SCALARS]),
        ("scalars.bias", vec![WIDTH]),
        ("up.weight", vec![1, WIDTH]),
        ("linear.weight", vec![1, SCALARS]),
        ("linear.bias", vec![1]),
    ];
    named(&format!("learned.{depth}"), parts)
}

fn lens(depth: usize, hidden: usize) -> Parts {
    let parts = [("weight", vec![hidden, hidden]), ("bias", vec![hidden])];
    named(&depth.to_string(), parts)
}

fn named<const N: usize>(prefix: &str, parts: [(&str, Vec<usize>); N]) -> Parts {
    let parts = parts.into_iter();
    parts
        .map(|(part, shape)| (format!("{prefix}.{part}"), shape))
        .collect()
}

fn all(
    depths: &[usize],
    numbers: impl Fn(usize) -> std::result::Result<Vec<f32>, String>,
) -> std::result::Result<Vec<DepthWeights>, String> {
    let depths = depths.iter();
    let weights = depths.map(|&depth| {
        let numbers = numbers(depth)?;
        Ok(DepthWeights { depth, numbers })
    });
    weights.collect()
}

/// Let `take` have the tensors of the file `name` of `bundle`.
fn read_file(
    bundle: &Bundle,
    name: &str,
    take: impl FnOnce(&Tensors<'_>) -> std::result::Result<(), String>,
) -> Result<()> {
    let bytes = bundle.gate.read(Path::new(name))?;
    let taken = Tensors::parse(&bytes).and_then(|tensors| take(&tensors));
    taken.map_err(|reason| {
        let reason = format!(
            "not what the cuda backend runs of this bundle ({reason}); train it again with \
             sedac-export train-probes, or use --backend onnxruntime"
        );
        Error::bundle(&bundle.gate.shown(name), reason)
    })
}

/// A file's tensors.
struct Tensors<'a>(SafeTensors<'a>);

impl<'a> Tensors<'a> {
    fn parse(bytes: &'a [u8]) -> std::result::Result<Self, String> {
        let tensors = SafeTensors::deserialize(bytes);
        tensors.map(Self).map_err(|error| error.to_string())
    }

    /// Those of `parts`, one after the other.
    fn numbers(&self, parts: &Parts) -> std::result::Result<Vec<f32>, String> {
        let mut numbers = Vec::new();
        for (name, shape) in parts {
            let tensor = self.0.tensor(name).ok();
            let tensor = tensor.filter(|t| t.dtype() == Dtype::F32 && t.shape() == shape);
            let tensor = tensor.ok_or_else(|| format!("no {name} of F32 {shape:?}"))?;
            let (words, _) = tensor.data().as_chunks::<4>();
            numbers.extend(words.iter().map(|&word| f32::from_le_bytes(word)));
        }
        Ok(numbers)
    }

    fn frequent_tokens(&self, vocabulary: usize) -> std::result::Result<Vec<i32>, String> {
        let tensor = self.0.tensor("frequent_tokens").ok();
        let tensor = tensor.filter(|t| t.dtype() == Dtype::I64);
        let tensor = tensor.ok_or("no frequent_tokens of I64")?;
        let (words, _) = tensor.data().as_chunks::<8>();
        let tokens = words.iter().map(|&word| i64::from_le_bytes(word));
        let known = tokens.map(|token| match usize::try_from(token) {
            Ok(index) if index < vocabulary => Ok(token as i32),
            _ => Err(format!(
                "frequent_tokens has {token}, of {vocabulary} tokens"
            )),
        });
        known.collect()
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    const HIDDEN: usize = 3;

    /// A file of `parts` but for `left_out`, whose numbers count up, and of `tokens`.
    fn file(parts: Parts, left_out: &str, tokens: &[i64]) -> Vec<u8> {
        let mut next = 0;
        let tensors = parts.into_iter().map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let numbers = (next..next + count).flat_map(|n| (n as f32).to_le_bytes());
            next += count;
            (name, Dtype::F32, shape, numbers.collect::<Vec<u8>>())
        });
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| token.to_le_bytes())
            .collect();
        let frequent = "frequent_tokens".to_owned();
        let of_tokens = (frequent, Dtype::I64, vec![tokens.len()], bytes);
        let tensors: Vec<_> = tensors.chain([of_tokens]).collect();
        let kept = tensors.iter().filter(|(name, ..)| name != left_out);
        let views = kept.map(|(name, kind, shape, bytes)| {
            let view = TensorView::new(*kind, shape.clone(), bytes);
            (name.clone(), view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn take(
        bytes: &[u8],
        depths: &Depths,
        vocabulary: usize,
    ) -> std::result::Result<ExitWeights, String> {
        let mut weights = ExitWeights::default();
        let tensors = Tensors::parse(bytes)?;
        weights.take_probes(&tensors, depths, HIDDEN, vocabulary)?;
        Ok(weights)
    }

    #[test]
    fn parts_follow_one_another() {
        let count_up = |count: usize| -> Vec<_> { (0..count).map(|n| n as f32).collect() };
        let bytes = file(entropy_probe(4, HIDDEN), "", &[]);
        let depths = Depths {
            probes: vec![4],
            ..Depths::default()
        };
        let weights = take(&bytes, &depths, 9).unwrap();
        let numbers = count_up(WIDTH * (HIDDEN + 3) + 1);
        assert_eq!(weights.probes, [DepthWeights { depth: 4, numbers }]);
        let bytes = file(learned_probe(2, HIDDEN), "", &[1, 8]);
        let depths = Depths {
            heads: vec![2],
            ..Depths::default()
        };
        let weights = take(&bytes, &depths, 9).unwrap();
        let numbers = count_up(WIDTH * (HIDDEN + SCALARS + 2) + SCALARS + 1);
        assert_eq!(weights.bytes(HIDDEN), 4 * numbers.len() as u64 + 2 * 10);
        assert_eq!(weights.heads, [DepthWeights { depth: 2, numbers }]);
        assert_eq!(weights.frequent_tokens, [1, 8]);
    }

    #[test]
    fn missing_parts_other_shapes_and_unknown_tokens_are_refused() {
        let depths = Depths {
            probes: vec![4],
            heads: vec![4],
            ..Depths::default()
        };
        let parts = |hidden| [entropy_probe(4, HIDDEN), learned_probe(4, hidden)].concat();
        for (bytes, named) in [
            (
                file(parts(HIDDEN), "risk.4.up.bias", &[1]),
                "no risk.4.up.bias of F32 [1]",
            ),
            (
                file(parts(5), "", &[1]),
                "no learned.4.state.weight of F32 [64, 3]",
            ),
            (
                file(parts(HIDDEN), "frequent_tokens", &[1]),
                "no frequent_tokens of I64",
            ),
            (file(parts(HIDDEN), "", &[9]), "frequent_tokens has 9"),
            (file(parts(HIDDEN), "", &[-1]), "frequent_tokens has -1"),
        ] {
            let reason = take(&bytes, &depths, 9).unwrap_err();
            assert!(reason.contains(named), "{reason}");
        }
        assert!(take(&[0; 4], &depths, 9).is_err());
    }

    #[test]
    fn a_lens_is_a_matrix_and_a_bias() {
        let bytes = file(lens(4, HIDDEN), "", &[]);
        let tensors = Tensors::parse(&bytes).unwrap();
        let numbers = tensors.numbers(&lens(4, HIDDEN)).unwrap();
        assert_eq!(numbers.len(), HIDDEN * (HIDDEN + 1));
        assert!(tensors.numbers(&lens(2, HIDDEN)).is_err());
    }
}
