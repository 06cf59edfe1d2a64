//! What runs engines. Each backend is one file.
//!
//! A [`Backend`] runs whole steps: where the decision to exit is taken, on the host or on a
//! device, is its own matter. One that decides on the host only has to provide [`Engines`] and is
//! driven by [`HostDecided`].

mod costs;
mod host;
mod not_finite;
mod onnxruntime;
pub mod tensorrt;

use std::ops::Range;

pub use costs::Costs;
pub use host::HostDecided;
pub use onnxruntime::{Exits, Layout, OnnxRuntime};

use crate::error::Result;
use crate::exit_config::KvFill;
use crate::interrupt::Interrupt;
use crate::policy::{ExitReason, ExitSignals, Policy};

/// Longer passes run in pieces: activations stay small, and an interrupt is noticed soon.
const MOST_TOKENS: usize = 256;

/// How one token's step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Layers executed, 1 to the number of layers.
    pub exit_layer: usize,
    /// Why no further.
    pub reason: ExitReason,
}

/// Runs steps of one sequence.
pub trait Backend: Send {
    /// Decoder layers of the model.
    fn num_layers(&self) -> usize;

    /// Positions there is still room for.
    fn room(&self) -> usize;

    /// Forget the sequence. In the next one, caches of layers that a token skips get what
    /// `kv_fill` says.
    fn reset(&mut self, kv_fill: KvFill);

    /// Run `tokens` at full depth; afterwards [`logits`](Self::logits) are the last one's.
    ///
    /// # Errors
    /// [`Error::Prompt`](crate::Error::Prompt) when they do not fit; nothing has changed then.
    /// [`Error::Cancelled`](crate::Error::Cancelled) when interrupted,
    /// [`Error::NotFinite`](crate::Error::NotFinite) when a logit is NaN or infinite, and what the
    /// engines report; the sequence must be [`reset`](Self::reset) after these.
    fn prefill(&mut self, tokens: &[u32], interrupt: &Interrupt) -> Result<()>;

    /// Run one token under `policy`; afterwards [`logits`](Self::logits) are its own, taken where
    /// it exited, at full depth those of the newest [`rows`](Policy::rows) that ran with it. Fails
    /// as [`prefill`](Self::prefill) does.
    fn decode(
        &mut self,
        token: u32,
        policy: &mut dyn Policy,
        interrupt: &Interrupt,
    ) -> Result<Step>;

    /// Run the `new` tokens to full depth in one pass, in which positions join that wait to be
    /// continued ([`KvFill::Defer`]); afterwards [`logits`](Self::logits) are those of the newest
    /// `rows` tokens of the pass, one row each. Fails as [`prefill`](Self::prefill) does.
    fn verify(&mut self, new: &[u32], rows: usize, interrupt: &Interrupt) -> Result<()>;

    /// Forget all positions from `length` on.
    fn truncate(&mut self, length: usize);

    /// Logits of the newest token, or after [`verify`](Self::verify) of each of its tokens in
    /// turn.
    fn logits(&self) -> &[f32];

    /// What passes took so far.
    fn costs(&self) -> &Costs;

    /// Fill what exits left open in the caches, so that every layer holds every position. Fails as
    /// [`prefill`](Self::prefill) does.
    fn complete(&mut self, interrupt: &Interrupt) -> Result<()>;
}

/// Single engines of one sequence, for a host that decides between them.
///
/// The engines carry a current residual stream: [`embed`](Self::embed) sets it and each
/// [`run`](Self::run) takes it through one engine.
pub trait Engines: Send {
    /// Layers of each engine, shallowest first; together they cover the model.
    fn layers(&self) -> Vec<Range<usize>>;

    /// Tokens that one pass may have: no fewer than a draft and the token before it, where the
    /// cache has room for them.
    fn most_tokens(&self) -> usize {
        MOST_TOKENS
    }

    /// Start a pass over `tokens` at positions from `start` on.
    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()>;

    /// Start a pass over `positions` at `engine`, from their kept hidden states.
    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()>;

    /// Take the current residual stream through `engine`; its layers' caches then hold the pass's
    /// positions.
    fn run(&mut self, engine: usize) -> Result<()>;

    /// The current residual stream of the pass's newest `tokens` tokens, a row each. Only asked for
    /// to find out where a failure comes from.
    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>>;

    /// Overwrite what caches hold, of which something is not finite. Engines that read entries which
    /// they mask out must: even zero times NaN is NaN.
    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    /// Stability after each layer of `engine`, for the newest token of the last
    /// [`run`](Self::run).
    fn stability(&self, engine: usize) -> &[f32];

    /// Like [`run`](Self::run), but the MLPs add nothing.
    fn run_attention(&mut self, engine: usize) -> Result<()>;

    /// The entropy probe's risk after `engine`, for the newest token of the last
    /// [`run`](Self::run); None where there is no probe.
    fn risk(&self, engine: usize) -> Option<f32>;

    /// What the exit engine at `depth` tells about the newest token, whose layers up to there had
    /// the `stability` given for the last three of them, 0 where there are fewer. None where there
    /// is no exit engine.
    fn exit_signals(&mut self, depth: usize, stability: [f32; 3]) -> Result<Option<ExitSignals>>;

    /// Keep the current residual stream as the hidden states of `positions`, the pass's.
    fn keep(&mut self, positions: Range<usize>) -> Result<()>;

    /// Fill `layer`'s cache at `positions` from their kept hidden states.
    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()>;

    /// Compute the logits of the pass's newest `tokens` tokens from the current residual stream,
    /// through the lens of its depth if there is one.
    fn head(&mut self, tokens: usize) -> Result<()>;

    /// The logits computed last, a row for each token.
    fn logits(&self) -> &[f32];
}
