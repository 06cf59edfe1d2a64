//! A toy model whose every logit depends on every cache entry, in a chain on a toy machine.

mod checks;
mod choices;
mod device;
mod drafts;
mod kernel;
mod rows;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sedac_core::Result;
use sedac_core::backend::cuda::CudaChain;
use sedac_core::backend::{
    Backend, Capabilities, Costs, DraftEngine, EngineTiming, Engines, HostDecided, RowEngines,
    SequenceStep, StepOutcome,
};
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::Chain;
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::ExitSignals;
use sedac_core::sequence::Sequence;

pub(crate) use self::device::ToyDevice;
pub(crate) use self::kernel::ToyKernel;
use self::rows::ToyRows;

pub(crate) const VOCABULARY: usize = 6;
pub(crate) const CAPACITY: usize = 80;
/// The drafters that need no engine of their own.
pub(crate) const UNTRAINED: [DrafterKind; 3] = [
    DrafterKind::EarlyExit,
    DrafterKind::PromptLookup,
    DrafterKind::Auto,
];

/// The cache of one slot by layer and position. An entry is the token, and a digest of the hidden
/// state that the layer was given.
pub(crate) type Cache = Vec<Vec<Option<(u32, u64)>>>;

/// A cache that is shared with the test.
pub(crate) type Caches = Arc<Mutex<Cache>>;

/// What stands for a hidden state: the token, a digest of all tokens that it attended to, which is
/// the same after every layer, and one of all that went into it, which is not.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hidden {
    token: u32,
    digest: u64,
    history: u64,
}

impl Hidden {
    pub(crate) fn of(token: u32) -> Self {
        Self {
            token,
            ..Self::default()
        }
    }

    /// Take the hidden state at `position` through `layer`.
    pub(crate) fn run(&mut self, layer: usize, position: usize, cache: &mut Cache) {
        self.fill(layer, position, cache);
        (self.digest, self.history) = (0, layer as u64);
        for entry in &cache[layer][..=position] {
            let (token, history) = entry.unwrap_or((99, 0));
            self.digest = mix(self.digest, u64::from(token));
            self.history = mix(self.history, history);
        }
    }

    /// Fill the cache of `layer` at `position`; the hidden state stays as it is.
    pub(crate) fn fill(self, layer: usize, position: usize, cache: &mut Cache) {
        cache[layer][position] = Some((self.token, self.history));
    }

    /// A number in 0..1 after `depth` layers that predicts nothing.
    pub(crate) fn signal(self, depth: usize, kind: u64) -> f32 {
        (mix(mix(self.digest, depth as u64), kind) % 1000) as f32 / 1000.0
    }

    pub(crate) fn exit_signals(self, depth: usize) -> ExitSignals {
        ExitSignals {
            margin: self.signal(depth, 2),
            entropy: self.signal(depth, 3),
            learned: self.signal(depth, 4),
        }
    }

    /// Logits after `depth` layers; an early exit agrees with full depth on the share `agreement`,
    /// of 256, of the tokens.
    pub(crate) fn logits(self, depth: usize, layers: usize, agreement: u64) -> Vec<f32> {
        let wrong = depth < layers && mix(self.digest, depth as u64) % 256 >= agreement;
        let seed = mix(self.digest, u64::from(wrong));
        let logit = |token| (mix(seed, token) % 1000) as f32 / 250.0;
        (0..VOCABULARY as u64).map(logit).collect()
    }
}

/// SplitMix64's finaliser over both numbers.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Layers of engines of these sizes.
pub(crate) fn layers_of(engine_sizes: &[usize]) -> Vec<Range<usize>> {
    let mut layers = Vec::new();
    let mut next = 0;
    for &size in engine_sizes {
        layers.push(next..next + size);
        next += size;
    }
    layers
}

/// After which depths engines of these sizes end.
pub(crate) fn ends(engine_sizes: &[usize]) -> Vec<usize> {
    layers_of(engine_sizes)
        .iter()
        .map(|layers| layers.end)
        .collect()
}

/// A toy model that computes from its caches: an entry too many, too few or stale in any layer
/// changes every later logit.
pub(crate) struct Toy {
    layers: Vec<Range<usize>>,
    slots: Vec<ToySlot>,
    selected: usize,
    start: usize,
    pass: Vec<Hidden>,
    /// Of the pass, where it is over several sequences.
    rows: Vec<ToyRows>,
    /// Logits of its rows that have exited.
    exited: Vec<Option<Vec<f32>>>,
    depth: usize,
    stability: Vec<f32>,
    logits: Vec<f32>,
    /// Share, of 256, of the tokens on which an exit agrees with full depth.
    agreement: u64,
    /// A token whose numbers are NaN after so many layers and more: 0 is the embedding, one more
    /// than there are the head.
    pub(crate) poison: Option<(u32, usize)>,
    /// Whether logits depend on all that went into a hidden state: then an exit agrees with full depth
    /// on no token, and what it leaves in caches matters.
    pub(crate) is_sensitive: bool,
    /// The text that a trained drafter knows, where there is one.
    pub(crate) draft_text: Option<Vec<u32>>,
    draft_logits: Vec<f32>,
}

