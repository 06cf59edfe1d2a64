//! A generation under way, as a Python iterator.

use std::ops::ControlFlow;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::certification::{Spoken, spoken};
use super::door::{Inbox, receive};
use crate::certification::Certification;
use crate::chain::{Chain, Request, Summary, Token};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::text::{StopStrings, TextCodec};

enum Event {
    Token(Token, String),
    End(Result<(Summary, String)>),
}

/// Yields (token id, text, exit layer, exit reason) for each token as it is generated.
#[pyclass]
pub(super) struct Generation {
    inbox: Inbox<Event>,
    interrupt: Interrupt,
    over: bool,
    end: Option<(Summary, String)>,
    certification: Option<Certification>,
}

impl Generation {
    /// Start generating on a thread of its own.
    pub(super) fn start(
        chain: Arc<Mutex<Chain>>,
        codec: Option<Arc<TextCodec>>,
        request: Request,
        stops: StopStrings,
        certification: Option<Certification>,
    ) -> Self {
        let (sender, receiver) = channel();
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        thread::spawn(move || {
            let end = generate(&chain, codec.as_deref(), &request, stops, &raised, &sender);
            // nobody listens any more when the iterator was dropped
            let _ = sender.send(Event::End(end));
        });
        Self {
            inbox: Mutex::new(receiver),
            interrupt,
            over: false,
            end: None,
            certification,
        }
    }
}

#[pymethods]
impl Generation {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<(u32, String, usize, &'static str)>> {
        if self.over {
            return Ok(None);
        }
        self.over = true;
        match receive(py, &self.inbox, &self.interrupt)? {
            Some(Event::Token(token, text)) => {
                self.over = false;
                Ok(Some((
                    token.id,
                    text,
                    token.step.exit_layer,
                    token.step.reason.name(),
                )))
            }
            Some(Event::End(end)) => {
                self.end = Some(end?);
                Ok(None)
            }
            None => Err(PyRuntimeError::new_err("the worker thread panicked")),
        }
    }

    /// What is certified of it: the certificate as JSON, if any, and a sentence. None where tokens
    /// only come from full depth.
    #[getter]
    fn certification(&self) -> Option<Spoken> {
        self.certification.as_ref().map(spoken)
    }

    /// finish_reason, prefill_ms, decode_ms, the text still owed and how drafting went, once the
    /// iterator ended.
    fn summary(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        let Some((summary, rest)) = &self.end else {
            return Err(PyRuntimeError::new_err("the generation did not finish"));
        };
        let result = PyDict::new(py);
        result.set_item("finish_reason", summary.finish_reason.name())?;
        result.set_item("prefill_ms", summary.prefill.as_secs_f64() * 1e3)?;
        result.set_item("decode_ms", summary.decode.as_secs_f64() * 1e3)?;
        result.set_item("rest", rest)?;
        let drafting = &summary.drafting;
        result.set_item("drafted", drafting.drafted)?;
        result.set_item("accepted", drafting.accepted)?;
        result.set_item("verify_passes", drafting.verify_passes)?;
        result.set_item("draft_depths", &drafting.draft_depths)?;
        Ok(result.unbind())
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.interrupt.raise();
    }
}

fn generate(
    chain: &Mutex<Chain>,
    codec: Option<&TextCodec>,
    request: &Request,
    mut stops: StopStrings,
    interrupt: &Interrupt,
    sender: &Sender<Event>,
) -> Result<(Summary, String)> {
    // a generation that panicked leaves nothing behind that the next one does not reset
    let mut chain = chain.lock().unwrap_or_else(PoisonError::into_inner);
    let mut stream = codec.map(TextCodec::stream);
    let summary = chain.generate(request, interrupt, |token| {
        let text = stream
            .as_mut()
            .map(|s| s.push(token.id))
            .unwrap_or_default();
        let stop = stops.push(&text);
        if sender.send(Event::Token(token, text)).is_err() {
            interrupt.raise();
        }
        if stop {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    let rest = match &stream {
        Some(stream) => stream.finish()?,
        None => String::new(),
    };
    Ok((summary, rest))
}
