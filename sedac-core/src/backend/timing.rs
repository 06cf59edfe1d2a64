//! How long engines took.

use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::Result;

/// What an engine computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnginePart {
    /// Hidden states of tokens.
    Embed,
    /// What layers take of positions.
    Contexts,
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

impl fmt::Display for EnginePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => f.write_str("embed"),
            Self::Contexts => f.write_str("contexts"),
            Self::Layers(layers) if layers.len() == 1 => write!(f, "layer {}", layers.start),
            Self::Layers(layers) => write!(f, "layers {}-{}", layers.start, layers.end - 1),
            Self::Attention(layers) if layers.len() == 1 => write!(f, "attention {}", layers.start),
            Self::Attention(layers) => write!(f, "attention {}-{}", layers.start, layers.end - 1),
            Self::KeyValue(layer) => write!(f, "kv {layer}"),
            Self::ExitHead(depth) => write!(f, "exit head {depth}"),
            Self::Lens(depth) => write!(f, "lens {depth}"),
            Self::Head => f.write_str("head"),
        }
    }
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
