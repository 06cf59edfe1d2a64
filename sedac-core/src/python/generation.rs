//! A running generation, as a Python iterator.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::door::{Inbox, POLL, receive};
use super::outcomes::{PyCertification, PyGenerationSummary, PyToken};
use super::process::ProcessLocal;
use super::turns::Turns;
use crate::backend::profile::record;
use crate::certification::Certification;
use crate::chain::{Request, Summary, Token};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::text::{StopStrings, TextCodec};

/// Tokens that a generation may be ahead of its reader, unless somebody else waits for the model.
const MOST_AHEAD: usize = 16;

enum Event {
    Token(PyToken),
    End(Result<Ended>),
}

/// What a generation leaves.
struct Ended {
    summary: Summary,
    /// Tokens that were not sent.
    tokens: Vec<PyToken>,
    /// Text that no token has given yet.
    rest: String,
    /// A Chrome trace, if asked for.
    profile: Option<String>,
}

/// What to generate, and with what.
pub(super) struct GenerationWork {
    pub(super) turns: Arc<Turns>,
    pub(super) codec: Option<Arc<TextCodec>>,
    pub(super) request: Request,
    pub(super) stops: StopStrings,
    /// Whether to record a Chrome trace.
    pub(super) profiled: bool,
}

/// Yields tokens as they are generated, from when the first is asked for. Threads that read it take
/// turns.
#[pyclass(frozen)]
pub(super) struct Generation {
    /// Outside the reader, so that closing need not wait for a thread that reads.
    interrupt: Interrupt,
    /// Whether nobody reads tokens before the end.
    is_unread: Arc<AtomicBool>,
    worker: OnceLock<Thread>,
    certification: Option<Certification>,
    reader: ProcessLocal<Mutex<Reader>>,
}

struct Reader {
    /// Taken when the first token is asked for.
    work: Option<GenerationWork>,
    /// From then on, until the generation is over.
    running: Option<Running>,
    tokens: Vec<Py<PyToken>>,
    end: Option<Ended>,
}

struct Running {
    inbox: Inbox<Event>,
    /// Tokens that were generated and not read.
    ahead: Arc<AtomicUsize>,
}

impl Generation {
    pub(super) fn new(work: GenerationWork, certification: Option<Certification>) -> Self {
        Self {
            interrupt: Interrupt::default(),
            is_unread: Arc::default(),
            worker: OnceLock::new(),
            certification,
            reader: ProcessLocal::new(Mutex::new(Reader {
                work: Some(work),
                running: None,
                tokens: Vec::new(),
                end: None,
            })),
        }
    }

    /// Generate on a separate thread.
    fn start(&self, work: GenerationWork) -> std::io::Result<Running> {
        let (sender, receiver) = channel();
        let ahead = Arc::<AtomicUsize>::default();
        let mut pace = Pace {
            ahead: ahead.clone(),
            is_unread: self.is_unread.clone(),
            turns: work.turns.clone(),
            interrupt: self.interrupt.clone(),
            waited: Duration::ZERO,
        };
        let worker = thread::Builder::new().name("sedac-generate".into());
        let worker = worker.spawn(move || {
            let end = generate(work, &mut pace, &sender);
            // nobody listens any more when the iterator was dropped
            let _ = sender.send(Event::End(end));
        })?;
        self.worker.get_or_init(|| worker.thread().clone());
        Ok(Running {
            inbox: Mutex::new(receiver),
            ahead,
        })
    }

    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Reader>> {
        let reader = self.reader.get()?.lock_py_attached(py);
        Ok(reader.unwrap_or_else(PoisonError::into_inner))
    }

    fn wake_worker(&self) {
        if let Some(worker) = self.worker.get() {
            worker.unpark();
        }
    }
}

