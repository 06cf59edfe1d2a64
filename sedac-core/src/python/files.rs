//! The files of a bundle for Python, through the same gate.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::door;
use super::outcomes::PyCertification;
use crate::bundle::{self, ExitConfig, Files, Gate, MAX_TEXT, Opening, Verify};
use crate::error::Result;

/// A bundle's files, checked.
#[pyclass(frozen)]
pub(super) struct BundleFiles(Files);

#[pymethods]
impl BundleFiles {
    /// Check the files of the bundle in `directory`, except those below its directory
    /// `replaced`, which are about to be rewritten. `verify` and `threads` are those of Model.
    /// With `older` the bundle may be of an older schema, to upgrade it.
    #[new]
    #[pyo3(signature = (
        directory, *, verify = Verify::Always, threads = 0, replaced = None, older = false
    ))]
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        verify: Verify,
        threads: usize,
        replaced: Option<PathBuf>,
        older: bool,
    ) -> PyResult<Self> {
        let opening = Opening {
            verify,
            threads,
            replaced,
            older,
            ..Opening::default()
        };
        let interrupt = opening.interrupt.clone();
        door::run(py, &interrupt, move || {
            bundle::check_files(&directory, &opening).map(Self)
        })
    }

    /// The text of bundle.json.
    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.text)
    }

    /// The digest by which certificates name what the bundle runs.
    #[getter]
    fn engines_sha256(&self) -> String {
        self.0.manifest.engines_sha256()
    }

    /// What is certified of the bundle's exit configuration, by argmax.
    fn certification(&self) -> Result<PyCertification> {
        let config = ExitConfig::read(&self.0.gate, &self.0.manifest)?;
        Ok((&config.own_certification(&self.0.manifest)).into())
    }

    /// How many files were hashed.
    #[getter]
    fn hashed(&self) -> usize {
        self.0.gate.hashed_and_skipped().0
    }

    /// How many files were not hashed since they had not changed.
    #[getter]
    fn unchanged(&self) -> usize {
        self.0.gate.hashed_and_skipped().1
    }

    /// The contents of the file `name`, which are as they were checked.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python's paths arrive by value"
    )]
    fn read<'py>(&self, py: Python<'py>, name: PathBuf) -> PyResult<Bound<'py, PyBytes>> {
        let contents = py.detach(|| self.0.gate.read(&name))?;
        Ok(PyBytes::new(py, &contents))
    }

    /// The graph in the file `name`, and the directory of its weights, both as they were checked.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python's paths arrive by value"
    )]
    fn graph(&self, py: Python<'_>, name: PathBuf) -> PyResult<PyGraphFile> {
        let (graph, directory) = py.detach(|| self.0.gate.graph(&name))?;
        Ok(PyGraphFile {
            graph: PyBytes::new(py, &graph).unbind(),
            directory,
        })
    }

    /// Where the file `name` lies, which is as it was checked.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python's paths arrive by value"
    )]
    fn path(&self, name: PathBuf) -> PyResult<PathBuf> {
        Ok(self.0.gate.path(&name)?)
    }
}

/// A graph, and the directory of its weights.
#[pyclass(frozen, get_all, name = "GraphFile")]
pub(super) struct PyGraphFile {
    graph: Py<PyBytes>,
    directory: PathBuf,
}

/// The text of bundle.json in `directory`, which has its digest and a schema that is known. No
/// other file is looked at.
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "Python's paths arrive by value"
)]
pub(super) fn read_manifest(py: Python<'_>, directory: PathBuf) -> PyResult<Bound<'_, PyBytes>> {
    let text = Gate::open(&directory).and_then(|gate| bundle::read_manifest(&gate))?;
    Ok(PyBytes::new(py, &text))
}

/// The text of the file `name` of the bundle in `directory`, for which no digest speaks; None where
/// there is none.
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "Python's paths arrive by value"
)]
pub(super) fn read_unlisted(
    py: Python<'_>,
    directory: PathBuf,
    name: PathBuf,
) -> PyResult<Option<Bound<'_, PyBytes>>> {
    let text = Gate::open(&directory).and_then(|gate| gate.read_unlisted(&name, MAX_TEXT))?;
    Ok(text.map(|text| PyBytes::new(py, &text)))
}

/// The graph `graph` as the CPU backend runs layers; None where it is as it is.
#[pyfunction]
#[pyo3(signature = (graph))]
pub(super) fn with_own_operators<'py>(
    py: Python<'py>,
    graph: &[u8],
) -> Option<Bound<'py, PyBytes>> {
    let graph = crate::backend::with_own_operators(graph)?;
    Some(PyBytes::new(py, &graph))
}
