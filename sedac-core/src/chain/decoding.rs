//! The rounds of a generation, each of which gives one or more tokens.

use std::ops::ControlFlow;

use tracing::{debug, debug_span};

use super::{DraftSummary, ExitSchedule, FinishReason, Request, Token, complete, step_one};
use crate::backend::{
    Ahead, Backend, Logits, LogitsRequest, MAX_AHEAD, PositionLogits, SequenceStep, StepExit,
};
use crate::draft::{Acceptance, BaselineCost, Draft, DraftContext, Drafter, Foresight};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::policy::ExitReason;
use crate::sampler::Sampler;
use crate::sequence::Sequence;

/// A drafter, and what tokens cost without it.
pub(super) struct Drafting {
    drafter: Box<dyn Drafter>,
    baseline: BaselineCost,
    /// Tokens since the last draft.
    undrafted: usize,
}

impl Drafting {
    /// For a model of `layers` layers.
    pub(super) fn new(drafter: Box<dyn Drafter>, layers: usize) -> Self {
        Self {
            drafter,
            baseline: BaselineCost::new(layers),
            undrafted: 0,
        }
    }

    /// The next rounds are of another text.
    pub(super) fn start(&mut self) {
        self.drafter.start();
    }

    /// Write what was observed into `acceptance`.
    pub(super) fn record(&self, acceptance: &mut Acceptance) {
        self.drafter.record(acceptance);
    }
}

/// A generation under way.
pub(super) struct Decoding<'a, F> {
    pub(super) backend: &'a mut dyn Backend,
    pub(super) vocab_size: usize,
    pub(super) sequence: Sequence,
    pub(super) exits: ExitSchedule,
    pub(super) interrupt: &'a Interrupt,
    pub(super) text: Text<'a, F>,
    pub(super) drafts: DraftSummary,
}

