//! Chains the per-layer engines of a decoder and stops each token at the layer that suffices.
//!
//! Data goes one way: [`bundle`] -> [`backend`] -> [`chain`] -> [`text`]. A [`policy`] decides
//! after each layer whether a token may stop; [`kv`] remembers which positions each layer's cache
//! holds. The crate knows no Python; its binding is compiled with the feature `python` only.

pub mod backend;
pub mod bench;
pub mod bundle;
pub mod certificate;
pub mod certification;
pub mod chain;
pub mod draft;
pub mod error;
pub mod exit_config;
pub mod interrupt;
pub mod kv;
pub mod plans;
pub mod policy;
pub mod sampler;
pub mod text;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
