//! What was found whole before, so that it need not be hashed again.
//!
//! The record lies in the user's cache directory and not in the bundle, whose author could write
//! one that was never true.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::gate::Identity;

/// The files of one manifest as they were when their digests were right.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Verified {
    pub(super) files: BTreeMap<PathBuf, Identity>,
}

impl Verified {
    pub(super) fn new(files: BTreeMap<PathBuf, Identity>) -> Self {
        Self { files }
    }

    /// The record of the manifest with digest `manifest`; an empty one when there is none.
    pub(super) fn load(manifest: &str) -> Self {
        let read = || serde_json::from_slice(&fs::read(record(manifest)?).ok()?).ok();
        read().unwrap_or_default()
    }

    /// Save the record. Where that is impossible, the next load hashes again; nothing else is lost.
    pub(super) fn save(&self, manifest: &str) {
        let write = || {
            let path = record(manifest)?;
            fs::create_dir_all(path.parent()?).ok()?;
            // another process may be reading it
            let staged = path.with_extension(std::process::id().to_string());
            fs::write(&staged, serde_json::to_vec(self).ok()?).ok()?;
            fs::rename(staged, path).ok()
        };
        let _ = write();
    }
}

fn record(manifest: &str) -> Option<PathBuf> {
    let directory = dirs::cache_dir()?.join("sedac").join("verified");
    Some(directory.join(manifest).with_extension("json"))
}
