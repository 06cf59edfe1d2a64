//! Drafters propose the next tokens, in lossless mode and between exits. Each drafter is one file,
//! a [`DrafterKind`] and a row in [`new_drafter`].
//!
//! Full depth verifies all drafted tokens in one pass, which costs little more than a pass over one
//! token as long as decoding is bound by memory. A rejected draft only costs time: tokens always
//! come from full-depth logits (speculative decoding, Leviathan et al. 2023,
//! <https://arxiv.org/abs/2211.17192>; drafts by early exit, LayerSkip, Elhoushi et al. 2024,
//! <https://arxiv.org/abs/2404.16710>). Where an exit rule lets tokens exit, those that exit
//! before a draft's depth need no verification: they are final.

mod acceptance;
mod auto;
mod baseline;
mod early_exit;
mod prompt_lookup;
mod round_costs;
mod round_lengths;
mod suffix_automaton;
mod trained;

use std::ops::Range;

use self::acceptance::AcceptanceRate;
pub use self::acceptance::{Acceptance, DepthAcceptance, TrainedAcceptance};
use self::auto::Auto;
pub(crate) use self::baseline::BaselineCost;
pub use self::baseline::{Company, TokenCost};
use self::early_exit::EarlyExit;
use self::prompt_lookup::PromptLookup;
use self::trained::Trained;
use crate::backend::{
    Ahead, Backend, Costs, DraftChoice, DraftedToken, Logits, LogitsRequest, PositionLogits,
    StepExit,
};
use crate::bundle::DrafterKind;
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::policy::ExitRule;
use crate::sampler::Sampler;
use crate::sequence::Sequence;

/// A drafter for a model of `layers` layers with exits after the depths `exit_layers`, of which it
/// uses those from `min_depth` on. `has_trained` says whether a trained one can be chosen from.
pub fn new_drafter(
    kind: DrafterKind,
    exit_layers: &[usize],
    layers: usize,
    min_depth: usize,
    has_trained: bool,
) -> Box<dyn Drafter> {
    let early_exit = || EarlyExit::new(exit_layers, layers, min_depth);
    match kind {
        DrafterKind::EarlyExit => Box::new(early_exit()),
        DrafterKind::PromptLookup => Box::new(PromptLookup::new(layers)),
        DrafterKind::Trained => Box::new(Trained::new(layers)),
        DrafterKind::Auto => {
            let mut drafters: Vec<Box<dyn Drafter>> =
                vec![Box::new(PromptLookup::new(layers)), Box::new(early_exit())];
            if has_trained {
                drafters.push(Box::new(Trained::new(layers)));
            }
            Box::new(Auto::new(drafters))
        }
    }
}

/// Proposed tokens after the newest one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    /// The tokens, at most as many as asked for; those that exits gave among them.
    pub tokens: Vec<u32>,
    /// Layers that the newest token and all drafted ones ran, fewer where the rule let them exit; 0
    /// when the backend has not run them yet.
    pub depth: usize,
    /// For the newest token and each of `tokens` in turn, the exit that the rule took. Empty when
    /// `depth` is 0.
    pub exits: Vec<Option<TakenExit>>,
    /// Full depth's logits, a row for each position, where the last position ran every layer and
    /// those that waited ran with it.
    pub verified: Option<Logits>,
    /// How far the trained drafter is to draft when these tokens were verified, where it probably
    /// will be asked to.
    pub next: Option<Ahead>,
}

impl Draft {
    /// Whether no token in it needs verification.
    pub fn is_certain(&self) -> bool {
        let exited = || self.exits[0].is_some();
        self.depth > 0 && self.tokens.is_empty() && (self.verified.is_some() || exited())
    }
}

/// What a drafter proposes.
#[derive(Debug)]
pub enum Proposal {
    /// A draft.
    Draft(Draft),
    /// What the trained drafter makes of these positions, and of the tokens after them, as far as that
    /// says. It drafts for several texts at once.
    Trained(Range<usize>, Ahead),
}

/// An exit that the rule took: the next token comes from here.
#[derive(Debug, Clone, PartialEq)]
pub struct TakenExit {
    /// Where, and why there.
    pub exit: StepExit,
    /// The logits there, one row.
    pub logits: Logits,
}

/// What a draft is made with.
pub struct DraftContext<'a> {
    /// Runs the layers.
    pub backend: &'a mut dyn Backend,
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// What lets tokens exit; None in lossless mode.
    pub rule: Option<&'a ExitRule>,
    /// Chooses the tokens of the draft.
    pub choice: Foresight<'a>,
    /// Stops it.
    pub interrupt: &'a Interrupt,
}

impl DraftContext<'_> {
    /// What tokens, and how probable they are, is known from, at each of the newest `positions`
    /// positions: all of the draft so far.
    fn logits(&mut self, positions: usize) -> LogitsRequest {
        if self.backend.capabilities().margins {
            self.choice.request(positions)
        } else {
            LogitsRequest::Rows(positions)
        }
    }
}

/// Chooses the tokens of a draft as the tokens themselves will be chosen.
pub struct Foresight<'a> {
    sampler: &'a mut Sampler,
    /// The text so far, and the draft.
    tokens: Vec<u32>,
    drafted: usize,
}

impl<'a> Foresight<'a> {
    /// By `sampler`, after `history`.
    pub fn new(sampler: &'a mut Sampler, history: &[u32]) -> Self {
        Self {
            sampler,
            tokens: history.to_vec(),
            drafted: 0,
        }
    }
}

impl DraftChoice for Foresight<'_> {
    fn request(&mut self, positions: usize) -> LogitsRequest {
        LogitsRequest::of(self.sampler, positions)
    }

    fn choose(&mut self, logits: PositionLogits<'_>) -> u32 {
        let token = match logits {
            PositionLogits::All(logits) => {
                let Self {
                    sampler, tokens, ..
                } = self;
                sampler.foresee(self.drafted, logits, tokens)
            }
            PositionLogits::Chosen(token) => token,
        };
        self.tokens.push(token);
        self.drafted += 1;
        token
    }
}

/// Proposes tokens, and observes which of them were accepted.
///
/// Whether, how deep and how far to draft is decided by the measured [`Costs`] of passes and by
/// acceptance rates so far.
pub trait Drafter: Send {
    /// The next history is of another text.
    fn start(&mut self);

    /// The expected speedup of a round with a draft, in tokens a second, over one without, where a
    /// token costs what `baseline` says. At most `max_tokens` tokens, 1 or more, may be drafted after
    /// `history`.
    fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        costs: &Costs,
        baseline: TokenCost,
    ) -> f64;

    /// Make the draft whose speedup was asked for last, after `history`, whose last token the
    /// backend has not run yet; or say what the trained drafter is to draft.
    ///
    /// # Errors
    /// What the backend reports.
    fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Proposal>;

    /// The draft of what the trained drafter drafted, as [proposed](Proposal::Trained).
    fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) -> Draft {
        let _ = (drafted, costs);
        Draft::default()
    }

    /// `tokens` came after the last draft: the accepted ones and one more, or fewer where the text
    /// ended.
    fn observe(&mut self, tokens: &[u32], costs: &Costs);

    /// Start from what an earlier process [recorded](Self::record).
    fn recall(&mut self, acceptance: &Acceptance);

    /// Write what was observed into `acceptance`.
    fn record(&self, acceptance: &mut Acceptance);
}

/// Seconds for `tokens` tokens at full depth.
fn full_depth_cost(costs: &Costs, layers: usize, tokens: usize) -> f64 {
    costs.layers(layers, tokens) + costs.head(tokens)
}
