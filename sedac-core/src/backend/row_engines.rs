//! Passes of several sequences at once.

use std::ops::Range;

use super::host_decided::{Deciding, HostDecided};
use super::not_finite::all_finite;
use super::{Backend, Engines, Logits, SequenceStep, StepExit, StepOutcome};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{ExitReason, ExitRule, ExitSignals};
use crate::sequence::Sequence;

/// The newest tokens of a sequence, as rows of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceRows<'a> {
    /// The sequence's cache slot.
    pub slot: usize,
    /// The tokens, 1 or more.
    pub tokens: &'a [u32],
    /// The position of the first.
    pub start: usize,
}

impl SequenceRows<'_> {
    /// The positions of the tokens.
    pub fn positions(&self) -> Range<usize> {
        self.start..self.start + self.tokens.len()
    }
}

/// Engines that run rows of several sequences in one pass. What a row gives depends on no other
/// sequence's, but for rounding. Sequences of a pass are counted from 0.
pub trait RowEngines {
    /// Start a pass over the rows of `sequences`, each another one.
    ///
    /// # Errors
    /// What the engines report.
    fn embed_rows(&mut self, sequences: &[SequenceRows<'_>]) -> Result<()>;

    /// Take the residual stream of all rows through `engine`; its layers' caches then hold their
    /// positions.
    ///
    /// # Errors
    /// What the engines report.
    fn run_rows(&mut self, engine: usize) -> Result<()>;

    /// As [`Engines::stability`], for the newest row of `sequence` in the last
    /// [`run_rows`](Self::run_rows).
    fn row_stability(&self, engine: usize, sequence: usize) -> Vec<f32>;

    /// As [`Engines::risk`], for that row.
    fn row_risk(&self, engine: usize, sequence: usize) -> Option<f32>;

    /// As [`Engines::exit_signals`], for that row.
    ///
    /// # Errors
    /// What the engines report.
    fn row_exit_signals(
        &mut self,
        depth: usize,
        sequence: usize,
        stability: [f32; 3],
    ) -> Result<Option<ExitSignals>>;

    /// The newest row of `sequence` exits here: save its hidden state, and take its logits from there.
    /// What engines still compute of it does not count.
    ///
    /// # Errors
    /// What the engines report.
    fn exit_row(&mut self, sequence: usize) -> Result<()>;

    /// The logits of the newest rows of each sequence, as many as `counts` has for it, 1 or more of all
    /// together: [rows, vocabulary].
    ///
    /// # Errors
    /// What the engines report.
    fn rows_logits(&mut self, counts: &[usize]) -> Result<Vec<f32>>;
}

/// A sequence whose rows are on their way through the engines.
struct OpenRows<'a> {
    deciding: Option<Deciding<'a>>,
    exit: Option<StepExit>,
}

impl<E: Engines> HostDecided<E> {
    /// Whether `step` may share a pass: no other position has to join it, and only the newest token of
    /// one token may exit.
    fn may_share(&self, step: &SequenceStep<'_>) -> bool {
        let kv = step.sequence.kv();
        let nothing_waits = kv.complete() == kv.length();
        let is_whole = step.rule.is_none() && step.max_depth >= self.num_layers();
        let fits = match step.tokens.len() {
            0 => false,
            1 => true,
            _ => is_whole,
        };
        fits && !step.rule.is_some_and(ExitRule::is_soft)
            && (nothing_waits || step.sequence.kv_fill() == KvFill::Propagate)
    }

