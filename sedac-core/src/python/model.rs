//! A loaded bundle.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::json;

use super::door;
use super::error::InputError;
use super::executor::PythonExecutor;
use super::files::verify_named;
use super::generation::{Generation, Work};
use super::process::ProcessLocal;
use super::turns::Turns;
use crate::backend::tensorrt::{Cuda, Host, TensorRt};
use crate::backend::{Exits, Layout};
use crate::bench::{BenchCase, BenchRow};
use crate::bundle::{Bundle, DrafterKind, Opening};
use crate::certification::{Certification, GenerationSetting};
use crate::chain::{Chain, DecodingMode, Request};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{PolicySettings, Signal};
use crate::sampler::Sampling;
use crate::text::{StopStrings, TextCodec};

/// A bundle with its engines loaded.
#[pyclass(frozen)]
pub(super) struct Model {
    bundle: Bundle,
    turns: ProcessLocal<Turns>,
    codec: ProcessLocal<Option<TextCodec>>,
    library: Library,
    plans: bool,
}

/// ONNX Runtime, and the threads it runs with.
#[derive(Clone)]
struct Library {
    path: PathBuf,
    threads: usize,
}

/// What runs a target's plans: its name, TensorRT's Python package, and whether the host's memory
/// takes the place of the GPU's.
type PlanRunner = (String, Py<PyAny>, bool);

