//! Which generations a certificate covers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::bundle::{
    Certificate, CertifiedSetting, DrafterEntry, ExitConfig, Manifest, drafter_name, hex,
};
use crate::chain::DecodingMode;
use crate::kv::KvFill;
use crate::sampler::Sampling;

/// The weights of portable graphs, where the bundle's own are quantized.
const PORTABLE_WEIGHTS: &str = "onnx/portable.data";

/// Everything about a generation that a certificate depends on.
#[derive(Debug, Clone, Copy)]
pub struct GenerationSetting<'a> {
    /// When tokens exit.
    pub mode: &'a DecodingMode,
    /// What the caches of skipped layers get.
    pub kv_fill: KvFill,
    /// How tokens are chosen.
    pub sampling: &'a Sampling,
    /// What runs instead of ONNX Runtime's engines, such as "TensorRT plans".
    pub others: Option<&'static str>,
    /// See [`Capabilities`](crate::backend::Capabilities::verifies_exactly).
    pub verifies_exactly: bool,
}

/// What is certified of tokens that may not be full depth's; shown as one sentence.
#[derive(Debug, Clone, PartialEq)]
pub enum Certification {
    /// The bundle's certificate is about this generation.
    Certified(Box<Certificate>),
    /// Nothing is certified, for this reason.
    Uncertified(String),
    /// Lossless mode's tokens are full depth's but for what rounding changes.
    Rounded,
}

impl ExitConfig {
    /// What is certified of a generation from the bundle of this configuration and `manifest`. None
    /// where all tokens are full depth's.
    pub fn certification(
        &self,
        manifest: &Manifest,
        generation: GenerationSetting<'_>,
    ) -> Option<Certification> {
        match generation.mode {
            DecodingMode::Full => None,
            DecodingMode::Lossless { .. } => {
                (!generation.verifies_exactly).then_some(Certification::Rounded)
            }
            _ => Some(self.of_exits(manifest, generation)),
        }
    }

    /// The same of what the configuration itself says, by argmax.
    pub fn own_certification(&self, manifest: &Manifest) -> Certification {
        let mode = DecodingMode::Exit {
            policy: self.policy.clone(),
            drafter: self.drafter,
        };
        let generation = GenerationSetting {
            mode: &mode,
            kv_fill: self.kv_fill,
            sampling: &Sampling::default(),
            others: None,
            verifies_exactly: true,
        };
        self.of_exits(manifest, generation)
    }

    fn of_exits(&self, manifest: &Manifest, generation: GenerationSetting<'_>) -> Certification {
        let Some(certificate) = &self.certificate else {
            let reason = "the bundle has no certificate, run sedac-export calibrate";
            return Certification::Uncertified(reason.into());
        };
        match certificate.setting.difference(manifest, generation) {
            None => Certification::Certified(Box::new(certificate.clone())),
            Some(reason) => Certification::Uncertified(reason),
        }
    }
}

impl CertifiedSetting {
    /// The first thing in which a generation from the bundle of `manifest` differs.
    fn difference(&self, manifest: &Manifest, generation: GenerationSetting<'_>) -> Option<String> {
        let DecodingMode::Exit { policy, drafter } = generation.mode else {
            return Some("exits are forced".into());
        };
        let other = |what, is, certified| format!("{what} {is}, certified with {certified}");
        if let Some(others) = generation.others {
            Some(format!(
                "ONNX Runtime's engines were certified, {others} run"
            ))
        } else if self.engines_sha256 != manifest.engines_sha256() {
            Some("the engines have changed since, run sedac-export calibrate again".into())
        } else if self.policy != *policy {
            Some("the policy's settings are not those certified".into())
        } else if self.kv_fill != generation.kv_fill {
            Some(other(
                "kv_fill",
                generation.kv_fill.name(),
                self.kv_fill.name(),
            ))
        } else if self.drafter != *drafter {
            Some(other(
                "drafter",
                drafter_name(*drafter),
                drafter_name(self.drafter),
            ))
        } else if !generation.sampling.is_argmax() {
            Some("tokens are sampled or penalised, certified with argmax".into())
        } else {
            None
        }
    }
}

impl Manifest {
    /// SHA-256, in hex, of all that exits depend on: the engines, where tokens exit, and every file
    /// but a drafter's and those that are of GPUs. It is taken of JSON with sorted keys and without
    /// spaces: `{"engines": .., "exit_layers": .., "files": {path: digest}}`.
    pub fn engines_sha256(&self) -> String {
        let files = self.digests().filter(|(file, _)| self.changes_exits(file));
        let run = json!({
            "engines": self.engines,
            "exit_layers": self.exit_layers,
            "files": files.collect::<BTreeMap<&Path, &str>>(),
        });
        hex(&Sha256::digest(run.to_string()))
    }

