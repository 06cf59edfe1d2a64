//! What is certified of a bundle.

use crate::certification::Certification;

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
