//! Buffers that engines read and write, bound once and reused.

use std::collections::HashMap;

use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, Tensor, TensorElementType};

use super::MAX_REUSED_TOKENS;
use super::runtime::{bind_input, bind_output, binding, dyn_tensor, read, run, tensor, write};
use crate::bundle::{ContextTensor, LayerEntry, Manifest};
use crate::error::{Error, Result};

/// Tensors that all passes use.
pub(super) struct Shared {
    pub(super) hidden_size: usize,
    pub(super) write_index: Tensor<i64>,
    contexts: Vec<ContextTensor>,
    /// Key and value cache of each layer, [1, heads, max_cache_length, head_size].
    caches: Vec<[Tensor<f32>; 2]>,
    seqlens_k: Tensor<i32>,
    total_sequence_length: Tensor<i32>,
}

impl Shared {
    pub(super) fn new(manifest: &Manifest) -> Result<Self> {
        let length = manifest.max_cache_length;
        let caches = manifest
            .key_value_heads
            .iter()
            .map(|kv| {
                let shape = [1, kv.heads, length, kv.head_size];
                Ok([tensor(&shape)?, tensor(&shape)?])
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            hidden_size: manifest.model.hidden_size,
            write_index: tensor(&[1])?,
            contexts: manifest.contexts.clone(),
            caches,
            seqlens_k: tensor(&[1])?,
            total_sequence_length: tensor(&[])?,
        })
    }

    /// Tell attention how many positions there are, the current pass's included.
    pub(super) fn set_length(&mut self, length: usize) {
        write(&mut self.seqlens_k, &[length as i32 - 1]);
        write(&mut self.total_sequence_length, &[length as i32]);
    }

    /// Bind `layer`'s cache as an engine's `index`-th, input and output in the same memory.
    pub(super) fn bind_cache(
        &mut self,
        bound: &mut IoBinding,
        layer: usize,
        index: usize,
    ) -> Result<()> {
        for (kind, cache) in ["key", "value"].into_iter().zip(&mut self.caches[layer]) {
            bind_input(bound, &format!("past_{kind}_{index}"), cache)?;
            bind_output(bound, &format!("present_{kind}_{index}"), cache)?;
        }
        Ok(())
    }
}

/// What the embed engine reads and writes for one number of tokens.
pub(super) struct Embedding {
    /// The residual stream before the first layer, [1, tokens, hidden_size].
    pub(super) hidden: Tensor<f32>,
    tokens: usize,
    bound: IoBinding,
    input_ids: Tensor<i64>,
    position_ids: Tensor<i64>,
    contexts: HashMap<String, DynTensor>,
}

impl Embedding {
    pub(super) fn new(tokens: usize, shared: &Shared, embed: &Session) -> Result<Self> {
        let contexts = shared
            .contexts
            .iter()
            .map(|context| Ok((context.name.clone(), context_tensor(context, tokens)?)))
            .collect::<Result<_>>()?;
        let mut embedding = Self {
            hidden: tensor(&[1, tokens, shared.hidden_size])?,
            tokens,
            bound: binding(embed)?,
            input_ids: tensor(&[1, tokens])?,
            position_ids: tensor(&[1, tokens])?,
            contexts,
        };
        embedding.bind(embed)?;
        Ok(embedding)
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Embed `tokens` at positions from `start` on; `embed` is the session bound before.
    pub(super) fn run(&mut self, embed: &mut Session, tokens: &[u32], start: usize) -> Result<()> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = (start as i64..).take(tokens.len()).collect();
        write(&mut self.input_ids, &ids);
        write(&mut self.position_ids, &positions);
        run(embed, &self.bound, || "embed engine".into())
    }

    /// Bind the named context tensors as inputs.
    pub(super) fn bind_contexts(&self, bound: &mut IoBinding, names: &[String]) -> Result<()> {
        for name in names {
            bind_input(bound, name, &self.contexts[name])?;
        }
        Ok(())
    }

    fn bind(&mut self, session: &Session) -> Result<()> {
        // a model without positions in its embedding or contexts drops that input
        for (name, ids) in [
            ("input_ids", &self.input_ids),
            ("position_ids", &self.position_ids),
        ] {
            if session.inputs().iter().any(|input| input.name() == name) {
                bind_input(&mut self.bound, name, ids)?;
            }
        }
        bind_output(&mut self.bound, "x", &mut self.hidden)?;
        for (name, context) in &mut self.contexts {
            bind_output(&mut self.bound, name, context)?;
        }
        Ok(())
    }
}

