//! The decode loop: prompt -> prefill -> (sample -> decode)* -> tokens.

mod decoding;
mod drafting;
mod drafting_record;
mod growing_text;
mod mode;
mod model_limits;
mod run_ahead;
mod trained_drafts;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::{debug, debug_span, info};

pub(crate) use self::decoding::Decoding;
use self::drafting::{Drafting, DraftingKey};
use self::drafting_record::{RecordFile, RecordKey};
use self::mode::ExitSchedule;
pub use self::mode::{DecodingChoice, DecodingMode, DecodingSetting, DrafterChoice, ModeName};
pub(crate) use self::model_limits::ModelLimits;
pub(crate) use self::trained_drafts::draft_together;
use crate::backend::cuda::CudaChain;
use crate::backend::{
    Ahead, Backend, Engines, HostDecided, Layout, LogitsRequest, OnnxRuntime, SequenceStep,
    StepExit, StepOutcome,
};
use crate::bundle::Bundle;
pub(crate) use crate::draft::Company;
use crate::draft::{Acceptance, Draft};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::sampler::{LogitsProcessing, Sampling, TokenLogprobs};
use crate::sequence::Sequence;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// The most new tokens.
    pub max_new_tokens: usize,
    /// Tokens that end the text.
    pub stop_tokens: Vec<u32>,
    /// When tokens exit.
    pub mode: DecodingMode,
    /// What the KV caches of layers that tokens skip get.
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
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Stop, Self::Length];

    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// One generated token.
#[derive(Debug, Clone)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The depth whose logits it was chosen from, and why no deeper. The first token comes from
    /// the prompt's last position, which always runs at full depth.
    pub exit: StepExit,
    /// Whether it was drafted, and full depth accepted it.
    pub is_accepted_draft: bool,
    /// How probable it was, where that was asked for.
    pub logprobs: Option<TokenLogprobs>,
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
    /// How drafts went; all zero when nothing was drafted.
    pub drafts: DraftSummary,
}

/// How the drafts of a generation went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftSummary {
    /// Tokens drafted, and between them those of exits that the rule took.
    pub drafted: usize,
    /// Those that full depth accepted.
    pub accepted: usize,
    /// Passes that verified drafts.
    pub verify_passes: usize,
    /// Drafts by the layers they ran; 0 for those that ran none.
    pub draft_depths: BTreeMap<usize, usize>,
}

impl DraftSummary {
    /// `tokens` came instead of `draft`.
    fn count(&mut self, draft: &Draft, tokens: &[u32]) {
        if draft.is_certain() {
            return;
        }
        self.drafted += draft.tokens.len();
        let pairs = tokens.iter().zip(&draft.tokens);
        let accepted = pairs.take_while(|(token, drafted)| token == drafted);
        self.accepted += accepted.count();
        self.verify_passes += 1;
        *self.draft_depths.entry(draft.depth).or_default() += 1;
    }
}

/// Generates with one backend.
pub struct Chain {
    backend: Box<dyn Backend>,
    exit_layers: Vec<usize>,
    capacity: usize,
    vocab_size: usize,
    /// Kept between generations, since they learn what pays on this machine.
    drafting: HashMap<DraftingKey, Drafting>,
    /// What earlier processes observed, and this one in lossless mode.
    acceptance: Acceptance,
    record: Option<RecordFile>,
}

