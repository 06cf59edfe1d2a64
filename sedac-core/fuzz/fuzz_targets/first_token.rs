//! From opening a bundle, one file of which is the input, to its first tokens.
//!
//! The input's first byte says which file, in the order of their names, and the rest is what it
//! holds. Sizes and digests are made to fit it, so that more is reached than the check of them:
//! whoever can write a bundle can do so too. Refusals are fine; panics, aborts, hangs and what
//! AddressSanitizer finds are not.
//!
//! ORT_DYLIB_PATH: the ONNX Runtime library.

#![no_main]

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sedac_core::Result;
use sedac_core::backend::Layout;
use sedac_core::bundle::{Bundle, DrafterKind};
use sedac_core::chain::{Chain, DecodingMode, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::sampler::Sampling;
use sedac_core::text::TextCodec;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const MANIFEST: &str = "bundle.json";
const MANIFEST_DIGEST: &str = "bundle.sha256";

static SEED: LazyLock<Seed> = LazyLock::new(Seed::new);

fuzz_target!(|input: &[u8]| {
    if let Some((&selector, contents)) = input.split_first() {
        SEED.with_file(usize::from(selector), contents, |bundle| {
            let _ = first_tokens(bundle);
        });
    }
});

/// The bundle that inputs change, in a directory of its own.
struct Seed {
    copy: TempDir,
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Seed {
    fn new() -> Self {
        let origin = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundle");
        let mut files = Vec::new();
        read(&origin, Path::new(""), &mut files);
        files.sort();
        let seed = Self {
            copy: tempfile::tempdir().expect("there is a directory for temporary files"),
            files,
        };
        for (name, contents) in &seed.files {
            seed.write(name, contents);
        }
        first_tokens(seed.copy.path()).expect("the seed generates; seed.py makes a new one");
        seed
    }

    /// Call `run` where the file that `selector` selects holds `contents`.
    fn with_file(&self, selector: usize, contents: &[u8], run: impl FnOnce(&Path)) {
        let (name, original) = &self.files[selector % self.files.len()];
        self.put(name, contents);
        run(self.copy.path());
        self.put(name, original);
    }

    fn put(&self, name: &Path, contents: &[u8]) {
        self.write(name, contents);
        if name == Path::new(MANIFEST_DIGEST) {
            return;
        }
        let mut manifest = self.original(MANIFEST).to_vec();
        if name == Path::new(MANIFEST) {
            manifest = contents.to_vec();
        } else {
            let mut entries: Value = serde_json::from_slice(&manifest).expect("it is JSON");
            let entry = json!({"bytes": contents.len(), "sha256": digest(contents)});
            entries["files"][name.to_str().expect("seed.py's names are text")] = entry;
            manifest = entries.to_string().into_bytes();
            self.write(Path::new(MANIFEST), &manifest);
        }
        let line = format!("{}  {MANIFEST}\n", digest(&manifest));
        self.write(Path::new(MANIFEST_DIGEST), line.as_bytes());
    }

    fn original(&self, name: &str) -> &[u8] {
        let mut files = self.files.iter();
        let found = files.find(|(known, _)| known == Path::new(name));
        &found.expect("bundles have it").1
    }

    fn write(&self, name: &Path, contents: &[u8]) {
        let path = self.copy.path().join(name);
        fs::create_dir_all(path.parent().expect("it is inside")).expect("it can be made");
        fs::write(path, contents).expect("there is room for temporary files");
    }
}

fn read(directory: &Path, name: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(directory.join(name)).expect("the seed is here") {
        let name = name.join(entry.expect("it can be listed").file_name());
        let path = directory.join(&name);
        if path.is_dir() {
            read(directory, &name, files);
        } else {
            let contents = fs::read(path).expect("it can be read");
            files.push((name, contents));
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    let bytes = Sha256::digest(bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn first_tokens(directory: &Path) -> Result<()> {
    let library = std::env::var_os("ORT_DYLIB_PATH").expect("ORT_DYLIB_PATH is set");
    let bundle = Bundle::open(directory)?;
    let codec = TextCodec::new(&bundle.gate.read(Path::new("tokenizer.json"))?)?;
    let mut chain = Chain::load(&bundle, Layout::Engines, Path::new(&library), 1)?;
    let config = &bundle.exit_config;
    let exits = DecodingMode::Exit {
        policy: config.policy.clone(),
        drafter: config.drafter,
    };
    let drafts = DecodingMode::Lossless {
        drafter: DrafterKind::Trained,
    };
    for mode in [exits, drafts] {
        let request = Request {
            prompt: codec.encode("a prompt", true)?,
            max_new_tokens: 3,
            stop_tokens: bundle.manifest.model.eos_token_ids.clone(),
            mode,
            kv_fill: config.kv_fill,
            sampling: Sampling::default(),
        };
        let mut tokens = Vec::new();
        chain.generate(&request, &Interrupt::default(), |token| {
            tokens.push(token.id);
            ControlFlow::Continue(())
        })?;
        codec.decode(&tokens)?;
    }
    Ok(())
}
