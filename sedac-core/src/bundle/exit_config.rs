//! sedac_config.json: when tokens exit, and what skipped layers' caches get.

use std::fmt::Display;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Certificate, Gate, MAX_TEXT, Manifest};
use crate::error::{Error, Result};
use crate::kv::KvFill;
use crate::policy::{ExitRule, PolicySettings};

/// Its file in a bundle.
pub(crate) const EXIT_CONFIG: &str = "sedac_config.json";

/// sedac_config.json: when tokens exit by default. What it leaves out has its default value.
#[derive(Debug, Clone, PartialEq)]
pub struct ExitConfig {
    /// What decides.
    pub policy: PolicySettings,
    /// What the caches of skipped layers get.
    pub kv_fill: KvFill,
    /// What drafts the tokens between exits.
    pub drafter: Option<DrafterKind>,
    /// What `sedac-export calibrate` certified; of these settings only if they are its own.
    pub certificate: Option<Certificate>,
}

/// Which drafter proposes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrafterKind {
    /// The model's own shallow layers.
    EarlyExit,
    /// What followed the newest tokens where they occurred before
    /// (<https://github.com/apoorvumang/prompt-lookup-decoding>).
    PromptLookup,
    /// A layer that was trained to continue the model's hidden states.
    Trained,
    /// The one of the others with the higher expected speedup.
    Auto,
}

impl DrafterKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::EarlyExit,
        Self::PromptLookup,
        Self::Trained,
        Self::Auto,
    ];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::EarlyExit => "early-exit",
            Self::PromptLookup => "prompt-lookup",
            Self::Trained => "trained",
            Self::Auto => "auto",
        }
    }

    /// Check that it can draft between the exits of `rule`.
    ///
    /// # Errors
    /// [`Error::Setting`] where tokens that exited do not wait to be continued: nothing could
    /// verify a draft in one pass with them then. A trained drafter needs full depth's hidden states.
    pub fn check_exits(self, rule: &ExitRule, kv_fill: KvFill) -> Result<()> {
        let range = if self == Self::Trained {
            "another one in mode exit; set mode lossless for the trained one"
        } else if kv_fill == KvFill::Propagate {
            "none with kv_fill propagate; set kv_fill defer, or drafter none"
        } else if rule.is_soft() {
            "none with soft exits; set exit_kind hard, or drafter none"
        } else {
            return Ok(());
        };
        Err(Error::setting("drafter", self.name(), range))
    }
}

impl ExitConfig {
    /// The configuration of the bundle behind `gate`; the defaults when it has none.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is no regular file, does not parse, is out of range or does not
    /// fit `manifest`, [`Error::Io`] when it cannot be read.
    pub(crate) fn read(gate: &Gate, manifest: &Manifest) -> Result<Self> {
        let Some(text) = gate.read_unlisted(Path::new(EXIT_CONFIG), MAX_TEXT)? else {
            return Ok(ExitConfig {
                policy: PolicySettings::for_layers(manifest.model.num_layers),
                kv_fill: KvFill::default(),
                drafter: None,
                certificate: None,
            });
        };
        let path = gate.shown(EXIT_CONFIG);
        let config = ExitConfig::parse(&text, manifest.model.num_layers)
            .map_err(|reason| Error::bundle(&path, reason))?;
        manifest
            .compile(&config.policy)
            .map_err(|error| Error::bundle(&path, with_remedy(error)))?;
        Ok(config)
    }

    /// Parse the text of sedac_config.json, for a model of `layers` layers. Errors have a remedy.
    fn parse(text: &[u8], layers: usize) -> std::result::Result<Self, String> {
        let mut fields: Map<String, Value> = serde_json::from_slice(text).map_err(with_remedy)?;
        let certificate = fields.remove("certificate");
        let certificate = certificate.map(|value| Certificate::parse(value, layers));
        let certificate = certificate.transpose()?;
        let settings = Self::parse_settings(fields, layers).map_err(with_remedy)?;
        Ok(Self {
            certificate,
            ..settings
        })
    }

    /// Parse all but the certificate.
    fn parse_settings(
        mut fields: Map<String, Value>,
        layers: usize,
    ) -> std::result::Result<Self, String> {
        let kv_fill = take(&mut fields, "kv_fill")?.unwrap_or_default();
        let drafter: Option<DrafterKind> = take(&mut fields, "drafter")?;
        fields.entry("policy").or_insert("stability".into());
        let policy: PolicySettings =
            serde_json::from_value(fields.into()).map_err(|error| error.to_string())?;
        let rule = policy.compile(layers).map_err(|error| error.to_string())?;
        if let Some(drafter) = drafter {
            let checked = drafter.check_exits(&rule, kv_fill);
            checked.map_err(|error| error.to_string())?;
        }
        Ok(Self {
            policy,
            kv_fill,
            drafter,
            certificate: None,
        })
    }
}

fn with_remedy(reason: impl Display) -> String {
    format!("{reason}; correct or delete the file")
}

/// The value of the field `name`, taken out of `fields`; None where it is left out.
fn take<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    name: &str,
) -> std::result::Result<Option<T>, String> {
    let value = fields.remove(name).map(serde_json::from_value);
    value
        .transpose()
        .map_err(|error| format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drafter_needs_exits_that_wait() {
        let parse = |json: &str| ExitConfig::parse(json.as_bytes(), 6);
        let defer = parse(r#"{"kv_fill": "defer", "drafter": "early-exit"}"#).unwrap();
        assert_eq!(defer.drafter, Some(DrafterKind::EarlyExit));
        assert_eq!(parse("{}").unwrap().drafter, None);
        for (json, words) in [
            (r#"{"drafter": "auto"}"#, "kv_fill defer"),
            (
                r#"{"kv_fill": "defer", "drafter": "guess"}"#,
                "drafter: unknown variant",
            ),
            (r#"{"kv_fill": "defer", "drafter": null}"#, "drafter: "),
            (
                r#"{"policy": "cascade", "thresholds": {"2": 1}, "weights": {"2": 1}, "targets": {"2": 1}, "exit_kind": "soft", "kv_fill": "defer", "drafter": "auto"}"#,
                "exit_kind hard",
            ),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(words), "{json}: {error}");
        }
    }
}