#[pymethods]
impl Generation {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyToken>>> {
        let mut reader = self.lock(py)?;
        if self.interrupt.check().is_err() {
            return Ok(None);
        }
        if let Some(work) = reader.work.take() {
            reader.running = Some(self.start(work)?);
        }
        let Some(running) = reader.running.take() else {
            return Ok(None);
        };
        match receive(py, &running.inbox, &self.interrupt)? {
            Some(Event::Token(token)) => {
                running.ahead.fetch_sub(1, Ordering::Relaxed);
                self.wake_worker();
                reader.running = Some(running);
                let token = Py::new(py, token)?;
                reader.tokens.push(token.clone_ref(py));
                Ok(Some(token))
            }
            // closed meanwhile
            Some(Event::End(Err(Error::Cancelled))) => Ok(None),
            Some(Event::End(end)) => {
                let mut end = end?;
                for token in end.tokens.drain(..) {
                    reader.tokens.push(Py::new(py, token)?);
                }
                reader.end = Some(end);
                Ok(None)
            }
            None => Err(PyRuntimeError::new_err("the worker thread panicked")),
        }
    }

    /// Generate what is left without giving its tokens one by one, only in the summary. A reader
    /// that wakes for each token takes a processor from the engines each time, which made tokens of
    /// a small int4 model on two processors take 1.3 times as long.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.is_unread.store(true, Ordering::Relaxed);
        self.wake_worker();
        while self.__next__(py)?.is_some() {}
        Ok(())
    }

    /// What is certified of it; None where tokens only come from full depth.
    #[getter]
    fn certification(&self) -> Option<PyCertification> {
        self.certification.as_ref().map(PyCertification::from)
    }

    /// End it, from any thread: the model is free as soon as the current engine has run.
    fn close(&self) {
        self.interrupt.raise();
        self.wake_worker();
    }

    /// The whole, once the iterator ended.
    fn summary(&self, py: Python<'_>) -> PyResult<PyGenerationSummary> {
        let reader = self.lock(py)?;
        let Some(Ended {
            summary,
            rest,
            profile,
            ..
        }) = &reader.end
        else {
            return Err(PyRuntimeError::new_err(
                "the generation did not finish: it failed, or was closed or interrupted before",
            ));
        };
        Ok(PyGenerationSummary {
            tokens: reader.tokens.iter().map(|t| t.clone_ref(py)).collect(),
            finish_reason: summary.finish_reason,
            prefill_ms: summary.prefill.as_secs_f64() * 1e3,
            decode_ms: summary.decode.as_secs_f64() * 1e3,
            rest: rest.clone(),
            profile: profile.clone(),
            drafts: (&summary.drafts).into(),
        })
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.close();
    }
}

/// Keeps a generation near its reader.
struct Pace {
    ahead: Arc<AtomicUsize>,
    is_unread: Arc<AtomicBool>,
    turns: Arc<Turns>,
    interrupt: Interrupt,
    waited: Duration,
}

impl Pace {
    /// A token was sent: wait until the reader is near. Where somebody else waits for the model,
    /// run on to the end instead, for the reader may never come.
    fn keep(&mut self) {
        self.ahead.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        while self.ahead.load(Ordering::Relaxed) >= MOST_AHEAD
            && !self.turns.is_wanted()
            && !self.is_unread.load(Ordering::Relaxed)
            && self.interrupt.check().is_ok()
        {
            thread::park_timeout(POLL);
        }
        self.waited += started.elapsed();
    }
}

fn generate(work: GenerationWork, pace: &mut Pace, sender: &Sender<Event>) -> Result<Ended> {
    let GenerationWork {
        turns,
        codec,
        request,
        mut stops,
        profiled,
    } = work;
    let mut chain = turns.take();
    let mut stream = codec.as_deref().map(TextCodec::stream);
    let interrupt = pace.interrupt.clone();
    let mut tokens = Vec::new();
    let emit = |token: Token| {
        let text = stream
            .as_mut()
            .map(|s| s.push(token.id))
            .unwrap_or_default();
        let stop = stops.push(&text);
        let token = PyToken::new(token, text);
        if pace.is_unread.load(Ordering::Relaxed) {
            tokens.push(token);
        } else {
            if sender.send(Event::Token(token)).is_err() {
                interrupt.raise();
            }
            pace.keep();
        }
        if stop {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let run = || chain.generate(&request, &interrupt, emit);
    let (summary, profile) = if profiled {
        let (summary, profile) = record(run);
        (summary, Some(profile))
    } else {
        (run(), None)
    };
    let mut summary = summary?;
    summary.decode = summary.decode.saturating_sub(pace.waited);
    let rest = match &stream {
        Some(stream) => stream.finish()?,
        None => String::new(),
    };
    Ok(Ended {
        summary,
        tokens,
        rest,
        profile,
    })
}
