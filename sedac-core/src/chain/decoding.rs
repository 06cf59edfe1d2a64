//! A text under way: what its next step is, and what comes of it.
//!
//! Whoever drives it owns the backend and the sequence: [`Chain::generate`](super::Chain::generate)
//! takes one text to its end, the [scheduler](crate::scheduler) many at once.

use std::ops::{ControlFlow, Range};

use tracing::{Span, debug, debug_span};

use super::drafting::Drafting;
use super::growing_text::{Emit, Text};
use super::model_limits::ModelLimits;
use super::run_ahead::RunAhead;
use super::trained_drafts::draft_together;
use super::{DraftSummary, ExitSchedule, FinishReason, Request, Token, step_one};
use crate::backend::{
    Ahead, Backend, Costs, Logits, LogitsRequest, MAX_AHEAD, SequenceStep, StepExit, StepOutcome,
};
use crate::bundle::DrafterKind;
use crate::draft::{Company, Draft, DraftContext, Foresight, Proposal};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::ExitReason;
use crate::sampler::{LogitsProcessing, Sampler, TokenLogprobs, TokenMask};
use crate::sequence::Sequence;

/// The most tokens that a step other than prefill appends: a draft and the token before it. No step
/// asks for the logits of more positions.
const MAX_STEP_TOKENS: usize = 16;

/// A text under way.
pub(crate) struct Decoding {
    layers: usize,
    vocab_size: usize,
    kv_fill: KvFill,
    exits: ExitSchedule,
    pub(super) text: Text,
    pub(super) drafter: Option<DrafterKind>,
    pub(super) drafting: Option<Drafting>,
    run_ahead: RunAhead,
    pub(super) planned: Planned,
    /// The tokens that the planned step appends.
    inputs: Vec<u32>,
    pub(super) drafts: DraftSummary,
}

/// What the next step is.
#[derive(Default)]
pub(super) enum Planned {
    /// What exits left open.
    #[default]
    Completion,
    /// Known tokens, of which the last gives the first new one where it `chooses`. All score the next
    /// token of the prompt where that is asked for.
    Prefill { chooses: bool },
    /// A token that has exited before the sequence lost its cache.
    Replay,
    /// The newest token, which exits where the rule says so.
    Decode { ahead: Ahead },
    /// At full depth, what the rule did not let exit.
    Verify(Draft),
    /// That, once the trained drafter has taken in these positions, and drafted as far as it pays.
    Draft {
        positions: Range<usize>,
        ahead: Ahead,
    },
}

impl Decoding {
    /// Start the text of `request`.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) and [`Error::Prompt`](crate::Error::Prompt) where
    /// the model does not take it.
    pub(crate) fn new(
        request: &Request,
        processing: LogitsProcessing,
        limits: &ModelLimits,
    ) -> Result<Self> {
        let exits = limits.exit_schedule(&request.mode, request.kv_fill)?;
        let sampler = Sampler::new(request.sampling)?;
        limits.check_request(request)?;
        processing.check(limits.vocab_size)?;
        Ok(Self {
            layers: limits.layers,
            vocab_size: limits.vocab_size,
            kv_fill: request.mode.kv_fill(request.kv_fill),
            exits,
            // what a constrained token is chosen among depends on the one before
            drafter: request.mode.drafter().filter(|_| !processing.constrained),
            text: Text::new(
                request,
                sampler.with_processing(processing),
                limits.capacity,
            ),
            drafting: None,
            run_ahead: RunAhead::default(),
            planned: Planned::default(),
            inputs: Vec::new(),
            drafts: DraftSummary::default(),
        })
    }

    /// Whether it drafts, for full depth to verify.
    pub(crate) fn drafts(&self) -> bool {
        self.drafting.as_ref().is_some_and(Drafting::is_lossless)
    }

    pub(crate) fn kv_fill(&self) -> KvFill {
        self.kv_fill
    }

    pub(super) fn exits(&self) -> &ExitSchedule {
        &self.exits
    }

    /// Why the text has ended, once it has.
    pub(crate) fn finished(&self) -> Option<FinishReason> {
        self.text.finished
    }

    /// How its drafts went since this was last asked.
    pub(crate) fn take_drafts(&mut self) -> DraftSummary {
        std::mem::take(&mut self.drafts)
    }

    /// How probable the prompt's tokens are, from the second on: those that are known since this was
    /// last asked.
    pub(crate) fn take_prompt_logprobs(&mut self) -> Vec<TokenLogprobs> {
        std::mem::take(&mut self.text.prompt_logprobs)
    }

