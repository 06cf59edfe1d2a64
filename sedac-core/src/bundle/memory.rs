//! The memory that a loaded bundle takes, compared with what is free before any of it is allocated.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use sysinfo::System;

use super::{Bundle, Gate, Manifest};
use crate::error::{Error, Result};

/// Tokens of the longest pass, whose buffers are the largest.
const MAX_TOKENS: u64 = 256;

/// Rows of logits that are held.
const LOGIT_ROWS: u64 = 16;

/// A file that is read whole, what it is decoded to, and what ONNX Runtime makes of it.
const COPIES: u64 = 3;

/// Bytes of a number where engines compute.
const FLOAT: u64 = size_of::<f32>() as u64;

impl Bundle {
    /// Check that there is memory for the engines in `graphs`, the caches of a sequence and the
    /// buffers of its passes.
    ///
    /// # Errors
    /// [`Error::Memory`] with what is needed and what there is.
    pub(crate) fn check_memory<'a>(&self, graphs: impl Iterator<Item = &'a Path>) -> Result<()> {
        let sequence = self.sequence_bytes(FLOAT);
        self.hold(self.weight_bytes(graphs).saturating_add(sequence), None)
    }

    /// As [`check_memory`](Self::check_memory), for plans or graphs on a device with `free` bytes;
    /// None stands for the host's memory.
    pub(crate) fn check_device_memory<'a>(
        &self,
        plans: impl Iterator<Item = &'a Path>,
        free: Option<u64>,
    ) -> Result<()> {
        let plans = plans.filter_map(|plan| match self.gate.graphs.get(plan) {
            Some(graph) => Some(graph.stored_bytes),
            None => self.gate.bytes(plan),
        });
        let sequence = self.sequence_bytes(self.manifest.precision.bytes() as u64);
        self.hold(plans.fold(sequence, u64::saturating_add), free)
    }

    /// What it may take of a device's memory.
    pub(crate) fn device_budget(&self) -> DeviceBudget {
        DeviceBudget {
            path: self.gate.shown_directory(),
            limit: self.memory_limit,
            taken: 0,
        }
    }

    /// As [`check_memory`](Self::check_memory), for engines that join a sequence under way.
    pub(crate) fn check_more_memory<'a>(
        &self,
        graphs: impl Iterator<Item = &'a Path>,
    ) -> Result<()> {
        self.hold(self.weight_bytes(graphs), None)
    }

    /// As [`check_memory`](Self::check_memory), for the caches of `slots` more sequences beside a loaded
    /// bundle.
    pub(crate) fn check_slots_memory(&self, slots: usize) -> Result<()> {
        let needed = self.sequence_bytes(FLOAT).saturating_mul(slots as u64);
        self.hold(needed, None)
    }

    fn hold(&self, needed: u64, free: Option<u64>) -> Result<()> {
        hold(&self.gate, needed, self.memory_limit.or(free))
    }

    fn weight_bytes<'a>(&self, graphs: impl Iterator<Item = &'a Path>) -> u64 {
        let bytes = graphs.filter_map(|graph| self.gate.graphs.get(graph));
        bytes.fold(0, |sum, graph| sum.saturating_add(graph.bytes))
    }

    /// Caches, saved hidden states, and the buffers of the longest pass, of numbers of `element`
    /// bytes.
    fn sequence_bytes(&self, element: u64) -> u64 {
        let manifest = &self.manifest;
        let product = |sizes: &[u64]| {
            sizes
                .iter()
                .fold(1, |left: u64, &right| left.saturating_mul(right))
        };
        let length = manifest.max_cache_length as u64;
        let hidden = manifest.model.hidden_size as u64;
        let caches = manifest.key_value_heads.iter();
        let caches = caches.map(|kv| product(&[2, kv.heads as u64, length, kv.head_size as u64]));
        let contexts = manifest.contexts.iter();
        let contexts = contexts.map(|context| {
            let numbers = context.numbers(MAX_TOKENS as usize);
            numbers.map_or(u64::MAX, |numbers| numbers as u64)
        });
        let rows = [
            product(&[hidden, length]),
            product(&[2, hidden, MAX_TOKENS]),
            product(&[manifest.model.vocab_size as u64, LOGIT_ROWS]),
        ];
        let numbers = caches.chain(contexts).chain(rows);
        let numbers = numbers.fold(0, u64::saturating_add);
        numbers.saturating_mul(element)
    }
}

