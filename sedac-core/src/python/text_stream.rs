//! The text of a sequence as its tokens come.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::text::{TextCodec, TextStream};

/// Gives the text of tokens as they come, only whole characters at a time.
#[pyclass(frozen, name = "TextStream")]
#[derive(Debug)]
pub(super) struct PyTextStream(Mutex<TextStream<Arc<TextCodec>>>);

impl PyTextStream {
    pub(super) fn new(codec: Arc<TextCodec>) -> Self {
        Self(Mutex::new(TextStream::new(codec)))
    }
}

#[pymethods]
impl PyTextStream {
    /// The text that `token` completes; empty while a character is unfinished.
    fn push(&self, py: Python<'_>, token: u32) -> String {
        let stream = self.0.lock_py_attached(py);
        let mut stream = stream.unwrap_or_else(PoisonError::into_inner);
        stream.push(token)
    }

    /// What the pieces so far lack of the whole text.
    fn finish(&self, py: Python<'_>) -> PyResult<String> {
        let stream = self.0.lock_py_attached(py);
        let stream = stream.unwrap_or_else(PoisonError::into_inner);
        let stream = &*stream;
        Ok(py.detach(|| stream.finish())?)
    }
}
