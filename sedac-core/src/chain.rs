//! The decode loop: prompt -> prefill -> (sample -> decode)* -> tokens.

mod decoding;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use self::decoding::{Decoding, Drafts, Text};
use crate::backend::{Backend, Engines, HostDecided, Layout, OnnxRuntime, Step};
use crate::bundle::Bundle;
use crate::draft::{Draft, DrafterKind};
use crate::error::{Error, Result};
use crate::exit_config::KvFill;
use crate::interrupt::Interrupt;
use crate::policy::{ExitReason, Forced, Policy, PolicySettings};
use crate::sampler::{Sampler, Sampling, argmax};

/// When tokens exit.
#[derive(Debug, Clone, PartialEq)]
pub enum Exit {
    /// Never: every token runs at full depth.
    Never,
    /// When a policy says so.
    Policy {
        /// What decides.
        settings: PolicySettings,
        /// What guesses the tokens that the policy does not let exit, for full depth to verify
        /// several at once. Takes [`KvFill::Defer`] and exits that are not soft.
        drafter: Option<DrafterKind>,
    },
    /// Only to guess: tokens come from full depth, which verifies several guesses at once.
    Lossless {
        /// What guesses.
        drafter: DrafterKind,
    },
    /// The n-th decoded token after `depths[n % depths.len()]` layers; see [`Forced`].
    Forced {
        /// Depths, each 1 to the number of layers.
        depths: Vec<usize>,
    },
}

impl Exit {
    /// Lossless drafts always wait to be continued by the pass that verifies them.
    fn kv_fill(&self, wanted: KvFill) -> KvFill {
        match self {
            Self::Lossless { .. } => KvFill::Defer,
            _ => wanted,
        }
    }

    fn drafter(&self) -> Option<DrafterKind> {
        match self {
            Self::Lossless { drafter } => Some(*drafter),
            Self::Policy { drafter, .. } => *drafter,
            _ => None,
        }
    }

    /// Layers that drafts run at least, of those of `exit_layers` up to half of `layers`: to pass
    /// over an exit that the policy takes would give away what it saves. None in lossless mode.
    fn least_draft_depth(&self, exit_layers: &[usize], layers: usize) -> Option<usize> {
        let Self::Policy { settings, .. } = self else {
            return None;
        };
        let taken = |depth: &usize| *depth <= layers / 2 && settings.may_exit(*depth);
        Some(exit_layers.iter().copied().filter(taken).max().unwrap_or(0))
    }

    fn check(&self, kv_fill: KvFill) -> Result<()> {
        match self {
            Self::Policy {
                settings,
                drafter: Some(drafter),
            } => drafter.check_exits(settings, kv_fill),
            _ => Ok(()),
        }
    }

    fn policy(&self, layers: usize) -> Result<Box<dyn Policy>> {
        match self {
            Self::Never | Self::Lossless { .. } => Ok(Box::new(Forced::new(vec![layers]))),
            Self::Policy { settings, .. } => settings.policy(layers),
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
    /// What the caches of layers that tokens skip get.
    pub kv_fill: KvFill,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated, or whoever takes the tokens wants no more.
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
#[derive(Debug, Clone)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Time for the prompt, until the first token's logits.
    pub prefill: Duration,
    /// Time for all other tokens, and for filling the caches at the end.
    pub decode: Duration,
    /// How drafting went; all zero when nothing was drafted.
    pub drafting: Drafting,
}

/// How the drafts of a generation went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drafting {
    /// Tokens guessed, and between them those that the policy was sure of.
    pub drafted: usize,
    /// Those of them that came: full depth confirmed the guesses up to there.
    pub accepted: usize,
    /// Passes of more than one token that verified guesses, or of one whose exit was not trusted.
    pub verify_passes: usize,
    /// Drafts by the layers they went through; 0 for those that ran no layer.
    pub draft_depths: BTreeMap<usize, usize>,
}

impl Drafting {
    /// `tokens` came instead of `draft`.
    fn count(&mut self, draft: &Draft, tokens: &[u32]) {
        if draft.is_certain() {
            return;
        }
        self.drafted += draft.tokens.len();
        let pairs = tokens.iter().zip(&draft.tokens);
        self.accepted += pairs.take_while(|(token, guess)| token == guess).count();
        self.verify_passes += 1;
        *self.draft_depths.entry(draft.depth).or_default() += 1;
    }
}

/// Generates with one backend. One sequence at a time.
pub struct Chain {
    backend: Box<dyn Backend>,
    exit_layers: Vec<usize>,
    vocab_size: usize,
    /// Kept, since they learn what pays on this machine; by the layers that drafts run at least,
    /// None in lossless mode.
    drafters: HashMap<(DrafterKind, Option<usize>), Drafts>,
}

impl Chain {
    /// A chain over ONNX Runtime engines of `bundle`; see [`OnnxRuntime::load`].
    ///
    /// # Errors
    /// What [`OnnxRuntime::load`] reports.
    pub fn load(bundle: &Bundle, layout: Layout, library: &Path, threads: usize) -> Result<Self> {
        let engines = OnnxRuntime::load(bundle, layout, library, threads)?;
        Ok(Self::over(bundle, engines))
    }