#[pymethods]
impl Model {
    /// Check and load the bundle in `directory`. library and threads are ONNX Runtime's; as many
    /// threads check the files. verify "always" hashes all of them, "changed" those that changed
    /// since they were last found whole. memory_limit, in bytes, is what the loaded bundle may
    /// take, None for what is free. `plans` runs TensorRT plans instead: (target, executor,
    /// rehearsal). executor puts one of them on a stream: (plan, [(tensor, address, shape, bytes)],
    /// stream, replayed) -> None. In a rehearsal addresses are the host's, and it computes at once.
    #[new]
    #[pyo3(signature = (
        directory, library, threads, plans = None, *, verify = "always", memory_limit = None
    ))]
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        library: PathBuf,
        threads: usize,
        plans: Option<PlanRunner>,
        verify: &str,
        memory_limit: Option<u64>,
    ) -> PyResult<Self> {
        let path = library;
        let opening = Opening {
            verify: verify_named(verify)?,
            threads,
            memory_limit,
            ..Opening::default()
        };
        let interrupt = opening.interrupt.clone();
        door::run(py, &interrupt, move || {
            let bundle = Bundle::open_with(&directory, &opening)?;
            let codec = codec(&bundle)?;
            let library = Library { path, threads };
            let served = plans.is_some();
            let chain = match plans {
                Some(runner) => load_plans(&bundle, &library, runner)?,
                None => Chain::load(&bundle, Layout::Engines, &library.path, threads)?,
            };
            Ok(Self {
                bundle,
                turns: ProcessLocal::new(Turns::new(chain)),
                codec: ProcessLocal::new(codec),
                library,
                plans: served,
            })
        })
    }

    /// The text of the file `name` of the bundle, None where the bundle has none.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python's paths arrive by value"
    )]
    fn read_text(&self, name: PathBuf) -> PyResult<Option<String>> {
        if !self.bundle.gate.lists(&name) {
            return Ok(None);
        }
        Ok(Some(self.bundle.gate.read_text(&name)?))
    }

    #[getter]
    fn name(&self) -> &str {
        &self.bundle.manifest.model.name
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.bundle.manifest.model.num_layers
    }

    #[getter]
    fn max_cache_length(&self) -> usize {
        self.bundle.manifest.max_cache_length
    }

    #[getter]
    fn tolerance(&self) -> f64 {
        self.bundle.manifest.tolerance
    }

    #[getter]
    fn exit_layers(&self) -> Vec<usize> {
        self.bundle.manifest.exit_layers.clone()
    }

    #[getter]
    fn eos_token_ids(&self) -> Vec<u32> {
        self.bundle.manifest.model.eos_token_ids.clone()
    }

    #[getter]
    fn has_tokenizer(&self) -> bool {
        self.bundle.manifest.tokenizer
    }

    /// The bundle's exit configuration: the policy as JSON, kv_fill, and the drafter, if any.
    #[getter]
    fn exit_config(&self) -> (String, &'static str, Option<&'static str>) {
        let config = &self.bundle.exit_config;
        (
            json!(config.policy).to_string(),
            config.kv_fill.name(),
            config.drafter.map(DrafterKind::name),
        )
    }

    /// The likeliest next token after each of `tokens` but the first, and the layers each of them
    /// ran: the tokens' exits when the text is given. Settings are those of `generate`.
    #[pyo3(signature = (tokens, *, policy = None, forced_exit = None, kv_fill = "propagate"))]
    fn follow(
        &self,
        py: Python<'_>,
        tokens: Vec<u32>,
        policy: Option<&str>,
        forced_exit: Option<Vec<usize>>,
        kv_fill: &str,
    ) -> PyResult<(Vec<u32>, Vec<usize>)> {
        let mode = self.mode(policy, forced_exit, None)?;
        let kv_fill = kv_fill_named(kv_fill)?;
        let turns = self.turns.get()?.clone();
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        door::run(py, &interrupt, move || {
            let mut chain = turns.take();
            let mut followed = (Vec::new(), Vec::new());
            chain.follow(&tokens, &mode, kv_fill, &raised, |token| {
                followed.0.push(token.id);
                followed.1.push(token.exit.layer);
            })?;
            Ok(followed)
        })
    }

    /// The depths at which the bundle has what a policy reads, by policy.
    #[getter]
    fn trained_depths(&self) -> HashMap<&'static str, Vec<usize>> {
        let manifest = &self.bundle.manifest;
        let (risk, exit) = (Signal::Risk, Signal::Learned);
        [
            ("probe", risk),
            ("cascade", risk),
            ("margin", exit),
            ("learned", exit),
        ]
        .map(|(policy, source)| (policy, manifest.trained_depths(source)))
        .into()
    }

    #[pyo3(signature = (text, add_special_tokens = true))]
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        let codec = self.codec()?;
        Ok(py.detach(|| codec.encode(text, add_special_tokens))?)
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "Python lists arrive by value"
    )]
    fn decode(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<String> {
        let codec = self.codec()?;
        Ok(py.detach(|| codec.decode(&tokens))?)
    }

    /// Generate as the result is iterated over. Without `policy` (JSON, as sedac_config.json has
    /// it) and `forced_exit` (depths, taken in turn) every token runs at full depth; `drafter`
    /// guesses several to verify at once, with a policy those that it does not let exit. With
    /// `profile` the summary has a Chrome trace, as JSON.
    #[pyo3(signature = (
        prompt, *, max_new_tokens, stop_tokens, stop_strings = vec![], policy = None,
        forced_exit = None, drafter = None, kv_fill = "propagate", temperature = 0.0, top_k = 0,
        top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0, seed = 0, profile = false
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn generate(
        &self,
        prompt: Vec<u32>,
        max_new_tokens: usize,
        stop_tokens: Vec<u32>,
        stop_strings: Vec<String>,
        policy: Option<&str>,
        forced_exit: Option<Vec<usize>>,
        drafter: Option<&str>,
        kv_fill: &str,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        seed: u64,
        profile: bool,
    ) -> PyResult<Generation> {
        let request = Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            mode: self.mode(policy, forced_exit, drafter)?,
            kv_fill: kv_fill_named(kv_fill)?,
            sampling: Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seed,
            },
        };
        if !stop_strings.is_empty() {
            self.codec()?;
        }
        let certification = self.certification(&request);
        let work = Work {
            turns: self.turns.get()?.clone(),
            codec: self.codec.get()?.clone(),
            request,
            stops: StopStrings::new(stop_strings)?,
            profiled: profile,
        };
        Ok(Generation::new(work, certification))
    }

    /// Compare ways to run the bundle: see `sedac-runtime bench`.
    ///
    /// cases: (row name, whether the monolith runs it, None or the depth to exit at, None or the
    /// drafter). against: the index of the case that others are compared with.
    fn bench(
        &self,
        py: Python<'_>,
        cases: Vec<(String, bool, Option<usize>, Option<String>)>,
        prompt: BenchPrompt,
        new_tokens: usize,
        repeat: usize,
        against: usize,
    ) -> PyResult<Py<PyList>> {
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        let codec = self.codec.get()?;
        let prompt = py.detach(|| prompt.tokens(codec.as_ref().as_ref()))?;
        let with_monolith = cases.iter().any(|case| case.1);
        let cases = cases
            .into_iter()
            .map(bench_case)
            .collect::<Result<Vec<_>>>()?;
        let monolith = with_monolith.then(|| self.monolith()).transpose()?;
        let turns = self.turns.get()?.clone();
        let rows = door::run(py, &interrupt, move || {
            let mut chain = turns.take();
            let mut monolith = monolith.map(|load| load()).transpose()?;
            let mut chains: Vec<_> = [&mut *chain].into_iter().chain(&mut monolith).collect();
            crate::bench::run(
                &mut chains,
                &cases,
                &prompt,
                new_tokens,
                repeat,
                against,
                &raised,
            )
        })?;
        let rows = rows
            .iter()
            .map(|row| to_dict(py, row))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(PyList::new(py, rows)?.unbind())
    }
}

impl Model {
    fn mode(
        &self,
        policy: Option<&str>,
        forced: Option<Vec<usize>>,
        drafter: Option<&str>,
    ) -> Result<DecodingMode> {
        let Some(json) = policy.filter(|_| forced.is_none()) else {
            return mode(forced, drafter);
        };
        let policy: PolicySettings = serde_json::from_str(json)
            .map_err(|error| Error::setting("policy", json, error.to_string()))?;
        self.bundle.manifest.compile(&policy)?;
        let drafter = drafter.map(drafter_kind).transpose()?;
        Ok(DecodingMode::Exit { policy, drafter })
    }