/// Numbers of tokens in the passes that are timed: drafts have up to 15 and the token before them.
const TIMED: [usize; 5] = [1, 8, 16, 4, 2];
/// How often each is timed again once all have been: what else the machine does comes and goes.
const REPEATS: usize = 2;
/// Passes are timed for no longer than this.
const MAX_TIMING: Duration = Duration::from_millis(900);

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
        let capacity = manifest.max_cache_length;
        let backend = HostDecided::new(engines, &manifest.exit_layers, capacity);
        Self::of(bundle, Box::new(backend))
    }

    /// A chain over the CUDA kernels of `bundle`, on the first GPU; see [`CudaChain::load`].
    ///
    /// # Errors
    /// What [`CudaChain::load`] reports.
    pub fn load_cuda(bundle: &Bundle) -> Result<Self> {
        let backend = CudaChain::load(bundle, 1)?;
        Ok(Self::of(bundle, Box::new(backend)))
    }

    /// A chain over a backend of `bundle`.
    fn of(bundle: &Bundle, backend: Box<dyn Backend>) -> Self {
        let manifest = &bundle.manifest;
        let exit_layers = manifest.exit_layers.clone();
        let (capacity, vocab_size) = (manifest.max_cache_length, manifest.model.vocab_size);
        Self::new(backend, exit_layers, capacity, vocab_size)
    }

    /// A chain over any backend whose sequences have `capacity` positions and whose logits are
    /// `vocab_size` numbers a token, with exits allowed after the depths `exit_layers`.
    pub fn new(
        backend: Box<dyn Backend>,
        exit_layers: Vec<usize>,
        capacity: usize,
        vocab_size: usize,
    ) -> Self {
        Self {
            backend,
            exit_layers,
            capacity,
            vocab_size,
            drafting: HashMap::new(),
            acceptance: Acceptance::default(),
            record: None,
        }
    }

    /// Start from what drafting found out about `bundle` on this machine in earlier processes, and
    /// record it for later ones in the user's cache directory. Without a record, passes are timed
    /// now, which takes less than a second. `backend` names what runs the bundle, whether it does so
    /// on a GPU, and with how many `threads`: each has its own record.
    pub fn remember(&mut self, bundle: &Bundle, backend: &str, on_gpu: bool, threads: usize) {
        let mut file = RecordFile::new(RecordKey::new(bundle, backend, on_gpu, threads));
        if let Some(record) = file.read() {
            self.backend.costs_mut().recall(&record.costs);
            self.acceptance = record.acceptance;
        } else {
            if let Err(error) = self.time_passes() {
                debug!(%error, "the costs of passes are not known");
            }
            file.write(self.backend.costs().record(), Acceptance::default());
        }
        self.record = Some(file);
    }

    /// Draft the next text as a new process would: without earlier texts to look up, from recorded
    /// acceptance rates. What passes cost stays known.
    pub fn forget_texts(&mut self) {
        self.drafting.clear();
    }

    /// Run passes as drafts do, for the backend to note what they cost.
    fn time_passes(&mut self) -> Result<()> {
        let mut sequence = self.backend.open(KvFill::Defer)?;
        let started = Instant::now();
        let mut longest = Duration::ZERO;
        // the first pass of each number of tokens makes its buffers and does not count
        let first = TIMED.into_iter().flat_map(|tokens| [tokens, tokens]);
        for tokens in first.chain(TIMED.repeat(REPEATS)) {
            if started.elapsed() + longest > MAX_TIMING {
                break;
            }
            let before = Instant::now();
            self.time_pass(&mut sequence, tokens.min(self.capacity))?;
            longest = longest.max(before.elapsed());
        }
        Ok(())
    }

    fn time_pass(&mut self, sequence: &mut Sequence, tokens: usize) -> Result<()> {
        // different ones: where experts are chosen by the token, each has its own to load
        let token = |index| (index * self.vocab_size / tokens) as u32;
        let text: Vec<u32> = (0..tokens).map(token).collect();
        let logits = LogitsRequest::Tokens(tokens);
        self.prefill(sequence, &text, logits, &Interrupt::default())?;
        sequence.truncate(0);
        Ok(())
    }

    /// Decoder layers of the model.
    pub fn num_layers(&self) -> usize {
        self.backend.num_layers()
    }

    /// Positions that a sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Generate, handing each token to `emit` as it comes; the text ends where that breaks.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) and [`Error::Prompt`](crate::Error::Prompt) before
    /// anything runs, [`Error::Cancelled`](crate::Error::Cancelled) when
    /// interrupted, and what the backend reports.
    pub fn generate(
        &mut self,
        request: &Request,
        interrupt: &Interrupt,
        mut emit: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<Summary> {
        let limits = self.limits();
        let mut decoding = Decoding::new(request, LogitsProcessing::default(), &limits)?;
        let mut sequence = self.backend.open(decoding.kv_fill())?;
        self.lend_drafter(&mut decoding);
        let started = Instant::now();
        let mut prefill = None;
        let decoded = self.decode(&mut decoding, &mut sequence, interrupt, |token| {
            prefill.get_or_insert_with(|| started.elapsed());
            emit(token)
        });
        self.return_drafter(&mut decoding);
        decoded?;
        let prefill = prefill.unwrap_or_default();
        let summary = Summary {
            finish_reason: decoding.finished().unwrap_or(FinishReason::Length),
            prefill,
            decode: started.elapsed() - prefill,
            drafts: decoding.drafts,
        };
        info!(prompt_tokens = request.prompt.len(), ?summary, "generated");
        Ok(summary)
    }

    /// Take `decoding` to its end, and complete the caches.
    fn decode(
        &mut self,
        decoding: &mut Decoding,
        sequence: &mut Sequence,
        interrupt: &Interrupt,
        mut emit: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<()> {
        let backend = self.backend.as_mut();
        while decoding.finished().is_none() {
            decoding.advance(backend, sequence, interrupt, &mut emit)?;
        }
        complete(backend, sequence, interrupt)
    }

    /// What requests are checked against.
    pub(crate) fn limits(&self) -> ModelLimits {
        ModelLimits {
            layers: self.num_layers(),
            capacity: self.capacity,
            vocab_size: self.vocab_size,
            capabilities: self.backend.capabilities().clone(),
        }
    }

    /// What runs the layers.
    pub(crate) fn backend_mut(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    /// Give `decoding` the drafter that it wants, with what it has learned so far.
    pub(crate) fn lend_drafter(&mut self, decoding: &mut Decoding) {
        let Some(kind) = decoding.drafter.filter(|_| decoding.drafting.is_none()) else {
            return;
        };
        let layers = self.num_layers();
        let has_trained = self.backend.capabilities().trained_drafter;
        let key = Drafting::key(
            kind,
            decoding.exits(),
            &self.exit_layers,
            layers,
            has_trained,
        );
        let known = self.drafting.remove(&key);
        let mut drafting = known
            .unwrap_or_else(|| Drafting::new(key, &self.exit_layers, layers, &self.acceptance));
        drafting.start();
        decoding.drafting = Some(drafting);
    }

    /// Take the drafter of `decoding` back, and record what it observed in lossless mode. Where
    /// tokens exit, drafts save less: that would mislead lossless mode.
    pub(crate) fn return_drafter(&mut self, decoding: &mut Decoding) {
        let Some(drafting) = decoding.drafting.take() else {
            return;
        };
        if drafting.is_lossless() {
            drafting.record(&mut self.acceptance);
            if let Some(file) = self.record.as_mut().filter(|file| file.is_due()) {
                file.write(self.backend.costs().record(), self.acceptance.clone());
            }
        }
        self.drafting.insert(drafting.key, drafting);
    }

    /// Run a given text token by token and hand to `emit`, for each token but the first, the most
    /// probable next one and where it exited. The first runs at full depth, as prompts do. Ends with
    /// complete caches.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn follow(
        &mut self,
        tokens: &[u32],
        mode: &DecodingMode,
        kv_fill: KvFill,
        interrupt: &Interrupt,
        mut emit: impl FnMut(Token),
    ) -> Result<()> {
        let limits = self.limits();
        let mut exits = limits.exit_schedule(mode, kv_fill)?;
        limits.check_tokens(tokens)?;
        let mut sequence = self.backend.open(kv_fill)?;
        let (first, rest) = tokens.split_at(1);
        self.prefill(&mut sequence, first, LogitsRequest::None, interrupt)?;
        for token in rest {
            let step = SequenceStep {
                sequence: &mut sequence,
                tokens: std::slice::from_ref(token),
                rule: exits.rule(),
                max_depth: exits.max_depth(),
                logits: LogitsRequest::Tokens(1),
                ahead: Ahead::default(),
                next_draft: None,
            };
            let outcome = step_one(self.backend.as_mut(), step, interrupt)?;
            exits.advance();
            if let &[id] = outcome.logits.tokens() {
                emit(Token {
                    id,
                    exit: outcome.exit,
                    is_accepted_draft: false,
                    logprobs: None,
                });
            }
        }
        // what the last tokens left open is part of what exits cost
        complete(self.backend.as_mut(), &mut sequence, interrupt)
    }

    fn prefill(
        &mut self,
        sequence: &mut Sequence,
        prompt: &[u32],
        logits: LogitsRequest,
        interrupt: &Interrupt,
    ) -> Result<StepOutcome> {
        let _span = debug_span!("prefill").entered();
        let max_depth = self.num_layers();
        let step = SequenceStep {
            sequence,
            tokens: prompt,
            rule: None,
            max_depth,
            logits,
            ahead: Ahead::default(),
            next_draft: None,
        };
        step_one(self.backend.as_mut(), step, interrupt)
    }
}

/// Run a step of one sequence.
fn step_one(
    backend: &mut dyn Backend,
    step: SequenceStep<'_>,
    interrupt: &Interrupt,
) -> Result<StepOutcome> {
    let mut outcomes = backend.step(&mut [step], interrupt)?;
    Ok(outcomes.swap_remove(0))
}

/// Run what exits left open, so that every layer's cache holds every position.
fn complete(
    backend: &mut dyn Backend,
    sequence: &mut Sequence,
    interrupt: &Interrupt,
) -> Result<()> {
    let _span = debug_span!("complete").entered();
    let step = SequenceStep {
        tokens: &[],
        rule: None,
        max_depth: backend.num_layers(),
        logits: LogitsRequest::None,
        ahead: Ahead::default(),
        next_draft: None,
        sequence,
    };
    step_one(backend, step, interrupt).map(|_| ())
}
