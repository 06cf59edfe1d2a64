//! Sequences that are generated together.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::PyMemoryView;

use super::decoding_settings::{PyDecodingSetting, PySampling};
use super::error::InputError;
use super::model::Model;
use super::outcomes::PyDraftSummary;
use super::process::ProcessLocal;
use super::step_thread::PyStepThread;
use crate::chain::{FinishReason, Request, Token};
use crate::interrupt::Interrupt;
use crate::policy::ExitReason;
use crate::sampler::LogitsProcessing;
use crate::scheduler::{Progress, Scheduler, SchedulerSettings, SchedulerStatistics};

/// Sequences that are generated together: they join and leave between steps.
#[pyclass(frozen, name = "Scheduler")]
pub(super) struct PyScheduler {
    model: Py<Model>,
    scheduler: ProcessLocal<Scheduler>,
}

#[pymethods]
impl PyScheduler {
    #[new]
    #[pyo3(signature = (
        model, *, max_sequences = None, cache_tokens = None, prefill_chunk = None
    ))]
    fn new(
        py: Python<'_>,
        model: Py<Model>,
        max_sequences: Option<usize>,
        cache_tokens: Option<usize>,
        prefill_chunk: Option<usize>,
    ) -> PyResult<Self> {
        let settings = SchedulerSettings {
            max_sequences,
            cache_tokens,
            prefill_chunk,
        };
        let turns = model.get().turns()?;
        let scheduler = py.detach(|| Scheduler::new(&mut turns.take(), settings))?;
        Ok(Self {
            model,
            scheduler: ProcessLocal::new(scheduler),
        })
    }

    /// The most sequences that run at once.
    #[getter]
    fn max_sequences(&self) -> PyResult<usize> {
        Ok(self.scheduler.get()?.max_sequences())
    }

    /// Queue a sequence and return its number.
    #[pyo3(signature = (
        prompt, decoding, sampling, *, max_new_tokens, stop_tokens, top_logprobs = None,
        prompt_logprobs = false, logit_bias = None, constrained = false
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn add(
        &self,
        prompt: Vec<u32>,
        decoding: PyDecodingSetting,
        sampling: PySampling,
        max_new_tokens: usize,
        stop_tokens: Vec<u32>,
        top_logprobs: Option<usize>,
        prompt_logprobs: bool,
        logit_bias: Option<BTreeMap<u32, f32>>,
        constrained: bool,
    ) -> PyResult<u64> {
        let PyDecodingSetting(decoding) = decoding;
        self.model.get().check(&decoding.mode)?;
        let request = Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            mode: decoding.mode,
            kv_fill: decoding.kv_fill,
            sampling: sampling.0,
        };
        let processing = LogitsProcessing {
            bias: logit_bias.into_iter().flatten().collect(),
            constrained,
            top_logprobs,
            prompt_logprobs,
        };
        Ok(self.scheduler.get()?.add(&request, processing)?)
    }

    /// End a sequence before the next step.
    fn cancel(&self, sequence: u64) -> PyResult<()> {
        self.scheduler.get()?.cancel(sequence);
        Ok(())
    }

    /// Say which tokens may come next in constrained sequences.
    fn allow(&self, masks: BTreeMap<u64, Bound<'_, PyAny>>) -> PyResult<()> {
        let masks = masks
            .into_iter()
            .map(|(sequence, mask)| Ok((sequence, words(&mask)?)));
        let masks = masks.collect::<PyResult<Vec<_>>>()?;
        Ok(self.scheduler.get()?.allow(masks)?)
    }

    /// Run one step of each sequence that can run.
    fn step(&self, py: Python<'_>) -> PyResult<Vec<PyProgress>> {
        let turns = self.model.get().turns()?;
        let scheduler = self.scheduler.get()?;
        let progress = py.detach(|| scheduler.step(&mut turns.take(), &Interrupt::default()));
        let progress = progress.into_iter();
        progress
            .map(|progress| PyProgress::new(py, progress))
            .collect()
    }

    /// Run steps on a thread, while there is something to do.
    fn start(&self) -> PyResult<PyStepThread> {
        let turns = self.model.get().turns()?.clone();
        PyStepThread::start(self.scheduler.get()?.clone(), turns)
    }

    /// How it stands, as of the end of the last step.
    fn statistics(&self) -> PyResult<PySchedulerStatistics> {
        Ok(self.scheduler.get()?.statistics().into())
    }
}

