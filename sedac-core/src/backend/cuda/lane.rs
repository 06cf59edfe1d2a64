//! One sequence's step: its rows, in pieces of one pass or batch each.

use std::collections::VecDeque;
use std::ops::Range;

use super::abi::{MAX_ROWS, PassRow, divides_anew};
use crate::backend::{Ahead, EngineTiming, Logits, LogitsRequest, SequenceStep, StepExit};
use crate::error::Result;
use crate::kv::{KvFill, KvState};
use crate::policy::{ExitReason, ExitSignals};

/// A step under way.
pub(super) struct Lane {
    pub(super) rows: Vec<PassRow>,
    /// The number of its first rows, which are not new.
    waiting: usize,
    /// Whether caches of layers that it skips get what these make of the hidden states it exits with.
    pub(super) fills: bool,
    /// Layers after which it ends at the latest.
    pub(super) limit: usize,
    /// Its passes that have not run, each as a range of `rows`.
    pieces: VecDeque<Range<usize>>,
    /// Its rows that come then, which passes and batches may divide in any way.
    divisible: Range<usize>,
    /// Whether a rule decides about these.
    decides: bool,
    /// Whether batches may have them.
    batches: bool,
    /// The rows whose logits are wanted where every layer runs.
    wanted: Range<usize>,
    pub(super) exit: StepExit,
    /// Of each token that it went on with.
    pub(super) exits_ahead: Vec<StepExit>,
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

/// What a lane runs in one pass or batch.
pub(super) struct Piece {
    /// Of the lane's rows.
    pub(super) rows: Range<usize>,
    /// Its rows whose logits are wanted, of the lane's.
    pub(super) wanted: Range<usize>,
    /// Whether it ends the step: the rule decides about no other.
    pub(super) is_last: bool,
}

impl Lane {
    /// Append the tokens of `step`, which goes to `limit` of `layers` layers at the most. How its rows
    /// are [divided](Self::divide) is still open.
    pub(super) fn new(step: &mut SequenceStep<'_>, layers: usize, limit: usize) -> Result<Self> {
        let appended = step.sequence.append(step.tokens)?;
        let mut rows = waiting(step.sequence.kv(), appended.start, limit);
        let waiting = rows.len();
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
        let fills = step.sequence.kv_fill() == KvFill::Propagate;
        // what waits after an exit is known to the host alone
        let decided = step.rule.is_none() || fills;
        let may_go_on = chooses && decided && step.tokens.len() == 1 && rows.len() == 1;
        let tokens = match may_go_on {
            true => step.ahead.tokens.min(step.sequence.room() + 1),
            false => 1,
        };
        assert!(wanted <= rows.len(), "logits of positions that do not run");
        Ok(Self {
            waiting,
            fills,
            limit,
            pieces: VecDeque::new(),
            divisible: rows.len()..rows.len(),
            decides: false,
            batches: false,
            wanted: rows.len() - wanted..rows.len(),
            rows,
            exit: StepExit {
                layer: layers,
                reason: ExitReason::FullDepth,
            },
            exits_ahead: Vec::new(),
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

    /// Divide the rows into passes, and leave those open that passes and batches may divide.
    /// `is_crowded`: whether a pass does not hold all lanes; `rule`: whether one may decide about a row
    /// of a batch, None where none decides.
    pub(super) fn divide(&mut self, layers: usize, is_crowded: bool, rule: Option<bool>) {
        let (waiting, count) = (self.waiting, self.rows.len());
        let new = count - waiting;
        let is_divisible = match rule {
            // new rows that a pass holds share one with those that wait
            None => waiting == 0 || new > MAX_ROWS,
            Some(_) => is_crowded && new == 1,
        };
        if is_divisible && self.limit == layers {
            self.pieces = undivided(&self.rows, split(waiting));
            self.divisible = waiting..count;
            self.decides = rule.is_some();
            // what decides about a row of a batch belongs to its logits
            self.batches = rule.is_none_or(|in_batches| in_batches && !self.wanted.is_empty());
        } else {
            self.pieces = undivided(&self.rows, pieces(waiting, count, rule.is_some()));
        }
    }

    /// Whether a row of it that a rule decides about may be in a batch once others have run.
    pub(super) fn joins_later(&self) -> bool {
        self.decides && self.batches && self.has_pieces()
    }

    /// Whether it has passes that cannot be divided.
    pub(super) fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Whether there is more to run.
    pub(super) fn is_open(&self) -> bool {
        !self.pieces.is_empty() || !self.divisible.is_empty()
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

    /// The rows that a batch may take now.
    pub(super) fn rows_for_batch(&self) -> usize {
        match self.batches && !self.has_pieces() {
            true => self.divisible.len(),
            false => 0,
        }
    }

    /// Take up to `room` rows for a batch, of which up to `logits_room` want logits.
    pub(super) fn take_for_batch(&mut self, room: usize, logits_room: usize) -> Option<Piece> {
        let unwanted = self.wanted.start.saturating_sub(self.divisible.start);
        let rows = self.rows_for_batch().min(room).min(unwanted + logits_room);
        (rows > 0).then(|| self.take_divisible(rows))
    }

    /// Take the next piece of a pass, if there is one of at most `room` rows. Rows for batches come later
    /// where the pass is one that a batch awaits (`is_awaited`). So does a row that a rule decides about
    /// where pieces are left of any lane, unless it fills caches: if it stopped in such a pass, it would
    /// wait for the next one.
    pub(super) fn take_piece(
        &mut self,
        room: usize,
        pieces_left: bool,
        is_awaited: bool,
    ) -> Option<Piece> {
        let Some(rows) = self.pieces.front().cloned() else {
            if is_awaited || (self.decides && !self.fills && pieces_left) {
                return None;
            }
            let most = self.divisible.len().min(MAX_ROWS);
            let rows = first_part(&self.rows[self.divisible.start..][..most]);
            return (1..=room)
                .contains(&rows)
                .then(|| self.take_divisible(rows));
        };
        if rows.len() > room {
            return None;
        }
        self.pieces.pop_front();
        Some(self.piece(rows))
    }

    fn take_divisible(&mut self, rows: usize) -> Piece {
        let start = self.divisible.start;
        self.divisible.start += rows;
        self.piece(start..start + rows)
    }

    fn piece(&self, rows: Range<usize>) -> Piece {
        Piece {
            wanted: self.wanted.start.clamp(rows.start, rows.end)..rows.end,
            is_last: !self.is_open(),
            rows,
        }
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

/// The same of `rows` as `pieces` have, in which attention divides keys in one way each.
fn undivided(rows: &[PassRow], pieces: VecDeque<Range<usize>>) -> VecDeque<Range<usize>> {
    let parts = pieces.into_iter().flat_map(|mut rest| {
        std::iter::from_fn(move || {
            let start = rest.start;
            rest.start += first_part(&rows[rest.clone()]);
            (start < rest.start).then_some(start..rest.start)
        })
    });
    parts.collect()
}

/// How many of `rows` come before attention divides keys anew.
fn first_part(rows: &[PassRow]) -> usize {
    let divides = |row: &PassRow| divides_anew(row.position as usize);
    let others = rows.iter().skip(1);
    let same = others.take_while(|row| !divides(row)).count();
    rows.len().min(1 + same)
}

/// Split the first `count` rows into passes.
fn split(count: usize) -> VecDeque<Range<usize>> {
    passes(0..count).collect()
}

fn passes(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(MAX_ROWS)
        .map(move |start| start..end.min(start + MAX_ROWS))
}

/// Split `count` rows, of which the first `waiting` are not new, into passes. New rows that the rule
/// decides about share the last pass, if one holds them. Waiting rows that do not fit beside them
/// run before, all of them: the next tokens are spared a second pass.
fn pieces(waiting: usize, count: usize, has_rule: bool) -> VecDeque<Range<usize>> {
    if has_rule && count > MAX_ROWS {
        return passes(0..waiting).chain(passes(waiting..count)).collect();
    }
    split(count)
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
    fn passes_end_where_attention_divides_keys_anew() {
        let row = |position| PassRow {
            position,
            ..PassRow::default()
        };
        let parts = |first: i32, counts: &[i32]| -> Vec<usize> {
            let count: i32 = counts.iter().sum();
            let rows: Vec<_> = (first..first + count).map(row).collect();
            let ends = counts.iter().scan(0, |end, &count| {
                *end += count as usize;
                Some(*end - count as usize..*end)
            });
            let parts = undivided(&rows, ends.collect());
            assert!(parts.iter().flat_map(Clone::clone).eq(0..rows.len()));
            parts.into_iter().map(|part| part.len()).collect()
        };
        assert_eq!(parts(2040, &[8, 3]), [8, 3]);
        assert_eq!(parts(2043, &[8, 3]), [5, 3, 3]);
        assert_eq!(parts(2047, &[1, 2]), [1, 2]);
        assert_eq!(parts(510, &[8]), [8]);
        assert!(parts(0, &[]).is_empty());
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
