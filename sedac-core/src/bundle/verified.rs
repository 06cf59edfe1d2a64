//! What was found whole before, so that it need not be hashed again.
//!
//! The record lies in the user's cache directory and not in the bundle, whose author could write
//! one that was never true.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::gate::Identity;
use crate::cache_file::CacheFile;

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
        let record = record(manifest).and_then(|file| file.read());
        record.unwrap_or_default()
    }

    /// Save the record. Where that is impossible, the next load hashes again; nothing else is lost.
    pub(super) fn save(&self, manifest: &str) {
        if let Some(file) = record(manifest) {
            file.write(self);
        }
    }
}

fn record(manifest: &str) -> Option<CacheFile> {
    CacheFile::new("verified", manifest)
}
