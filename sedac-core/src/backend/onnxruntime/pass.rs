//! Buffers that engines read and write, bound once and reused.

use std::collections::HashMap;
use std::ops::Range;

use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, Tensor, TensorElementType};

use super::cache_memory::CacheMemory;
use super::row_attention::{POSITIONS, SLOTS};
use super::runtime::{bind_input, bind_output, binding, dyn_tensor, read, run, tensor, write};
use crate::backend::{EnginePart, Stopwatch, stability};
use crate::bundle::{ContextTensor, LayerEntry, Manifest};
use crate::error::{Error, Result};

/// Tensors that all passes over the same slots use.
pub(super) struct Shared {
    pub(super) hidden_size: usize,
    pub(super) write_index: Tensor<i64>,
    contexts: Vec<ContextTensor>,
    /// Whose caches engines see.
    pub(super) slots: Range<usize>,
}

impl Shared {
    pub(super) fn new(manifest: &Manifest, slots: Range<usize>) -> Result<Self> {
        Ok(Self {
            hidden_size: manifest.model.hidden_size,
            write_index: tensor(&[1])?,
            contexts: manifest.contexts.clone(),
            slots,
        })
    }
}

/// Positions and what layers take of them, for one number of tokens.
pub(super) struct Contexts {
    tokens: usize,
    position_ids: Tensor<i64>,
    /// Of each token, among those that engines see.
    slots: Tensor<i64>,
    tensors: HashMap<String, DynTensor>,
    /// None where layers take nothing of positions.
    bound: Option<IoBinding>,
}

impl Contexts {
    pub(super) fn new(tokens: usize, shared: &Shared, session: Option<&Session>) -> Result<Self> {
        let tensors = shared
            .contexts
            .iter()
            .map(|context| Ok((context.name.clone(), context_tensor(context, tokens)?)))
            .collect::<Result<_>>()?;
        let mut contexts = Self {
            tokens,
            position_ids: tensor(&[1, tokens])?,
            slots: tensor(&[tokens])?,
            tensors,
            bound: session.map(binding).transpose()?,
        };
        if let Some(bound) = &mut contexts.bound {
            bind_input(bound, "position_ids", &contexts.position_ids)?;
            for (name, context) in &mut contexts.tensors {
                bind_output(bound, name, context)?;
            }
        }
        Ok(contexts)
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Have each token belong to the sequence in one of `slots`, among those that engines see: to that
    /// in the first until then.
    pub(super) fn set_slots(&mut self, slots: &[i64]) {
        write(&mut self.slots, slots);
    }

    /// Take `positions`, one for each token; `session` is the one bound before.
    pub(super) fn run(
        &mut self,
        session: Option<&mut Session>,
        positions: impl Iterator<Item = usize>,
        stopwatch: &mut Stopwatch,
    ) -> Result<()> {
        let positions: Vec<i64> = positions.map(|position| position as i64).collect();
        write(&mut self.position_ids, &positions);
        let Some((session, bound)) = session.zip(self.bound.as_ref()) else {
            return Ok(());
        };
        stopwatch.time(EnginePart::Contexts, self.tokens, || {
            run(session, bound, || "contexts engine".into())
        })
    }

    /// Bind the named context tensors as inputs.
    pub(super) fn bind<'a>(
        &self,
        bound: &mut IoBinding,
        names: impl IntoIterator<Item = &'a String>,
    ) -> Result<()> {
        for name in names {
            bind_input(bound, name, &self.tensors[name])?;
        }
        Ok(())
    }
}

/// Buffers and bindings that take one number of tokens through all layers.
pub(super) struct Pass {
    pub(super) contexts: Contexts,
    embed: IoBinding,
    input_ids: Tensor<i64>,
    /// The residual stream, [1, tokens, hidden_size]. Engines take turns reading one and writing
    /// the other; embed writes the first.
    hidden: [Tensor<f32>; 2],
    /// [1, tokens, layers of the engine] by engine, of those with several.
    stability: Vec<Option<Tensor<f32>>>,
    /// [1, tokens, 1] by engine, of those with a probe.
    pub(super) risk: Vec<Option<Tensor<f32>>>,
    layers: Vec<IoBinding>,
    /// The attention engines' bindings; none until one runs.
    pub(super) attention: Vec<IoBinding>,
}

