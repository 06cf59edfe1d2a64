//! How long engines took.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::Result;

/// What an engine computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnginePart {
    /// Hidden states of tokens.
    Embed,
    /// Consecutive layers.
    Layers(Range<usize>),
    /// Consecutive layers without their MLPs.
    Attention(Range<usize>),
    /// Keys and values of one skipped layer.
    KeyValue(usize),
    /// The exit head of one depth.
    ExitHead(usize),
    /// The lens of one depth.
    Lens(usize),
    /// Logits.
    Head,
}

/// One run of one engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineTiming {
    /// What ran.
    pub part: EnginePart,
    /// Tokens in the pass.
    pub tokens: usize,
    /// When it started, since the engines were loaded.
    pub start: Duration,
    /// How long it took.
    pub elapsed: Duration,
}

/// Times engines that have run when their call returns.
#[derive(Debug)]
pub struct Stopwatch {
    epoch: Instant,
    timings: Vec<EngineTiming>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            timings: Vec::new(),
        }
    }
}

impl Stopwatch {
    /// Run `work`, which takes `tokens` tokens through `part`.
    ///
    /// # Errors
    /// What `work` reports.
    pub fn time<T>(
        &mut self,
        part: EnginePart,
        tokens: usize,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let start = self.epoch.elapsed();
        let result = work()?;
        self.timings.push(EngineTiming {
            part,
            tokens,
            start,
            elapsed: self.epoch.elapsed() - start,
        });
        Ok(result)
    }

    /// What was timed since the last call.
    pub fn take(&mut self) -> Vec<EngineTiming> {
        std::mem::take(&mut self.timings)
    }
}