    /// A chain over any engines of `bundle`.
    pub fn over(bundle: &Bundle, engines: impl Engines + 'static) -> Self {
        let manifest = &bundle.manifest;
        let backend = HostDecided::new(engines, &manifest.exit_layers, manifest.max_cache_length);
        let exit_layers = manifest.exit_layers.clone();
        Self::new(Box::new(backend), exit_layers, manifest.model.vocab_size)
    }

    /// A chain over any backend whose logits are `vocab_size` numbers a token, with exits allowed
    /// after the depths `exit_layers`.
    pub fn new(backend: Box<dyn Backend>, exit_layers: Vec<usize>, vocab_size: usize) -> Self {
        Self {
            backend,
            exit_layers,
            vocab_size,
            drafters: HashMap::new(),
        }
    }

    /// Decoder layers of the model.
    pub fn num_layers(&self) -> usize {
        self.backend.num_layers()
    }

    /// Positions that a sequence may have. Forgets the sequence.
    pub fn capacity(&mut self) -> usize {
        self.backend.reset(KvFill::default());
        self.backend.room()
    }

    /// Generate, handing each token to `emit` as it comes; the text ends where that breaks.
    ///
    /// # Errors
    /// [`Error::Setting`] and [`Error::Prompt`] before anything runs, [`Error::Cancelled`] when
    /// interrupted, and what the backend reports.
    pub fn generate(
        &mut self,
        request: &Request,
        interrupt: &Interrupt,
        emit: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<Summary> {
        let layers = self.num_layers();
        request.exit.check(request.kv_fill)?;
        let mut policy = request.exit.policy(layers)?;
        let sampler = Sampler::new(request.sampling)?;
        self.backend.reset(request.exit.kv_fill(request.kv_fill));
        self.check_prompt(request)?;
        let started = Instant::now();
        self.backend.prefill(&request.prompt, interrupt)?;
        let prefill = started.elapsed();
        let full_depth = self.full_depth();
        let room = self.backend.room();
        let (drafters, exit_layers) = (&mut self.drafters, &self.exit_layers);
        let mut drafts = request.exit.drafter().map(|kind| {
            let least = request.exit.least_draft_depth(exit_layers, layers);
            let new = || {
                Drafts::new(
                    kind.drafter(exit_layers, layers, least.unwrap_or(0)),
                    layers,
                )
            };
            drafters.entry((kind, least)).or_insert_with(new)
        });
        let mut decoding = Decoding {
            backend: self.backend.as_mut(),
            vocab_size: self.vocab_size,
            policy: policy.as_mut(),
            interrupt,
            text: Text::new(request, sampler, room, emit),
            drafting: Drafting::default(),
        };
        decoding.text.take(decoding.backend.logits(), full_depth);
        while decoding.text.finished.is_none() {
            match &mut drafts {
                Some(drafts) => decoding.round(drafts)?,
                None => decoding.step().map(|_| ())?,
            }
        }
        decoding.backend.complete(interrupt)?;
        Ok(Summary {
            finish_reason: decoding.text.finished.unwrap_or(FinishReason::Length),
            prefill,
            decode: started.elapsed() - prefill,
            drafting: decoding.drafting,
        })
    }

    /// Run a given text token by token and hand to `emit`, for each token but the first, the
    /// likeliest next one and where it exited. The first runs at full depth, as prompts do. Ends with
    /// complete caches.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn follow(
        &mut self,
        tokens: &[u32],
        exit: &Exit,
        kv_fill: KvFill,
        interrupt: &Interrupt,
        mut emit: impl FnMut(Token),
    ) -> Result<()> {
        let mut policy = exit.policy(self.num_layers())?;
        self.backend.reset(kv_fill);
        self.check_tokens(tokens)?;
        self.backend.prefill(&tokens[..1], interrupt)?;
        for &token in &tokens[1..] {
            let step = self.backend.decode(token, policy.as_mut(), interrupt)?;
            let id = argmax(self.backend.logits());
            emit(Token { id, step });
        }
        // what the last tokens left open is part of what exits cost
        self.backend.complete(interrupt)
    }

    fn full_depth(&self) -> Step {
        Step {
            exit_layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        }
    }

    fn check_prompt(&self, request: &Request) -> Result<()> {
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "1 or more"));
        }
        self.check_tokens(&request.prompt)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Prompt("holds no token; give some text".into()));
        }
        let room = self.backend.room();
        if tokens.len() > room {
            return Err(Error::Prompt(format!(
                "of {} tokens is longer than the cache of {room} positions; shorten it or build \
                 the bundle with a larger --max-cache-length",
                tokens.len()
            )));
        }
        let vocabulary = self.vocab_size;
        if let Some(token) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Prompt(format!(
                "holds token {token}, but the model knows {vocabulary} tokens only"
            )));
        }
        Ok(())
    }
}
