//! Nothing outside of a bundle is opened, nothing that changed after its check, and no size in a
//! file is believed that the graphs or the memory do not bear out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use prost::Message;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use sedac_core::Error;
use sedac_core::bundle::onnx::{Graph, Tensor};
use sedac_core::bundle::{Bundle, Opening, Verify};
use sedac_core::interrupt::Interrupt;
use serde_json::{Value, json};
use tiny::{Scratch, WEIGHT_BYTES, graph, whole};

type ChangeGraph = fn(&mut Graph);

const LAYER: &str = "onnx/layer_001.onnx";

/// Write the layer's graph with its initialiser changed.
fn with_weight(scratch: &Scratch, manifest: &mut Value, change: impl Fn(&mut Tensor)) {
    let mut model = graph("layer_001");
    change(&mut model.graph.as_mut().unwrap().initializer[0]);
    scratch.list(manifest, LAYER, &model.encode_to_vec());
}

fn set(tensor: &mut Tensor, key: &str, value: &str) {
    let mut entries = tensor.external_data.iter_mut();
    entries.find(|entry| entry.key == key).unwrap().value = value.into();
}

#[test]
fn links_lead_nowhere_outside() {
    let scratch = Scratch::new("links");
    whole(&scratch);
    let outside = Scratch::new("links-outside");
    let copy = outside.0.join("copy");
    for name in [LAYER, "onnx/layer_001.data", "bundle.json"] {
        fs::copy(scratch.0.join(name), &copy).unwrap();
        scratch.link(name, &copy);
        let reason = scratch.reason();
        assert!(
            reason.contains(name) && reason.contains("not a regular file inside of the bundle"),
            "{reason}"
        );
        fs::remove_file(scratch.0.join(name)).unwrap();
        fs::copy(&copy, scratch.0.join(name)).unwrap();
    }
    fs::write(&copy, "{}").unwrap();
    fs::write(scratch.0.join("sedac_config.json"), "{}").unwrap();
    scratch.link("sedac_config.json", &copy);
    assert!(scratch.reason().contains("sedac_config.json"));
}

#[test]
fn a_link_inside_is_what_it_points_to() {
    let scratch = Scratch::new("link-inside");
    whole(&scratch);
    fs::rename(scratch.0.join(LAYER), scratch.0.join("onnx/real.onnx")).unwrap();
    std::os::unix::fs::symlink("real.onnx", scratch.0.join(LAYER)).unwrap();
    Bundle::open(&scratch.0).unwrap();
}

