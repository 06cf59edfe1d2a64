//! ONNX Runtime on the CPU: one session an engine, caches updated in place, one thread pool.

mod attention;
mod cache_memory;
mod drafter;
mod edited_graph;
mod exits;
mod graph_executor;
#[cfg(target_arch = "x86_64")]
mod half_matmul;
mod head;
mod host_memory;
mod huge_pages;
mod operator;
mod own_operators;
mod pass;
#[cfg(target_arch = "x86_64")]
mod quantized_matmul;
mod row_attention;
#[cfg(target_arch = "x86_64")]
mod row_products;
mod rows;
mod runtime;
mod stability_output;
#[cfg(target_arch = "x86_64")]
mod stored_values;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ort::environment::Environment;
use ort::session::Session;
use ort::value::Tensor;

use self::cache_memory::CacheMemory;
use self::drafter::Drafter;
pub use self::exits::Exits;
pub use self::graph_executor::{GraphDevice, GraphExecutor};
use self::head::Head;
pub use self::own_operators::with_own_operators;
use self::pass::{Contexts, Pass, Passes, Shared};
use self::rows::Rows;
use self::runtime::{
    bind_input, binding, environment, layer_session, read, run, session, tensor, write,
};
use super::{
    AttentionOnly, Capabilities, DraftEngine, EnginePart, EngineTiming, Engines, RowEngines,
    Stopwatch,
};
use crate::bundle::{Bundle, DrafterEntry, ExitEntry, LayerEntry};
use crate::error::Result;
use crate::policy::ExitSignals;

/// Buffers of passes up to this length are reused; longer passes are rare and large.
const MAX_REUSED_TOKENS: usize = 16;
/// The same of passes over rows of several sequences.
const MAX_REUSED_ROWS: usize = 64;

/// Which of a bundle's layer engines to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The bundle's own engines.
    Engines,
    /// All layers in one engine: what the chain is compared with.
    Monolith,
}

/// The engines of one bundle, and cache slots.
pub struct OnnxRuntime {
    entries: Vec<LayerEntry>,
    embed: Session,
    contexts: Option<Session>,
    layers: Vec<Session>,
    /// Loaded when the first soft exit wants them.
    attention: Vec<Session>,
    attention_entries: Vec<LayerEntry>,
    bundle: Bundle,
    environment: Environment,
    exits: Exits,
    drafter: Option<Drafter>,
    /// The current pass's first position.
    start: usize,
    /// Loaded when the first layer's cache has to be filled without running it.
    key_value: Vec<KeyValueEngine>,
    head: Head,
    hidden_size: usize,
    caches: CacheMemory,
    slots: Vec<Slot>,
    /// The slot that calls are about.
    selected: usize,
    /// Passes of several slots, where the layers' graphs can have them.
    rows: Option<Rows>,
    verifies_exactly: bool,
    stopwatch: Stopwatch,
}

/// What belongs to the sequence in one cache slot.
struct Slot {
    shared: Shared,
    passes: Passes,
    /// The saved hidden states that caches are filled from, by the number of their positions.
    fillings: HashMap<usize, Filling>,
    /// Hidden states by position, `hidden_size` numbers each.
    saved: Vec<f32>,
}

/// Exit hidden states and contexts of consecutive positions, as kv engines read them.
struct Filling {
    positions: Range<usize>,
    hidden: Tensor<f32>,
    contexts: Contexts,
}

struct KeyValueEngine {
    session: Session,
    contexts: Vec<String>,
}