    /// Whether what exits give may depend on `file`.
    fn changes_exits(&self, file: &Path) -> bool {
        let is_of_portable = self.portable.is_some() && file == Path::new(PORTABLE_WEIGHTS);
        let mut drafter = self.drafter.iter().flat_map(DrafterEntry::all_files);
        !self.is_for_devices(file) && !is_of_portable && !drafter.any(|own| own == file)
    }
}

impl fmt::Display for Certification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certified(certificate) => certificate.fmt(f),
            Self::Uncertified(reason) => write!(
                f,
                "exits not certified ({reason}): nothing bounds how many tokens differ from full \
                 depth's; mode lossless gives full depth's"
            ),
            Self::Rounded => f.write_str(
                "lossless mode is not exact on this CPU: ONNX Runtime's products of these quantized \
                 weights give a token other bits alone than beside drafts, so that it may differ from \
                 full depth's where two are nearly as probable; bundles built with --precision int8 or \
                 --block-size 16 are exact",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::bundle::{DrafterKind, test_certificate};
    use crate::policy::PolicySettings;

    fn manifest() -> Value {
        let layer = |first: usize, count: usize| json!({"file": "onnx/layer.onnx", "first_layer": first, "num_layers": count, "contexts": []});
        json!({
            "model": {
                "name": "tiny", "type": "llama", "hidden_size": 8, "num_layers": 2,
                "vocab_size": 16, "eos_token_ids": []
            },
            "target": "onnxruntime", "precision": "fp32", "exit_layers": [1, 2],
            "max_cache_length": 32, "key_value_heads": [], "contexts": [], "tokenizer": false,
            "engines": {
                "embed": "onnx/embed.onnx", "layers": [layer(0, 1), layer(1, 1)],
                "key_value": [], "head": "onnx/head.onnx", "monolith": layer(0, 2)
            },
            "files": {
                "onnx/layer.onnx": {"bytes": 1, "sha256": "aa"},
                "onnx/layer.data": {"bytes": 1, "sha256": "bb"}
            }
        })
    }

    fn read(manifest: &Value) -> Manifest {
        serde_json::from_value(manifest.clone()).unwrap()
    }

    fn own_certificate() -> Value {
        test_certificate(&read(&manifest()).engines_sha256())
    }

    fn config() -> ExitConfig {
        let certificate = Certificate::parse(own_certificate(), 2).unwrap();
        ExitConfig {
            policy: certificate.setting.policy.clone(),
            kv_fill: certificate.setting.kv_fill,
            drafter: certificate.setting.drafter,
            certificate: Some(certificate),
        }
    }

    fn said(
        mode: &DecodingMode,
        kv_fill: KvFill,
        sampling: &Sampling,
        others: Option<&'static str>,
    ) -> Option<String> {
        let generation = GenerationSetting {
            mode,
            kv_fill,
            sampling,
            others,
            verifies_exactly: true,
        };
        let said = config().certification(&read(&manifest()), generation);
        said.map(|certification| certification.to_string())
    }

    #[test]
    fn the_sentence_says_what_was_certified() {
        let certification = config().own_certification(&read(&manifest()));
        assert_eq!(
            certification.to_string(),
            "exits certified for given text and argmax: at most 0.99% of tokens differ from full \
             depth's, with confidence 0.95, by 137102 tokens of 16 documents; sampling and free \
             generation are not certified; 2.20x full depth's speed when calibrated"
        );
        let Certification::Certified(certificate) = certification else {
            panic!("not certified");
        };
        let written = serde_json::to_string(&certificate).unwrap();
        let again: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(again, own_certificate());
    }

    #[test]
    fn any_other_generation_is_not_certified() {
        let own = config();
        let exit = |drafter| DecodingMode::Exit {
            policy: own.policy.clone(),
            drafter,
        };
        let (auto, plain) = (exit(own.drafter), exit(None));
        let other = DecodingMode::Exit {
            policy: PolicySettings::for_layers(2),
            drafter: own.drafter,
        };
        let forced = DecodingMode::Forced { depths: vec![1] };
        let argmax = Sampling {
            seed: 7,
            ..Sampling::default()
        };
        let certified = said(&auto, KvFill::Defer, &argmax, None).unwrap();
        assert!(certified.starts_with("exits certified"), "{certified}");
        let warm = Sampling {
            temperature: 0.5,
            ..argmax
        };
        let penalised = Sampling {
            repetition_penalty: 1.1,
            ..argmax
        };
        let filtered = Sampling { top_k: 5, ..argmax };
        for (mode, kv_fill, sampling, others, reason) in [
            (&other, KvFill::Defer, &argmax, None, "policy's settings"),
            (&auto, KvFill::Propagate, &argmax, None, "kv_fill propagate"),
            (&plain, KvFill::Defer, &argmax, None, "drafter none"),
            (&auto, KvFill::Defer, &warm, None, "sampled"),
            (&auto, KvFill::Defer, &penalised, None, "penalised"),
            (&auto, KvFill::Defer, &filtered, None, "sampled"),
            (
                &auto,
                KvFill::Defer,
                &argmax,
                Some("TensorRT plans"),
                "TensorRT plans run",
            ),
            (&forced, KvFill::Defer, &argmax, None, "forced"),
        ] {
            let sentence = said(mode, kv_fill, sampling, others).unwrap();
            assert!(sentence.starts_with("exits not certified ("), "{sentence}");
            assert!(sentence.contains(reason), "{sentence}");
        }
        assert_eq!(
            said(&DecodingMode::Full, KvFill::Defer, &argmax, None),
            None
        );
    }

    #[test]
    fn lossless_mode_says_where_rounding_may_change_its_tokens() {
        let certification = |mode: &DecodingMode, verifies_exactly| {
            let generation = GenerationSetting {
                mode,
                kv_fill: KvFill::Defer,
                sampling: &Sampling::default(),
                others: None,
                verifies_exactly,
            };
            config().certification(&read(&manifest()), generation)
        };
        let lossless = DecodingMode::Lossless {
            drafter: DrafterKind::Auto,
        };
        assert_eq!(certification(&lossless, true), None);
        assert_eq!(certification(&DecodingMode::Full, false), None);
        let said = certification(&lossless, false).unwrap();
        assert!(
            said.to_string()
                .starts_with("lossless mode is not exact on this CPU")
        );
    }

    #[test]
    fn other_engines_are_not_certified() {
        for (pointer, value) in [
            ("/files/onnx~1layer.data/sha256", json!("cc")),
            ("/files/onnx~1layer.onnx/sha256", json!("cc")),
            ("/exit_layers", json!([2])),
            ("/engines/layers/0/risk", json!(true)),
            ("/engines/head", json!("onnx/layer.onnx")),
        ] {
            let mut changed = manifest();
            match changed.pointer_mut(pointer) {
                Some(place) => *place = value,
                None => changed["engines"]["layers"][0]["risk"] = value,
            }
            let certification = config().own_certification(&read(&changed));
            let sentence = certification.to_string();
            assert!(sentence.contains("have changed"), "{pointer}: {sentence}");
        }
    }

    #[test]
    fn a_drafter_leaves_the_engines_what_they_were() {
        let mut more = manifest();
        more["drafter"] = json!({
            "state": "onnx/draft_state.onnx", "file": "onnx/draft.onnx",
            "feature_layers": [1, 2], "key_value_size": 8, "tokens": [1, 2]
        });
        let files = [
            "onnx/draft_state.onnx",
            "onnx/draft.onnx",
            "drafter.safetensors",
        ];
        for file in files {
            more["files"][file] = json!({"bytes": 1, "sha256": "dd"});
        }
        let digests = [manifest(), more].map(|manifest| read(&manifest).engines_sha256());
        assert_eq!(digests[0], digests[1]);
    }

    #[test]
    fn what_tensorrt_adds_leaves_the_engines_what_they_were() {
        let mut more = manifest();
        more["portable"] = json!({
            "embed": "onnx/portable_embed.onnx", "layers": [], "key_value": [],
            "head": "onnx/portable_head.onnx", "contexts": {}, "masks": {}
        });
        for file in [
            "onnx/portable_embed.onnx",
            "onnx/portable.data",
            "engines/tensorrt/embed.plan",
        ] {
            more["files"][file] = json!({"bytes": 1, "sha256": "dd"});
        }
        let digests = [manifest(), more].map(|manifest| read(&manifest).engines_sha256());
        assert_eq!(digests[0], digests[1]);
        // as engines/README.md describes it
        let text = r#"{"engines":{"attention":[],"embed":"onnx/embed.onnx","exits":[],"head":"onnx/head.onnx","key_value":[],"layers":[{"contexts":[],"file":"onnx/layer.onnx","first_layer":0,"num_layers":1,"risk":false},{"contexts":[],"file":"onnx/layer.onnx","first_layer":1,"num_layers":1,"risk":false}],"monolith":{"contexts":[],"file":"onnx/layer.onnx","first_layer":0,"num_layers":2,"risk":false}},"exit_layers":[1,2],"files":{"onnx/layer.data":"bb","onnx/layer.onnx":"aa"}}"#;
        assert_eq!(digests[0], hex(&Sha256::digest(text)));
    }
}