#[test]
fn neither_pipes_nor_sockets_nor_directories_are_waited_for() {
    let scratch = Scratch::new("pipes");
    whole(&scratch);
    let path = scratch.0.join(LAYER);
    fs::remove_file(&path).unwrap();
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let (sender, receiver) = channel();
    let directory = scratch.0.clone();
    thread::spawn(move || sender.send(Bundle::open(&directory).unwrap_err().to_string()));
    let reason = receiver.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(
        reason.contains("layer_001.onnx: not a regular file"),
        "{reason}"
    );
    fs::remove_file(&path).unwrap();
    let _socket = UnixListener::bind(&path).unwrap();
    assert!(scratch.reason().contains("not a regular file"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(scratch.reason().contains("not a regular file"));
}

#[test]
fn names_are_plain() {
    let scratch = Scratch::new("names");
    let manifest = whole(&scratch);
    let outside = Scratch::new("names-outside");
    fs::write(outside.0.join("file"), "secret").unwrap();
    let absolute = outside.0.join("file").display().to_string();
    let up = format!("../{}/file", outside.0.file_name().unwrap().display());
    for name in [
        &*absolute,
        &*up,
        "onnx/../bundle.json",
        "./onnx/embed.onnx",
        "",
    ] {
        let mut changed = manifest.clone();
        let digest = tiny::hex(b"secret");
        changed["files"][name] = json!({"bytes": 6, "sha256": digest});
        scratch.write_manifest(changed.to_string().as_bytes());
        let reason = scratch.reason();
        assert!(
            reason.contains("not a regular file inside"),
            "{name}: {reason}"
        );
    }
}

#[test]
fn weights_are_in_files_that_are_checked() {
    let scratch = Scratch::new("weights");
    let mut manifest = whole(&scratch);
    fs::write(scratch.0.join("onnx/unlisted.data"), [0; WEIGHT_BYTES]).unwrap();
    for location in [
        "unlisted.data",
        "../onnx/embed.data",
        "/dev/zero",
        "",
        ".",
        "sub/embed.data",
    ] {
        with_weight(&scratch, &mut manifest, |tensor| {
            set(tensor, "location", location)
        });
        let reason = scratch.reason();
        assert!(reason.contains("does not list"), "{location}: {reason}");
    }
    let twice = |tensor: &mut Tensor| {
        let entry = tensor.external_data[0].clone();
        tensor.external_data.push(entry);
    };
    with_weight(&scratch, &mut manifest, twice);
    assert!(scratch.reason().contains("no place"));
    with_weight(&scratch, &mut manifest, |_| {});
    Bundle::open(&scratch.0).unwrap();
}

#[test]
fn weights_fit_their_place_and_shape() {
    let scratch = Scratch::new("sizes");
    let mut manifest = whole(&scratch);
    let changes: [fn(&mut Tensor); 6] = [
        |tensor| set(tensor, "offset", "4"),
        |tensor| set(tensor, "offset", "18446744073709551615"),
        |tensor| set(tensor, "length", "60"),
        |tensor| tensor.dims = vec![1 << 40, 1 << 40],
        |tensor| tensor.dims = vec![-16],
        |tensor| tensor.data_type = 8,
    ];
    for change in changes {
        with_weight(&scratch, &mut manifest, change);
        let reason = scratch.reason();
        assert!(reason.contains("layer_001.onnx: weight weight"), "{reason}");
    }
}

#[test]
fn graphs_are_what_the_manifest_says() {
    let scratch = Scratch::new("graphs");
    let mut manifest = whole(&scratch);
    let changes: [(ChangeGraph, &str); 4] = [
        (
            |graph| graph.name = "layer_000".into(),
            "\"layer_000\" where bundle.json means \"layer_001\"",
        ),
        (|graph| graph.output.clear(), "no output y"),
        (|graph| graph.input.remove(0).name.clear(), "no input x"),
        (
            |graph| {
                graph
                    .output
                    .iter_mut()
                    .for_each(|value| value.r#type = None)
            },
            "no output y",
        ),
    ];
    for (change, words) in changes {
        let mut model = graph("layer_001");
        change(model.graph.as_mut().unwrap());
        scratch.list(&mut manifest, LAYER, &model.encode_to_vec());
        let reason = scratch.reason();
        assert!(reason.contains(words), "{reason}");
    }
    scratch.list(&mut manifest, LAYER, b"\x07");
    assert!(
        scratch
            .reason()
            .contains("layer_001.onnx: not an ONNX graph")
    );
}

#[test]
fn engines_cannot_change_places() {
    let scratch = Scratch::new("swap");
    let mut manifest = whole(&scratch);
    let layers = &mut manifest["engines"]["layers"];
    let first = layers[0]["file"].take();
    layers[0]["file"] = layers[1]["file"].take();
    layers[1]["file"] = first;
    scratch.write_manifest(manifest.to_string().as_bytes());
    assert!(scratch.reason().contains("where bundle.json means"));
}

#[test]
fn sizes_are_those_of_the_graphs() {
    let scratch = Scratch::new("facts");
    let sound = whole(&scratch);
    for (pointer, value, words) in [
        ("/model/hidden_size", json!(9), "x is float32 [1, ?, 8]"),
        (
            "/model/vocab_size",
            json!(1_u64 << 39),
            "logits is float32 [1, ?, 16]",
        ),
        (
            "/key_value_heads/1/heads",
            json!(1 << 20),
            "layer_001.onnx: input past_key_0 is float32 [1, 1, ?, 4]",
        ),
        (
            "/key_value_heads/0/head_size",
            json!(8),
            "past_key_0 is float32",
        ),
        (
            "/contexts/0/shape/2",
            json!(4),
            "context_0 is float32 [1, ?, 2]",
        ),
        ("/contexts/0/dtype", json!("int64"), "context_0 is float32"),
    ] {
        let mut manifest = sound.clone();
        *manifest.pointer_mut(pointer).unwrap() = value;
        scratch.write_manifest(manifest.to_string().as_bytes());
        let reason = scratch.reason();
        assert!(reason.contains(words), "{pointer}: {reason}");
    }
}

#[test]
fn a_file_that_changes_after_its_check_is_not_opened() {
    let scratch = Scratch::new("late");
    whole(&scratch);
    let bundle = Bundle::open(&scratch.0).unwrap();
    let data = Path::new("onnx/layer_001.data");
    // copies by hard links, and modes, are none of its contents
    fs::hard_link(scratch.0.join(data), scratch.0.join("link")).unwrap();
    fs::set_permissions(scratch.0.join(data), Permissions::from_mode(0o600)).unwrap();
    bundle.gate.path(data).unwrap();
    fs::write(scratch.0.join("new"), [1; WEIGHT_BYTES]).unwrap();
    fs::rename(scratch.0.join("new"), scratch.0.join(data)).unwrap();
    let error = bundle.gate.path(data).unwrap_err().to_string();
    assert!(error.contains("layer_001.data is altered"), "{error}");
    fs::write(scratch.0.join(LAYER), "other").unwrap();
    let error = bundle.gate.read(Path::new(LAYER)).unwrap_err().to_string();
    assert!(error.contains("layer_001.onnx is altered"), "{error}");
    let unlisted = bundle.gate.read(Path::new("bundle.json")).unwrap_err();
    assert!(unlisted.to_string().contains("not among the files"));
}

#[test]
fn a_check_can_be_interrupted() {
    let scratch = Scratch::new("interrupt");
    whole(&scratch);
    let interrupt = Interrupt::default();
    interrupt.raise();
    let opening = Opening {
        interrupt,
        ..Opening::default()
    };
    assert!(matches!(
        Bundle::open_with(&scratch.0, &opening),
        Err(Error::Cancelled)
    ));
}

#[test]
fn what_was_whole_and_has_not_changed_need_not_be_hashed_again() {
    let scratch = Scratch::new("again");
    whole(&scratch);
    let opening = Opening {
        verify: Verify::Changed,
        ..Opening::default()
    };
    let open =
        || Bundle::open_with(&scratch.0, &opening).map(|bundle| bundle.gate.hashed_and_skipped());
    assert_eq!(open().unwrap(), (16, 0));
    assert_eq!(open().unwrap(), (0, 16));
    let path = scratch.0.join("onnx/head.data");
    fs::copy(&path, scratch.0.join("copy")).unwrap();
    fs::rename(scratch.0.join("copy"), &path).unwrap();
    assert_eq!(open().unwrap(), (1, 15));
    fs::write(&path, [1; WEIGHT_BYTES]).unwrap();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("head.data is altered"), "{error}");
    let manifest = fs::read(scratch.0.join("bundle.json")).unwrap();
    let record = format!("sedac/verified/{}.json", tiny::hex(&manifest));
    fs::remove_file(dirs::cache_dir().unwrap().join(record)).unwrap();
}

#[test]
fn files_that_are_about_to_be_replaced_are_not_looked_at() {
    let scratch = Scratch::new("replaced");
    let mut manifest = whole(&scratch);
    fs::create_dir_all(scratch.0.join("engines/tensorrt")).unwrap();
    let name = "engines/tensorrt/embed.plan";
    scratch.list(&mut manifest, name, b"plan");
    fs::remove_file(scratch.0.join(name)).unwrap();
    assert!(scratch.reason().contains("embed.plan is missing"));
    let replaced = Some("engines/tensorrt".into());
    Bundle::open_with(
        &scratch.0,
        &Opening {
            replaced,
            ..Opening::default()
        },
    )
    .unwrap();
}
