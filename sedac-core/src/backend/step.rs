//! One call of a backend: what each sequence is to run, and what came of it.

use crate::policy::{ExitReason, ExitRule, ExitSignals};
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
}

/// Which logits a step is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsRequest {
    /// None.
    None,
    /// All logits of the newest positions, this many where every layer ran. An exit gives those of
    /// the newest position only.
    Rows(usize),
    /// The highest logits of the newest position, this many.
    Top(usize),
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// Where, and why there.
    pub exit: StepExit,
    /// What the exit head gave there, where the rule reads it.
    pub exit_signals: Option<ExitSignals>,
    /// The logits wanted.
    pub logits: Logits,
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
    /// Tokens and their logits, the highest first; of equal ones the lower token first.
    Top(Vec<(u32, f32)>),
}

impl Logits {
    /// The rows; empty where none were requested.
    pub fn rows(&self) -> &[f32] {
        match self {
            Self::Rows(rows) => rows,
            Self::None | Self::Top(_) => &[],
        }
    }

    /// The token with the highest logit among the highest requested.
    pub fn top_token(&self) -> Option<u32> {
        match self {
            Self::Top(top) => top.first().map(|&(token, _)| token),
            Self::None | Self::Rows(_) => None,
        }
    }

    /// The `count` highest of `logits`, all finite.
    pub(super) fn top(logits: &[f32], count: usize) -> Self {
        let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let higher = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if count < tokens.len() {
            tokens.select_nth_unstable_by(count, higher);
            tokens.truncate(count);
        }
        tokens.sort_unstable_by(higher);
        Self::Top(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::argmax;

    #[test]
    fn the_highest_come_first_and_of_equals_the_lower_token() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        let expected = vec![(1, 3.0), (3, 3.0), (2, 2.0)];
        assert_eq!(Logits::top(&logits, 3), Logits::Top(expected));
        assert_eq!(Logits::top(&logits, 1).top_token(), Some(argmax(&logits)));
        assert_eq!(Logits::top(&logits, 9).rows(), &[] as &[f32]);
    }
}