impl Pass {
    pub(super) fn new(
        tokens: usize,
        (shared, caches): (&Shared, &CacheMemory),
        (embed, contexts): (&Session, Option<&Session>),
        layers: &[Session],
        entries: &[LayerEntry],
    ) -> Result<Self> {
        let hidden = || tensor(&[1, tokens, shared.hidden_size]);
        let mut pass = Self {
            hidden: [hidden()?, hidden()?],
            contexts: Contexts::new(tokens, shared, contexts)?,
            embed: binding(embed)?,
            input_ids: tensor(&[1, tokens])?,
            stability: entries
                .iter()
                .map(|entry| match entry.num_layers {
                    1 => Ok(None),
                    layers => tensor(&[1, tokens, layers]).map(Some),
                })
                .collect::<Result<_>>()?,
            risk: entries
                .iter()
                .map(|entry| entry.risk.then(|| tensor(&[1, tokens, 1])).transpose())
                .collect::<Result<_>>()?,
            layers: Vec::new(),
            attention: Vec::new(),
        };
        pass.bind_embed(embed)?;
        for (engine, (session, entry)) in layers.iter().zip(entries).enumerate() {
            let bound = pass.bind_session((engine, entry), session, (shared, caches))?;
            pass.layers.push(bound);
        }
        Ok(pass)
    }

    /// The residual stream after `engines` engines.
    pub(super) fn hidden(&self, engines: usize) -> &Tensor<f32> {
        &self.hidden[engines % 2]
    }

    /// The stability of the layers of `engine`, the one that ran last, for the token number `place`.
    pub(super) fn stability(&self, engine: usize, place: usize) -> Vec<f32> {
        let row = |tensor: &Tensor<f32>| {
            let numbers = read(tensor);
            let width = numbers.len() / self.contexts.tokens();
            numbers[place * width..][..width].to_vec()
        };
        match &self.stability[engine] {
            Some(tensor) => row(tensor),
            None => vec![stability(
                &row(self.hidden(engine)),
                &row(self.hidden(engine + 1)),
            )],
        }
    }

    fn hidden_mut(&mut self, engines: usize) -> &mut Tensor<f32> {
        &mut self.hidden[engines % 2]
    }

    /// Embed `tokens` at the positions of the contexts; `embed` is the session bound before.
    pub(super) fn embed(&mut self, embed: &mut Session, tokens: &[u32]) -> Result<()> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        write(&mut self.input_ids, &ids);
        run(embed, &self.embed, || "embed engine".into())
    }

    fn bind_embed(&mut self, embed: &Session) -> Result<()> {
        bind_input(&mut self.embed, "input_ids", &self.input_ids)?;
        let mut inputs = embed.inputs().iter();
        if inputs.any(|input| input.name() == "position_ids") {
            let positions = &self.contexts.position_ids;
            bind_input(&mut self.embed, "position_ids", positions)?;
        }
        bind_output(&mut self.embed, "x", &mut self.hidden[0])
    }

    /// Bind what `session`, the layer engine of this number and entry, reads and writes.
    fn bind_session(
        &mut self,
        (engine, entry): (usize, &LayerEntry),
        session: &Session,
        (shared, caches): (&Shared, &CacheMemory),
    ) -> Result<IoBinding> {
        let takes = |name: &str| session.inputs().iter().any(|value| value.name() == name);
        let gives = |name: &str| session.outputs().iter().any(|value| value.name() == name);
        let mut bound = binding(session)?;
        if takes("x") {
            bind_input(&mut bound, "x", self.hidden(engine))?;
        }
        let contexts = entry.contexts.iter().filter(|name| takes(name));
        self.contexts.bind(&mut bound, contexts)?;
        if takes(SLOTS) {
            bind_input(&mut bound, SLOTS, &self.contexts.slots)?;
            bind_input(&mut bound, POSITIONS, &self.contexts.position_ids)?;
        }
        for index in 0..entry.num_layers {
            let place = (entry.first_layer + index, index);
            // SAFETY: whoever holds passes holds the caches, makes new passes with new ones, and
            // runs one binding at a time.
            unsafe { caches.bind(&mut bound, session, place, shared.slots.clone())? };
        }
        if gives("y") {
            bind_output(&mut bound, "y", self.hidden_mut(engine + 1))?;
        }
        let stability = self.stability[engine].as_mut();
        if let Some(stability) = stability.filter(|_| gives("stability")) {
            bind_output(&mut bound, "stability", stability)?;
        }
        if let Some(risk) = self.risk[engine].as_mut().filter(|_| gives("risk")) {
            bind_output(&mut bound, "risk", risk)?;
        }
        Ok(bound)
    }

    /// Bind the attention engines, once.
    pub(super) fn bind_attention(
        &mut self,
        sessions: &[Session],
        entries: &[LayerEntry],
        (shared, caches): (&Shared, &CacheMemory),
    ) -> Result<()> {
        for engine in self.attention.len()..sessions.len() {
            let (session, entry) = (&sessions[engine], &entries[engine]);
            let bound = self.bind_session((engine, entry), session, (shared, caches))?;
            self.attention.push(bound);
        }
        Ok(())
    }
}

