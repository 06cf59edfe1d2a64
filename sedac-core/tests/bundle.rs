//! A bundle that is not whole is refused by name, and no manifest makes the loader panic.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sedac_core::Error;
use sedac_core::bundle::Bundle;
use sedac_core::exit_config::KvFill;
use sedac_core::policy::PolicySettings;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory of its own for each test, gone afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sedac-{}-{name}", std::process::id()));
        fs::create_dir_all(path.join("onnx")).unwrap();
        Self(path)
    }

    fn write_manifest(&self, manifest: &[u8]) {
        fs::write(self.0.join("bundle.json"), manifest).unwrap();
        let line = format!("{}  bundle.json\n", hex(manifest));
        fs::write(self.0.join("bundle.sha256"), line).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A bundle of two layers whose graphs are a few bytes each.
fn whole(scratch: &Scratch) -> Value {
    let mut files = serde_json::Map::new();
    for name in [
        "embed",
        "layer_000",
        "layer_001",
        "kv_000",
        "kv_001",
        "head",
        "monolith",
    ] {
        let file = format!("onnx/{name}.onnx");
        let contents = format!("graph of {name}");
        fs::write(scratch.0.join(&file), &contents).unwrap();
        let entry = json!({"bytes": contents.len(), "sha256": hex(contents.as_bytes())});
        files.insert(file, entry);
    }
    let layer = |file: &str, first: usize, count: usize| json!({"file": file, "first_layer": first, "num_layers": count, "contexts": ["context_0"]});
    let fill = |file: &str| json!({"file": file, "contexts": ["context_0"]});
    let manifest = json!({
        "schema_version": 1,
        "model": {
            "name": "tiny", "type": "llama", "hidden_size": 8, "num_layers": 2, "vocab_size": 16,
            "eos_token_ids": [0]
        },
        "target": "onnxruntime",
        "precision": "fp16",
        "exit_layers": [1, 2],
        "max_cache_length": 32,
        "key_value_heads": [{"heads": 1, "head_size": 4}, {"heads": 1, "head_size": 4}],
        "contexts": [{"name": "context_0", "shape": [1, -1, 2], "dtype": "float32"}],
        "engines": {
            "embed": "onnx/embed.onnx",
            "layers": [layer("onnx/layer_000.onnx", 0, 1), layer("onnx/layer_001.onnx", 1, 1)],
            "key_value": [fill("onnx/kv_000.onnx"), fill("onnx/kv_001.onnx")],
            "head": "onnx/head.onnx",
            "monolith": layer("onnx/monolith.onnx", 0, 2)
        },
        "tokenizer": false,
        "files": files
    });
    scratch.write_manifest(manifest.to_string().as_bytes());
    manifest
}

fn reason(directory: &Path) -> String {
    Bundle::open(directory).unwrap_err().to_string()
}

#[test]
fn a_whole_bundle_opens() {
    let scratch = Scratch::new("whole");
    whole(&scratch);
    let bundle = Bundle::open(&scratch.0).unwrap();
    assert_eq!(bundle.manifest.model.num_layers, 2);
    assert_eq!(bundle.exit_config.policy, PolicySettings::for_layers(2));
    assert_eq!(bundle.exit_config.kv_fill, KvFill::Propagate);
}

#[test]
fn damage_is_named() {
    let scratch = Scratch::new("damage");
    whole(&scratch);
    let path = scratch.0.join("onnx/layer_001.onnx");
    fs::write(&path, "graph of layer_00!").unwrap();
    assert!(reason(&scratch.0).contains("layer_001.onnx is altered"));
    fs::write(&path, "graph").unwrap();
    assert!(reason(&scratch.0).contains("layer_001.onnx is truncated"));
    fs::remove_file(&path).unwrap();
    assert!(reason(&scratch.0).contains("layer_001.onnx is missing"));
}

#[test]
fn a_manifest_must_match_its_digest() {
    let scratch = Scratch::new("digest");
    let manifest = whole(&scratch).to_string();
    fs::write(
        scratch.0.join("bundle.json"),
        manifest.replace("tiny", "tinx"),
    )
    .unwrap();
    assert!(reason(&scratch.0).contains("bundle.json is altered"));
    fs::remove_file(scratch.0.join("bundle.sha256")).unwrap();
    assert!(reason(&scratch.0).contains("bundle.sha256 is missing"));
}

#[test]
fn a_newer_schema_is_not_called_damaged() {
    let scratch = Scratch::new("schema");
    let mut manifest = whole(&scratch);
    manifest["schema_version"] = json!(2);
    manifest["engines"] = json!("something else");
    fs::write(scratch.0.join("bundle.json"), manifest.to_string()).unwrap();
    assert!(reason(&scratch.0).contains("schema 2 is newer than 1"));
}

#[test]
fn engines_that_do_not_add_up_are_refused() {
    let scratch = Scratch::new("sum");
    let sound = whole(&scratch);
    let changes: [(&str, Value); 6] = [
        ("/engines/layers/1/first_layer", json!(0)),
        ("/engines/layers/1/contexts/0", json!("context_9")),
        ("/engines/head", json!("onnx/unlisted.onnx")),
        ("/exit_layers/0", json!(3)),
        ("/max_cache_length", json!(0)),
        ("/model/num_layers", json!(3)),
    ];
    for (pointer, value) in changes {
        let mut manifest = sound.clone();
        *manifest.pointer_mut(pointer).unwrap() = value;
        scratch.write_manifest(manifest.to_string().as_bytes());
        assert!(reason(&scratch.0).contains("do not add up"), "{pointer}");
    }
}

#[test]
fn an_exit_configuration_may_leave_things_out_but_not_add() {
    let scratch = Scratch::new("config");
    whole(&scratch);
    let path = scratch.0.join("sedac_config.json");
    fs::write(&path, r#"{"tau": 0.5}"#).unwrap();
    let config = Bundle::open(&scratch.0).unwrap().exit_config;
    let expected = PolicySettings::Stability {
        tau: 0.5,
        consecutive_k: 2,
        min_layer_ratio: 0.2,
    };
    assert_eq!(config.policy, expected);
    fs::write(&path, r#"{"taw": 0.5}"#).unwrap();
    assert!(reason(&scratch.0).contains("unknown field `taw`"));
}

#[test]
fn thresholds_need_an_engine_that_tells_at_their_depth() {
    let scratch = Scratch::new("thresholds");
    whole(&scratch);
    let path = scratch.0.join("sedac_config.json");
    for policy in ["probe", "margin", "learned"] {
        let config = json!({"policy": policy, "thresholds": {"1": 0.5}});
        fs::write(&path, config.to_string()).unwrap();
        let reason = reason(&scratch.0);
        assert!(
            reason.contains("at depth 1") && reason.contains("train-probes"),
            "{reason}"
        );
    }
    fs::write(&path, r#"{"kv_fill": "defer"}"#).unwrap();
    let config = Bundle::open(&scratch.0).unwrap().exit_config;
    assert_eq!(config.kv_fill, KvFill::Defer);
}

#[test]
fn a_certificate_with_fields_missing_is_damage() {
    let scratch = Scratch::new("certificate");
    whole(&scratch);
    let path = scratch.0.join("sedac_config.json");
    for certificate in [json!({"risk_bound": 0.01}), json!({}), Value::Null] {
        fs::write(&path, json!({"certificate": certificate}).to_string()).unwrap();
        let reason = reason(&scratch.0);
        assert!(
            reason.contains("certificate: ")
                && reason.ends_with("run sedac-export calibrate again"),
            "{reason}"
        );
    }
}

/// Any JSON, small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Pointers to every value of `value`.
fn pointers(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| {
            pointers(inner, format!("{at}/{}", key.replace('/', "~1")), found);
        }),
        Value::Array(items) => items.iter().enumerate().for_each(|(index, inner)| {
            pointers(inner, format!("{at}/{index}"), found);
        }),
        _ => {}
    }
    found.push(at);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_manifest_makes_the_loader_panic(pick in any::<prop::sample::Index>(), value in any_json()) {
        let scratch = Scratch::new("fuzz");
        let mut manifest = whole(&scratch);
        let mut places = Vec::new();
        pointers(&manifest, String::new(), &mut places);
        let place: &String = pick.get(&places);
        *manifest.pointer_mut(place).unwrap() = value;
        scratch.write_manifest(manifest.to_string().as_bytes());
        let _ = Bundle::open(&scratch.0);
    }

    #[test]
    fn no_bytes_make_the_loader_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let scratch = Scratch::new("bytes");
        scratch.write_manifest(&bytes);
        let refused = matches!(Bundle::open(&scratch.0), Err(Error::Bundle { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn plans_are_found_for_their_target_and_only_whole() {
    let scratch = Scratch::new("plans");
    let mut manifest = whole(&scratch);
    let graphs = [
        "embed",
        "layer_000",
        "layer_001",
        "kv_000",
        "kv_001",
        "head",
    ];
    let graph = |name: &str| format!("onnx/portable_{name}.onnx");
    let layers = |first: usize| json!({"file": graph(graphs[1 + first]), "first_layer": first, "num_layers": 1, "masks": ["mask"]});
    manifest["portable"] = json!({
        "embed": graph("embed"), "layers": [layers(0), layers(1)],
        "key_value": [graph("kv_000"), graph("kv_001")], "head": graph("head"),
        "contexts": {"context_0": {"dtype": "float16", "shape": [-1, -1, 2]}},
        "masks": {"mask": 0}
    });
    // any file that the manifest lists stands for a plan here
    let plan = |name: &&str| json!({"file": format!("onnx/{name}.onnx"), "graph": graph(name), "seconds": 1.0});
    manifest["plans"] = json!({"tensorrt-rtx": {
        "options": {"max_prefill_chunk": 64}, "plans": graphs.iter().map(plan).collect::<Vec<_>>()
    }});
    let open = |manifest: &Value| {
        scratch.write_manifest(manifest.to_string().as_bytes());
        Bundle::open(&scratch.0).unwrap().manifest
    };
    let sound = open(&manifest);
    let (portable, plans) = sound.plans_for("tensorrt-rtx").unwrap();
    assert_eq!(portable.contexts["context_0"].shape_for(3), [1, 3, 2]);
    assert_eq!(plans.layers[1], Path::new("onnx/layer_001.onnx"));
    assert_eq!(plans.max_prefill_chunk, 64);
    assert!(sound.plans_for("tensorrt").is_none());
    for (pointer, value) in [
        (
            "/plans/tensorrt-rtx/plans/3/graph",
            json!("onnx/other.onnx"),
        ),
        (
            "/plans/tensorrt-rtx/plans/3/file",
            json!("onnx/unlisted.plan"),
        ),
        ("/portable/layers/1/first_layer", json!(0)),
        ("/portable/contexts/context_0/shape/2", json!(1_u64 << 62)),
        ("/portable/contexts/context_0/shape/2", json!(0)),
    ] {
        let mut broken = manifest.clone();
        *broken.pointer_mut(pointer).unwrap() = value;
        assert!(
            open(&broken).plans_for("tensorrt-rtx").is_none(),
            "{pointer}"
        );
    }
}
