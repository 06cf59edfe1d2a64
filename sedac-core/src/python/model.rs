//! A loaded bundle.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use pyo3::prelude::*;

use super::benchmark::{Prompt, PyBenchCase, PyBenchRow};
use super::decoding_settings::{PyDecodingSetting, PySampling};
use super::door;
use super::error::InputError;
use super::executor::PythonExecutor;
use super::generation::{Generation, GenerationWork};
use super::loading::{BackendName, Library, Loaded, PassedOver, Preparation, load};
use super::outcomes::{PyCertification, PyFollowedText};
use super::process::ProcessLocal;
use super::spellings::{BackendChoice, PlanDevice};
use super::text_stream::PyTextStream;
use super::turns::Turns;
use crate::backend::Layout;
use crate::bench::BenchCase;
use crate::bundle::{Bundle, Opening, Verify};
use crate::certification::{Certification, GenerationSetting};
use crate::chain::{
    Chain, DecodingChoice, DecodingMode, DrafterChoice, ModeName, ModelLimits, Request,
};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{PolicyChoice, PolicyKind};
use crate::sampler::Sampling;
use crate::text::{StopStrings, TextCodec};

/// A bundle with its engines loaded.
#[pyclass(frozen)]
pub(super) struct Model {
    bundle: Bundle,
    turns: ProcessLocal<Turns>,
    codec: ProcessLocal<Option<Arc<TextCodec>>>,
    library: Library,
    backend: BackendName,
    passed_over: Vec<PassedOver>,
    limits: ModelLimits,
}

