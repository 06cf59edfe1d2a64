//! The head engine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use ort::session::{IoBinding, Session};
use ort::value::Tensor;

use super::MAX_REUSED_TOKENS;
use super::runtime::{bind_input, bind_output, binding, read, run, tensor, write};
use crate::error::Result;

/// The head engine, and its buffers by the number of tokens: few ones, and the newest others.
pub(super) struct Head {
    session: Session,
    hidden_size: usize,
    vocab_size: usize,
    passes: HashMap<usize, HeadPass>,
    /// Tokens whose logits were computed last.
    tokens: usize,
}

/// What the engine reads and writes for one number of tokens.
struct HeadPass {
    binding: IoBinding,
    input: Tensor<f32>,
    logits: Tensor<f32>,
}

impl Head {
    pub(super) fn new(session: Session, hidden_size: usize, vocab_size: usize) -> Self {
        Self {
            session,
            hidden_size,
            vocab_size,
            passes: HashMap::new(),
            tokens: 0,
        }
    }

    /// Compute the logits of `rows` of the residual stream.
    pub(super) fn run(&mut self, rows: &[f32]) -> Result<()> {
        let tokens = rows.len() / self.hidden_size;
        let sizes = [self.hidden_size, self.vocab_size];
        if tokens > MAX_REUSED_TOKENS && !self.passes.contains_key(&tokens) {
            self.passes.retain(|&tokens, _| tokens <= MAX_REUSED_TOKENS);
        }
        let pass = match self.passes.entry(tokens) {
            Entry::Occupied(ready) => ready.into_mut(),
            Entry::Vacant(empty) => empty.insert(HeadPass::new(&self.session, tokens, sizes)?),
        };
        write(&mut pass.input, rows);
        self.tokens = tokens;
        run(&mut self.session, &pass.binding, || "head engine".into())
    }

    /// The logits that were computed last.
    pub(super) fn logits(&self) -> &[f32] {
        let pass = self.passes.get(&self.tokens);
        pass.map_or(&[], |pass| read(&pass.logits))
    }
}

impl HeadPass {
    fn new(
        session: &Session,
        tokens: usize,
        [hidden_size, vocab_size]: [usize; 2],
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
