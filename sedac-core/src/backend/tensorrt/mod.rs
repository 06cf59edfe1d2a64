//! TensorRT and TensorRT-RTX: one plan an engine, captured once for each number of tokens and
//! replayed.
//!
//! Python's TensorRT package puts a plan's work on a stream when the core asks for it (an
//! [`Executor`]); the [`Device`] captures that, and from then on decoding is launches of captured
//! work, a few bytes written before a pass and the stability read after each engine. The graphs
//! behind the plans are the portable ones of `sedac_export/tensorrt/portable.py`.
//!
//! ONNX Runtime's CUDA provider runs in the same manner, with its sessions as the executor.

mod buffers;
mod cuda;
mod device;
mod host_device;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use cuda::Cuda;
pub use device::{Bound, Buffer, Device, Executor, Work};
pub use host_device::Host;

use self::buffers::{Caches, Frame, Masks, Sizes, allocate, bound, decode_f32};
use super::onnxruntime::Exits;
use super::{Capabilities, EnginePart, EngineTiming, Engines, MAX_TOKENS, stability};
use crate::bundle::{Bundle, Gate, PlanFiles, PortableGraphs, PortableLayers};
use crate::error::{Error, Result};
use crate::policy::ExitSignals;

/// Passes of up to this many tokens, those that verify a draft, are captured. It is what the plans'
/// profiles call verifying, and as many logits as the head gives at once.
const MAX_CAPTURED: usize = 16;

/// A plan and the tensors it runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PlanKind {
    Embed,
    Contexts(FrameKind),
    Layers(usize),
    KeyValue(usize),
    Head,
}

/// One of the two frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum FrameKind {
    Pass,
    Filling,
}

/// A bundle's plans of one target and the caches of one sequence.
pub struct TensorRt<D: Device> {
    /// First, for it goes first: it waits for work that uses what is below.
    device: D,
    executor: Arc<dyn Executor>,
    gate: Arc<Gate>,
    plans: PlanFiles,
    layers: Vec<PortableLayers>,
    sizes: Sizes,
    captured: HashMap<(PlanKind, usize), D::Captured>,
    pass: Frame,
    /// Apart from the pass, whose residual stream and contexts stay while a cache is filled.
    filling: Frame,
    /// The positions that `filling` is ready for.
    filled: Range<usize>,
    caches: Caches,
    masks: Masks,
    /// [1, tokens, layers of the engine] of the engine that ran last, fp32.
    stabilities: Buffer,
    /// Hidden states by position.
    saved: Buffer,
    head_input: Buffer,
    head_output: Buffer,
    exits: Exits,
    tokens: usize,
    engines_run: usize,
    logits: Vec<f32>,
    loaded: D::Mark,
    /// What was launched since the host last waited for the device.
    launched: Vec<Launched<D::Mark>>,
    timings: Vec<EngineTiming>,
}

/// A launched plan, between two points of the device's work.
struct Launched<Mark> {
    part: EnginePart,
    tokens: usize,
    start: Mark,
    end: Mark,
}

impl<D: Device> TensorRt<D> {
    /// Run the plans of `bundle` for the target named, such as `tensorrt-rtx`, on `device`. `exits`
    /// compute exit heads and lenses, on the host.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it holds no plans for the target, [`Error::Device`] when memory is
    /// short.
    pub fn load(
        bundle: &Bundle,
        target: &str,
        device: D,
        executor: Arc<dyn Executor>,
        exits: Exits,
    ) -> Result<Self> {
        let plans = bundle.manifest.plans_for(target);
        let plans = plans.ok_or_else(|| missing_plans(&bundle.gate.shown(""), target))?;
        Self::over(bundle, plans, device, executor, exits)
    }

    /// As [`load`](Self::load), for the bundle's graphs for ONNX Runtime's CUDA provider, which need
    /// no plans: the executor runs the graphs themselves.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it holds no such graphs, and as [`load`](Self::load).
    pub fn load_graphs(
        bundle: &Bundle,
        device: D,
        executor: Arc<dyn Executor>,
        exits: Exits,
    ) -> Result<Self> {
        Self::over(bundle, bundle.graphs_for_cuda()?, device, executor, exits)
    }