    /// Choose the next token of a constrained text among those of `mask`.
    pub(crate) fn allow(&mut self, mask: TokenMask) {
        self.text.sampler.allow(mask);
    }

    pub(crate) fn is_constrained(&self) -> bool {
        self.text.sampler.is_constrained()
    }

    /// Whether it waits to be told among which tokens the step after a sequence of `length` positions
    /// chooses. Prefill of up to `max_chunk` tokens a step comes before.
    pub(crate) fn waits(&self, length: usize, max_chunk: usize) -> bool {
        let chooses = match self.known() - length {
            0 => true,
            left => left == self.chunk(length, max_chunk) && !self.text.has_output(),
        };
        chooses && self.text.sampler.lacks_mask()
    }

    /// The tokens that the sequence holds before a new one is decoded: all but the newest, or the
    /// whole prompt, whose last position gives the first new token.
    fn known(&self) -> usize {
        self.text.tokens.len() - usize::from(self.text.has_output())
    }

    /// The number of tokens that the step after a sequence of `length` positions prefills, up to
    /// `max_chunk`.
    pub(crate) fn chunk(&self, length: usize, max_chunk: usize) -> usize {
        let limit = match self.replays() {
            true => self.text.prompt_tokens,
            false => self.known(),
        };
        let max_chunk = match self.text.scores_prompt() {
            // every position also takes the head and a softmax
            true => max_chunk.min(MAX_STEP_TOKENS),
            false => max_chunk,
        };
        limit.saturating_sub(length).min(max_chunk)
    }

    /// The most positions that the sequence may have in the next decoding step.
    pub(crate) fn reach(&self) -> usize {
        let reach = self.known() + MAX_STEP_TOKENS;
        // the last token is not run
        reach.min(self.text.max_length - 1)
    }

    /// The first tokens, which may already be in a cache where full depth computed all entries.
    pub(crate) fn reusable(&self) -> &[u32] {
        let tokens = match (self.text.has_output(), self.replays()) {
            // positions whose logits are needed are run: the last one, or all that are not scored
            (false, _) if self.text.scores_prompt() => self.text.scored,
            (false, _) => self.text.prompt_tokens - 1,
            (true, true) => self.text.prompt_tokens,
            (true, false) => self.known(),
        };
        &self.text.tokens[..tokens]
    }

    /// Of a sequence of `length` positions, how many first ones have the entries that full depth
    /// computes, once every layer holds them.
    pub(crate) fn exact(&self, length: usize) -> usize {
        match self.replays() {
            true => length.min(self.text.prompt_tokens),
            false => length,
        }
    }

    /// Whether the caches hold something else than what full depth would compute, so that decoded
    /// tokens have to exit again where they exited before.
    fn replays(&self) -> bool {
        let approximates = self.kv_fill == KvFill::Propagate || self.exits.is_soft();
        approximates && self.exits.may_exit(self.layers)
    }

    /// The sequence has lost its cache: the tokens so far are run again.
    pub(crate) fn restart(&mut self) {
        if self.replays() {
            self.exits.restart();
        }
        if let Some(drafting) = &mut self.drafting {
            drafting.start();
        }
    }

