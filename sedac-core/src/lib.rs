//! Chains the per-layer engines of a decoder and stops each token at the layer that suffices.
//!
//! Data flows in one direction: [`bundle`] -> [`backend`] -> [`chain`] -> [`text`]. A [`policy`] compiles to a
//! rule that says after each layer whether a token may stop; [`kv`] tracks which positions each
//! layer's cache holds, for each [`sequence`]. [`draft`] proposes tokens for full depth to verify.
//! The crate knows no Python; its binding is compiled with the feature `python` only.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use sedac_core::backend::Layout;
//! use sedac_core::bundle::{Bundle, DrafterKind};
//! use sedac_core::chain::{Chain, DecodingMode, Request};
//! use sedac_core::interrupt::Interrupt;
//! use sedac_core::kv::KvFill;
//! use sedac_core::sampler::Sampling;
//!
//! # fn main() -> sedac_core::Result<()> {
//! let bundle = Bundle::open(Path::new("engines/demo"))?;
//! let onnxruntime = Path::new("libonnxruntime.so");
//! let mut chain = Chain::load(&bundle, Layout::Engines, onnxruntime, 2)?;
//! let request = Request {
//!     prompt: vec![1, 2, 3],
//!     max_new_tokens: 16,
//!     stop_tokens: bundle.manifest.model.eos_token_ids.clone(),
//!     mode: DecodingMode::Lossless { drafter: DrafterKind::Auto },
//!     kv_fill: KvFill::Defer,
//!     sampling: Sampling::default(),
//! };
//! let summary = chain.generate(&request, &Interrupt::default(), |token| {
//!     println!("{} after {} layers", token.id, token.exit.layer);
//!     ControlFlow::Continue(())
//! })?;
//! println!("{} of {} accepted", summary.drafts.accepted, summary.drafts.drafted);
//! # Ok(())
//! # }
//! ```

pub mod backend;
pub mod bench;
pub mod bundle;
mod cache_file;
pub mod certification;
pub mod chain;
pub mod draft;
pub mod error;
mod exponential;
pub mod interrupt;
pub mod kv;
pub mod policy;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod text;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
