//! What drafting found out about a bundle on this machine, kept for later processes.
//!
//! The record lies in the user's cache directory and not in the bundle: costs are this machine's and
//! not the bundle's, a signature covers every file of a bundle, and one that came with a bundle could
//! hold anything.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sysinfo::{CpuRefreshKind, RefreshKind, System};
use tracing::debug;

use crate::backend::{CostRecord, gpu_name};
use crate::bundle::{Bundle, hex};
use crate::cache_file::CacheFile;
use crate::draft::Acceptance;

/// Writing more often would take time from short generations.
const INTERVAL: Duration = Duration::from_secs(10);

/// Where passes cost the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordKey {
    /// Of this crate.
    version: String,
    /// SHA-256 of the bundle's manifest.
    bundle: String,
    /// Its processors, and its GPU where that runs the model.
    machine: String,
    backend: String,
    threads: usize,
}

impl RecordKey {
    pub(super) fn new(bundle: &Bundle, backend: &str, on_gpu: bool, threads: usize) -> Self {
        let gpu = on_gpu.then(gpu_name).flatten();
        let machine = [processors()].into_iter().chain(gpu);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            bundle: bundle.digest.clone(),
            machine: machine.collect::<Vec<_>>().join(", "),
            backend: backend.into(),
            threads,
        }
    }

    /// The name of its file.
    fn name(&self) -> String {
        let mut digest = Sha256::new();
        for part in [&self.version, &self.bundle, &self.machine, &self.backend] {
            digest.update(part);
            digest.update([0]);
        }
        digest.update(self.threads.to_le_bytes());
        hex(&digest.finalize())
    }
}

fn processors() -> String {
    let cpu = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(cpu).ok();
    let cpus = system.as_ref().map_or(&[][..], System::cpus);
    let brand = cpus.first().map_or("", |cpu| cpu.brand().trim());
    format!("{} {brand} x {}", std::env::consts::ARCH, cpus.len())
}

/// What is known on one machine of one bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DraftingRecord {
    key: RecordKey,
    pub(super) costs: CostRecord,
    pub(super) acceptance: Acceptance,
}

/// The file of a record.
#[derive(Debug)]
pub(super) struct RecordFile {
    key: RecordKey,
    file: Option<CacheFile>,
    written: Option<Instant>,
}

impl RecordFile {
    pub(super) fn new(key: RecordKey) -> Self {
        Self {
            file: CacheFile::new("drafting", &key.name()),
            key,
            written: None,
        }
    }

    /// The record; None where there is none, or none that can be right.
    pub(super) fn read(&self) -> Option<DraftingRecord> {
        let record: DraftingRecord = self.file.as_ref()?.read()?;
        let is_sound = record.costs.is_sound() && record.acceptance.is_sound();
        if record.key == self.key && is_sound {
            return Some(record);
        }
        debug!(key = ?self.key, found = ?record.key, is_sound, "drafting record ignored");
        None
    }

    /// Whether the last one is old enough to be replaced.
    pub(super) fn is_due(&self) -> bool {
        self.written
            .is_none_or(|written| written.elapsed() >= INTERVAL)
    }

    pub(super) fn write(&mut self, costs: CostRecord, acceptance: Acceptance) {
        self.written = Some(Instant::now());
        let Some(file) = &self.file else {
            return;
        };
        file.write(&DraftingRecord {
            key: self.key.clone(),
            costs,
            acceptance,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn key(threads: usize) -> RecordKey {
        RecordKey {
            version: "1".into(),
            bundle: "digest".into(),
            machine: "processors".into(),
            backend: "onnxruntime".into(),
            threads,
        }
    }

    fn path(directory: &Path) -> PathBuf {
        directory.join("record.json")
    }

    fn record_file(directory: &Path, key: RecordKey) -> RecordFile {
        RecordFile {
            key,
            file: Some(CacheFile::at(path(directory))),
            written: None,
        }
    }

    fn costs(seconds: f64) -> CostRecord {
        CostRecord {
            layer: [(1, seconds)].into(),
            head: [(1, 0.5)].into(),
            draft: [(2, 0.1)].into(),
        }
    }

    fn acceptance(rate: f64) -> Acceptance {
        Acceptance {
            prompt_lookup: vec![rate],
            ..Acceptance::default()
        }
    }

    #[test]
    fn records_are_read_by_those_with_the_same_key() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = record_file(directory.path(), key(2));
        assert_eq!(file.read(), None);
        assert!(file.is_due());
        file.write(costs(1.0), acceptance(0.25));
        assert!(!file.is_due());
        let record = record_file(directory.path(), key(2)).read().unwrap();
        assert_eq!(
            (record.costs, record.acceptance),
            (costs(1.0), acceptance(0.25))
        );
        assert_eq!(record_file(directory.path(), key(3)).read(), None);
    }

    #[test]
    fn every_part_of_the_key_is_in_the_name() {
        let other = || "other".to_owned();
        let others = [
            RecordKey {
                version: other(),
                ..key(2)
            },
            RecordKey {
                bundle: other(),
                ..key(2)
            },
            RecordKey {
                machine: other(),
                ..key(2)
            },
            RecordKey {
                backend: other(),
                ..key(2)
            },
            key(3),
        ];
        assert_eq!(key(2).name(), key(2).name());
        for other in others {
            assert_ne!(other.name(), key(2).name(), "{other:?}");
        }
    }

    #[test]
    fn records_that_cannot_be_right_are_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = record_file(directory.path(), key(2));
        for (costs, acceptance) in [(costs(0.0), acceptance(0.5)), (costs(1.0), acceptance(1.5))] {
            file.write(costs, acceptance);
            assert_eq!(file.read(), None);
        }
        file.write(costs(1.0), acceptance(0.5));
        assert!(file.read().is_some());
        let text = fs::read_to_string(path(directory.path())).unwrap();
        fs::write(path(directory.path()), text.replace("costs", "cost")).unwrap();
        assert_eq!(file.read(), None);
    }

    #[test]
    fn of_two_processes_the_last_to_write_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let open = || record_file(directory.path(), key(2));
        let (mut first, mut second) = (open(), open());
        first.write(costs(1.0), acceptance(0.5));
        second.write(costs(2.0), acceptance(0.5));
        assert_eq!(first.read().unwrap().costs, costs(2.0));
    }

    #[test]
    fn processors_have_a_name() {
        assert!(processors().starts_with(std::env::consts::ARCH));
    }
}
