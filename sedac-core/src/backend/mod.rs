//! What runs engines. Each backend is one file.
//!
//! A [`Backend`] runs whole steps: where the decision to exit is taken, on the host or on a
//! device, is up to it. One that decides on the host only has to provide [`Engines`] and is driven
//! by [`HostDecided`].

mod capabilities;
mod costs;
pub mod cuda;
mod draft_engine;
mod gpu;
mod host_decided;
mod not_finite;
mod onnxruntime;
pub mod profile;
mod row_engines;
mod stability;
mod step;
pub mod tensorrt;
mod timing;

use std::ops::Range;

pub(crate) use self::gpu::gpu_name;
pub(crate) use self::stability::stability;
pub use capabilities::Capabilities;
pub use costs::{CostRecord, Costs};
pub use draft_engine::{DraftChoice, DraftEngine, DraftRequest, DraftedToken, Drafts};
pub use host_decided::HostDecided;
pub use onnxruntime::{Exits, GraphDevice, GraphExecutor, Layout, OnnxRuntime, with_own_operators};
pub use row_engines::{RowEngines, SequenceRows};
pub use step::{
    Ahead, Logits, LogitsRequest, MARGIN_BINS, MAX_AHEAD, NextDraft, PositionLogits, SequenceStep,
    StepExit, StepOutcome, margin_bin,
};
pub use timing::{EnginePart, EngineTiming, Stopwatch};

use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::ExitSignals;
use crate::sequence::Sequence;

/// Longer passes run in pieces: activations stay small, and an interrupt is noticed soon.
const MAX_TOKENS: usize = 256;

/// Runs steps of sequences.
pub trait Backend: Send {
    /// Decoder layers of the model.
    fn num_layers(&self) -> usize;

    /// What it can do beyond running layers.
    fn capabilities(&self) -> &Capabilities;

    /// Make slots for `sequences` sequences at once, where there are fewer and the backend can:
    /// [`Capabilities::sequences`] then says how many there are.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when they do not fit, and what the engines report.
    fn reserve(&mut self, sequences: usize) -> Result<()> {
        let _ = sequences;
        Ok(())
    }

    /// Slots that are to be made where nobody says how many sequences run at once: one of them is for a
    /// sequence beside those.
    ///
    /// # Errors
    /// What the device reports.
    fn usual_slots(&self) -> Result<usize> {
        Ok(9)
    }

    /// Start a sequence, in which caches of layers that a token skips get what `kv_fill` says.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) when every cache slot is taken.
    fn open(&mut self, kv_fill: KvFill) -> Result<Sequence>;

    /// Copy the caches of the first `length` positions of `from`, which every layer holds, to the empty
    /// sequence `to`. False where the backend cannot.
    ///
    /// # Errors
    /// What the device reports.
    fn copy(&mut self, from: &Sequence, length: usize, to: &mut Sequence) -> Result<bool> {
        let _ = (from, length, to);
        Ok(false)
    }

    /// Run one step of each of some sequences. The outcomes are in the order of the steps.
    ///
    /// # Errors
    /// [`Error::Prompt`](crate::Error::Prompt) when tokens do not fit; nothing has changed then.
    /// [`Error::Cancelled`](crate::Error::Cancelled) when interrupted,
    /// [`Error::NotFinite`](crate::Error::NotFinite) when a logit is NaN or infinite, and what the
    /// engines report; the sequences can only be dropped after these.
    fn step(
        &mut self,
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>>;

    /// The trained drafter, where there is one.
    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        None
    }

    /// What passes cost so far, as the backend measured it.
    fn costs(&self) -> &Costs;

    /// The same, to start from what an earlier process measured.
    fn costs_mut(&mut self) -> &mut Costs;
}

/// Single engines, for a host that decides between them.
///
/// The engines carry the residual stream of one pass: [`embed`](Self::embed) sets it and each
/// [`run`](Self::run) takes it through one engine.
pub trait Engines: Send {
    /// Layers of each engine, shallowest first; together they cover the model.
    fn layers(&self) -> Vec<Range<usize>>;

    /// What there is beyond layers.
    fn capabilities(&self) -> Capabilities;

    /// Make slots for `sequences` sequences, more than there are, where these engines can. Returns the
    /// number of slots that there are.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) when they do not fit, and what the engines report.
    fn reserve(&mut self, sequences: usize) -> Result<usize> {
        let _ = sequences;
        Ok(self.capabilities().sequences)
    }

    /// Copy the KV caches of the first `length` positions from the slot `from` to the slot `to`. False
    /// where these engines cannot.
    fn copy(&mut self, from: usize, length: usize, to: usize) -> bool {
        let _ = (from, length, to);
        false
    }

    /// Make the KV cache and saved hidden states in `slot`, below
    /// [`Capabilities::sequences`], those that the following calls use.
    fn select(&mut self, slot: usize) {
        debug_assert_eq!(slot, 0, "one sequence at a time");
    }

    /// The most tokens that one pass may have: no fewer than a draft and the token before it, where
    /// the cache has room for them.
    fn max_tokens(&self) -> usize {
        MAX_TOKENS
    }

    /// Start a pass over `tokens` at positions from `start` on.
    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()>;

    /// Start a pass over `positions` at `engine`, from their saved hidden states.
    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()>;

    /// Take the residual stream through `engine`; its layers' caches then hold the pass's
    /// positions.
    fn run(&mut self, engine: usize) -> Result<()>;

    /// Passes over rows of several sequences, where there are any.
    fn rows(&mut self) -> Option<&mut dyn RowEngines> {
        None
    }

    /// The engines of attention alone, where there are any.
    fn attention_only(&mut self) -> Option<&mut dyn AttentionOnly> {
        None
    }

    /// The trained drafter, where there is one.
    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        None
    }

    /// The residual stream of the pass's newest `tokens` tokens, a row each. Only asked for to find
    /// out where a failure comes from.
    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>>;

    /// Overwrite what caches hold, of which something is not finite. Engines that read entries which
    /// they mask out must: even zero times NaN is NaN.
    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    /// Stability after each layer of `engine`, for the newest token of the last
    /// [`run`](Self::run). Only asked for where a rule decides.
    fn stability(&mut self, engine: usize) -> Result<Vec<f32>>;

    /// The entropy probe's risk after `engine`, for the newest token of the last
    /// [`run`](Self::run); None where there is no probe.
    fn risk(&self, engine: usize) -> Option<f32>;

    /// What the exit head at `depth` gives for the newest token, whose last three layers up to
    /// there had the `stability` given, 0 where there are fewer. None where there is no exit head.
    fn exit_signals(&mut self, depth: usize, stability: [f32; 3]) -> Result<Option<ExitSignals>>;

    /// Save the residual stream as the hidden states of `positions`, the pass's.
    fn save(&mut self, positions: Range<usize>) -> Result<()>;

    /// Fill `layer`'s cache at `positions` from their saved hidden states.
    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()>;

    /// Compute the logits of the pass's newest `tokens` tokens from the residual stream, through
    /// the lens of its depth if there is one.
    fn head(&mut self, tokens: usize) -> Result<()>;

    /// The logits computed last, a row for each token.
    fn logits(&self) -> &[f32];

    /// How long engines took that have run since the last call, as far as it is known without
    /// waiting for any.
    fn take_timings(&mut self) -> Vec<EngineTiming>;
}

/// Engines whose MLPs add nothing, for soft exits.
pub trait AttentionOnly {
    /// Like [`Engines::run`], without the MLPs.
    ///
    /// # Errors
    /// What the engines report.
    fn run_attention(&mut self, engine: usize) -> Result<()>;
}
