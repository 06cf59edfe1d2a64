//! One call of a backend: what each sequence is to run, and what came of it.

use crate::policy::{ExitReason, ExitRule, ExitSignals};
use crate::sampler::{Race, Sampler, argmax};
use crate::sequence::Sequence;

/// What one sequence is to run.
///
/// Prefill, decode, draft, verification and deferred completion are all such steps:
///
/// | step | tokens | rule | max depth | logits |
/// |---|---|---|---|---|
/// | prefill | the prompt | none | all layers | 1 row |
/// | decode | the newest | the policy's | all layers | 1 row |
/// | draft | the newest | the policy's, if any | the draft's | 1 row |
/// | verification | drafts that have not run | none | all layers | 1 row each |
/// | deferred completion | none | none | all layers | none |
#[derive(Debug)]
pub struct SequenceStep<'a> {
    /// The sequence. After a step that failed it can only be dropped.
    pub sequence: &'a mut Sequence,
    /// Tokens to append. Positions that wait to be continued join their pass.
    pub tokens: &'a [u32],
    /// When to stop before `max_depth`. The newest token decides for all.
    pub rule: Option<&'a ExitRule>,
    /// Layers after which the step ends at the latest: at the first depth from there on where
    /// tokens may exit.
    pub max_depth: usize,
    /// Which logits are wanted.
    pub logits: LogitsRequest,
    /// How far to go on with the tokens that it chooses.
    pub ahead: Ahead,
    /// What the trained drafter is to draft once the step has chosen tokens at all positions that it
    /// appends. Backends that wait for the host in between leave it to a
    /// [`DraftRequest`](super::DraftRequest).
    pub next_draft: Option<NextDraft>,
}

/// A draft that begins without the host: from the first position of a step at which the token chosen
/// is not the one that the step has there. Who then requests a draft of the positions up to there, of as
/// many tokens or more, has it.
#[derive(Debug, Clone, PartialEq)]
pub struct NextDraft {
    /// How far it drafts.
    pub ahead: Ahead,
    /// What the step's tokens and those of the draft are chosen from.
    pub choice: LogitsRequest,
}

/// Bins of equal width in which a margin, of 0 to 1, lies.
pub const MARGIN_BINS: usize = 8;

/// The most tokens that a step may give.
pub const MAX_AHEAD: usize = 8;

/// How far a step of one token goes on: each time as a step of the token that it chose last would, by
/// the same rule and to the same depth. Then as many positions of [`LogitsRequest`] are wanted, and of
/// these the last as many as there are tokens.
///
/// Where the backend cannot, or not as far, it gives fewer tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ahead {
    /// The most tokens that the step gives, 1 to [`MAX_AHEAD`].
    pub tokens: usize,
    /// By the bin of its margin, the probability that a token is accepted.
    pub acceptance: [f32; MARGIN_BINS],
    /// It goes on after n tokens where the product of their acceptance is at least the n-th.
    pub min_accepted: [f32; MAX_AHEAD],
}

impl Default for Ahead {
    /// One token.
    fn default() -> Self {
        Self::of(1)
    }
}

impl Ahead {
    /// Up to `tokens` tokens, whatever they are.
    pub fn of(tokens: usize) -> Self {
        Self {
            tokens,
            acceptance: [1.0; MARGIN_BINS],
            min_accepted: [0.0; MAX_AHEAD],
        }
    }

    /// Whether it goes on after `tokens` tokens, 1 or more, the product of whose acceptance is
    /// `accepted`.
    pub fn goes_on(&self, tokens: usize, accepted: f32) -> bool {
        tokens < self.tokens && accepted >= self.min_accepted[tokens - 1]
    }
}

/// The bin of a margin, or of another probability.
pub fn margin_bin(margin: f32) -> usize {
    ((margin * MARGIN_BINS as f32) as usize).min(MARGIN_BINS - 1)
}

/// Which logits a step is to give.
#[derive(Debug, Clone, PartialEq)]
pub enum LogitsRequest {
    /// None.
    None,
    /// All logits of the newest positions, this many where every layer ran. An exit gives those of
    /// the newest position only.
    Rows(usize),
    /// The token with the highest logit at each of the newest positions, in the order of
    /// positions and as many as [`Rows`](Self::Rows) gives. A device hands these over in place of
    /// the logits.
    Tokens(usize),
    /// The token that wins the race at each of the newest positions, as many as the race has, given
    /// as [`Tokens`](Self::Tokens) are.
    Sampled(Race),
}

impl LogitsRequest {
    /// What `sampler` chooses tokens from at each of the newest `positions` positions: its next
    /// tokens, in turn.
    pub fn of(sampler: &mut Sampler, positions: usize) -> Self {
        if sampler.is_argmax() {
            return Self::Tokens(positions);
        }
        sampler
            .race(positions)
            .map_or(Self::Rows(positions), Self::Sampled)
    }

