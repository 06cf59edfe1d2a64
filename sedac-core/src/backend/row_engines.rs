//! Passes of several sequences at once, of one row each.

use super::host_decided::HostDecided;
use super::not_finite::all_finite;
use super::{Backend, Engines, SequenceStep, StepExit, StepOutcome};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::policy::ExitReason;

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

    /// The logits of all rows, [rows, vocabulary].
    ///
    /// # Errors
    /// What the engines report.
    fn rows_logits(&mut self) -> Result<Vec<f32>>;
}

impl<E: Engines> HostDecided<E> {
    /// Whether `step` may share a pass: it decodes one token at full depth, before which nothing waits.
    fn is_row(&self, step: &SequenceStep<'_>) -> bool {
        let kv = step.sequence.kv();
        step.tokens.len() == 1
            && step.rule.is_none()
            && step.max_depth >= self.num_layers()
            && step.logits.positions() > 0
            && kv.complete() == kv.length()
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
        let logits = self.run_rows(&rows, interrupt)?;
        for step in steps.iter_mut() {
            let length = step.sequence.kv().length();
            for layer in 0..self.num_layers() {
                step.sequence.kv_mut().fill(layer, length);
            }
        }
        let width = logits.len() / rows.len();
        let exit = StepExit {
            layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        };
        self.note_costs(rows.len(), exit);
        let outcomes = steps.iter().zip(rows).zip(logits.chunks_exact(width));
        outcomes
            .map(|((step, row), logits)| {
                if !all_finite(logits) {
                    let position = row.position;
                    return Err(Error::NotFinite {
                        position,
                        engine: None,
                    });
                }
                Ok(StepOutcome {
                    exit,
                    exit_signals: None,
                    logits: step.logits.of_rows(logits, width),
                    margins: Vec::new(),
                })
            })
            .collect()
    }

    fn run_rows(&mut self, rows: &[SequenceRow], interrupt: &Interrupt) -> Result<Vec<f32>> {
        let count = self.engines.layers().len();
        let engines = self.engines.rows().expect("asked before");
        engines.embed_rows(rows)?;
        for engine in 0..count {
            interrupt.check()?;
            engines.run_rows(engine)?;
        }
        engines.rows_logits()
    }
}
