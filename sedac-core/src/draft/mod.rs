//! What guesses the next tokens, for the lossless mode and beside exits. Each drafter is one file.
//!
//! Full depth verifies every guess in one pass over several tokens, which costs little more than
//! a pass over one as long as decoding waits for memory. A guess only costs time: tokens always
//! come from full-depth logits (speculative decoding, Leviathan et al. 2023,
//! <https://arxiv.org/abs/2211.17192>; drafts by early exit, LayerSkip, Elhoushi et al. 2024,
//! <https://arxiv.org/abs/2404.16710>). Where a policy lets tokens exit, those that it takes on the
//! way to a draft's depth are no guesses: their tokens stand as they are.

mod auto;
mod early_exit;
mod plain;
mod prompt_lookup;
mod share;
mod up_to;

use serde::Deserialize;

use self::auto::Auto;
use self::early_exit::EarlyExit;
pub(crate) use self::plain::Plain;
use self::prompt_lookup::PromptLookup;
use self::share::Share;
use crate::backend::{Backend, Costs, Step};
use crate::error::{Error, Result};
use crate::exit_config::KvFill;
use crate::interrupt::Interrupt;
use crate::policy::{Policy, PolicySettings};

/// Which drafter to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrafterKind {
    /// The model's own shallow layers.
    EarlyExit,
    /// What followed the newest tokens when they occurred before
    /// (<https://github.com/apoorvumang/prompt-lookup-decoding>).
    PromptLookup,
    /// Prompt lookup where it finds something, early exit otherwise.
    Auto,
}

impl DrafterKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::EarlyExit, Self::PromptLookup, Self::Auto];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::EarlyExit => "early-exit",
            Self::PromptLookup => "prompt-lookup",
            Self::Auto => "auto",
        }
    }

    /// A drafter for a model of `layers` layers with exits after the depths `exit_layers`, of which
    /// it uses those from `least_depth` on.
    pub fn drafter(
        self,
        exit_layers: &[usize],
        layers: usize,
        least_depth: usize,
    ) -> Box<dyn Drafter> {
        let early_exit = || EarlyExit::new(exit_layers, layers, least_depth);
        match self {
            Self::EarlyExit => Box::new(early_exit()),
            Self::PromptLookup => Box::new(PromptLookup::new(layers)),
            Self::Auto => Box::new(Auto::new(PromptLookup::new(layers), early_exit())),
        }
    }

    /// Check that it can draft between the exits of `policy`.
    ///
    /// # Errors
    /// [`Error::Setting`] where tokens that exited do not wait to be continued: nothing could
    /// verify a guess in one pass with them then.
    pub fn check_exits(self, policy: &PolicySettings, kv_fill: KvFill) -> Result<()> {
        let range = if kv_fill == KvFill::Propagate {
            "none with kv_fill propagate; set kv_fill defer, or drafter none"
        } else if policy.is_soft() {
            "none with soft exits; set exit_kind hard, or drafter none"
        } else {
            return Ok(());
        };
        Err(Error::setting("drafter", self.name(), range))
    }
}

/// Guesses at the tokens after the newest one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    /// The guesses, at most as many as asked for; tokens of certain positions among them.
    pub tokens: Vec<u32>,
    /// Layers that the newest token and all guesses went through, fewer where they are certain; 0
    /// when the backend has not seen them yet.
    pub depth: usize,
    /// For the newest token and each of `tokens` in turn, the exit that the policy took. Empty
    /// when `depth` is 0.
    pub exits: Vec<Option<Exited>>,
    /// Whether the last position ran every layer, and those that waited with it: the backend's
    /// logits are full depth's, a row for each position.
    pub verified: bool,
}

impl Draft {
    /// Whether there is no guess in it.
    pub fn is_certain(&self) -> bool {
        self.depth > 0 && self.tokens.is_empty() && (self.verified || self.exits[0].is_some())
    }
}

/// An exit that the policy took: the next token comes from here.
#[derive(Debug, Clone, PartialEq)]
pub struct Exited {
    /// Where, and why there.
    pub step: Step,
    /// The logits there.
    pub logits: Vec<f32>,
}

/// What a draft is made with.
pub struct Tools<'a> {
    /// Runs the layers.
    pub backend: &'a mut dyn Backend,
    /// What lets tokens exit.
    pub policy: &'a mut dyn Policy,
    /// Chooses the next token of the draft by its logits, as the token itself will be chosen.
    pub choose: &'a mut dyn FnMut(&[f32]) -> u32,
    /// Stops it.
    pub interrupt: &'a Interrupt,
}

/// Guesses tokens, and learns from what became of its guesses.
///
/// Whether, how deep and how far to draft is decided by the [`Costs`] of passes on this machine
/// and by how often guesses were right so far.
pub trait Drafter: Send {
    /// How many times as many tokens a second a round with a draft promises as one without, where
    /// a token takes `plain` seconds. At most `most` tokens, 1 or more, may be guessed after
    /// `history`.
    fn promise(&mut self, history: &[u32], most: usize, costs: &Costs, plain: f64) -> f64;

    /// Make the draft that was promised last, after `history`, whose last token the backend has
    /// not run yet.
    ///
    /// # Errors
    /// What the backend reports.
    fn draft(&mut self, history: &[u32], most: usize, tools: &mut Tools<'_>) -> Result<Draft>;

    /// `tokens` came instead of the last draft: what was right of it and one more, or fewer where
    /// the text ended.
    fn learn(&mut self, tokens: &[u32], costs: &Costs);
}

/// Seconds for `tokens` tokens at full depth.
fn full_depth(costs: &Costs, layers: usize, tokens: usize) -> f64 {
    costs.layers(layers, tokens) + costs.head(tokens)
}
