//! The Python binding: it translates and does nothing else.

mod benchmark;
mod decisions;
mod decoding_settings;
mod door;
mod error;
mod executor;
mod files;
mod generation;
mod loading;
mod model;
mod outcomes;
mod policy_settings;
mod process;
mod scheduler;
mod spellings;
mod step_thread;
mod text_stream;
mod turns;

use log::LevelFilter;
use pyo3::prelude::*;
use pyo3_log::{Caching, Logger};

use crate::bundle::SCHEMA_VERSION;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // the core's events go to Python's logging, whose levels are read once for each logger
    let logger = Logger::new(module.py(), Caching::LoggersAndLevels)?;
    // fails where another module of the process has installed a logger before, which then stays
    let _ = logger.filter(LevelFilter::Trace).install();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::Model>()?;
    module.add_class::<files::BundleFiles>()?;
    module.add_class::<generation::Generation>()?;
    module.add_class::<files::PyGraphFile>()?;
    module.add_class::<policy_settings::PyPolicySettings>()?;
    module.add_class::<decoding_settings::PyDecodingMode>()?;
    module.add_class::<decoding_settings::PyDecodingSetting>()?;
    module.add_class::<decoding_settings::PySampling>()?;
    module.add_class::<outcomes::PyToken>()?;
    module.add_class::<outcomes::PyDraftSummary>()?;
    module.add_class::<outcomes::PyGenerationSummary>()?;
    module.add_class::<outcomes::PyFollowedText>()?;
    module.add_class::<outcomes::PyCertification>()?;
    module.add_class::<benchmark::PyBenchCase>()?;
    module.add_class::<scheduler::PyScheduler>()?;
    module.add_class::<step_thread::PyStepThread>()?;
    module.add_class::<scheduler::PyProgress>()?;
    module.add_class::<scheduler::PyStepToken>()?;
    module.add_class::<scheduler::PySchedulerStatistics>()?;
    module.add_class::<text_stream::PyTextStream>()?;
    module.add_class::<executor::PyPlanTensor>()?;
    module.add_class::<decisions::PyBatchDecision>()?;
    module.add_class::<decisions::PyThresholds>()?;
    module.add_function(wrap_pyfunction!(decisions::stabilities, module)?)?;
    module.add_function(wrap_pyfunction!(decisions::exits_by_stability, module)?)?;
    module.add_function(wrap_pyfunction!(decisions::exits_by_risk, module)?)?;
    module.add_function(wrap_pyfunction!(files::read_manifest, module)?)?;
    module.add_function(wrap_pyfunction!(files::read_unlisted, module)?)?;
    module.add_function(wrap_pyfunction!(files::with_own_operators, module)?)?;
    module.add("SCHEMA_VERSION", SCHEMA_VERSION)?;
    module.add("SPELLINGS", spellings::all(module.py())?)?;
    process::register(module)?;
    error::register(module)
}
