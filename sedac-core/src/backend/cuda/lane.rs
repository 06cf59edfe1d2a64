//! One sequence's step: its rows, in pieces of one pass each.

use std::collections::VecDeque;
use std::ops::Range;

use super::abi::{MAX_ROWS, PassRow};
use crate::backend::{Ahead, EngineTiming, Logits, LogitsRequest, SequenceStep, StepExit};
use crate::error::Result;
use crate::kv::{KvFill, KvState};
use crate::policy::{ExitReason, ExitSignals};

/// A step under way.
pub(super) struct Lane {
    pub(super) rows: Vec<PassRow>,
    /// The number of its first rows that only fill caches.
    frozen: usize,
    /// Layers after which it ends at the latest.
    pub(super) limit: usize,
    /// Its passes that have not run, each as a range of `rows`.
    pieces: VecDeque<Range<usize>>,
    /// The rows whose logits are wanted where every layer runs.
    wanted: Range<usize>,
    pub(super) exit: StepExit,
    /// What the exit head said there, where the rule asked it.
    pub(super) exit_signals: Option<ExitSignals>,
    pub(super) logits: Logits,
    /// Of the logits' rows, where tokens are wanted, sampled or not.
    pub(super) margins: Vec<f32>,
    /// Whether the device went on with another token than the one chosen last.
    pub(super) mispredicted: bool,
    /// How far it can go on.
    pub(super) ahead: Ahead,
    /// How far it was asked to.
    asked_ahead: usize,
    pub(super) timings: Vec<EngineTiming>,
}

/// What a lane runs in one pass.
pub(super) struct Piece {
    /// Of the lane's rows.
    pub(super) rows: Range<usize>,
    /// The number of its first rows that only fill caches.
    pub(super) frozen: usize,
    /// Its rows whose logits are wanted, of the lane's.
    pub(super) wanted: Range<usize>,
    /// Whether it ends the step: the rule decides about no other.
    pub(super) is_last: bool,
}

impl Lane {
    /// Append the tokens of `step`, which goes to `limit` of `layers` layers at the most. `prefill`:
    /// tokens that prefill takes at once, 0 where there is none.
    pub(super) fn new(
        step: &mut SequenceStep<'_>,
        layers: usize,
        limit: usize,
        prefill: usize,
    ) -> Result<Self> {
        let appended = step.sequence.append(step.tokens)?;
        let mut rows = waiting(step.sequence.kv(), appended.start, limit);
        let count = rows.len();
        rows.extend(
            step.tokens
                .iter()
                .zip(appended)
                .map(|(&token, position)| PassRow {
                    token: token as i32,
                    position: position as i32,
                    ..PassRow::default()
                }),
        );
        let wanted = match step.logits.positions() {
            wanted if limit < layers => wanted.min(1),
            wanted if step.ahead.tokens > 1 => wanted.min(step.tokens.len()),
            wanted => wanted,
        };
        let chooses = matches!(
            step.logits,
            LogitsRequest::Tokens(_) | LogitsRequest::Sampled(_)
        );
        let may_go_on = chooses && step.rule.is_none() && step.tokens.len() == 1 && rows.len() == 1;
        let tokens = match may_go_on {
            true => step.ahead.tokens.min(step.sequence.room() + 1),
            false => 1,
        };
        assert!(wanted <= rows.len(), "logits of positions that do not run");
        let prefills = prefill > 0 && limit == layers && step.rule.is_none();
        let pieces = match step.tokens.len() - wanted.min(step.tokens.len()) {
            new if prefills && new > MOST_IN_PASSES => {
                pieces_with_prefill(count, new, rows.len(), prefill)
            }
            _ => pieces(count, rows.len(), step.rule.is_some()),
        };
        Ok(Self {
            frozen: match step.sequence.kv_fill() {
                KvFill::Propagate => count,
                KvFill::Defer => 0,
            },
            limit,
            pieces,
            wanted: rows.len() - wanted..rows.len(),
            rows,
            exit: StepExit {
                layer: layers,
                reason: ExitReason::FullDepth,
            },
            exit_signals: None,
            logits: Logits::None,
            margins: Vec::new(),
            mispredicted: false,
            ahead: Ahead {
                tokens,
                ..step.ahead
            },
            asked_ahead: step.ahead.tokens,
            timings: Vec::new(),
        })
    }