#[pymethods]
impl Model {
    /// Check and load the bundle in `directory`. library and threads are ONNX Runtime's; as many
    /// threads check the files. verify "always" hashes all of them, "changed" those that changed
    /// since they were last found whole. memory_limit, in bytes, is what the loaded bundle may
    /// take, None for what is free. `executor` runs the bundle's TensorRT plans of its target
    /// instead of ONNX Runtime's engines, over the memory of its device. Without one `backend` says
    /// what runs: "onnxruntime" or the bundle's CUDA kernels ("cuda"). "auto" takes the first that
    /// can run of these kernels, the bundle's plans, ONNX Runtime on a GPU and on the CPU.
    /// `device` is for "onnxruntime": where it runs the bundle's graphs for GPUs, None for its
    /// engines on the CPU. "auto" calls `prepare` with the name of a backend of another library
    /// before it tries that: it gives the executor of a target's plans, or makes ONNX Runtime's CUDA
    /// provider ready, and raises where that cannot be.
    #[new]
    #[pyo3(signature = (
        directory, library, threads, executor = None, *, backend = BackendChoice::Onnxruntime,
        device = None, prepare = None, verify = Verify::Always, memory_limit = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        library: PathBuf,
        threads: usize,
        executor: Option<PythonExecutor>,
        backend: BackendChoice,
        device: Option<PlanDevice>,
        prepare: Option<Preparation>,
        verify: Verify,
        memory_limit: Option<u64>,
    ) -> PyResult<Self> {
        let path = library;
        let opening = Opening {
            verify,
            threads,
            memory_limit,
            ..Opening::default()
        };
        let interrupt = opening.interrupt.clone();
        door::run(py, &interrupt, move || {
            let bundle = Bundle::open_with(&directory, &opening)?;
            let library = Library { path, threads };
            let (codec, loaded) = thread::scope(|scope| {
                // both take one thread, and the tokenizer a good part of the engines' time
                let codec = scope.spawn(|| codec(&bundle));
                let loaded = load(
                    &bundle,
                    &library,
                    backend,
                    device,
                    executor,
                    prepare.as_ref(),
                );
                (codec.join(), loaded)
            });
            let codec = codec.unwrap_or_else(|panic| resume_unwind(panic))?;
            let Loaded {
                chain,
                backend,
                passed_over,
            } = loaded?;
            Ok(Self {
                bundle,
                limits: chain.limits(),
                turns: ProcessLocal::new(Turns::new(chain)),
                codec: ProcessLocal::new(codec.map(Arc::new)),
                library,
                backend,
                passed_over,
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

    /// What runs it.
    #[getter]
    fn backend(&self) -> &'static str {
        self.backend.name()
    }

    /// Where it runs, "cpu" or "cuda".
    #[getter]
    fn device(&self) -> &'static str {
        self.backend.device()
    }

    /// The backends that "auto" could not take, the best first, each with the reason.
    #[getter]
    fn passed_over(&self) -> Vec<PassedOver> {
        self.passed_over.clone()
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

    /// How tokens are decoded: as the arguments say, and where they are None the bundle. Raises
    /// where what runs the bundle cannot decode so.
    #[pyo3(signature = (
        mode, *, forced_exit = None, policy = None, threshold = None, tau = None,
        consecutive_k = None, min_layer_ratio = None, kv_fill = None, drafter = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn decoding(
        &self,
        mode: ModeName,
        forced_exit: Option<Vec<usize>>,
        policy: Option<PolicyKind>,
        threshold: Option<f32>,
        tau: Option<f32>,
        consecutive_k: Option<usize>,
        min_layer_ratio: Option<f64>,
        kv_fill: Option<KvFill>,
        drafter: Option<DrafterChoice>,
    ) -> Result<PyDecodingSetting> {
        let choice = DecodingChoice {
            mode,
            forced_exit,
            policy: PolicyChoice {
                policy,
                threshold,
                tau,
                consecutive_k,
                min_layer_ratio,
            },
            kv_fill,
            drafter,
        };
        let Bundle {
            manifest,
            exit_config,
            ..
        } = &self.bundle;
        let setting = choice.resolve(exit_config, manifest)?;
        self.limits.check_decoding(&setting.mode, setting.kv_fill)?;
        Ok(PyDecodingSetting(setting))
    }

    /// What is certified of texts that are decoded so; None where their tokens are full depth's.
    fn certification(
        &self,
        decoding: PyDecodingSetting,
        sampling: PySampling,
    ) -> Option<PyCertification> {
        let PyDecodingSetting(decoding) = decoding;
        let said = self.certification_of(&decoding.mode, decoding.kv_fill, &sampling.0);
        said.as_ref().map(PyCertification::from)
    }

    /// Run a text token by token with exits.
    fn follow(
        &self,
        py: Python<'_>,
        tokens: Vec<u32>,
        decoding: PyDecodingSetting,
    ) -> PyResult<PyFollowedText> {
        let PyDecodingSetting(decoding) = decoding;
        self.check(&decoding.mode)?;
        let turns = self.turns.get()?.clone();
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        door::run(py, &interrupt, move || {
            let mut chain = turns.take();
            let mut followed = PyFollowedText::default();
            chain.follow(
                &tokens,
                &decoding.mode,
                decoding.kv_fill,
                &raised,
                |token| {
                    followed.tokens.push(token.id);
                    followed.exit_layers.push(token.exit.layer);
                },
            )?;
            Ok(followed)
        })
    }

    /// Draft the next text as a new process would, without earlier texts to look up.
    fn forget_texts(&self, py: Python<'_>) -> PyResult<()> {
        let turns = self.turns.get()?.clone();
        door::run(py, &Interrupt::default(), move || {
            turns.take().forget_texts();
            Ok(())
        })
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
        let known = 0..self.limits.vocab_size as u32;
        if let Some(token) = tokens.iter().find(|token| !known.contains(token)) {
            let range = format!("0 to {}", known.end - 1);
            return Err(Error::setting("token", token, range).into());
        }
        Ok(py.detach(|| codec.decode(&tokens))?)
    }

    /// Decodes one text token by token.
    fn text_stream(&self) -> PyResult<PyTextStream> {
        Ok(PyTextStream::new(self.codec()?.clone()))
    }

    /// Generate as the result is iterated over. With `profile` the summary has a Chrome trace.
    #[pyo3(signature = (
        prompt, decoding, sampling, *, max_new_tokens, stop_tokens, stop_strings = vec![],
        profile = false
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn generate(
        &self,
        prompt: Vec<u32>,
        decoding: PyDecodingSetting,
        sampling: PySampling,
        max_new_tokens: usize,
        stop_tokens: Vec<u32>,
        stop_strings: Vec<String>,
        profile: bool,
    ) -> PyResult<Generation> {
        let PyDecodingSetting(decoding) = decoding;
        self.check(&decoding.mode)?;
        let request = Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            mode: decoding.mode,
            kv_fill: decoding.kv_fill,
            sampling: sampling.0,
        };
        if !stop_strings.is_empty() {
            self.codec()?;
        }
        let certification =
            self.certification_of(&request.mode, request.kv_fill, &request.sampling);
        let work = GenerationWork {
            turns: self.turns.get()?.clone(),
            codec: self.codec.get()?.as_ref().clone(),
            request,
            stops: StopStrings::new(stop_strings)?,
            profiled: profile,
        };
        Ok(Generation::new(work, certification))
    }

    /// Compare decoding modes, each after the first `prompt_tokens` tokens of `prompt`: see
    /// `sedac_runtime.bench`. against: the index of the case that others are compared with.
    #[expect(clippy::too_many_arguments, reason = "what a benchmark takes")]
    fn bench(
        &self,
        py: Python<'_>,
        cases: Vec<PyBenchCase>,
        prompt: Prompt,
        prompt_tokens: usize,
        new_tokens: usize,
        repeat: usize,
        against: usize,
    ) -> PyResult<Vec<PyBenchRow>> {
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        let codec = self.codec.get()?;
        let prompt = py.detach(|| prompt.first(prompt_tokens, codec.as_deref()))?;
        let with_monolith = cases.iter().any(|case| case.monolith);
        let cases: Vec<BenchCase> = cases.into_iter().map(Into::into).collect();
        cases.iter().try_for_each(|case| self.check(&case.mode))?;
        let monolith = with_monolith.then(|| self.monolith()).transpose()?;
        let turns = self.turns.get()?.clone();
        door::run(py, &interrupt, move || {
            let mut chain = turns.take();
            let mut monolith = monolith.map(|load| load()).transpose()?;
            let mut chains: Vec<_> = [&mut *chain].into_iter().chain(&mut monolith).collect();
            let rows = crate::bench::run(
                &mut chains,
                &cases,
                &prompt,
                new_tokens,
                repeat,
                against,
                &raised,
            )?;
            Ok(rows.into_iter().map(Into::into).collect())
        })
    }
}

impl Model {
    /// The chain, which callers use in turns.
    pub(super) fn turns(&self) -> PyResult<&Arc<Turns>> {
        self.turns.get()
    }

    /// Check that the bundle has what a policy reads.
    pub(super) fn check(&self, mode: &DecodingMode) -> Result<()> {
        match mode {
            DecodingMode::Exit { policy, .. } => self.bundle.manifest.compile(policy).map(drop),
            _ => Ok(()),
        }
    }

    fn certification_of(
        &self,
        mode: &DecodingMode,
        kv_fill: KvFill,
        sampling: &Sampling,
    ) -> Option<Certification> {
        let generation = GenerationSetting {
            mode,
            kv_fill,
            sampling,
            others: self.backend.others(),
            verifies_exactly: self.limits.capabilities.verifies_exactly,
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
        if let Some(others) = self.backend.others() {
            let range = format!("full; {others} have no monolith, which is ONNX Runtime's");
            return Err(Error::setting("against", "monolith", range));
        }
        let (bundle, library) = (self.bundle.clone(), self.library.clone());
        Ok(move || Chain::load(&bundle, Layout::Monolith, &library.path, library.threads))
    }

    fn codec(&self) -> PyResult<&Arc<TextCodec>> {
        let codec = self.codec.get()?.as_ref();
        codec.as_ref().ok_or_else(|| {
            InputError::new_err(
                "this bundle has no tokenizer; give token ids (in Python) or build \
                                 it from a model directory that holds one",
            )
        })
    }
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
