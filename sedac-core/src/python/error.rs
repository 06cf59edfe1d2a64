//! The exception hierarchy, and the one place where errors become exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt};
use pyo3::prelude::*;

use crate::error::Error;

create_exception!(
    sedac_runtime,
    SedacError,
    PyException,
    "Base of all errors of sedac_runtime."
);
create_exception!(
    sedac_runtime,
    BundleError,
    SedacError,
    "A bundle is missing, damaged, of another schema or too large for the memory it may take."
);
create_exception!(
    sedac_runtime,
    InputError,
    SedacError,
    "A setting is out of range or a prompt cannot be used."
);
create_exception!(
    sedac_runtime,
    EngineError,
    SedacError,
    "ONNX Runtime, TensorRT or the tokenizer failed, or an engine gave NaN or infinity."
);

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("SedacError", py.get_type::<SedacError>())?;
    module.add("BundleError", py.get_type::<BundleError>())?;
    module.add("InputError", py.get_type::<InputError>())?;
    module.add("EngineError", py.get_type::<EngineError>())
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Bundle { .. } | Error::DamagedFile { .. } | Error::Memory { .. } => {
                BundleError::new_err(message)
            }
            Error::Setting { .. }
            | Error::Misplaced { .. }
            | Error::MissingThresholds { .. }
            | Error::Prompt(_) => InputError::new_err(message),
            Error::Library { .. }
            | Error::Engine { .. }
            | Error::NotFinite { .. }
            | Error::Device { .. }
            | Error::Tokenizer(_) => EngineError::new_err(message),
            Error::Io { source, .. } => std::io::Error::new(source.kind(), message).into(),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
        }
    }
}