    /// Plan a step, run it alone, and hand the tokens that come of it to `emit`; the text ends where
    /// that breaks.
    ///
    /// # Errors
    /// What the backend reports.
    pub(super) fn advance(
        &mut self,
        backend: &mut dyn Backend,
        sequence: &mut Sequence,
        interrupt: &Interrupt,
        emit: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<()> {
        self.plan(backend, sequence, usize::MAX, Company::default(), interrupt)?;
        draft_together(&mut [(self, sequence.slot())], backend, interrupt)?;
        let outcome = match self.has_step() {
            true => {
                let _span = self.span().entered();
                Some(step_one(backend, self.step(sequence), interrupt)?)
            }
            false => None,
        };
        self.take(outcome, sequence, backend.costs(), emit);
        Ok(())
    }

    /// Decide what the next step is; prefill takes up to `max_chunk` tokens at once. Drafts are made
    /// here, or by [`draft_together`] afterwards, and verified in the step. Passes may be shared with
    /// its `company`.
    ///
    /// # Errors
    /// What the backend reports.
    pub(crate) fn plan(
        &mut self,
        backend: &mut dyn Backend,
        sequence: &mut Sequence,
        max_chunk: usize,
        company: Company,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let length = sequence.tokens().len();
        if length < self.known() {
            self.plan_prefill(length, max_chunk);
            return Ok(());
        }
        let max_ahead = backend.capabilities().ahead;
        match self.draft(backend, sequence, company, interrupt)? {
            Some(Proposal::Draft(draft)) => self.plan_verification(draft),
            Some(Proposal::Trained(positions, ahead)) => {
                self.planned = Planned::Draft { positions, ahead };
            }
            None => self.plan_decode(max_ahead),
        }
        Ok(())
    }

    fn plan_prefill(&mut self, length: usize, max_chunk: usize) {
        let (end, planned) = match self.chunk(length, max_chunk) {
            0 => (length + 1, Planned::Replay),
            chunk => {
                let end = length + chunk;
                let chooses = end == self.known() && !self.text.has_output();
                (end, Planned::Prefill { chooses })
            }
        };
        self.inputs.clear();
        self.inputs.extend(&self.text.tokens[length..end]);
        self.planned = planned;
    }

    /// One token, or up to `max_ahead` where tokens have the same depth and rule, and the backend can.
    fn plan_decode(&mut self, max_ahead: usize) {
        // whether the next token can be drafted is worth knowing where others were lately
        let wanted = self.drafting.as_ref().map_or(MAX_AHEAD, |drafting| {
            (drafting.undrafted / 2).clamp(1, MAX_AHEAD)
        });
        let tokens = match self.exits.is_constant() {
            true => wanted.min(max_ahead).min(self.run_ahead.tokens()),
            false => 1,
        };
        self.inputs.clear();
        self.inputs.push(self.text.newest());
        self.planned = Planned::Decode {
            ahead: Ahead::of(tokens.min(self.text.room())),
        };
    }

    pub(super) fn plan_verification(&mut self, draft: Draft) {
        self.inputs.clear();
        if draft.depth == 0 {
            self.inputs.push(self.text.newest());
            self.inputs.extend(&draft.tokens);
        }
        self.planned = Planned::Verify(draft);
    }

    /// Draft where that pays.
    fn draft(
        &mut self,
        backend: &mut dyn Backend,
        sequence: &mut Sequence,
        company: Company,
        interrupt: &Interrupt,
    ) -> Result<Option<Proposal>> {
        let Some(drafting) = &mut self.drafting else {
            return Ok(None);
        };
        let max_tokens = self.text.room() - 1;
        let history = &self.text.tokens;
        let (capabilities, costs) = (backend.capabilities(), backend.costs());
        let speedup = drafting.expected_speedup(history, max_tokens, company, capabilities, costs);
        if speedup <= 1.0 || speedup.is_nan() {
            debug!(speedup, max_tokens, "no draft: it would not pay");
            return Ok(None);
        }
        let _span = debug_span!("draft").entered();
        let mut context = DraftContext {
            backend,
            sequence,
            rule: self.exits.rule(),
            choice: Foresight::new(&mut self.text.sampler, history),
            interrupt,
        };
        let proposal = drafting.propose(history, max_tokens, &mut context)?;
        if let Proposal::Draft(draft) = &proposal {
            let drafted = draft.tokens.len();
            debug!(speedup, drafted, depth = draft.depth, "draft");
        }
        Ok(Some(proposal))
    }

    /// Whether anything has to run. Of a draft whose tokens all exited, or ran at full depth, nothing
    /// has.
    pub(crate) fn has_step(&self) -> bool {
        match &self.planned {
            Planned::Verify(draft) => draft.verified.is_none() && !draft.is_certain(),
            _ => true,
        }
    }

    /// What the planned step is called in traces.
    fn span(&self) -> Span {
        match &self.planned {
            Planned::Completion => debug_span!("complete"),
            Planned::Prefill { .. } | Planned::Replay => debug_span!("prefill"),
            Planned::Decode { .. } => debug_span!("decode"),
            Planned::Verify(_) | Planned::Draft { .. } => debug_span!("verify"),
        }
    }

    /// The planned step.
    pub(crate) fn step<'a>(&'a mut self, sequence: &'a mut Sequence) -> SequenceStep<'a> {
        let next_draft = self.next_draft();
        let (may_exit, positions, ahead) = match &self.planned {
            Planned::Completion | Planned::Draft { .. } => (false, 0, Ahead::default()),
            Planned::Prefill { .. } if self.text.scores_prompt() => {
                (false, self.inputs.len(), Ahead::default())
            }
            Planned::Prefill { chooses } => (false, usize::from(*chooses), Ahead::default()),
            Planned::Replay => (true, 0, Ahead::default()),
            Planned::Decode { ahead } => (true, ahead.tokens, *ahead),
            Planned::Verify(draft) => (false, draft.tokens.len() + 1, Ahead::default()),
        };
        SequenceStep {
            sequence,
            tokens: &self.inputs,
            rule: self.exits.rule().filter(|_| may_exit),
            max_depth: match may_exit {
                true => self.exits.max_depth(),
                false => self.layers,
            },
            logits: match positions {
                0 => LogitsRequest::None,
                _ => LogitsRequest::of(&mut self.text.sampler, positions),
            },
            ahead,
            next_draft,
        }
    }

    /// Take what came of the planned step, None where nothing had to run.
    pub(crate) fn take(
        &mut self,
        outcome: Option<StepOutcome>,
        sequence: &mut Sequence,
        costs: &Costs,
        mut emit: impl FnMut(Token) -> ControlFlow<()>,
    ) {
        match (std::mem::take(&mut self.planned), outcome) {
            (Planned::Prefill { chooses }, Some(outcome)) => {
                let end = sequence.tokens().len();
                self.take_prefilled(&outcome, end, chooses, &mut emit);
            }
            (Planned::Replay, Some(_)) => self.exits.advance(),
            (Planned::Decode { .. }, Some(outcome)) => {
                self.exits.advance();
                self.take_decoded(&outcome, costs, &mut emit);
            }
            (Planned::Verify(draft), outcome) => {
                let verified = outcome.map(|outcome| outcome.logits);
                let verified = verified.or_else(|| draft.verified.clone());
                self.take_verified(&draft, &verified.unwrap_or(Logits::None), costs, &mut emit);
            }
            _ => {}
        }
        // the newest token is never run yet
        sequence.truncate(self.text.tokens.len() - 1);
    }

    /// Take the logits of the positions before `end`, as many as were wanted.
    fn take_prefilled(
        &mut self,
        outcome: &StepOutcome,
        end: usize,
        chooses: bool,
        emit: &mut impl Emit,
    ) {
        let mut last = 0;
        if self.text.scores_prompt() {
            last = self.inputs.len() - 1;
            for index in 0..=last {
                let logits = outcome.logits.at(index, self.vocab_size);
                self.text.score(end - 1 - last + index, logits);
            }
        }
        if chooses {
            let logits = outcome.logits.at(last, self.vocab_size);
            self.text.take(logits, outcome.exit, None, emit);
        }
    }

    fn take_decoded(&mut self, outcome: &StepOutcome, costs: &Costs, emit: &mut impl Emit) {
        let tokens = outcome.logits.tokens().len().max(1);
        self.run_ahead.observe(tokens, outcome.mispredicted);
        for index in 0..tokens {
            let logits = outcome.logits.at(index, self.vocab_size);
            let exit = outcome.exit_of(index);
            self.text.take(logits, exit, None, emit);
            if let Some(drafting) = &mut self.drafting {
                drafting.observe_undrafted(exit.layer, costs);
            }
            if self.text.finished.is_some() {
                break;
            }
        }
    }

    /// Take tokens as long as they are those of `draft`; what was drafted beyond is forgotten.
    ///
    /// Drafts have no distribution to sample from, so that speculative sampling's rule comes down
    /// to this: sample from full depth's, and go on if that is the drafted token. The same seed
    /// hence gives the same tokens as without drafts.
    fn take_verified(
        &mut self,
        draft: &Draft,
        verified: &Logits,
        costs: &Costs,
        emit: &mut impl Emit,
    ) {
        let full_depth = StepExit {
            layer: self.layers,
            reason: ExitReason::FullDepth,
        };
        let before = self.text.tokens.len();
        for index in 0..=draft.tokens.len() {
            let proposed = draft.tokens.get(index).copied();
            let (logits, exit, drafted) = match draft.exits.get(index) {
                Some(Some(taken)) => (taken.logits.at(0, self.vocab_size), taken.exit, None),
                _ => (verified.at(index, self.vocab_size), full_depth, proposed),
            };
            let id = self.text.take(logits, exit, drafted, emit);
            if self.text.finished.is_some() || proposed != Some(id) {
                break;
            }
        }
        let tokens = &self.text.tokens[before..];
        self.drafts.count(draft, tokens);
        if let Some(drafting) = &mut self.drafting {
            drafting.observe(draft, tokens, self.layers, costs);
        }
    }
}