/// What belongs to one sequence.
struct ToySlot {
    caches: Caches,
    saved: Vec<Hidden>,
    /// The tokens whose states a trained drafter's cache holds.
    drafter_cache: Vec<u32>,
}

impl ToySlot {
    /// An empty slot of `layers` layers, whose cache is in `caches`.
    fn new(layers: usize, caches: &Caches) -> Self {
        *caches.lock().unwrap() = vec![vec![None; CAPACITY]; layers];
        Self {
            caches: caches.clone(),
            saved: vec![Hidden::default(); CAPACITY],
            drafter_cache: Vec::new(),
        }
    }
}

impl Toy {
    pub(crate) fn new(engine_sizes: &[usize], agreement: u64, caches: &Caches) -> Self {
        let layers = layers_of(engine_sizes);
        let count = layers.last().unwrap().end;
        Self {
            layers,
            slots: vec![ToySlot::new(count, caches)],
            selected: 0,
            start: 0,
            pass: Vec::new(),
            rows: Vec::new(),
            exited: Vec::new(),
            depth: 0,
            stability: vec![0.0; count],
            logits: Vec::new(),
            agreement,
            poison: None,
            is_sensitive: false,
            draft_text: None,
            draft_logits: Vec::new(),
        }
    }

    /// The logits of `hidden` after the layers that have run.
    fn logits_of(&self, mut hidden: Hidden) -> Vec<f32> {
        if self.is_sensitive {
            hidden.digest = mix(hidden.digest, hidden.history);
        }
        let poison = self.poisoned(hidden, self.depth + 1);
        let logits = hidden.logits(self.depth, self.stability.len(), self.agreement);
        logits.iter().map(|logit| logit + poison).collect()
    }

    fn newest(&self) -> Hidden {
        self.pass.last().copied().unwrap_or_default()
    }

    /// The trained drafter has taken in `text`.
    fn set_draft_text(&mut self, text: Vec<u32>) {
        self.draft_logits = drafts::draft_logits(&text, self.stability.len(), self.agreement);
        self.draft_text = Some(text);
    }

    /// NaN where `hidden` is poisoned after `depth` layers, 0 otherwise.
    fn poisoned(&self, hidden: Hidden, depth: usize) -> f32 {
        match self.poison {
            Some((token, from)) if hidden.token == token && depth >= from => f32::NAN,
            _ => 0.0,
        }
    }
}

impl Engines for Toy {
    fn layers(&self) -> Vec<Range<usize>> {
        self.layers.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let ends: Vec<_> = self.layers.iter().map(|layers| layers.end).collect();
        Capabilities {
            sequences: self.slots.len(),
            probes: ends.clone(),
            exit_heads: ends,
            trained_drafter: self.draft_text.is_some(),
            ..Capabilities::default()
        }
    }

    fn reserve(&mut self, sequences: usize) -> Result<usize> {
        let layers = self.stability.len();
        let slot = || ToySlot::new(layers, &Caches::default());
        self.slots.resize_with(sequences, slot);
        Ok(sequences)
    }

    fn copy(&mut self, from: usize, length: usize, to: usize) -> bool {
        let source = self.slots[from].caches.lock().unwrap().clone();
        let mut target = self.slots[to].caches.lock().unwrap();
        for (target, source) in target.iter_mut().zip(&source) {
            target[..length].copy_from_slice(&source[..length]);
        }
        true
    }

    fn rows(&mut self) -> Option<&mut dyn RowEngines> {
        Some(self)
    }

    fn select(&mut self, slot: usize) {
        self.selected = slot;
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        self.draft_text.is_some().then_some(self)
    }

    fn max_tokens(&self) -> usize {
        // as few as are allowed, so that what waits longer runs in pieces
        16
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.pass = tokens.iter().copied().map(Hidden::of).collect();
        (self.start, self.depth) = (start, 0);
        Ok(())
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.depth = self.layers[engine].start;
        self.start = positions.start;
        self.pass = self.slots[self.selected].saved[positions].to_vec();
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        for layer in self.layers[engine].clone() {
            assert_eq!(layer, self.depth, "engines run in order");
            let mut caches = self.slots[self.selected].caches.lock().unwrap();
            for (offset, hidden) in self.pass.iter_mut().enumerate() {
                hidden.run(layer, self.start + offset, &mut caches);
            }
            drop(caches);
            self.depth += 1;
            self.stability[layer] = self.newest().signal(self.depth, 0);
        }
        Ok(())
    }

    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let rows = &self.pass[self.pass.len() - tokens..];
        let row = |&hidden| self.poisoned(hidden, self.depth);
        Ok(rows.iter().map(row).collect())
    }

    fn risk(&self, _: usize) -> Option<f32> {
        Some(self.newest().signal(self.depth, 1))
    }

    fn exit_signals(&mut self, depth: usize, _: [f32; 3]) -> Result<Option<ExitSignals>> {
        Ok(Some(self.newest().exit_signals(depth)))
    }

    fn stability(&mut self, engine: usize) -> Result<Vec<f32>> {
        Ok(self.stability[self.layers[engine].clone()].to_vec())
    }

    fn save(&mut self, positions: Range<usize>) -> Result<()> {
        let count = positions.len();
        let saved = &mut self.slots[self.selected].saved;
        saved[positions].copy_from_slice(&self.pass[self.pass.len() - count..]);
        Ok(())
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        let slot = &self.slots[self.selected];
        let mut caches = slot.caches.lock().unwrap();
        for position in positions {
            slot.saved[position].fill(layer, position, &mut caches);
        }
        Ok(())
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        let rows = &self.pass[self.pass.len() - tokens..];
        self.logits = rows.iter().flat_map(|&row| self.logits_of(row)).collect();
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn take_timings(&mut self) -> Vec<EngineTiming> {
        Vec::new()
    }
}