    fn over(
        bundle: &Bundle,
        (portable, plans): (&PortableGraphs, PlanFiles),
        mut device: D,
        executor: Arc<dyn Executor>,
        exits: Exits,
    ) -> Result<Self> {
        let manifest = &bundle.manifest;
        bundle.check_device_memory(plans.files(), device.free_memory()?)?;
        let length = manifest.max_cache_length;
        let sizes = Sizes {
            precision: manifest.precision,
            hidden: manifest.model.hidden_size,
            vocabulary: manifest.model.vocab_size,
            length,
            max_tokens: MAX_TOKENS
                .min(plans.max_prefill_chunk.max(MAX_CAPTURED))
                .min(length),
        };
        let loaded = device.mark()?;
        let contexts = &portable.contexts;
        let max_layers = portable.layers.iter().map(|entry| entry.num_layers).max();
        let stabilities = [sizes.max_tokens, max_layers.unwrap_or(1)];
        let logits = [MAX_CAPTURED, sizes.vocabulary];
        let mut engines = Self {
            pass: Frame::new(&mut device, contexts, sizes)?,
            filling: Frame::new(&mut device, contexts, sizes)?,
            filled: 0..0,
            caches: Caches::new(&mut device, manifest, sizes)?,
            masks: Masks::new(&mut device, &portable.masks, sizes)?,
            stabilities: allocate(&mut device, &stabilities, size_of::<f32>())?,
            saved: sizes.rows(&mut device, length)?,
            head_input: sizes.rows(&mut device, MAX_CAPTURED)?,
            head_output: allocate(&mut device, &logits, sizes.precision.bytes())?,
            gate: bundle.gate.clone(),
            layers: portable.layers.clone(),
            plans,
            device,
            executor,
            sizes,
            exits,
            captured: HashMap::new(),
            tokens: 0,
            engines_run: 0,
            logits: Vec::new(),
            loaded,
            launched: Vec::new(),
            timings: Vec::new(),
        };
        engines.prepare()?;
        Ok(engines)
    }

    /// Capture every plan for a single token: what is wrong with one shows now.
    fn prepare(&mut self) -> Result<()> {
        self.embed(&[0], 0)?;
        for engine in 0..self.layers.len() {
            self.run(engine)?;
        }
        self.head(1)?;
        self.save(0..1)?;
        (0..self.plans.key_value.len()).try_for_each(|layer| self.fill(layer, 0..1))
    }

    fn launch(&mut self, plan: PlanKind, tokens: usize) -> Result<()> {
        let start = self.device.mark()?;
        self.launch_untimed(plan, tokens)?;
        let end = self.device.mark()?;
        self.launched.push(Launched {
            part: self.part(plan),
            tokens,
            start,
            end,
        });
        Ok(())
    }

    fn part(&self, plan: PlanKind) -> EnginePart {
        match plan {
            PlanKind::Embed => EnginePart::Embed,
            PlanKind::Contexts(_) => EnginePart::Contexts,
            PlanKind::Layers(engine) => EnginePart::Layers(self.layers[engine].range()),
            PlanKind::KeyValue(layer) => EnginePart::KeyValue(layer),
            PlanKind::Head => EnginePart::Head,
        }
    }

    /// Note how long the launched plans took, which the host has waited for.
    fn note_timings(&mut self) -> Result<()> {
        for launched in self.launched.drain(..) {
            self.timings.push(EngineTiming {
                start: self.device.elapsed(&self.loaded, &launched.start)?,
                elapsed: self.device.elapsed(&launched.start, &launched.end)?,
                part: launched.part,
                tokens: launched.tokens,
            });
        }
        Ok(())
    }

    fn launch_untimed(&mut self, plan: PlanKind, tokens: usize) -> Result<()> {
        if tokens > MAX_CAPTURED {
            let work = self.work(plan, tokens)?;
            return self.device.run(&work);
        }
        if let Some(captured) = self.captured.get(&(plan, tokens)) {
            return self.device.launch(captured);
        }
        let captured = self.device.capture(self.work(plan, tokens)?)?;
        self.captured.insert((plan, tokens), captured);
        Ok(())
    }

