//! ONNX Runtime on the CPU: one session an engine, caches updated in place, one thread pool.

mod drafter;
mod exits;
mod graph_executor;
mod huge_pages;
mod pass;
mod runtime;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ort::environment::Environment;
use ort::session::{IoBinding, Session};
use ort::value::Tensor;

use self::drafter::Drafter;
pub use self::exits::Exits;
pub use self::graph_executor::{GraphDevice, GraphExecutor};
use self::pass::{Contexts, Pass, Passes, Shared};
use self::runtime::{
    bind_input, bind_output, binding, environment, read, run, session, tensor, write,
};
use super::{
    AttentionOnly, Capabilities, DraftEngine, EnginePart, EngineTiming, Engines, Stopwatch,
};
use crate::bundle::{Bundle, DrafterEntry, ExitEntry, LayerEntry};
use crate::error::Result;
use crate::policy::ExitSignals;

/// Buffers of passes up to this length are reused; longer passes are rare and large.
const MAX_REUSED_TOKENS: usize = 16;

/// Which of a bundle's layer engines to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The bundle's own engines.
    Engines,
    /// All layers in one engine: what the chain is compared with.
    Monolith,
}

/// The engines of one bundle and the caches of one sequence.
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
    key_value: Vec<KeyValueEngine>,
    head: Session,
    vocab_size: usize,
    /// The head's buffers by the number of tokens.
    head_passes: HashMap<usize, HeadPass>,
    /// Tokens whose logits were computed last.
    logit_rows: usize,
    shared: Shared,
    passes: Passes,
    /// The saved hidden states that caches are filled from, by the number of their positions.
    fillings: HashMap<usize, Filling>,
    /// Hidden states by position, `hidden_size` numbers each.
    saved: Vec<f32>,
    stopwatch: Stopwatch,
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