    /// The indices of those of `steps` that share a pass: none, or several.
    pub(super) fn shared_pass(&mut self, steps: &[SequenceStep<'_>]) -> Vec<usize> {
        if self.engines.rows().is_none() {
            return Vec::new();
        }
        let rows = steps.iter().enumerate();
        let rows = rows.filter(|(_, step)| self.may_share(step));
        let rows: Vec<_> = rows.map(|(index, _)| index).collect();
        match rows.len() {
            1 => Vec::new(),
            _ => rows,
        }
    }

    /// Run `steps` in one pass.
    ///
    /// # Errors
    /// As [`Backend::step`].
    pub(super) fn step_rows(
        &mut self,
        steps: &mut [&mut SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        let rows = steps.iter_mut().map(|step| {
            Ok(SequenceRows {
                start: step.sequence.append(step.tokens)?.start,
                slot: step.sequence.slot(),
                tokens: step.tokens,
            })
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let open = steps.iter().map(|step| OpenRows {
            deciding: step.rule.map(Deciding::new),
            exit: None,
        });
        let mut open: Vec<_> = open.collect();
        self.row_engines().embed_rows(&rows)?;
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            for ((step, rows), open) in steps.iter_mut().zip(&rows).zip(&open) {
                if open.exit.is_none() {
                    self.fill_below(engine, step.sequence, rows.start)?;
                }
            }
            self.row_engines().run_rows(engine)?;
            for (index, (step, open)) in steps.iter_mut().zip(&mut open).enumerate() {
                if open.exit.is_none() {
                    self.note_run(engine, step.sequence, &rows[index].positions());
                    open.exit = self.exit_of_rows(engine, index, step.max_depth, open)?;
                }
            }
            if open.iter().all(|open| open.exit.is_some()) {
                break;
            }
        }
        let full_depth = StepExit {
            layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        };
        let counts = steps.iter().zip(&open).map(|(step, open)| match open.exit {
            Some(_) => step.logits.positions().min(1),
            None => step.logits.positions(),
        });
        let counts: Vec<_> = counts.collect();
        let wanted: usize = counts.iter().sum();
        let logits = match wanted {
            0 => Vec::new(),
            _ => self.row_engines().rows_logits(&counts)?,
        };
        let exits = open.iter().map(|open| open.exit.unwrap_or(full_depth));
        let deepest = exits.max_by_key(|exit| exit.layer);
        let tokens = rows.iter().map(|rows| rows.tokens.len()).sum();
        self.note_costs(tokens, deepest.unwrap_or(full_depth));
        let width = logits.len() / wanted.max(1);
        let mut rest = &logits[..];
        let sequences = steps.iter().zip(rows).zip(open.into_iter().zip(counts));
        sequences
            .map(|((step, rows), (open, count))| {
                let (logits, others) = rest.split_at(count * width);
                rest = others;
                if let Some(row) = logits
                    .chunks_exact(width.max(1))
                    .position(|row| !all_finite(row))
                {
                    return Err(Error::NotFinite {
                        position: rows.positions().end - count + row,
                        engine: None,
                    });
                }
                Ok(StepOutcome {
                    exit: open.exit.unwrap_or(full_depth),
                    exits_ahead: Vec::new(),
                    exit_signals: open.deciding.and_then(|deciding| deciding.exit_signals),
                    logits: match count {
                        0 => Logits::None,
                        _ => step.logits.of_rows(logits, width),
                    },
                    margins: Vec::new(),
                    mispredicted: false,
                })
            })
            .collect()
    }

    /// Fill the caches of `engine` where positions of `sequence` before `start` exited above it.
    fn fill_below(&mut self, engine: usize, sequence: &mut Sequence, start: usize) -> Result<()> {
        self.engines.select(sequence.slot());
        let mut layers = self.layers[engine].clone();
        layers.try_for_each(|layer| self.fill(layer, sequence, start))
    }

    /// Where the newest row of the sequence `index` ends, if that is after `engine`.
    fn exit_of_rows(
        &mut self,
        engine: usize,
        index: usize,
        max_depth: usize,
        open: &mut OpenRows<'_>,
    ) -> Result<Option<StepExit>> {
        let decision = match &mut open.deciding {
            Some(deciding) => self.decide(engine, Some(index), deciding)?,
            None => None,
        };
        let exit = self.exit_after(engine, max_depth, decision.map(|decision| decision.reason));
        if exit.is_some() {
            self.row_engines().exit_row(index)?;
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