    /// Whether there is more to run.
    pub(super) fn is_open(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// The token at the next of the positions wanted, and its margin.
    pub(super) fn take_token(&mut self, token: u32, margin: f32) {
        self.margins.push(margin);
        match &mut self.logits {
            Logits::Tokens(earlier) => earlier.push(token),
            other => *other = Logits::Tokens(vec![token]),
        }
    }

    /// The number of positions wanted after the one numbered `row` in the pass's step `step`.
    pub(super) fn later(&self, row: usize, step: usize) -> usize {
        self.rows.len() - 1 - row + self.asked_ahead - 1 - step
    }

    /// Take the next piece, if it is one for prefill.
    pub(super) fn take_prefill(&mut self) -> Option<Range<usize>> {
        let is_one = |rows: &&Range<usize>| rows.len() > MAX_ROWS;
        self.pieces.front().filter(is_one)?;
        self.pieces.pop_front()
    }

    /// Take the next piece, if there is one of at most `room` rows.
    pub(super) fn take_piece(&mut self, room: usize) -> Option<Piece> {
        let rows = self
            .pieces
            .front()
            .filter(|rows| rows.len() <= room)?
            .clone();
        self.pieces.pop_front();
        Some(Piece {
            frozen: self.frozen.clamp(rows.start, rows.end) - rows.start,
            wanted: rows.start.max(self.wanted.start)..rows.end,
            is_last: self.pieces.is_empty(),
            rows,
        })
    }
}

/// The positions below `end` that lack one of the first `limit` layers.
fn waiting(kv: &KvState, end: usize, limit: usize) -> Vec<PassRow> {
    let first_layer = |position| (0..limit).find(|&layer| kv.filled(layer) <= position);
    let positions = kv.pending(limit - 1, end);
    let rows = positions.filter_map(|position| {
        Some(PassRow {
            token: -1,
            position: position as i32,
            sequence: 0,
            first_layer: first_layer(position)? as i32,
        })
    });
    rows.collect()
}

/// New rows without logits that are left to passes: as many take no longer in these than in prefill.
/// (SmolLM2 on one H200 has its first token 1.93 ms after a prompt of 25 in passes, and 2.01 after
/// one of 26, of which 25 are prefilled; after 256 2.31.)
const MOST_IN_PASSES: usize = 3 * MAX_ROWS;

/// Split `count` rows into passes, but for `new` new ones after the first `waiting`: those are for
/// prefill, which takes `prefill` at once. A piece for prefill has more rows than a pass.
fn pieces_with_prefill(
    waiting: usize,
    new: usize,
    count: usize,
    prefill: usize,
) -> VecDeque<Range<usize>> {
    let new = match new % prefill {
        rest if rest <= MAX_ROWS => new - rest,
        _ => new,
    };
    let end = waiting + new;
    let prefilled = (waiting..end)
        .step_by(prefill)
        .map(|start| start..end.min(start + prefill));
    split(0..waiting)
        .chain(prefilled)
        .chain(split(end..count))
        .collect()
}

/// Split rows into passes.
fn split(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(MAX_ROWS)
        .map(move |start| start..end.min(start + MAX_ROWS))
}

/// Split `count` rows, of which the first `waiting` are not new, into passes. New rows that the rule
/// decides about share the last pass, if one holds them. Waiting rows that do not fit beside them
/// run before, all of them: the next tokens are spared a second pass.
fn pieces(waiting: usize, count: usize, has_rule: bool) -> VecDeque<Range<usize>> {
    if has_rule && count > MAX_ROWS {
        return split(0..waiting).chain(split(waiting..count)).collect();
    }
    split(0..count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_a_rule_decides_about_stay_together() {
        let rows = |waiting, count, has_rule| -> Vec<usize> {
            let pieces = pieces(waiting, count, has_rule);
            pieces.iter().map(ExactSizeIterator::len).collect()
        };
        assert!(rows(0, 0, true).is_empty());
        assert_eq!(rows(5, 8, true), [8]);
        assert_eq!(rows(8, 9, true), [8, 1]);
        assert_eq!(rows(6, 9, true), [6, 3]);
        assert_eq!(rows(6, 9, false), [8, 1]);
        assert_eq!(rows(9, 9, true), [8, 1]);
        assert_eq!(rows(0, 20, true), [8, 8, 4]);
    }

    #[test]
    fn prefill_takes_whole_pieces_of_new_rows() {
        let rows = |waiting, new, count| -> Vec<_> {
            pieces_with_prefill(waiting, new, count, 100).into()
        };
        assert_eq!(rows(0, 50, 51), [0..50, 50..51]);
        assert_eq!(rows(9, 50, 60), [0..8, 8..9, 9..59, 59..60]);
        // a rest that one pass holds runs beside the rows that want logits
        assert_eq!(rows(0, 204, 206), [0..100, 100..200, 200..206]);
        assert_eq!(rows(0, 209, 209), [0..100, 100..200, 200..209]);
        assert_eq!(rows(0, 200, 200), [0..100, 100..200]);
    }

    #[test]
    fn positions_wait_from_the_first_layer_they_lack() {
        let mut kv = KvState::new(3, 8);
        kv.begin(4).unwrap();
        for (layer, filled) in [(0, 4), (1, 3), (2, 1)] {
            kv.fill(layer, filled);
        }
        let first_layers = |limit| -> Vec<_> {
            let rows = waiting(&kv, 4, limit).into_iter();
            rows.map(|row| (row.position, row.first_layer)).collect()
        };
        assert_eq!(first_layers(3), [(1, 2), (2, 2), (3, 1)]);
        assert_eq!(first_layers(2), [(3, 1)]);
        assert!(first_layers(1).is_empty());
    }
}