/// Buffers and bindings that take one number of tokens through all layers.
pub(super) struct Pass {
    pub(super) embedding: Embedding,
    /// [1, tokens, layers of the engine] by engine.
    pub(super) stability: Vec<Tensor<f32>>,
    /// [1, tokens, 1] by engine, of those with a probe.
    pub(super) risk: Vec<Option<Tensor<f32>>>,
    pub(super) layers: Vec<IoBinding>,
    /// The attention engines' bindings; none until one runs.
    pub(super) attention: Vec<IoBinding>,
    /// Engines take turns reading the embedding's residual stream and this one, writing the other.
    other: Tensor<f32>,
}

impl Pass {
    pub(super) fn new(
        tokens: usize,
        shared: &mut Shared,
        embed: &Session,
        layers: &[Session],
        entries: &[LayerEntry],
    ) -> Result<Self> {
        let mut pass = Self {
            embedding: Embedding::new(tokens, shared, embed)?,
            stability: entries
                .iter()
                .map(|entry| tensor(&[1, tokens, entry.num_layers]))
                .collect::<Result<_>>()?,
            risk: entries
                .iter()
                .map(|entry| entry.risk.then(|| tensor(&[1, tokens, 1])).transpose())
                .collect::<Result<_>>()?,
            layers: Vec::new(),
            attention: Vec::new(),
            other: tensor(&[1, tokens, shared.hidden_size])?,
        };
        for (engine, (session, entry)) in layers.iter().zip(entries).enumerate() {
            let bound = pass.bind_layer(engine, session, entry, shared)?;
            pass.layers.push(bound);
        }
        Ok(pass)
    }

    /// The residual stream after `engines` engines.
    fn hidden(&self, engines: usize) -> &Tensor<f32> {
        [&self.embedding.hidden, &self.other][engines % 2]
    }

    fn hidden_mut(&mut self, engines: usize) -> &mut Tensor<f32> {
        match engines % 2 {
            0 => &mut self.embedding.hidden,
            _ => &mut self.other,
        }
    }

    fn bind_layer(
        &mut self,
        engine: usize,
        session: &Session,
        entry: &LayerEntry,
        shared: &mut Shared,
    ) -> Result<IoBinding> {
        let mut bound = binding(session)?;
        bind_input(&mut bound, "x", self.hidden(engine))?;
        self.embedding.bind_contexts(&mut bound, &entry.contexts)?;
        bind_input(&mut bound, "seqlens_k", &shared.seqlens_k)?;
        let total = &shared.total_sequence_length;
        bind_input(&mut bound, "total_sequence_length", total)?;
        for index in 0..entry.num_layers {
            shared.bind_cache(&mut bound, entry.first_layer + index, index)?;
        }
        bind_output(&mut bound, "y", self.hidden_mut(engine + 1))?;
        bind_output(&mut bound, "stability", &mut self.stability[engine])?;
        if let Some(risk) = self.risk[engine].as_mut().filter(|_| entry.risk) {
            bind_output(&mut bound, "risk", risk)?;
        }
        Ok(bound)
    }

    /// Bind the attention engines, once.
    pub(super) fn bind_attention(
        &mut self,
        sessions: &[Session],
        entries: &[LayerEntry],
        shared: &mut Shared,
    ) -> Result<()> {
        for engine in self.attention.len()..sessions.len() {
            let bound = self.bind_layer(engine, &sessions[engine], &entries[engine], shared)?;
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
}

impl Passes {
    pub(super) fn new(decode: Pass) -> Self {
        Self {
            engines_run: 0,
            current: decode.embedding.tokens(),
            ready: HashMap::from([(decode.embedding.tokens(), decode)]),
        }
    }

    /// Whether a pass of `tokens` tokens is ready.
    pub(super) fn has(&self, tokens: usize) -> bool {
        self.ready.contains_key(&tokens)
    }

    /// Add `pass` for reuse; of the long ones only the newest stays.
    pub(super) fn insert(&mut self, pass: Pass) {
        let tokens = pass.embedding.tokens();
        if tokens > MAX_REUSED_TOKENS {
            self.ready.retain(|&tokens, _| tokens <= MAX_REUSED_TOKENS);
        }
        self.ready.insert(tokens, pass);
    }

    /// Make the ready pass of `tokens` tokens the current one.
    pub(super) fn begin(&mut self, tokens: usize) -> &mut Pass {
        self.engines_run = 0;
        self.current = tokens;
        self.ready.get_mut(&tokens).expect("made ready before")
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