impl OnnxRuntime {
    /// Load the engines of `bundle` in `layout` with the ONNX Runtime library at `library`.
    ///
    /// # Errors
    /// [`Error::Library`](crate::Error::Library) when ONNX Runtime cannot be loaded,
    /// [`Error::Setting`](crate::Error::Setting) when the process already runs it with another
    /// number of `threads`, [`Error::Engine`](crate::Error::Engine) when an engine fails to load.
    pub fn load(bundle: &Bundle, layout: Layout, library: &Path, threads: usize) -> Result<Self> {
        let environment = environment(library, threads)?;
        let manifest = &bundle.manifest;
        let engines = &manifest.engines;
        let (entries, attention_entries, exits) = match layout {
            Layout::Engines => (
                engines.layers.clone(),
                engines.attention.clone(),
                &engines.exits[..],
            ),
            Layout::Monolith => (vec![engines.monolith.clone()], Vec::new(), &[][..]),
        };
        let parts = [&engines.embed, &engines.head].into_iter();
        let parts = parts.chain(&engines.contexts);
        let parts = parts.chain(entries.iter().map(|entry| &entry.file));
        let parts = parts.chain(exits.iter().flat_map(ExitEntry::files));
        let drafters = manifest
            .drafter
            .iter()
            .filter(|_| layout == Layout::Engines);
        let parts = parts.chain(drafters.flat_map(DrafterEntry::files));
        bundle.check_memory(parts.map(PathBuf::as_path))?;
        let open = |file: &Path| session(&environment, bundle, file);
        let embed = open(&engines.embed)?;
        let contexts = engines.contexts.as_deref().map(open).transpose()?;
        let layers = entries
            .iter()
            .map(|entry| layer_session(&environment, bundle, entry))
            .collect::<Result<Vec<_>>>()?;
        let sizes = (manifest.model.hidden_size, manifest.model.vocab_size);
        let head = Head::new(open(&manifest.engines.head)?, sizes.0, sizes.1)?;
        let drafter = match layout {
            Layout::Engines => Drafter::load(bundle, open)?,
            Layout::Monolith => None,
        };
        let mut engines = Self {
            hidden_size: manifest.model.hidden_size,
            caches: CacheMemory::new(manifest, 1)?,
            slots: Vec::new(),
            selected: 0,
            rows: None,
            verifies_exactly: true,
            stopwatch: Stopwatch::default(),
            exits: Exits::load(exits, manifest.model.hidden_size, open)?,
            drafter,
            start: 0,
            attention: Vec::new(),
            attention_entries,
            bundle: bundle.clone(),
            environment,
            entries,
            embed,
            contexts,
            layers,
            key_value: Vec::new(),
            head,
        };
        engines.slots.push(engines.new_slot(0)?);
        let has_two_rows = manifest.max_cache_length > 1;
        // some CPUs multiply one row of numbers and several by kernels that round differently
        if manifest.precision.is_quantized() && has_two_rows {
            engines.verifies_exactly = engines.first_row(1)? == engines.first_row(2)?;
        }
        Ok(engines)
    }

    /// What all layers make of the first of `tokens` equal tokens.
    fn first_row(&mut self, tokens: usize) -> Result<Vec<f32>> {
        self.embed(&vec![0; tokens], 0)?;
        for engine in 0..self.layers.len() {
            self.run(engine)?;
        }
        self.take_timings();
        let hidden = self.slots[0].passes.newest(tokens, self.hidden_size);
        Ok(hidden[..self.hidden_size].to_vec())
    }

    /// A slot that has run nothing.
    fn new_slot(&self, index: usize) -> Result<Slot> {
        let manifest = &self.bundle.manifest;
        let shared = Shared::new(manifest, index..index + 1)?;
        Ok(Slot {
            saved: vec![0.0; manifest.max_cache_length * shared.hidden_size],
            passes: Passes::new(self.new_pass(1, &shared)?, MAX_REUSED_TOKENS),
            fillings: HashMap::new(),
            shared,
        })
    }

    fn new_pass(&self, tokens: usize, shared: &Shared) -> Result<Pass> {
        // kv engines alone may take any, where attention has its tables
        let mut entries = self.entries.iter().chain(&self.attention_entries);
        let takes_contexts = entries.any(|entry| !entry.contexts.is_empty());
        let contexts = self.contexts.as_ref().filter(|_| takes_contexts);
        Pass::new(
            tokens,
            (shared, &self.caches),
            (&self.embed, contexts),
            &self.layers,
            &self.entries,
        )
    }

