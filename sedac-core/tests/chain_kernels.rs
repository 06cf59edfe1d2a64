//! What a manifest says of the chain's kernels is taken only where it is of the model.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::fs;

use sedac_core::Error;
use sedac_core::bundle::Bundle;
use sedac_core::chain::Chain;
use serde_json::{Value, json};
use tiny::{Scratch, whole};

const CUBIN: &str = "engines/cuda/chain-sm_90.cubin";
const WEIGHTS: &str = "engines/cuda/weights.safetensors";

/// A whole bundle with kernels whose files hold nothing useful.
fn with_kernels(scratch: &Scratch) -> Value {
    let mut manifest = whole(scratch);
    fs::create_dir_all(scratch.0.join("engines/cuda")).unwrap();
    scratch.list(&mut manifest, CUBIN, b"cubin");
    scratch.list(&mut manifest, WEIGHTS, b"weights");
    let kernel = |rows: usize| json!({"rows": rows, "registers": 255, "shared_bytes": 231000, "spilled_bytes": 0});
    manifest["cuda"] = json!({
        "compiler": "13.0.88",
        "fingerprint": "00",
        "shape": {
            "hidden": 8, "heads": 2, "key_value_heads": 1, "head_size": 4, "rotary_size": 4,
            "intermediate": 16, "layers": 2, "vocabulary": 16
        },
        "options": {
            "activation": "silu", "norm_epsilon": 1e-6, "attention_scale": 0.5,
            "attention_softcap": 0.0, "logits_softcap": 0.0, "embedding_scale": 1.0
        },
        "layers": [{"window": 0, "rotary": 0}, {"window": 4096, "rotary": 1}],
        "modules": [{
            "file": CUBIN,
            "architecture": "sm_90",
            "kernels": [kernel(1), kernel(2), kernel(4), kernel(8)]
        }],
        "weights": WEIGHTS
    });
    scratch.write_manifest(manifest.to_string().as_bytes());
    manifest
}

#[test]
fn kernels_are_read() {
    let scratch = Scratch::new("kernels");
    with_kernels(&scratch);
    let bundle = Bundle::open(&scratch.0).unwrap();
    let kernels = bundle.manifest.cuda.unwrap();
    assert_eq!(kernels.rotary_tables(), 2);
    assert_eq!(kernels.shape.qkv_rows(), 16);
    let module = kernels.module_for((9, 0)).unwrap();
    assert_eq!(module.file.to_str(), Some(CUBIN));
    assert_eq!(kernels.module_for((8, 6)), None);
}

#[test]
fn kernels_of_another_model_are_refused() {
    let scratch = Scratch::new("other-kernels");
    let sound = with_kernels(&scratch);
    let changes: [(&str, Value); 14] = [
        ("/cuda/shape/hidden", json!(16)),
        ("/cuda/shape/layers", json!(3)),
        ("/cuda/shape/vocabulary", json!(8)),
        ("/cuda/shape/key_value_heads", json!(2)),
        ("/cuda/shape/head_size", json!(8)),
        ("/cuda/shape/rotary_size", json!(6)),
        ("/cuda/shape/heads", json!(0)),
        ("/cuda/shape/intermediate", json!(usize::MAX)),
        ("/cuda/layers", json!([{"window": 0, "rotary": 0}])),
        ("/cuda/layers/0/rotary", json!(2)),
        ("/cuda/modules/0/file", json!("engines/cuda/unlisted.cubin")),
        ("/cuda/modules/0/kernels/3/rows", json!(16)),
        ("/cuda/modules/0/kernels", json!([])),
        ("/cuda/weights", json!("engines/cuda/unlisted.safetensors")),
    ];
    for (pointer, value) in changes {
        let mut manifest = sound.clone();
        *manifest.pointer_mut(pointer).unwrap() = value;
        scratch.write_manifest(manifest.to_string().as_bytes());
        let reason = scratch.reason();
        assert!(
            reason.contains("do not add up to the model"),
            "{pointer}: {reason}"
        );
    }
}

#[test]
fn fields_that_nobody_knows_are_refused() {
    let scratch = Scratch::new("unknown-fields");
    let sound = with_kernels(&scratch);
    for place in [
        "/cuda",
        "/cuda/shape",
        "/cuda/options",
        "/cuda/layers/0",
        "/cuda/modules/0",
    ] {
        let mut manifest = sound.clone();
        manifest.pointer_mut(place).unwrap()["surprise"] = json!(1);
        scratch.write_manifest(manifest.to_string().as_bytes());
        let reason = scratch.reason();
        assert!(
            reason.contains("unknown field `surprise`"),
            "{place}: {reason}"
        );
    }
    let mut manifest = sound;
    manifest["cuda"]["modules"][0]["architecture"] = json!("gfx90");
    scratch.write_manifest(manifest.to_string().as_bytes());
    assert!(scratch.reason().contains("architecture gfx90"));
}

/// Why the chain of the bundle does not run on a GPU.
fn refusal(scratch: &Scratch) -> Error {
    let bundle = Bundle::open(&scratch.0).unwrap();
    match Chain::load_cuda(&bundle) {
        Ok(_) => panic!("these kernels cannot run"),
        Err(error) => error,
    }
}

#[test]
fn a_bundle_without_kernels_names_the_remedy() {
    let scratch = Scratch::new("no-kernels");
    let mut manifest = whole(&scratch);
    let error = refusal(&scratch);
    assert!(matches!(error, Error::Bundle { .. }));
    let remedy = format!("add them with sedac-export engines {}", scratch.0.display());
    assert!(error.to_string().contains(&remedy), "{error}");
    manifest["cuda_refusal"] = json!("its norms are of another kind");
    scratch.write_manifest(manifest.to_string().as_bytes());
    let reason = refusal(&scratch).to_string();
    assert!(
        reason.contains("cannot run this model: its norms"),
        "{reason}"
    );
}

/// There is no driver here, or no GPU, or a driver that finds that the file is no cubin.
#[test]
fn kernels_that_no_device_runs_are_an_error_of_the_device() {
    let scratch = Scratch::new("no-device");
    with_kernels(&scratch);
    let error = refusal(&scratch);
    assert!(matches!(error, Error::Device { .. }), "{error}");
}
