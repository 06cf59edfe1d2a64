//! The Python binding: it translates and does nothing else.

mod certification;
mod decisions;
mod door;
mod error;
mod executor;
mod files;
mod generation;
mod model;
mod process;
mod turns;

use pyo3::prelude::*;

use crate::bundle::SCHEMA_VERSION;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::Model>()?;
    module.add_class::<files::BundleFiles>()?;
    module.add_class::<generation::Generation>()?;
    module.add_class::<decisions::Thresholds>()?;
    module.add_function(wrap_pyfunction!(decisions::exits_by_stability, module)?)?;
    module.add_function(wrap_pyfunction!(decisions::exits_by_risk, module)?)?;
    module.add_function(wrap_pyfunction!(files::read_manifest, module)?)?;
    module.add_function(wrap_pyfunction!(files::read_unlisted, module)?)?;
    module.add("SCHEMA_VERSION", SCHEMA_VERSION)?;
    process::register(module)?;
    error::register(module)
}
