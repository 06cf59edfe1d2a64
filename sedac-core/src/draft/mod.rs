//! What guesses the next tokens, for the lossless mode. Each drafter is one file.
//!
//! Full depth verifies every guess in one pass over several tokens, which costs little more than
//! a pass over one as long as decoding waits for memory. A guess only costs time: tokens always
//! come from full-depth logits (speculative decoding, Leviathan et al. 2023,
//! <https://arxiv.org/abs/2211.17192>; drafts by early exit, LayerSkip, Elhoushi et al. 2024,
//! <https://arxiv.org/abs/2404.16710>).

mod auto;
mod early_exit;
mod prompt_lookup;
mod share;

use self::auto::Auto;
use self::early_exit::EarlyExit;
use self::prompt_lookup::PromptLookup;
use self::share::Share;
use crate::backend::{Backend, Costs};
use crate::error::Result;
use crate::interrupt::Interrupt;

/// Which drafter to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

    /// A drafter for a model of `layers` layers with exits after the depths `exit_layers`.
    pub fn drafter(self, exit_layers: &[usize], layers: usize) -> Box<dyn Drafter> {
        let early_exit = || EarlyExit::new(exit_layers, layers);
        match self {
            Self::EarlyExit => Box::new(early_exit()),
            Self::PromptLookup => Box::new(PromptLookup::new(layers)),
            Self::Auto => Box::new(Auto::new(PromptLookup::new(layers), early_exit())),
        }
    }
}

/// Guesses at the tokens after the newest one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// The guesses, at most as many as asked for.
    pub tokens: Vec<u32>,
    /// Layers that the newest token and all guesses went through; 0 when the backend has not seen
    /// them yet.
    pub depth: usize,
}

/// Guesses tokens, and learns from what became of its guesses.
///
/// Whether, how deep and how far to draft is decided by the [`Costs`] of passes on this machine
/// and by how often guesses were right so far.
pub trait Drafter: Send {
    /// How many times as many tokens a second a round with a draft promises as one without. At
    /// most `most` tokens, 1 or more, may be guessed after `history`.
    fn promise(&mut self, history: &[u32], most: usize, costs: &Costs) -> f64;

    /// Make the draft that was promised last, after `history`, whose last token the backend has
    /// not run yet.
    ///
    /// # Errors
    /// What the backend reports.
    fn draft(
        &mut self,
        history: &[u32],
        most: usize,
        backend: &mut dyn Backend,
        interrupt: &Interrupt,
    ) -> Result<Draft>;

    /// `tokens` came instead of the last draft: what was right of it and one more, or fewer where
    /// the text ended.
    fn learn(&mut self, tokens: &[u32], costs: &Costs);
}

/// Seconds for `tokens` tokens at full depth.
fn full_depth(costs: &Costs, layers: usize, tokens: usize) -> f64 {
    costs.layers(layers, tokens) + costs.head(tokens)
}