/// A backend on a machine where each further token of a pass adds `per_token` of the first's time:
/// drafts must not depend on this machine.
struct Timed<B> {
    inner: B,
    costs: Costs,
    capabilities: Capabilities,
}

impl<B: Backend> Timed<B> {
    fn new(inner: B, per_token: f64) -> Self {
        let mut costs = Costs::default();
        for tokens in 1..=16 {
            let elapsed = Duration::from_secs_f64(1.0 + per_token * (tokens - 1) as f64);
            for _ in 0..2 {
                costs.note_layers(1, tokens, elapsed);
            }
        }
        Self {
            capabilities: inner.capabilities().clone(),
            inner,
            costs,
        }
    }
}

impl<B: Backend> Backend for Timed<B> {
    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn usual_slots(&self) -> Result<usize> {
        self.inner.usual_slots()
    }

    fn reserve(&mut self, sequences: usize) -> Result<()> {
        self.inner.reserve(sequences)?;
        self.capabilities.sequences = self.inner.capabilities().sequences;
        self.capabilities.shares_passes = self.inner.capabilities().shares_passes;
        Ok(())
    }

    fn copy(&mut self, from: &Sequence, length: usize, to: &mut Sequence) -> Result<bool> {
        self.inner.copy(from, length, to)
    }

    fn open(&mut self, kv_fill: KvFill) -> Result<Sequence> {
        self.inner.open(kv_fill)
    }

    fn step(
        &mut self,
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        self.inner.step(steps, interrupt)
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        self.inner.draft_engine()
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }
}

/// What decides about exits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Decides {
    /// The host, between engines.
    Host,
    /// The device, by the rule's table.
    Device,
    /// The kernel, likewise, in passes of a few rows; by stability and risk only.
    Kernel,
    /// The kernel, which does not go on by itself.
    KernelByToken,
}

impl Decides {
    pub(crate) const ALL: [Self; 4] = [Self::Host, Self::Device, Self::Kernel, Self::KernelByToken];
}

/// A chain over the toy, and the toy's cache of the first sequence.
pub(crate) fn chain(
    decides: Decides,
    engine_sizes: &[usize],
    agreement: u64,
    per_token: f64,
) -> (Chain, Caches) {
    let caches = Caches::default();
    let exits = ends(engine_sizes);
    let backend: Box<dyn Backend> = match decides {
        Decides::Host => {
            let toy = Toy::new(engine_sizes, agreement, &caches);
            let inner = HostDecided::new(toy, &exits, CAPACITY);
            Box::new(Timed::new(inner, per_token))
        }
        Decides::Device => {
            let inner = ToyDevice::new(engine_sizes, agreement, &caches);
            Box::new(Timed::new(inner, per_token))
        }
        Decides::Kernel | Decides::KernelByToken => {
            let kernel = ToyKernel::new(engine_sizes, agreement, 1, &caches);
            let layers = *exits.last().unwrap();
            let inner = CudaChain::new(kernel, layers, &exits, CAPACITY, 1);
            let mut timed = Timed::new(inner, per_token);
            if decides == Decides::KernelByToken {
                timed.capabilities.ahead = 1;
            }
            Box::new(timed)
        }
    };
    (Chain::new(backend, exits, CAPACITY, VOCABULARY), caches)
}

/// A chain over `kernel`, whose engines end after the depths `exits`.
pub(crate) fn chain_over_kernel(kernel: ToyKernel, exits: &[usize], per_token: f64) -> Chain {
    let layers = *exits.last().unwrap();
    let backend = Timed::new(
        CudaChain::new(kernel, layers, exits, CAPACITY, 1),
        per_token,
    );
    Chain::new(Box::new(backend), exits.to_vec(), CAPACITY, VOCABULARY)
}

/// A chain over `toy`.
pub(crate) fn chain_over(toy: Toy, exits: &[usize], per_token: f64) -> Chain {
    let backend = Timed::new(HostDecided::new(toy, exits, CAPACITY), per_token);
    Chain::new(Box::new(backend), exits.to_vec(), CAPACITY, VOCABULARY)
}