    fn work(&self, plan: PlanKind, tokens: usize) -> Result<Work> {
        Ok(Work {
            executor: self.executor.clone(),
            plan: self.gate.path(self.path(plan))?,
            tensors: self.tensors(plan, tokens),
            replayed: tokens <= MAX_CAPTURED,
        })
    }

    fn path(&self, plan: PlanKind) -> &Path {
        match plan {
            PlanKind::Embed => &self.plans.embed,
            PlanKind::Contexts(_) => {
                let contexts = self.plans.contexts.as_deref();
                contexts.expect("launched where there is one")
            }
            PlanKind::Layers(engine) => &self.plans.layers[engine],
            PlanKind::KeyValue(layer) => &self.plans.key_value[layer],
            PlanKind::Head => &self.plans.head,
        }
    }

    fn tensors(&self, plan: PlanKind, tokens: usize) -> Vec<Bound> {
        let sizes = self.sizes;
        match plan {
            PlanKind::Embed => self.pass.embed(tokens, sizes),
            PlanKind::Contexts(FrameKind::Pass) => self.pass.positions(tokens),
            PlanKind::Contexts(FrameKind::Filling) => self.filling.positions(tokens),
            PlanKind::Layers(engine) => {
                let layers = self.layers[engine].range();
                let stability = [1, tokens, layers.len()];
                let mut tensors = self.pass.shared(tokens);
                tensors.extend(self.masks.tensors(tokens, sizes));
                tensors.push(sizes.bound("x", self.pass.hidden[engine % 2], tokens));
                tensors.push(sizes.bound("y", self.pass.hidden[(engine + 1) % 2], tokens));
                let element = size_of::<f32>();
                tensors.push(bound("stability", self.stabilities, &stability, element));
                tensors.extend(self.caches.tensors(layers));
                tensors
            }
            PlanKind::KeyValue(layer) => {
                let mut tensors = self.filling.shared(tokens);
                tensors.push(sizes.bound("x", self.filling.hidden[0], tokens));
                tensors.extend(self.caches.tensors(layer..layer + 1));
                tensors
            }
            PlanKind::Head => {
                let logits = [1, tokens, sizes.vocabulary];
                let element = sizes.precision.bytes();
                vec![
                    sizes.bound("x", self.head_input, tokens),
                    bound("logits", self.head_output, &logits, element),
                ]
            }
        }
    }

    /// Where the newest `tokens` tokens' rows of the current residual stream begin.
    fn newest(&self, tokens: usize) -> (Buffer, usize) {
        let offset = (self.tokens - tokens) * self.sizes.row();
        (self.pass.hidden[self.engines_run % 2], offset)
    }

    /// The newest token's residual stream after `engines` engines, of which the last or the one
    /// before it must have run last.
    fn newest_row(&mut self, engines: usize) -> Result<Vec<f32>> {
        let offset = (self.tokens - 1) * self.sizes.row();
        let mut bytes = vec![0; self.sizes.row()];
        self.device
            .read(self.pass.hidden[engines % 2], offset, &mut bytes)?;
        Ok(self.sizes.precision.decode(&bytes))
    }

    /// Make the pass at `positions` the current one.
    fn begin(&mut self, positions: Range<usize>) -> Result<()> {
        let (tokens, start) = (positions.len(), positions.start);
        self.tokens = tokens;
        self.engines_run = 0;
        if self.filled.end > start {
            // exit hidden states at these positions are about to change
            self.filled = 0..0;
        }
        self.pass.write_positions(&mut self.device, &positions)?;
        self.masks.write(&mut self.device, positions, self.sizes)?;
        self.launch_contexts(FrameKind::Pass, tokens)
    }

    fn launch_contexts(&mut self, frame: FrameKind, tokens: usize) -> Result<()> {
        match self.plans.contexts {
            Some(_) => self.launch(PlanKind::Contexts(frame), tokens),
            None => Ok(()),
        }
    }

    /// Make the filling frame ready for `positions`.
    fn prepare_filling(&mut self, positions: &Range<usize>) -> Result<()> {
        if self.filled == *positions {
            return Ok(());
        }
        let tokens = positions.len();
        let start = positions.start;
        self.filling.write_positions(&mut self.device, positions)?;
        self.launch_contexts(FrameKind::Filling, tokens)?;
        let from = (self.saved, start * self.sizes.row());
        let to = (self.filling.hidden[0], 0);
        self.device.copy(from, to, tokens * self.sizes.row())?;
        self.filled = positions.clone();
        Ok(())
    }

