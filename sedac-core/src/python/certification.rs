//! What is certified of a bundle.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::bundle::read_manifest;
use crate::certification::Certification;
use crate::error::Result;
use crate::exit_config::ExitConfig;

/// The certificate as JSON, None where nothing is certified; and one sentence that says so.
pub(super) type Spoken = (Option<String>, String);

pub(super) fn spoken(certification: &Certification) -> Spoken {
    let certificate = match certification {
        Certification::Certified(certificate) => {
            let text = serde_json::to_string(certificate);
            Some(text.expect("numbers and texts can be written"))
        }
        Certification::Uncertified(_) => None,
    };
    (certificate, certification.to_string())
}

/// What is certified of the exit configuration of the bundle in `directory`, by argmax. Files are
/// not checked.
#[pyfunction]
pub(super) fn certification(directory: PathBuf) -> Result<Spoken> {
    let manifest = read_manifest(&directory)?;
    let config = ExitConfig::read(&directory, &manifest)?;
    Ok(spoken(&config.own_certification(&manifest)))
}

/// The digest by which certificates name what the bundle in `directory` runs. Files are not
/// checked.
#[pyfunction]
pub(super) fn engines_sha256(directory: PathBuf) -> Result<String> {
    Ok(read_manifest(&directory)?.engines_sha256())
}