/// The passes made so far; one of them is under way.
pub(super) struct Passes {
    pub(super) engines_run: usize,
    ready: HashMap<usize, Pass>,
    current: usize,
    /// Of longer ones only the newest stays.
    max_reused: usize,
}

impl Passes {
    /// `decode` alone; of passes over up to `max_reused` tokens all stay that come to it.
    pub(super) fn new(decode: Pass, max_reused: usize) -> Self {
        Self {
            max_reused,
            engines_run: 0,
            current: decode.contexts.tokens(),
            ready: HashMap::from([(decode.contexts.tokens(), decode)]),
        }
    }

    /// Whether a pass of `tokens` tokens is ready.
    pub(super) fn has(&self, tokens: usize) -> bool {
        self.ready.contains_key(&tokens)
    }

    /// Add `pass` for reuse.
    pub(super) fn insert(&mut self, pass: Pass) {
        let tokens = pass.contexts.tokens();
        if tokens > self.max_reused {
            self.ready.retain(|&tokens, _| tokens <= self.max_reused);
        }
        self.ready.insert(tokens, pass);
    }

    /// Make the ready pass of `tokens` tokens the current one.
    pub(super) fn begin(&mut self, tokens: usize) -> &mut Pass {
        self.engines_run = 0;
        self.current = tokens;
        self.ready.get_mut(&tokens).expect("made ready before")
    }

    /// Take the current pass through `engine`, of which these are the session and the entry.
    pub(super) fn run(
        &mut self,
        engine: usize,
        session: &mut Session,
        entry: &LayerEntry,
        stopwatch: &mut Stopwatch,
    ) -> Result<()> {
        let pass = self.current_mut();
        let part = EnginePart::Layers(entry.range());
        let what = || format!("layer engine {}", entry.file.display());
        stopwatch.time(part, pass.contexts.tokens(), || {
            run(session, &pass.layers[engine], what)
        })?;
        self.engines_run = engine + 1;
        Ok(())
    }

    /// Take up the current pass at `engine` with the residual stream `rows`.
    pub(super) fn resume(&mut self, engine: usize, rows: &[f32]) {
        self.engines_run = engine;
        write(self.current_mut().hidden_mut(engine), rows);
    }

    pub(super) fn current(&self) -> &Pass {
        &self.ready[&self.current]
    }

    pub(super) fn current_mut(&mut self) -> &mut Pass {
        self.ready.get_mut(&self.current).expect("begun before")
    }

    /// The newest `tokens` tokens' rows of the current residual stream.
    pub(super) fn newest(&self, tokens: usize, hidden_size: usize) -> &[f32] {
        let rows = read(self.current().hidden(self.engines_run));
        &rows[rows.len() - tokens * hidden_size..]
    }
}

fn context_tensor(context: &ContextTensor, tokens: usize) -> Result<DynTensor> {
    let shape: Vec<usize> = context
        .shape
        .iter()
        .map(|&size| usize::try_from(size).unwrap_or(tokens))
        .collect();
    let element = match context.dtype.as_str() {
        "float32" => TensorElementType::Float32,
        "int64" => TensorElementType::Int64,
        "int32" => TensorElementType::Int32,
        "bool" => TensorElementType::Bool,
        other => {
            return Err(Error::setting(
                "context dtype",
                other,
                "float32, int64, int32 or bool",
            ));
        }
    };
    dyn_tensor(element, &shape)
}