impl<F: FnMut(Token) -> ControlFlow<()>> Decoding<'_, F> {
    /// Decode until the text ends, and complete the caches.
    pub(super) fn run(&mut self, mut drafting: Option<&mut Drafting>) -> Result<()> {
        while self.text.finished.is_none() {
            match &mut drafting {
                Some(drafting) => self.round(drafting)?,
                None => self.decode(MAX_AHEAD).map(|_| ())?,
            }
        }
        complete(self.backend, &mut self.sequence, self.interrupt)
    }

    /// One token, which exits where the rule says so, or up to `most` where no token has to wait for
    /// what is decided about the one before.
    fn decode(&mut self, most: usize) -> Result<StepExit> {
        let _span = debug_span!("decode").entered();
        let newest = self.text.newest();
        let most = match self.exits.is_constant() {
            true => most.min(self.backend.capabilities().ahead),
            false => 1,
        };
        let ahead = Ahead::of(most.min(self.text.room()));
        let (rule, max_depth) = self.exits.advance();
        let step = SequenceStep {
            sequence: &mut self.sequence,
            tokens: &[newest],
            rule,
            max_depth,
            logits: LogitsRequest::of(&mut self.text.sampler, ahead.tokens),
            ahead,
        };
        let outcome = step_one(self.backend, step, self.interrupt)?;
        for index in 0..outcome.logits.tokens().len().max(1) {
            let logits = outcome.logits.at(index, self.vocab_size);
            self.text.take(logits, outcome.exit);
            if self.text.finished.is_some() {
                break;
            }
        }
        // the newest token is never run yet
        self.sequence.truncate(self.text.tokens.len() - 1);
        Ok(outcome.exit)
    }

    /// Draft where that pays, verify at full depth what the rule did not let exit, and take tokens
    /// as long as they are those drafted; what was drafted beyond is forgotten.
    ///
    /// Drafts have no distribution to sample from, so that speculative sampling's rule comes down
    /// to this: sample from full depth's, and go on if that is the drafted token. The same seed
    /// hence gives the same tokens as without drafts.
    fn round(&mut self, drafting: &mut Drafting) -> Result<()> {
        let max_tokens = self.text.room() - 1;
        let costs = self.backend.costs();
        let baseline = drafting.baseline.seconds(costs);
        let speedup = match max_tokens {
            0 => 0.0,
            _ => drafting
                .drafter
                .expected_speedup(&self.text.tokens, max_tokens, costs, baseline),
        };
        if speedup <= 1.0 || speedup.is_nan() {
            debug!(speedup, max_tokens, "no draft: it would not pay");
            let before = self.text.tokens.len();
            // whether the next token can be drafted is worth knowing where others were lately
            let exit = self.decode((drafting.undrafted / 2).clamp(1, MAX_AHEAD))?;
            for _ in before..self.text.tokens.len() {
                drafting.baseline.observe(exit.layer, self.backend.costs());
                drafting.undrafted += 1;
            }
            return Ok(());
        }
        drafting.undrafted = 0;
        let draft = self.propose(drafting.drafter.as_mut(), max_tokens)?;
        let before = self.text.tokens.len();
        self.verify(&draft)?;
        let tokens = &self.text.tokens[before..];
        debug!(
            speedup,
            drafted = draft.tokens.len(),
            depth = draft.depth,
            tokens = tokens.len(),
            "draft"
        );
        self.drafts.count(&draft, tokens);
        drafting.drafter.observe(tokens, self.backend.costs());
        for taken in &draft.exits {
            let depth = taken
                .as_ref()
                .map_or(self.backend.num_layers(), |taken| taken.exit.layer);
            drafting.baseline.observe(depth, self.backend.costs());
        }
        Ok(())
    }

    fn propose(&mut self, drafter: &mut dyn Drafter, max_tokens: usize) -> Result<Draft> {
        let _span = debug_span!("draft").entered();
        let history = &self.text.tokens;
        let mut context = DraftContext {
            backend: self.backend,
            sequence: &mut self.sequence,
            rule: self.exits.rule(),
            choice: Foresight::new(&mut self.text.sampler, history),
            interrupt: self.interrupt,
        };
        drafter.propose(history, max_tokens, &mut context)
    }

    /// Full depth's logits for the positions of `draft`; none where all of them exited.
    fn verification(&mut self, draft: &Draft) -> Result<Logits> {
        if let Some(logits) = &draft.verified {
            return Ok(logits.clone());
        }
        if draft.is_certain() {
            return Ok(Logits::None);
        }
        let _span = debug_span!("verify").entered();
        let mut tokens = Vec::new();
        if draft.depth == 0 {
            tokens.push(self.text.newest());
            tokens.extend(&draft.tokens);
        }
        let step = SequenceStep {
            sequence: &mut self.sequence,
            tokens: &tokens,
            rule: None,
            max_depth: self.backend.num_layers(),
            logits: LogitsRequest::of(&mut self.text.sampler, draft.tokens.len() + 1),
            ahead: Ahead::default(),
        };
        step_one(self.backend, step, self.interrupt).map(|outcome| outcome.logits)
    }

    /// Verify `draft` and take the tokens.
    fn verify(&mut self, draft: &Draft) -> Result<()> {
        let full_depth = StepExit {
            layer: self.backend.num_layers(),
            reason: ExitReason::FullDepth,
        };
        let verified = self.verification(draft)?;
        for index in 0..=draft.tokens.len() {
            let (logits, exit) = match draft.exits.get(index) {
                Some(Some(taken)) => (taken.logits.at(0, self.vocab_size), taken.exit),
                _ => (verified.at(index, self.vocab_size), full_depth),
            };
            let id = self.text.take(logits, exit);
            if self.text.finished.is_some() || draft.tokens.get(index) != Some(&id) {
                break;
            }
        }
        // the newest token is never run yet
        self.sequence.truncate(self.text.tokens.len() - 1);
        Ok(())
    }
}

/// The text as it grows, and when it ends.
pub(super) struct Text<'a, F> {
    request: &'a Request,
    sampler: Sampler,
    emit: F,
    /// Prompt and output so far.
    pub(super) tokens: Vec<u32>,
    /// The length at which the text ends: max_new_tokens or the cache allows no more.
    max_length: usize,
    pub(super) finished: Option<FinishReason>,
}

impl<'a, F: FnMut(Token) -> ControlFlow<()>> Text<'a, F> {
    /// The prompt, with cache positions for `room` tokens after it.
    pub(super) fn new(request: &'a Request, sampler: Sampler, room: usize, emit: F) -> Self {
        // the last token is not run, so it needs no position
        let max_new_tokens = request.max_new_tokens.min(room + 1);
        Self {
            request,
            sampler,
            emit,
            tokens: request.prompt.clone(),
            max_length: request.prompt.len() + max_new_tokens,
            finished: None,
        }
    }

    /// Tokens that may still follow.
    fn room(&self) -> usize {
        self.max_length - self.tokens.len()
    }

    fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Choose a token by `logits`, which `exit` gave, and hand it to `emit`.
    pub(super) fn take(&mut self, logits: PositionLogits<'_>, exit: StepExit) -> u32 {
        let id = match logits {
            PositionLogits::All(logits) => self.sampler.sample(logits, &self.tokens),
            PositionLogits::Chosen(token) => {
                self.sampler.skip();
                token
            }
        };
        let flow = (self.emit)(Token { id, exit });
        self.tokens.push(id);
        if flow.is_break() || self.request.stop_tokens.contains(&id) {
            self.finished = Some(FinishReason::Stop);
        } else if self.room() == 0 {
            self.finished = Some(FinishReason::Length);
        }
        id
    }
}