/// What a loaded bundle may take of a device's memory, and what it has taken.
#[derive(Debug)]
pub(crate) struct DeviceBudget {
    path: PathBuf,
    limit: Option<u64>,
    taken: u64,
}

impl DeviceBudget {
    /// Bytes that it may take of the `free` ones.
    pub(crate) fn left(&self, free: u64) -> u64 {
        let left = self.limit.map(|limit| limit.saturating_sub(self.taken));
        left.map_or(free, |left| left.min(free))
    }

    /// Check that it may take `needed` bytes of the `free` ones.
    ///
    /// # Errors
    /// [`Error::Memory`] with what is needed and what there is.
    pub(crate) fn check(&self, needed: u64, free: u64) -> Result<()> {
        compare(&self.path, needed, self.left(free))
    }

    /// It has taken `taken` bytes, and given `freed` back.
    pub(crate) fn note(&mut self, taken: u64, freed: u64) {
        self.taken = (self.taken + taken).saturating_sub(freed);
    }
}

/// Check that there is memory to read each graph and text of `files` whole, and for what is made of
/// it.
pub(super) fn check_reading(gate: &Gate, manifest: &Manifest, limit: Option<u64>) -> Result<()> {
    let files = manifest.files.iter();
    let whole = files.filter(|(name, _)| {
        let extension = name.extension().and_then(OsStr::to_str);
        matches!(extension, Some("onnx" | "json" | "jinja"))
    });
    let largest = whole.map(|(_, file)| file.bytes).max().unwrap_or(0);
    hold(gate, largest.saturating_mul(COPIES), limit)
}

/// `limit` None stands for the memory that is free.
fn hold(gate: &Gate, needed: u64, limit: Option<u64>) -> Result<()> {
    match limit.or_else(available) {
        Some(limit) => compare(&gate.shown_directory(), needed, limit),
        None => Ok(()),
    }
}

/// Check that the bundle in `path` needs no more than `limit` bytes.
fn compare(path: &Path, needed: u64, limit: u64) -> Result<()> {
    if needed <= limit {
        return Ok(());
    }
    Err(Error::Memory {
        path: path.to_owned(),
        needed,
        limit,
    })
}

/// Bytes of memory that this process may still take, its control group's limit included; None where
/// the system does not say.
fn available() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let free = system.available_memory();
    let limited = system.cgroup_limits().map(|limits| limits.free_memory);
    let free = limited.map_or(free, |limited| free.min(limited));
    (free > 0).then_some(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: Option<u64>) -> DeviceBudget {
        DeviceBudget {
            path: "bundle".into(),
            limit,
            taken: 0,
        }
    }

    #[test]
    fn a_budget_is_what_is_free_and_what_the_limit_leaves() {
        assert_eq!(budget(None).left(50), 50);
        let mut limited = budget(Some(100));
        assert_eq!((limited.left(50), limited.left(500)), (50, 100));
        limited.note(70, 0);
        assert_eq!((limited.left(20), limited.left(500)), (20, 30));
        // as caches are replaced by larger ones
        limited.note(25, 60);
        assert_eq!(limited.left(500), 65);
        assert!(limited.check(65, 500).is_ok());
        let refused = limited.check(66, 500);
        let wanted = (66, 65);
        assert!(
            matches!(refused, Err(Error::Memory { needed, limit, .. }) if (needed, limit) == wanted)
        );
        limited.note(100, 0);
        assert_eq!(limited.left(500), 0);
    }
}