/// What the head engine reads and writes for one number of tokens.
struct HeadPass {
    binding: IoBinding,
    input: Tensor<f32>,
    logits: Tensor<f32>,
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
        let (entries, attention_entries, exits) = match layout {
            Layout::Engines => {
                let engines = &manifest.engines;
                (
                    engines.layers.clone(),
                    engines.attention.clone(),
                    &engines.exits[..],
                )
            }
            Layout::Monolith => (vec![manifest.engines.monolith.clone()], Vec::new(), &[][..]),
        };
        let engines = &manifest.engines;
        let parts = [&engines.embed, &engines.head].into_iter();
        let parts = parts.chain(&engines.contexts);
        let parts = parts.chain(entries.iter().map(|entry| &entry.file));
        let parts = parts.chain(engines.key_value.iter().map(|entry| &entry.file));
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
            .map(|entry| open(&entry.file))
            .collect::<Result<Vec<_>>>()?;
        let key_value = manifest
            .engines
            .key_value
            .iter()
            .map(|entry| {
                Ok(KeyValueEngine {
                    session: open(&entry.file)?,
                    contexts: entry.contexts.clone(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let head = open(&manifest.engines.head)?;
        let drafter = match layout {
            Layout::Engines => Drafter::load(bundle, open)?,
            Layout::Monolith => None,
        };
        let mut shared = Shared::new(manifest)?;
        let ends = (&embed, contexts.as_ref());
        let decode = Pass::new(1, &mut shared, ends, &layers, &entries)?;
        Ok(Self {
            vocab_size: manifest.model.vocab_size,
            saved: vec![0.0; manifest.max_cache_length * shared.hidden_size],
            passes: Passes::new(decode),
            head_passes: HashMap::new(),
            logit_rows: 1,
            fillings: HashMap::new(),
            stopwatch: Stopwatch::default(),
            exits: Exits::load(exits, shared.hidden_size, open)?,
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
            key_value,
            head,
            shared,
        })
    }

    fn new_pass(&mut self, tokens: usize) -> Result<Pass> {
        Pass::new(
            tokens,
            &mut self.shared,
            (&self.embed, self.contexts.as_ref()),
            &self.layers,
            &self.entries,
        )
    }

    /// Load the attention engines, once.
    fn load_attention(&mut self) -> Result<()> {
        if self.attention.len() == self.attention_entries.len() {
            return Ok(());
        }
        let files = self.attention_entries.iter().map(|entry| &*entry.file);
        self.bundle.check_more_memory(files)?;
        for entry in &self.attention_entries {
            let session = session(&self.environment, &self.bundle, &entry.file)?;
            self.attention.push(session);
        }
        Ok(())
    }

    /// Make the filling of `positions` ready.
    ///
    /// Consecutive layers mostly lack the same positions, so it is made once for all of them.
    fn prepare_filling(&mut self, positions: &Range<usize>) -> Result<()> {
        let count = positions.len();
        if !self.fillings.contains_key(&count) {
            if count > MAX_REUSED_TOKENS {
                self.fillings.retain(|&count, _| count <= MAX_REUSED_TOKENS);
            }
            let filling = Filling {
                positions: 0..0,
                hidden: tensor(&[1, count, self.shared.hidden_size])?,
                contexts: Contexts::new(count, &self.shared, self.contexts.as_ref())?,
            };
            self.fillings.insert(count, filling);
        }
        let filling = self.fillings.get_mut(&count).expect("inserted above");
        if filling.positions != *positions {
            let session = self.contexts.as_mut();
            filling
                .contexts
                .run(session, positions.start, &mut self.stopwatch)?;
            let size = self.shared.hidden_size;
            let rows = &self.saved[positions.start * size..positions.end * size];
            write(&mut filling.hidden, rows);
            filling.positions = positions.clone();
        }
        write(&mut self.shared.write_index, &[positions.start as i64]);
        Ok(())
    }

    /// Make a pass of `tokens` positions from `start` on the current one.
    fn begin(&mut self, tokens: usize, start: usize) -> Result<()> {
        if !self.passes.has(tokens) {
            let pass = self.new_pass(tokens)?;
            self.passes.insert(pass);
        }
        self.shared.set_length(start + tokens);
        self.start = start;
        // exit hidden states at these positions are about to change
        for filling in self.fillings.values_mut() {
            if filling.positions.end > start {
                filling.positions = 0..0;
            }
        }
        let pass = self.passes.begin(tokens);
        let session = self.contexts.as_mut();
        pass.contexts.run(session, start, &mut self.stopwatch)
    }
}

impl Engines for OnnxRuntime {
    fn layers(&self) -> Vec<Range<usize>> {
        self.entries.iter().map(LayerEntry::range).collect()
    }

    fn capabilities(&self) -> Capabilities {
        let probes = self.entries.iter().filter(|entry| entry.risk);
        Capabilities {
            probes: probes.map(LayerEntry::end).collect(),
            exit_heads: self.exits.depths(),
            attention_only: !self.attention_entries.is_empty(),
            trained_drafter: self.drafter.is_some(),
            ..Capabilities::default()
        }
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.begin(tokens.len(), start)?;
        let pass = self.passes.current_mut();
        self.stopwatch.time(EnginePart::Embed, tokens.len(), || {
            pass.embed(&mut self.embed, tokens)
        })
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.begin(positions.len(), positions.start)?;
        let size = self.shared.hidden_size;
        let rows = &self.saved[positions.start * size..positions.end * size];
        self.passes.resume(engine, rows);
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        let pass = self.passes.current();
        let entry = &self.entries[engine];
        let part = EnginePart::Layers(entry.range());
        self.stopwatch.time(part, pass.contexts.tokens(), || {
            run(&mut self.layers[engine], &pass.layers[engine], || {
                format!("layer engine {}", entry.file.display())
            })
        })?;
        self.passes.engines_run = engine + 1;
        if let Some(drafter) = &mut self.drafter {
            let rows = read(self.passes.current().hidden(engine + 1));
            drafter.note(entry.end(), self.start, rows);
        }
        Ok(())
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        self.drafter
            .as_mut()
            .map(|drafter| drafter as &mut dyn DraftEngine)
    }

    fn attention_only(&mut self) -> Option<&mut dyn AttentionOnly> {
        (!self.attention_entries.is_empty()).then_some(self)
    }

    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let rows = self.passes.newest(tokens, self.shared.hidden_size);
        Ok(rows.to_vec())
    }

    fn risk(&self, engine: usize) -> Option<f32> {
        let risk = self.passes.current().risk[engine].as_ref()?;
        read(risk).last().copied()
    }

    fn exit_signals(&mut self, depth: usize, stability: [f32; 3]) -> Result<Option<ExitSignals>> {
        let row = self.passes.newest(1, self.shared.hidden_size);
        self.stopwatch.time(EnginePart::ExitHead(depth), 1, || {
            self.exits.signals(depth, row, stability)
        })
    }

    fn stability(&mut self, engine: usize) -> Result<Vec<f32>> {
        let rows = read(&self.passes.current().stability[engine]);
        Ok(rows[rows.len() - self.entries[engine].num_layers..].to_vec())
    }

    fn save(&mut self, positions: Range<usize>) -> Result<()> {
        let size = self.shared.hidden_size;
        let rows = self.passes.newest(positions.len(), size);
        self.saved[positions.start * size..positions.end * size].copy_from_slice(rows);
        Ok(())
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        self.prepare_filling(&positions)?;
        let filling = &self.fillings[&positions.len()];
        let engine = &mut self.key_value[layer];
        let mut bound = binding(&engine.session)?;
        bind_input(&mut bound, "x", &filling.hidden)?;
        filling.contexts.bind(&mut bound, &engine.contexts)?;
        bind_input(&mut bound, "write_index", &self.shared.write_index)?;
        self.shared.bind_cache(&mut bound, layer, 0)?;
        let part = EnginePart::KeyValue(layer);
        self.stopwatch.time(part, positions.len(), || {
            run(&mut engine.session, &bound, || {
                format!("kv engine of layer {layer}")
            })
        })
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        let sizes = (self.shared.hidden_size, self.vocab_size);
        let pass = match self.head_passes.entry(tokens) {
            Entry::Occupied(ready) => ready.into_mut(),
            Entry::Vacant(empty) => empty.insert(HeadPass::new(&self.head, tokens, sizes)?),
        };
        let rows = self.passes.newest(tokens, sizes.0);
        let depth = self.entries[self.passes.engines_run - 1].end();
        // lenses are for exits, which are of one token
        let seen = match tokens {
            1 if self.exits.has_lens(depth) => {
                self.stopwatch.time(EnginePart::Lens(depth), 1, || {
                    self.exits.through_lens(depth, rows)
                })?
            }
            _ => None,
        };
        write(&mut pass.input, seen.unwrap_or(rows));
        self.logit_rows = tokens;
        self.stopwatch.time(EnginePart::Head, tokens, || {
            run(&mut self.head, &pass.binding, || "head engine".into())
        })
    }

    fn logits(&self) -> &[f32] {
        self.head_passes
            .get(&self.logit_rows)
            .map_or(&[], |pass| read(&pass.logits))
    }

    fn take_timings(&mut self) -> Vec<EngineTiming> {
        self.stopwatch.take()
    }
}

impl AttentionOnly for OnnxRuntime {
    fn run_attention(&mut self, engine: usize) -> Result<()> {
        self.load_attention()?;
        let pass = self.passes.current_mut();
        pass.bind_attention(&self.attention, &self.attention_entries, &mut self.shared)?;
        let entry = &self.attention_entries[engine];
        let part = EnginePart::Attention(entry.range());
        self.stopwatch.time(part, pass.contexts.tokens(), || {
            run(&mut self.attention[engine], &pass.attention[engine], || {
                format!("attention engine {}", entry.file.display())
            })
        })?;
        self.passes.engines_run = engine + 1;
        Ok(())
    }
}

impl HeadPass {
    fn new(
        session: &Session,
        tokens: usize,
        (hidden_size, vocab_size): (usize, usize),
    ) -> Result<Self> {
        let input = tensor(&[1, tokens, hidden_size])?;
        let mut logits = tensor(&[1, tokens, vocab_size])?;
        let mut bound = binding(session)?;
        bind_input(&mut bound, "x", &input)?;
        bind_output(&mut bound, "logits", &mut logits)?;
        Ok(Self {
            binding: bound,
            input,
            logits,
        })
    }
}
