//! Passes of several sequences at once, of one row each.

use super::host_decided::{Deciding, HostDecided};
use super::not_finite::all_finite;
use super::{Backend, Engines, SequenceStep, StepExit, StepOutcome};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{ExitReason, ExitRule, ExitSignals};
use crate::sequence::Sequence;

/// The newest token of a sequence, as a row of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceRow {
    /// The sequence's cache slot.
    pub slot: usize,
    /// The token.
    pub token: u32,
    /// Its position.
    pub position: usize,
}

/// Engines that run rows of several sequences in one pass. What a row gives depends on no other, but
/// for rounding.
pub trait RowEngines {
    /// Whether passes may include `slot`, between others, though it has no row in them.
    fn may_idle(&self, slot: usize) -> bool;

    /// Start a pass over `rows`, each of another sequence.
    ///
    /// # Errors
    /// What the engines report.
    fn embed_rows(&mut self, rows: &[SequenceRow]) -> Result<()>;

    /// Take the residual stream of all rows through `engine`; its layers' caches then hold their
    /// positions.
    ///
    /// # Errors
    /// What the engines report.
    fn run_rows(&mut self, engine: usize) -> Result<()>;

    /// As [`Engines::stability`], for the row `row` of the last [`run_rows`](Self::run_rows).
    fn row_stability(&self, engine: usize, row: usize) -> Vec<f32>;

    /// As [`Engines::risk`], for that row.
    fn row_risk(&self, engine: usize, row: usize) -> Option<f32>;

    /// As [`Engines::exit_signals`], for that row.
    ///
    /// # Errors
    /// What the engines report.
    fn row_exit_signals(
        &mut self,
        depth: usize,
        row: usize,
        stability: [f32; 3],
    ) -> Result<Option<ExitSignals>>;

    /// The row `row` exits here: save its hidden state, and take its logits from there. What engines
    /// still compute of it does not count.
    ///
    /// # Errors
    /// What the engines report.
    fn exit_row(&mut self, row: usize) -> Result<()>;

    /// The logits of all rows, [rows, vocabulary].
    ///
    /// # Errors
    /// What the engines report.
    fn rows_logits(&mut self) -> Result<Vec<f32>>;
}

/// A row on its way through the engines.
struct OpenRow<'a> {
    deciding: Option<Deciding<'a>>,
    exit: Option<StepExit>,
}

impl<E: Engines> HostDecided<E> {
    /// Whether `step` may share a pass: it decodes one token, and no other position has to join it.
    fn is_row(&self, step: &SequenceStep<'_>) -> bool {
        let kv = step.sequence.kv();
        let nothing_waits = kv.complete() == kv.length();
        step.tokens.len() == 1
            && step.logits.positions() > 0
            && !step.rule.is_some_and(ExitRule::is_soft)
            && (nothing_waits || step.sequence.kv_fill() == KvFill::Propagate)
    }

    /// The indices of those of `steps` that run as rows, for each pass.
    pub(super) fn passes_of_rows(&mut self, steps: &[SequenceStep<'_>]) -> Vec<Vec<usize>> {
        let rows = steps.iter().enumerate();
        let rows = rows.filter(|(_, step)| self.is_row(step));
        let mut rows: Vec<_> = rows
            .map(|(index, step)| (step.sequence.slot(), index))
            .collect();
        rows.sort_unstable();
        let Some(engines) = self.engines.rows() else {
            return Vec::new();
        };
        let share = |&(one, _): &(usize, usize), &(next, _): &(usize, usize)| {
            (one + 1..next).all(|slot| engines.may_idle(slot))
        };
        let passes = rows.chunk_by(share).filter(|rows| rows.len() > 1);
        let indices = |rows: &[(usize, usize)]| rows.iter().map(|&(_, index)| index).collect();
        passes.map(indices).collect()
    }

    /// Run `steps`, each a row, in one pass.
    ///
    /// # Errors
    /// As [`Backend::step`].
    pub(super) fn step_rows(
        &mut self,
        steps: &mut [&mut SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        let rows = steps.iter_mut().map(|step| {
            Ok(SequenceRow {
                position: step.sequence.append(step.tokens)?.start,
                slot: step.sequence.slot(),
                token: step.tokens[0],
            })
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let open = steps.iter().map(|step| OpenRow {
            deciding: step.rule.map(Deciding::new),
            exit: None,
        });
        let mut open: Vec<_> = open.collect();
        self.row_engines().embed_rows(&rows)?;
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            for (step, open) in steps.iter_mut().zip(&open) {
                if open.exit.is_none() {
                    self.fill_below(engine, step.sequence)?;
                }
            }
            self.row_engines().run_rows(engine)?;
            for (row, (step, open)) in steps.iter_mut().zip(&mut open).enumerate() {
                if open.exit.is_none() {
                    let length = step.sequence.kv().length();
                    self.note_run(engine, step.sequence, &(length - 1..length));
                    open.exit = self.exit_of_row(engine, row, step.max_depth, open)?;
                }
            }
            if open.iter().all(|open| open.exit.is_some()) {
                break;
            }
        }
        let logits = self.row_engines().rows_logits()?;
        let full_depth = StepExit {
            layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        };
        let exits = open.iter().map(|open| open.exit.unwrap_or(full_depth));
        let deepest = exits.max_by_key(|exit| exit.layer);
        self.note_costs(rows.len(), deepest.unwrap_or(full_depth));
        let width = logits.len() / rows.len();
        let rows = steps.iter().zip(rows).zip(open);
        let outcomes = rows.zip(logits.chunks_exact(width));
        outcomes
            .map(|(((step, row), open), logits)| {
                if !all_finite(logits) {
                    return Err(Error::NotFinite {
                        position: row.position,
                        engine: None,
                    });
                }
                Ok(StepOutcome {
                    exit: open.exit.unwrap_or(full_depth),
                    exit_signals: open.deciding.and_then(|deciding| deciding.exit_signals),
                    logits: step.logits.of_rows(logits, width),
                    margins: Vec::new(),
                })
            })
            .collect()
    }

    /// Fill the caches of `engine` where earlier positions of `sequence` exited above it.
    fn fill_below(&mut self, engine: usize, sequence: &mut Sequence) -> Result<()> {
        let newest = sequence.kv().length() - 1;
        self.engines.select(sequence.slot());
        let mut layers = self.layers[engine].clone();
        layers.try_for_each(|layer| self.fill(layer, sequence, newest))
    }

    /// Where the row `row` ends, if that is after `engine`.
    fn exit_of_row(
        &mut self,
        engine: usize,
        row: usize,
        max_depth: usize,
        open: &mut OpenRow<'_>,
    ) -> Result<Option<StepExit>> {
        let decision = match &mut open.deciding {
            Some(deciding) => self.decide(engine, Some(row), deciding)?,
            None => None,
        };
        let exit = self.exit_after(engine, max_depth, decision.map(|decision| decision.reason));
        if exit.is_some() {
            self.row_engines().exit_row(row)?;
        }
        Ok(exit)
    }

    /// # Panics
    /// Where engines have no rows.
    pub(super) fn row_engines(&mut self) -> &mut dyn RowEngines {
        self.engines
            .rows()
            .expect("rows are only run where there are any")
    }
}