    fn certification(&self, request: &Request) -> Option<Certification> {
        let generation = GenerationSetting {
            mode: &request.mode,
            kv_fill: request.kv_fill,
            sampling: &request.sampling,
            plans: self.plans,
        };
        let Bundle {
            manifest,
            exit_config,
            ..
        } = &self.bundle;
        exit_config.certification(manifest, generation)
    }

    /// What loads all layers in one engine.
    fn monolith(&self) -> Result<impl FnOnce() -> Result<Chain> + Send + 'static> {
        if self.plans {
            let range = "full; plans have no monolith, which is ONNX Runtime's";
            return Err(Error::setting("against", "monolith", range));
        }
        let (bundle, library) = (self.bundle.clone(), self.library.clone());
        Ok(move || Chain::load(&bundle, Layout::Monolith, &library.path, library.threads))
    }

    fn codec(&self) -> PyResult<&TextCodec> {
        let codec = self.codec.get()?.as_ref();
        codec.as_ref().ok_or_else(|| {
            InputError::new_err(
                "this bundle has no tokenizer; give token ids (in Python) or build \
                                 it from a model directory that holds one",
            )
        })
    }
}

/// Tokens, or a text and how many of its tokens to take.
#[derive(FromPyObject)]
pub(super) enum BenchPrompt {
    Tokens(Vec<u32>),
    Text(String, usize),
}

impl BenchPrompt {
    fn tokens(self, codec: Option<&TextCodec>) -> Result<Vec<u32>> {
        let (text, count) = match self {
            Self::Tokens(tokens) => return Ok(tokens),
            Self::Text(text, count) => (text, count),
        };
        let Some(codec) = codec else {
            return Err(Error::Prompt(
                "is a text, but this bundle has no tokenizer".into(),
            ));
        };
        let mut tokens = codec.encode(&text, true)?;
        if tokens.len() < count {
            let range = format!("at most the {} tokens of the text", tokens.len());
            return Err(Error::setting("prompt_tokens", count, range));
        }
        tokens.truncate(count);
        Ok(tokens)
    }
}

/// A chain over the plans that `runner` names.
fn load_plans(bundle: &Bundle, library: &Library, runner: PlanRunner) -> Result<Chain> {
    let (target, executor, rehearsal) = runner;
    let exits = Exits::of(bundle, &library.path, library.threads)?;
    let executor = Arc::new(PythonExecutor(executor));
    Ok(if rehearsal {
        let host = Host::default();
        Chain::over(
            bundle,
            TensorRt::load(bundle, &target, host, executor, exits)?,
        )
    } else {
        let gpu = Cuda::new()?;
        Chain::over(
            bundle,
            TensorRt::load(bundle, &target, gpu, executor, exits)?,
        )
    })
}

fn bench_case(
    (name, monolith, depth, drafter): (String, bool, Option<usize>, Option<String>),
) -> Result<BenchCase> {
    Ok(BenchCase {
        name,
        chain: usize::from(monolith),
        mode: mode(depth.map(|depth| vec![depth]), drafter.as_deref())?,
    })
}

fn to_dict<'py>(py: Python<'py>, row: &BenchRow) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    result.set_item("name", &row.name)?;
    result.set_item("ms_per_token", row.ms_per_token)?;
    result.set_item("tokens_per_second", 1e3 / row.ms_per_token)?;
    result.set_item("min_ms", row.min_ms)?;
    result.set_item("max_ms", row.max_ms)?;
    result.set_item("mean_exit_layer", row.mean_exit_layer)?;
    result.set_item("speedup", row.speedup)?;
    result.set_item("agreement", row.agreement)?;
    Ok(result)
}

fn mode(forced: Option<Vec<usize>>, drafter: Option<&str>) -> Result<DecodingMode> {
    Ok(match (forced, drafter) {
        (Some(depths), _) => DecodingMode::Forced { depths },
        (None, Some(name)) => DecodingMode::Lossless {
            drafter: drafter_kind(name)?,
        },
        (None, None) => DecodingMode::Full,
    })
}

fn drafter_kind(name: &str) -> Result<DrafterKind> {
    named("drafter", name, DrafterKind::ALL, DrafterKind::name)
}

fn kv_fill_named(name: &str) -> Result<KvFill> {
    named("kv_fill", name, KvFill::ALL, KvFill::name)
}

pub(super) fn named<T: Copy, const N: usize>(
    setting: &'static str,
    name: &str,
    all: [T; N],
    name_of: fn(T) -> &'static str,
) -> Result<T> {
    all.into_iter()
        .find(|&choice| name_of(choice) == name)
        .ok_or_else(|| Error::setting(setting, name, all.map(name_of).join(" or ")))
}

fn codec(bundle: &Bundle) -> Result<Option<TextCodec>> {
    if !bundle.manifest.tokenizer {
        return Ok(None);
    }
    let file = Path::new("tokenizer.json");
    let codec = TextCodec::new(&bundle.gate.read(file)?);
    codec.map(Some).map_err(|error| {
        let reason = format!("{error}; build or copy the bundle again");
        Error::bundle(&bundle.gate.shown(file), reason)
    })
}
