//! Chains the per-layer engines of a decoder and stops each token at the layer that suffices.
//!
//! Data goes one way: [`bundle`] -> [`backend`] -> [`chain`] -> [`text`]. A [`policy`] compiles to a
//! rule that says after each layer whether a token may stop; [`kv`] tracks which positions each
//! layer's cache holds, for each [`sequence`]. [`draft`] proposes tokens for full depth to verify.
//! The crate knows no Python; its binding is compiled with the feature `python` only.

pub mod backend;
pub mod bench;
pub mod bundle;
pub mod certification;
pub mod chain;
pub mod draft;
pub mod error;
pub mod interrupt;
pub mod kv;
pub mod policy;
pub mod sampler;
pub mod sequence;
pub mod text;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
