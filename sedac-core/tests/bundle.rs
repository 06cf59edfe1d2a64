//! A bundle that is not whole is refused by name, and no manifest makes the loader panic.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use prost::Message;
use sedac_core::Error;
use sedac_core::bundle::{Bundle, Opening};
use sedac_core::kv::KvFill;
use sedac_core::policy::{PolicySettings, Stability};
use serde_json::{Value, json};
use tiny::{Scratch, whole};

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
    let mut contents = fs::read(&path).unwrap();
    *contents.last_mut().unwrap() ^= 1;
    fs::write(&path, &contents).unwrap();
    assert!(scratch.reason().contains("layer_001.onnx is altered"));
    fs::write(&path, "graph").unwrap();
    assert!(scratch.reason().contains("layer_001.onnx is truncated"));
    fs::remove_file(&path).unwrap();
    assert!(scratch.reason().contains("layer_001.onnx is missing"));
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
    assert!(scratch.reason().contains("bundle.json is altered"));
    fs::remove_file(scratch.0.join("bundle.sha256")).unwrap();
    assert!(scratch.reason().contains("bundle.sha256 is missing"));
}

#[test]
fn a_newer_schema_is_not_called_damaged() {
    let scratch = Scratch::new("schema");
    let mut manifest = whole(&scratch);
    manifest["schema_version"] = json!(3);
    manifest["engines"] = json!("something else");
    fs::write(scratch.0.join("bundle.json"), manifest.to_string()).unwrap();
    assert!(scratch.reason().contains("schema 3 is newer than 2"));
}

#[test]
fn an_older_schema_opens_for_an_upgrade_only() {
    let scratch = Scratch::new("older");
    let mut manifest = whole(&scratch);
    manifest["schema_version"] = json!(1);
    let engines = manifest["engines"].as_object_mut().unwrap();
    engines.remove("contexts");
    scratch.write_manifest(manifest.to_string().as_bytes());
    let reason = scratch.reason();
    assert!(reason.contains("schema 1 is older than 2"), "{reason}");
    assert!(reason.contains("sedac-export upgrade"), "{reason}");
    let upgrade = Opening {
        older: true,
        ..Opening::default()
    };
    assert!(Bundle::open_with(&scratch.0, &upgrade).is_ok());
    fs::write(scratch.0.join("onnx/head.onnx"), "graph").unwrap();
    let damaged = Bundle::open_with(&scratch.0, &upgrade).unwrap_err();
    assert!(damaged.to_string().contains("head.onnx is truncated"));
}

#[test]
fn engines_that_do_not_add_up_are_refused() {
    let scratch = Scratch::new("sum");
    let sound = whole(&scratch);
    let changes: [(&str, Value); 14] = [
        ("/engines/contexts", Value::Null),
        ("/engines/contexts", json!("onnx/unlisted.onnx")),
        ("/contexts", json!([])),
        ("/engines/head", json!("onnx/head.data")),
        ("/exit_layers", json!([2, 1])),
        ("/exit_layers", json!([1])),
        ("/tolerance", json!(1.0)),
        ("/tolerance", json!(-1.0)),
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
        assert!(scratch.reason().contains("do not add up"), "{pointer}");
    }
}

#[test]
fn an_exit_configuration_may_leave_things_out_but_not_add() {
    let scratch = Scratch::new("config");
    whole(&scratch);
    let path = scratch.0.join("sedac_config.json");
    fs::write(&path, r#"{"tau": 0.5}"#).unwrap();
    let config = Bundle::open(&scratch.0).unwrap().exit_config;
    let expected = PolicySettings::Stability(Stability {
        tau: 0.5,
        consecutive_k: 2,
        min_layer_ratio: 0.2,
    });
    assert_eq!(config.policy, expected);
    fs::write(&path, r#"{"taw": 0.5}"#).unwrap();
    assert!(scratch.reason().contains("unknown field `taw`"));
}

#[test]
fn thresholds_need_an_engine_that_tells_at_their_depth() {
    let scratch = Scratch::new("thresholds");
    whole(&scratch);
    let path = scratch.0.join("sedac_config.json");
    for policy in ["probe", "margin", "learned"] {
        let config = json!({"policy": policy, "thresholds": {"1": 0.5}});
        fs::write(&path, config.to_string()).unwrap();
        let reason = scratch.reason();
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
        let reason = scratch.reason();
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
        "contexts",
        "layer_000",
        "layer_001",
        "kv_000",
        "kv_001",
        "head",
    ];
    let graph = |name: &str| format!("onnx/portable_{name}.onnx");
    for name in graphs {
        let stand_in = tiny::graph(name).encode_to_vec();
        scratch.list(&mut manifest, &graph(name), &stand_in);
    }
    let layers = |first: usize| json!({"file": graph(graphs[2 + first]), "first_layer": first, "num_layers": 1, "masks": ["mask"]});
    manifest["portable"] = json!({
        "embed": graph("embed"), "contexts_graph": graph("contexts"), "layers": [layers(0), layers(1)],
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
        ("/plans/tensorrt-rtx/plans/3/graph", json!("onnx/head.onnx")),
        ("/plans/tensorrt-rtx/plans/1/graph", json!("onnx/head.onnx")),
        ("/portable/contexts_graph", Value::Null),
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
    for (pointer, name) in [
        ("/plans/tensorrt-rtx/plans/3/graph", "onnx/other.onnx"),
        ("/plans/tensorrt-rtx/plans/3/file", "../a.plan"),
        // what is there for TensorRT only is no part of what certificates are about
        ("/portable/embed", "onnx/embed.data"),
        ("/portable/embed", "onnx/embed.onnx"),
        ("/engines/head", "onnx/portable_head.onnx"),
    ] {
        let mut broken = manifest.clone();
        *broken.pointer_mut(pointer).unwrap() = json!(name);
        scratch.write_manifest(broken.to_string().as_bytes());
        assert!(scratch.reason().contains("do not add up"), "{pointer}");
    }
}
