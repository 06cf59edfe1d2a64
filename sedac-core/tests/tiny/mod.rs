//! A bundle of two layers on disk whose graphs compute nothing, but take and give what they must.

#![allow(
    dead_code,
    reason = "each test binary that has this module uses a part of it"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use prost::Message;
use sedac_core::bundle::onnx::{
    Dimension, Graph, OnnxModel, Shape, StringEntry, Tensor, TensorType, Type, ValueInfo,
};
use sedac_core::bundle::{Bundle, SCHEMA_VERSION};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const FLOAT: i32 = 1;
const INT32: i32 = 6;
const INT64: i32 = 7;

const HIDDEN: i64 = 8;
const VOCABULARY: i64 = 16;
const HEAD_SIZE: i64 = 4;

/// Bytes of each graph's weights in its data file.
pub(crate) const WEIGHT_BYTES: usize = 64;

pub(crate) fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory of its own for each test, gone afterwards.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sedac-{}-{name}", std::process::id()));
        fs::create_dir_all(path.join("onnx")).unwrap();
        Self(path)
    }

    /// Write `manifest` and its digest.
    pub(crate) fn write_manifest(&self, manifest: &[u8]) {
        fs::write(self.0.join("bundle.json"), manifest).unwrap();
        let line = format!("{}  bundle.json\n", hex(manifest));
        fs::write(self.0.join("bundle.sha256"), line).unwrap();
    }

    /// Write `contents` as the file `name` and list it in `manifest`, which is written too.
    pub(crate) fn list(&self, manifest: &mut Value, name: &str, contents: &[u8]) {
        fs::write(self.0.join(name), contents).unwrap();
        manifest["files"][name] = entry(contents);
        self.write_manifest(manifest.to_string().as_bytes());
    }

    /// Put a link to `target` in the place of the file `name`.
    pub(crate) fn link(&self, name: &str, target: &Path) {
        fs::remove_file(self.0.join(name)).unwrap();
        symlink(target, self.0.join(name)).unwrap();
    }

    /// Why the bundle is refused.
    pub(crate) fn reason(&self) -> String {
        Bundle::open(&self.0).unwrap_err().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn entry(contents: &[u8]) -> Value {
    json!({"bytes": contents.len(), "sha256": hex(contents)})
}

/// A value of a graph; -1 leaves an axis open.
fn value(name: &str, elem_type: i32, axes: &[i64]) -> ValueInfo {
    let axes = axes.iter().map(|&size| Dimension {
        dim_value: (size >= 0).then_some(size),
        dim_param: (size < 0).then(|| "tokens".into()),
    });
    let shape = Shape {
        dim: axes.collect(),
    };
    let tensor_type = Some(TensorType {
        elem_type,
        shape: Some(shape),
    });
    ValueInfo {
        name: name.into(),
        r#type: Some(Type { tensor_type }),
    }
}

/// A weight of fp32 numbers in the graph's data file.
fn weight(location: &str) -> Tensor {
    let facts = [("location", location), ("offset", "0"), ("length", "64")];
    Tensor {
        name: "weight".into(),
        data_type: FLOAT,
        dims: vec![WEIGHT_BYTES as i64 / 4],
        data_location: 1,
        external_data: facts
            .map(|(key, value)| StringEntry {
                key: key.into(),
                value: value.into(),
            })
            .into(),
    }
}

/// The graph of the engine `name`, with a weight in `name`.data.
pub(crate) fn graph(name: &str) -> OnnxModel {
    let x = || value("x", FLOAT, &[1, -1, HIDDEN]);
    let context = || value("context_0", FLOAT, &[1, -1, 2]);
    let caches = |kind: &str, layers: usize| -> Vec<ValueInfo> {
        let names = (0..layers)
            .flat_map(|layer| ["key", "value"].map(|tensor| format!("{kind}_{tensor}_{layer}")));
        names
            .map(|name| value(&name, FLOAT, &[1, 1, -1, HEAD_SIZE]))
            .collect()
    };
    let mut graph = Graph::default();
    graph.name = name.into();
    graph.initializer.push(weight(&format!("{name}.data")));
    match name.split('_').next().unwrap() {
        "embed" => {
            graph.input.push(value("input_ids", INT64, &[1, -1]));
            graph.output.push(x());
        }
        "contexts" => {
            graph.input.push(value("position_ids", INT64, &[1, -1]));
            graph.output.push(context());
        }
        "kv" => {
            graph
                .input
                .extend([x(), value("write_index", INT64, &[1]), context()]);
            graph.input.extend(caches("past", 1));
            graph.output.extend(caches("present", 1));
        }
        "head" => {
            graph.input.push(x());
            graph
                .output
                .push(value("logits", FLOAT, &[1, -1, VOCABULARY]));
        }
        kind => {
            let layers = if kind == "monolith" { 2 } else { 1 };
            let lengths = [
                value("seqlens_k", INT32, &[1]),
                value("total_sequence_length", INT32, &[]),
            ];
            graph
                .input
                .extend([x(), context()].into_iter().chain(lengths));
            graph.input.extend(caches("past", layers));
            let y = value("y", FLOAT, &[1, -1, HIDDEN]);
            graph
                .output
                .extend([y, value("stability", FLOAT, &[1, -1, layers as i64])]);
            graph.output.extend(caches("present", layers));
        }
    }
    let mut model = OnnxModel::default();
    model.graph = Some(graph);
    model
}

/// Write a whole bundle; its manifest.
pub(crate) fn whole(scratch: &Scratch) -> Value {
    let mut files = serde_json::Map::new();
    for name in [
        "embed",
        "contexts",
        "layer_000",
        "layer_001",
        "kv_000",
        "kv_001",
        "head",
        "monolith",
    ] {
        let data = (format!("onnx/{name}.data"), vec![0; WEIGHT_BYTES]);
        for (file, contents) in [
            (format!("onnx/{name}.onnx"), graph(name).encode_to_vec()),
            data,
        ] {
            fs::write(scratch.0.join(&file), &contents).unwrap();
            files.insert(file, entry(&contents));
        }
    }
    let layer = |file: &str, first: usize, count: usize| json!({"file": file, "first_layer": first, "num_layers": count, "contexts": ["context_0"]});
    let fill = |file: &str| json!({"file": file, "contexts": ["context_0"]});
    let manifest = json!({
        "schema_version": SCHEMA_VERSION,
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
            "contexts": "onnx/contexts.onnx",
            "layers": [layer("onnx/layer_000.onnx", 0, 1), layer("onnx/layer_001.onnx", 1, 1)],
            "key_value": [fill("onnx/kv_000.onnx"), fill("onnx/kv_001.onnx")],
            "head": "onnx/head.onnx",
            "monolith": layer("onnx/monolith.onnx", 0, 2)
        },
        "tokenizer": false,
        "tolerance": 1e-4,
        "files": files
    });
    scratch.write_manifest(manifest.to_string().as_bytes());
    manifest
}
