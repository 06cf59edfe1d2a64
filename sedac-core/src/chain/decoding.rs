//! The rounds of a generation, each of which gives one or more tokens.

use std::ops::ControlFlow;

use super::{Drafting, FinishReason, Request, Token};
use crate::backend::{Backend, Step};
use crate::draft::{Draft, Drafter, Plain, Tools};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::policy::{ExitReason, Policy};
use crate::sampler::Sampler;

/// A drafter, and what tokens cost without it.
pub(super) struct Drafts {
    drafter: Box<dyn Drafter>,
    plain: Plain,
}

impl Drafts {
    /// For a model of `layers` layers.
    pub(super) fn new(drafter: Box<dyn Drafter>, layers: usize) -> Self {
        Self {
            drafter,
            plain: Plain::new(layers),
        }
    }
}

/// A generation under way.
pub(super) struct Decoding<'a, F> {
    pub(super) backend: &'a mut dyn Backend,
    pub(super) vocab_size: usize,
    pub(super) policy: &'a mut dyn Policy,
    pub(super) interrupt: &'a Interrupt,
    pub(super) text: Text<'a, F>,
    pub(super) drafting: Drafting,
}

impl<F: FnMut(Token) -> ControlFlow<()>> Decoding<'_, F> {
    /// One token, which exits where the policy says so.
    pub(super) fn step(&mut self) -> Result<Step> {
        let newest = self.text.newest();
        let step = self.backend.decode(newest, self.policy, self.interrupt)?;
        self.text.take(self.backend.logits(), step);
        Ok(step)
    }

    /// Draft where that pays, verify at full depth what the policy is not sure of, and take tokens
    /// as long as they confirm the draft; what was drafted beyond is forgotten.
    ///
    /// Guesses have no distribution of their own, so that speculative sampling's rule comes down
    /// to this: sample from full depth's, and go on if that is the guess. The same seed hence
    /// gives the same tokens as without drafts.
    pub(super) fn round(&mut self, drafts: &mut Drafts) -> Result<()> {
        let most = self.text.room() - 1;
        let costs = self.backend.costs();
        let plain = drafts.plain.seconds(costs);
        let promise = match most {
            0 => 0.0,
            _ => drafts
                .drafter
                .promise(&self.text.tokens, most, costs, plain),
        };
        if promise <= 1.0 || promise.is_nan() {
            let step = self.step()?;
            drafts.plain.note(step.exit_layer, self.backend.costs());
            return Ok(());
        }
        let draft = self.draft(drafts.drafter.as_mut(), most)?;
        let before = self.text.tokens.len();
        self.confirm(&draft)?;
        let tokens = &self.text.tokens[before..];
        self.drafting.count(&draft, tokens);
        drafts.drafter.learn(tokens, self.backend.costs());
        for exit in &draft.exits {
            let depth = exit
                .as_ref()
                .map_or(self.backend.num_layers(), |exit| exit.step.exit_layer);
            drafts.plain.note(depth, self.backend.costs());
        }
        Ok(())
    }

    fn draft(&mut self, drafter: &mut dyn Drafter, most: usize) -> Result<Draft> {
        let history = &self.text.tokens;
        let mut tools = Tools {
            backend: self.backend,
            policy: self.policy,
            choose: &mut ahead(&mut self.text.sampler, history),
            interrupt: self.interrupt,
        };
        drafter.draft(history, most, &mut tools)
    }

    /// Verify the positions of `draft` that have to be, and take the tokens.
    fn confirm(&mut self, draft: &Draft) -> Result<()> {
        if !(draft.verified || draft.is_certain()) {
            let mut new = Vec::new();
            if draft.depth == 0 {
                new.push(self.text.newest());
                new.extend(&draft.tokens);
            }
            let rows = draft.tokens.len() + 1;
            self.backend.verify(&new, rows, self.interrupt)?;
        }
        let full_depth = Step {
            exit_layer: self.backend.num_layers(),
            reason: ExitReason::FullDepth,
        };
        let logits = self.backend.logits();
        for (index, row) in logits.chunks_exact(self.vocab_size).enumerate() {
            let id = match draft.exits.get(index) {
                Some(Some(exit)) => self.text.take(&exit.logits, exit.step),
                _ => self.text.take(row, full_depth),
            };
            if self.text.finished.is_some() || draft.tokens.get(index) != Some(&id) {
                break;
            }
        }
        // the newest token is never run yet
        self.backend.truncate(self.text.tokens.len() - 1);
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
    /// The text's length at which it ends: max_new_tokens or the cache allows no more.
    longest: usize,
    pub(super) finished: Option<FinishReason>,
}

impl<'a, F: FnMut(Token) -> ControlFlow<()>> Text<'a, F> {
    /// The prompt, with cache positions for `room` tokens after it.
    pub(super) fn new(request: &'a Request, sampler: Sampler, room: usize, emit: F) -> Self {
        // the last token is not run, so it needs no position
        let most = request.max_new_tokens.min(room + 1);
        Self {
            request,
            sampler,
            emit,
            tokens: request.prompt.clone(),
            longest: request.prompt.len() + most,
            finished: None,
        }
    }

    /// Tokens that may still follow.
    fn room(&self) -> usize {
        self.longest - self.tokens.len()
    }

    fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Sample a token from `logits`, which `step` gave, and hand it to `emit`.
    pub(super) fn take(&mut self, logits: &[f32], step: Step) -> u32 {
        let id = self.sampler.sample(logits, &self.tokens);
        let flow = (self.emit)(Token { id, step });
        self.tokens.push(id);
        if flow.is_break() || self.request.stop_tokens.contains(&id) {
            self.finished = Some(FinishReason::Stop);
        } else if self.room() == 0 {
            self.finished = Some(FinishReason::Length);
        }
        id
    }
}

/// What `sampler` will choose after `history`, of the logits of the next tokens in turn.
fn ahead(sampler: &mut Sampler, history: &[u32]) -> impl FnMut(&[f32]) -> u32 {
    let before = history.len();
    let mut tokens = history.to_vec();
    move |logits| {
        let id = sampler.foresee(tokens.len() - before, logits, &tokens);
        tokens.push(id);
        id
    }
}
