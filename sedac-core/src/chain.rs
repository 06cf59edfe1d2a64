//! The decode loop: prompt -> prefill -> (sample -> decode)* -> tokens.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::backend::{Backend, HostDecided, Layout, OnnxRuntime, Step};
use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::policy::{ExitReason, Forced, Policy, Stability};
use crate::sampler::{Sampler, Sampling};

/// When tokens exit.
#[derive(Debug, Clone, PartialEq)]
pub enum Exit {
    /// Never: every token runs at full depth.
    Never,
    /// After consecutive stable layers; see [`Stability`].
    Stability {
        /// Stability a layer must reach.
        tau: f32,
        /// Layers in a row that must reach it.
        consecutive_k: usize,
        /// Share of the layers that always run.
        min_layer_ratio: f32,
    },
    /// The n-th decoded token after `depths[n % depths.len()]` layers; see [`Forced`].
    Forced {
        /// Depths, each 1 to the number of layers.
        depths: Vec<usize>,
    },
}

impl Exit {
    fn policy(&self, layers: usize) -> Result<Box<dyn Policy>> {
        match self {
            Self::Never => Ok(Box::new(Forced::new(vec![layers]))),
            &Self::Stability {
                tau,
                consecutive_k,
                min_layer_ratio,
            } => Ok(Box::new(Stability::new(
                tau,
                consecutive_k,
                min_layer_ratio,
                layers,
            )?)),
            Self::Forced { depths } => {
                let wrong = depths.iter().find(|depth| !(1..=layers).contains(depth));
                if let Some(depth) = wrong {
                    let range = format!("1 to {layers}, the model's layers");
                    return Err(Error::setting("forced_exit", depth, range));
                }
                if depths.is_empty() {
                    return Err(Error::setting(
                        "forced_exit",
                        "(none)",
                        "at least one depth",
                    ));
                }
                Ok(Box::new(Forced::new(depths.clone())))
            }
        }
    }
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// At most so many new tokens.
    pub max_new_tokens: usize,
    /// Tokens that end the text.
    pub stop_tokens: Vec<u32>,
    /// When tokens exit.
    pub exit: Exit,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// max_new_tokens were generated or the cache is full.
    Length,
}

impl FinishReason {
    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// One generated token.
#[derive(Debug, Clone, Copy)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The depth whose logits it was chosen from, and why no deeper. The first token comes from
    /// the prompt's last position, which always runs at full depth.
    pub step: Step,
}

/// How a generation went.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Time for the prompt, until the first token's logits.
    pub prefill: Duration,
    /// Time for all other tokens, and for filling the caches at the end.
    pub decode: Duration,
}

/// Generates with one backend. One sequence at a time.
pub struct Chain {
    backend: Box<dyn Backend>,
    vocab_size: usize,
}

impl Chain {
    /// A chain over ONNX Runtime engines of `bundle`; see [`OnnxRuntime::load`].
    ///
    /// # Errors
    /// What [`OnnxRuntime::load`] reports.
    pub fn load(bundle: &Bundle, layout: Layout, library: &Path, threads: usize) -> Result<Self> {
        let engines = OnnxRuntime::load(bundle, layout, library, threads)?;
        let manifest = &bundle.manifest;
        let backend = HostDecided::new(engines, &manifest.exit_layers, manifest.max_cache_length);
        Ok(Self::new(Box::new(backend), manifest.model.vocab_size))
    }

    /// A chain over any backend whose logits are `vocab_size` numbers.
    pub fn new(backend: Box<dyn Backend>, vocab_size: usize) -> Self {
        Self {
            backend,
            vocab_size,
        }
    }

    /// Decoder layers of the model.
    pub fn num_layers(&self) -> usize {
        self.backend.num_layers()
    }

    /// Positions that a sequence may have. Forgets the sequence.
    pub fn capacity(&mut self) -> usize {
        self.backend.reset();
        self.backend.room()
    }

    /// Generate, handing each token to `emit` as it comes.
    ///
    /// # Errors
    /// [`Error::Setting`] and [`Error::Prompt`] before anything runs, [`Error::Cancelled`] when
    /// interrupted, and what the backend reports.
    pub fn generate(
        &mut self,
        request: &Request,
        interrupt: &Interrupt,
        mut emit: impl FnMut(Token),
    ) -> Result<Summary> {
        let mut policy = request.exit.policy(self.num_layers())?;
        let mut sampler = Sampler::new(request.sampling)?;
        self.backend.reset();
        self.check_prompt(request)?;
        let mut history = request.prompt.clone();
        let started = Instant::now();
        self.backend.prefill(&request.prompt, interrupt)?;
        let prefill = started.elapsed();
        let mut step = Step {
            exit_layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        };
        let finish_reason = loop {
            let id = sampler.sample(self.backend.logits(), &history);
            emit(Token { id, step });
            history.push(id);
            if request.stop_tokens.contains(&id) {
                break FinishReason::Stop;
            }
            let generated = history.len() - request.prompt.len();
            if generated == request.max_new_tokens || self.backend.room() == 0 {
                break FinishReason::Length;
            }
            step = self.backend.decode(id, policy.as_mut(), interrupt)?;
        };
        self.backend.complete(interrupt)?;
        Ok(Summary {
            finish_reason,
            prefill,
            decode: started.elapsed() - prefill,
        })
    }

    fn check_prompt(&self, request: &Request) -> Result<()> {
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "1 or more"));
        }
        if request.prompt.is_empty() {
            return Err(Error::Prompt("holds no token; give some text".into()));
        }
        let room = self.backend.room();
        if request.prompt.len() > room {
            return Err(Error::Prompt(format!(
                "of {} tokens is longer than the cache of {room} positions; shorten it or build \
                 the bundle with a larger --max-cache-length",
                request.prompt.len()
            )));
        }
        let vocabulary = self.vocab_size;
        if let Some(token) = request.prompt.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Prompt(format!(
                "holds token {token}, but the model knows {vocabulary} tokens only"
            )));
        }
        Ok(())
    }
}