/// The words of a mask.
fn words(mask: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let bytes = PyMemoryView::from(mask)?.call_method0("tobytes")?;
    let bytes: &[u8] = bytes.extract()?;
    let (words, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(InputError::new_err(format!(
            "a mask has {} bytes; it is of words of 4 bytes",
            bytes.len()
        )));
    }
    let words = words.iter().map(|&word| u32::from_le_bytes(word));
    Ok(words.collect())
}

/// What one step did for one sequence.
#[pyclass(frozen, get_all, name = "Progress")]
#[derive(Debug)]
pub(super) struct PyProgress {
    sequence: u64,
    tokens: Vec<Py<PyStepToken>>,
    prompt_logprobs: Vec<(f32, Vec<(u32, f32)>)>,
    finish_reason: Option<FinishReason>,
    error: Option<String>,
    cached_prompt_tokens: usize,
    waited: f64,
    drafts: PyDraftSummary,
}

impl PyProgress {
    pub(super) fn new(py: Python<'_>, progress: Progress) -> PyResult<Self> {
        let (finish_reason, error) = match progress.end {
            Some(Ok(reason)) => (Some(reason), None),
            Some(Err(error)) => (None, Some(error.to_string())),
            None => (None, None),
        };
        let tokens = progress.tokens.into_iter();
        let prompt_logprobs = progress.prompt_logprobs.into_iter();
        Ok(Self {
            sequence: progress.sequence,
            tokens: tokens
                .map(|token| Py::new(py, PyStepToken::from(token)))
                .collect::<PyResult<_>>()?,
            prompt_logprobs: prompt_logprobs
                .map(|logprobs| (logprobs.logprob, logprobs.top))
                .collect(),
            finish_reason,
            error,
            cached_prompt_tokens: progress.cached_prompt_tokens,
            waited: progress.waited.as_secs_f64(),
            drafts: (&progress.drafts).into(),
        })
    }
}

/// One token of a sequence: its id, the layers executed and why no more, whether it is an accepted
/// draft, and its log-probability and those of the most probable tokens where they were asked for.
#[pyclass(frozen, get_all, name = "StepToken")]
#[derive(Debug)]
pub(super) struct PyStepToken {
    id: u32,
    exit_layer: usize,
    exit_reason: ExitReason,
    drafted: bool,
    logprob: Option<f32>,
    top_logprobs: Vec<(u32, f32)>,
}

impl From<Token> for PyStepToken {
    fn from(token: Token) -> Self {
        Self {
            id: token.id,
            exit_layer: token.exit.layer,
            exit_reason: token.exit.reason,
            drafted: token.is_accepted_draft,
            logprob: token.logprobs.as_ref().map(|logprobs| logprobs.logprob),
            top_logprobs: token
                .logprobs
                .map_or_else(Vec::new, |logprobs| logprobs.top),
        }
    }
}

/// How a scheduler stands.
#[pyclass(frozen, get_all, name = "SchedulerStatistics")]
#[derive(Debug)]
pub(super) struct PySchedulerStatistics {
    running: usize,
    waiting: usize,
    used_cache_tokens: usize,
    cache_tokens: usize,
    preemptions: u64,
    prefix_hits: u64,
    prefix_tokens: u64,
}

impl From<SchedulerStatistics> for PySchedulerStatistics {
    fn from(statistics: SchedulerStatistics) -> Self {
        let SchedulerStatistics {
            running,
            waiting,
            used_cache_tokens,
            cache_tokens,
            preemptions,
            prefix_hits,
            prefix_tokens,
        } = statistics;
        Self {
            running,
            waiting,
            used_cache_tokens,
            cache_tokens,
            preemptions,
            prefix_hits,
            prefix_tokens,
        }
    }
}