    /// What is wanted of `logits`, [rows, width], of the newest positions.
    pub(super) fn of_rows(&self, logits: &[f32], width: usize) -> Logits {
        let rows = || logits.chunks_exact(width);
        match self {
            Self::None => Logits::None,
            Self::Rows(_) => Logits::Rows(logits.to_vec()),
            Self::Tokens(_) => Logits::Tokens(rows().map(argmax).collect()),
            Self::Sampled(race) => {
                let later = (0..rows().len()).rev();
                let token = |(later, row)| race.choose(later, row);
                Logits::Tokens(later.zip(rows()).map(token).collect())
            }
        }
    }

    /// The number of positions.
    pub fn positions(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Rows(positions) | Self::Tokens(positions) => *positions,
            Self::Sampled(race) => race.positions(),
        }
    }
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// Where, and why there.
    pub exit: StepExit,
    /// The same of each token after the first, where it went on.
    pub exits_ahead: Vec<StepExit>,
    /// What the exit head gave there, where the rule reads it.
    pub exit_signals: Option<ExitSignals>,
    /// The logits wanted.
    pub logits: Logits,
    /// For each of the logits' positions, the probability of the most probable token less that of
    /// the second, where tokens, sampled or not, were requested of a backend that
    /// [measures](super::Capabilities::margins) it; empty elsewhere.
    pub margins: Vec<f32>,
    /// Whether it went on with a token other than the one chosen last: what ran after it was for
    /// nothing.
    pub mispredicted: bool,
}

impl StepOutcome {
    /// The exit of the token number `index` of those that a step that went on gave.
    ///
    /// # Panics
    /// When it gave fewer.
    pub fn exit_of(&self, index: usize) -> StepExit {
        match index {
            0 => self.exit,
            _ => self.exits_ahead[index - 1],
        }
    }
}

/// The depth at which a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepExit {
    /// Layers executed, 1 to the number of layers.
    pub layer: usize,
    /// Why no further.
    pub reason: ExitReason,
}

/// Logits, as [requested](LogitsRequest).
#[derive(Debug, Clone, PartialEq)]
pub enum Logits {
    /// None.
    None,
    /// `[rows, vocabulary]`, row by row.
    Rows(Vec<f32>),
    /// The token at each position: the one with the highest logit, the lowest of equals, or the one
    /// that wins the race.
    Tokens(Vec<u32>),
}

/// What the token after one position is chosen from, or that it was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PositionLogits<'a> {
    /// All logits, one for each token.
    All(&'a [f32]),
    /// The token.
    Chosen(u32),
}

impl Logits {
    /// The rows; empty where none were requested.
    pub fn rows(&self) -> &[f32] {
        match self {
            Self::Rows(rows) => rows,
            Self::None | Self::Tokens(_) => &[],
        }
    }

    /// The tokens; empty where none were requested.
    pub fn tokens(&self) -> &[u32] {
        match self {
            Self::Tokens(tokens) => tokens,
            Self::None | Self::Rows(_) => &[],
        }
    }

    /// Those of the position `index` among the requested ones, `vocabulary` logits each.
    ///
    /// # Panics
    /// When they were not requested.
    pub fn at(&self, index: usize, vocabulary: usize) -> PositionLogits<'_> {
        match self {
            Self::None => panic!("no logits were requested"),
            Self::Rows(rows) => PositionLogits::All(&rows[index * vocabulary..][..vocabulary]),
            Self::Tokens(tokens) => PositionLogits::Chosen(tokens[index]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Sampling;

    #[test]
    fn positions_are_counted_in_rows_and_in_tokens() {
        let rows = Logits::Rows(vec![0.0, 1.0, 2.0, 3.0]);
        assert_eq!(rows.at(1, 2), PositionLogits::All(&[2.0, 3.0]));
        let tokens = Logits::Tokens(vec![7, 5]);
        assert_eq!(tokens.at(1, 2), PositionLogits::Chosen(5));
        assert_eq!(
            (rows.tokens(), tokens.rows()),
            (&[] as &[u32], &[] as &[f32])
        );
    }

    #[test]
    fn logits_are_requested_where_nothing_less_will_do() {
        let request = |temperature, repetition_penalty| {
            let settings = Sampling {
                temperature,
                repetition_penalty,
                ..Sampling::default()
            };
            LogitsRequest::of(&mut Sampler::new(settings).unwrap(), 3)
        };
        assert_eq!(request(0.0, 1.0), LogitsRequest::Tokens(3));
        assert_eq!(request(0.5, 1.1), LogitsRequest::Rows(3));
        let sampled = request(0.5, 1.0);
        assert!(matches!(sampled, LogitsRequest::Sampled(_)));
        assert_eq!(sampled.positions(), 3);
    }
}
