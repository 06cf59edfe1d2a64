//! Exit engines and lenses, which a bundle has after training.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ort::session::{IoBinding, Session};
use ort::value::Tensor;

use super::runtime::{
    bind_input, bind_output, binding, environment, read, run, session, tensor, write,
};
use crate::bundle::{Bundle, ExitEntry};
use crate::error::Result;
use crate::policy::ExitSignals;

/// What a bundle has for exits, by depth.
pub struct Exits {
    engines: HashMap<usize, ExitEngine>,
    lenses: HashMap<usize, Lens>,
}

/// x [1, 1, hidden], stability [1, 1, 3] -> signals [1, 1, 3].
struct ExitEngine {
    session: Session,
    bound: IoBinding,
    hidden: Tensor<f32>,
    stability: Tensor<f32>,
    signals: Tensor<f32>,
}

/// x [1, 1, hidden] -> y like x.
struct Lens {
    session: Session,
    bound: IoBinding,
    hidden: Tensor<f32>,
    output: Tensor<f32>,
}

impl Exits {
    /// Load the engines of `entries`; `open` loads a graph of the bundle.
    pub(super) fn load(
        entries: &[ExitEntry],
        hidden_size: usize,
        open: impl Fn(&Path) -> Result<Session>,
    ) -> Result<Self> {
        let mut exits = Self {
            engines: HashMap::new(),
            lenses: HashMap::new(),
        };
        for entry in entries {
            let engine = ExitEngine::new(open(&entry.file)?, hidden_size)?;
            exits.engines.insert(entry.depth, engine);
            if let Some(file) = &entry.lens {
                let lens = Lens::new(open(file)?, hidden_size)?;
                exits.lenses.insert(entry.depth, lens);
            }
        }
        Ok(exits)
    }

    /// Load those of `bundle` with the ONNX Runtime library at `library`, which is not touched
    /// where there are none. They run on the host.
    ///
    /// # Errors
    /// As [`OnnxRuntime::load`](super::OnnxRuntime::load).
    pub fn of(bundle: &Bundle, library: &Path, threads: usize) -> Result<Self> {
        let manifest = &bundle.manifest;
        let entries = &manifest.engines.exits;
        let files = entries.iter().flat_map(ExitEntry::files);
        bundle.check_more_memory(files.map(PathBuf::as_path))?;
        Self::load(entries, manifest.model.hidden_size, |file| {
            let environment = environment(library, threads)?;
            session(&environment, bundle, file)
        })
    }

    /// The depths with an exit head, ascending.
    pub(in crate::backend) fn depths(&self) -> Vec<usize> {
        let mut depths: Vec<_> = self.engines.keys().copied().collect();
        depths.sort_unstable();
        depths
    }

    /// Whether there is a lens at `depth`.
    pub(in crate::backend) fn has_lens(&self, depth: usize) -> bool {
        self.lenses.contains_key(&depth)
    }

    /// What the exit engine at `depth` says about the residual stream `row`.
    pub(in crate::backend) fn signals(
        &mut self,
        depth: usize,
        row: &[f32],
        stability: [f32; 3],
    ) -> Result<Option<ExitSignals>> {
        let Some(engine) = self.engines.get_mut(&depth) else {
            return Ok(None);
        };
        write(&mut engine.hidden, row);
        write(&mut engine.stability, &stability);
        run(&mut engine.session, &engine.bound, || {
            format!("exit engine of depth {depth}")
        })?;
        let signals = read(&engine.signals);
        Ok(Some(ExitSignals {
            margin: signals[0],
            entropy: signals[1],
            learned: signals[2],
        }))
    }

    /// The residual stream `row` at `depth` as the head takes it; None where there is no lens.
    pub(in crate::backend) fn through_lens(
        &mut self,
        depth: usize,
        row: &[f32],
    ) -> Result<Option<&[f32]>> {
        let Some(lens) = self.lenses.get_mut(&depth) else {
            return Ok(None);
        };
        write(&mut lens.hidden, row);
        run(&mut lens.session, &lens.bound, || {
            format!("lens of depth {depth}")
        })?;
        Ok(Some(read(&lens.output)))
    }
}

impl ExitEngine {
    fn new(session: Session, hidden_size: usize) -> Result<Self> {
        let mut bound = binding(&session)?;
        let hidden = tensor(&[1, 1, hidden_size])?;
        let stability = tensor(&[1, 1, 3])?;
        let mut signals = tensor(&[1, 1, 3])?;
        bind_input(&mut bound, "x", &hidden)?;
        bind_input(&mut bound, "stability", &stability)?;
        bind_output(&mut bound, "signals", &mut signals)?;
        Ok(Self {
            session,
            bound,
            hidden,
            stability,
            signals,
        })
    }
}

impl Lens {
    fn new(session: Session, hidden_size: usize) -> Result<Self> {
        let mut bound = binding(&session)?;
        let hidden = tensor(&[1, 1, hidden_size])?;
        let mut output = tensor(&[1, 1, hidden_size])?;
        bind_input(&mut bound, "x", &hidden)?;
        bind_output(&mut bound, "y", &mut output)?;
        Ok(Self {
            session,
            bound,
            hidden,
            output,
        })
    }
}