    /// What the head reads of a single token: its row, through the lens of its depth if there is
    /// one.
    fn write_head_input(&mut self, tokens: usize) -> Result<()> {
        let depth = self.layers[self.engines_run - 1].range().end;
        // lenses are for exits, which are of one token
        if tokens == 1 && self.exits.has_lens(depth) {
            let row = self.residual(1)?;
            let seen = self.exits.through_lens(depth, &row)?.unwrap_or(&row);
            let bytes = self.sizes.precision.encode(seen);
            return self.device.write(self.head_input, 0, &bytes);
        }
        let to = (self.head_input, 0);
        self.device
            .copy(self.newest(tokens), to, tokens * self.sizes.row())
    }
}

impl<D: Device> Engines for TensorRt<D> {
    fn layers(&self) -> Vec<Range<usize>> {
        self.layers.iter().map(PortableLayers::range).collect()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            exit_heads: self.exits.depths(),
            ..Capabilities::default()
        }
    }

    fn max_tokens(&self) -> usize {
        self.sizes.max_tokens
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.begin(start..start + tokens.len())?;
        self.pass.write_tokens(&mut self.device, tokens)?;
        self.launch(PlanKind::Embed, tokens.len())
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.begin(positions.clone())?;
        self.engines_run = engine;
        let from = (self.saved, positions.start * self.sizes.row());
        let to = self.newest(positions.len());
        self.device
            .copy(from, to, positions.len() * self.sizes.row())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        self.launch(PlanKind::Layers(engine), self.tokens)?;
        self.engines_run = engine + 1;
        Ok(())
    }

    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let (buffer, offset) = self.newest(tokens);
        let mut bytes = vec![0; tokens * self.sizes.row()];
        self.device.read(buffer, offset, &mut bytes)?;
        Ok(self.sizes.precision.decode(&bytes))
    }

    fn clear(&mut self) -> Result<()> {
        self.caches.clear(&mut self.device)
    }

    fn risk(&self, _: usize) -> Option<f32> {
        None
    }

    fn exit_signals(&mut self, depth: usize, stability: [f32; 3]) -> Result<Option<ExitSignals>> {
        let row = self.residual(1)?;
        self.exits.signals(depth, &row, stability)
    }

    fn stability(&mut self, engine: usize) -> Result<Vec<f32>> {
        if !self.layers[engine].stability {
            let before = self.newest_row(engine)?;
            let after = self.newest_row(engine + 1)?;
            return Ok(vec![stability(&before, &after)]);
        }
        let newest = self.layers[engine].num_layers * size_of::<f32>();
        let mut bytes = vec![0; newest];
        let offset = (self.tokens - 1) * newest;
        self.device.read(self.stabilities, offset, &mut bytes)?;
        Ok(decode_f32(&bytes))
    }

    fn save(&mut self, positions: Range<usize>) -> Result<()> {
        if positions.is_empty() {
            return Ok(());
        }
        let to = (self.saved, positions.start * self.sizes.row());
        let bytes = positions.len() * self.sizes.row();
        self.device.copy(self.newest(positions.len()), to, bytes)
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        self.prepare_filling(&positions)?;
        self.launch(PlanKind::KeyValue(layer), positions.len())
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        self.write_head_input(tokens)?;
        self.launch(PlanKind::Head, tokens)?;
        let bytes = tokens * self.sizes.vocabulary * self.sizes.precision.bytes();
        let mut read = vec![0; bytes];
        self.device.read(self.head_output, 0, &mut read)?;
        self.logits = self.sizes.precision.decode(&read);
        self.note_timings()
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn take_timings(&mut self) -> Vec<EngineTiming> {
        std::mem::take(&mut self.timings)
    }
}

fn missing_plans(directory: &Path, target: &str) -> Error {
    let reason = format!(
        "holds no plans for {target}; add them with sedac-export engines --target {target} and \
         --model"
    );
    Error::bundle(directory, reason)
}