    /// Load the kv engines, once.
    fn load_key_value(&mut self) -> Result<()> {
        let entries = &self.bundle.manifest.engines.key_value;
        if self.key_value.len() == entries.len() {
            return Ok(());
        }
        let files = entries.iter().map(|entry| &*entry.file);
        self.bundle.check_more_memory(files)?;
        self.key_value = entries
            .iter()
            .map(|entry| {
                Ok(KeyValueEngine {
                    session: session(&self.environment, &self.bundle, &entry.file)?,
                    contexts: entry.contexts.clone(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(())
    }

    /// Make the filling of `positions` ready.
    ///
    /// Consecutive layers mostly lack the same positions, so it is made once for all of them.
    fn prepare_filling(&mut self, positions: &Range<usize>) -> Result<()> {
        let slot = &mut self.slots[self.selected];
        let count = positions.len();
        if !slot.fillings.contains_key(&count) {
            if count > MAX_REUSED_TOKENS {
                slot.fillings.retain(|&count, _| count <= MAX_REUSED_TOKENS);
            }
            let filling = Filling {
                positions: 0..0,
                hidden: tensor(&[1, count, self.hidden_size])?,
                contexts: Contexts::new(count, &slot.shared, self.contexts.as_ref())?,
            };
            slot.fillings.insert(count, filling);
        }
        let filling = slot.fillings.get_mut(&count).expect("inserted above");
        if filling.positions != *positions {
            let session = self.contexts.as_mut();
            filling
                .contexts
                .run(session, positions.clone(), &mut self.stopwatch)?;
            let size = self.hidden_size;
            let rows = &slot.saved[positions.start * size..positions.end * size];
            write(&mut filling.hidden, rows);
            filling.positions = positions.clone();
        }
        write(&mut slot.shared.write_index, &[positions.start as i64]);
        Ok(())
    }

    /// Compute the logits of `rows` of the residual stream.
    fn run_head(&mut self, rows: &[f32]) -> Result<()> {
        let tokens = rows.len() / self.hidden_size;
        let head = &mut self.head;
        self.stopwatch
            .time(EnginePart::Head, tokens, || head.run(rows))
    }

    /// Make a pass of `tokens` positions from `start` on the current one.
    fn begin(&mut self, tokens: usize, start: usize) -> Result<()> {
        if !self.slots[self.selected].passes.has(tokens) {
            let pass = self.new_pass(tokens, &self.slots[self.selected].shared)?;
            self.slots[self.selected].passes.insert(pass);
        }
        self.start = start;
        let slot = &mut self.slots[self.selected];
        let positions = start..start + tokens;
        slot.note_run(positions.clone());
        let pass = slot.passes.begin(tokens);
        let session = self.contexts.as_mut();
        pass.contexts.run(session, positions, &mut self.stopwatch)
    }
}

impl Slot {
    /// `positions` are about to run.
    fn note_run(&mut self, positions: Range<usize>) {
        // exit hidden states at these positions are about to change
        for filling in self.fillings.values_mut() {
            if filling.positions.end > positions.start {
                filling.positions = 0..0;
            }
        }
    }
}

impl Engines for OnnxRuntime {
    fn layers(&self) -> Vec<Range<usize>> {
        self.entries.iter().map(LayerEntry::range).collect()
    }

    fn capabilities(&self) -> Capabilities {
        let probes = self.entries.iter().filter(|entry| entry.risk);
        Capabilities {
            sequences: self.slots.len(),
            shares_passes: self.rows.is_some(),
            shares_drafts: self.rows.is_some(),
            probes: probes.map(LayerEntry::end).collect(),
            exit_heads: self.exits.depths(),
            attention_only: !self.attention_entries.is_empty(),
            trained_drafter: self.drafter.is_some(),
            verifies_exactly: self.verifies_exactly,
            ..Capabilities::default()
        }
    }

    fn reserve(&mut self, sequences: usize) -> Result<usize> {
        let more = sequences.saturating_sub(self.slots.len());
        self.bundle.check_slots_memory(more)?;
        if let Some(drafter) = &mut self.drafter {
            drafter.reserve_slots(sequences)?;
        }
        let mut caches = CacheMemory::new(&self.bundle.manifest, sequences)?;
        caches.copy_from(&self.caches);
        self.caches = caches;
        // where a row has other bits alone than beside others, texts take turns, so that each comes out
        // as it would alone
        if self.verifies_exactly {
            self.rows = self.new_rows(sequences)?;
        }
        for index in 0..sequences {
            let mut slot = self.new_slot(index)?;
            if let Some(before) = self.slots.get_mut(index) {
                // what its sequence has beside the caches; its passes are bound to the old ones
                slot.saved = std::mem::take(&mut before.saved);
                *before = slot;
            } else {
                self.slots.push(slot);
            }
        }
        Ok(sequences)
    }

    fn copy(&mut self, from: usize, length: usize, to: usize) -> bool {
        self.caches.copy(from, length, to);
        self.slots[to].note_run(0..length);
        if let Some(drafter) = &mut self.drafter {
            drafter.copy(from, length, to);
        }
        true
    }

    fn rows(&mut self) -> Option<&mut dyn RowEngines> {
        self.rows.is_some().then_some(self)
    }

    fn select(&mut self, slot: usize) {
        self.selected = slot;
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.begin(tokens.len(), start)?;
        let pass = self.slots[self.selected].passes.current_mut();
        self.stopwatch.time(EnginePart::Embed, tokens.len(), || {
            pass.embed(&mut self.embed, tokens)
        })
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.begin(positions.len(), positions.start)?;
        let (slot, size) = (&mut self.slots[self.selected], self.hidden_size);
        let rows = &slot.saved[positions.start * size..positions.end * size];
        slot.passes.resume(engine, rows);
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        let (session, entry) = (&mut self.layers[engine], &self.entries[engine]);
        let passes = &mut self.slots[self.selected].passes;
        passes.run(engine, session, entry, &mut self.stopwatch)?;
        if let Some(drafter) = &mut self.drafter {
            let rows = read(passes.current().hidden(engine + 1));
            drafter.note(entry.end(), self.selected, self.start, rows);
        }
        Ok(())
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        let drafter = self.drafter.as_mut()?;
        Some(drafter)
    }

    fn attention_only(&mut self) -> Option<&mut dyn AttentionOnly> {
        (!self.attention_entries.is_empty()).then_some(self)
    }

    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let passes = &self.slots[self.selected].passes;
        Ok(passes.newest(tokens, self.hidden_size).to_vec())
    }

    fn risk(&self, engine: usize) -> Option<f32> {
        let pass = self.slots[self.selected].passes.current();
        let risk = pass.risk[engine].as_ref()?;
        read(risk).last().copied()
    }

    fn exit_signals(&mut self, depth: usize, stability: [f32; 3]) -> Result<Option<ExitSignals>> {
        let passes = &self.slots[self.selected].passes;
        let row = passes.newest(1, self.hidden_size);
        self.stopwatch.time(EnginePart::ExitHead(depth), 1, || {
            self.exits.signals(depth, row, stability)
        })
    }

    fn stability(&mut self, engine: usize) -> Result<Vec<f32>> {
        let pass = self.slots[self.selected].passes.current();
        Ok(pass.stability(engine, pass.contexts.tokens() - 1))
    }

    fn save(&mut self, positions: Range<usize>) -> Result<()> {
        let (slot, size) = (&mut self.slots[self.selected], self.hidden_size);
        let rows = slot.passes.newest(positions.len(), size);
        slot.saved[positions.start * size..positions.end * size].copy_from_slice(rows);
        Ok(())
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        self.load_key_value()?;
        self.prepare_filling(&positions)?;
        let slot = &self.slots[self.selected];
        let filling = &slot.fillings[&positions.len()];
        let engine = &mut self.key_value[layer];
        let mut bound = binding(&engine.session)?;
        bind_input(&mut bound, "x", &filling.hidden)?;
        filling.contexts.bind(&mut bound, &engine.contexts)?;
        bind_input(&mut bound, "write_index", &slot.shared.write_index)?;
        // SAFETY: the binding is run here, and the caches live.
        unsafe {
            let slots = slot.shared.slots.clone();
            self.caches
                .bind(&mut bound, &engine.session, (layer, 0), slots)?;
        }
        let part = EnginePart::KeyValue(layer);
        self.stopwatch.time(part, positions.len(), || {
            run(&mut engine.session, &bound, || {
                format!("kv engine of layer {layer}")
            })
        })
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        let passes = &self.slots[self.selected].passes;
        let rows = passes.newest(tokens, self.hidden_size);
        let depth = self.entries[passes.engines_run - 1].end();
        // lenses are for exits, which are of one token
        let seen = match tokens {
            1 if self.exits.has_lens(depth) => {
                self.stopwatch.time(EnginePart::Lens(depth), 1, || {
                    self.exits.through_lens(depth, rows)
                })?
            }
            _ => None,
        };
        let rows = seen.unwrap_or(rows).to_vec();
        self.run_head(&rows)
    }

    fn logits(&self) -> &[f32] {
        self.head.logits()
    }

    fn take_timings(&mut self) -> Vec<EngineTiming> {
        self.stopwatch.take()
    }
}
