//! The head engine.

use std::collections::HashMap;

use ort::session::{IoBinding, Session};
use ort::value::{Outlet, Tensor};

use super::MAX_REUSED_TOKENS;
use super::host_memory::HostMemory;
use super::runtime::{
    Side, bind_input, bind_memory, bind_output, binding, engine_error, read, run, tensor, write,
};
use crate::error::Result;

/// The head engine, and its buffers by the number of tokens: few ones, and the newest others.
pub(super) struct Head {
    session: Session,
    hidden_size: usize,
    vocab_size: usize,
    passes: HashMap<usize, HeadPass>,
    /// Logits of few tokens, which all of their passes use.
    logits: HostMemory,
    /// Tokens whose logits were computed last.
    tokens: usize,
}

/// What the engine reads and writes for one number of tokens.
struct HeadPass {
    binding: IoBinding,
    input: Tensor<f32>,
    /// None where few tokens share the head's.
    logits: Option<Tensor<f32>>,
}

impl Head {
    pub(super) fn new(session: Session, hidden_size: usize, vocab_size: usize) -> Result<Self> {
        let count = MAX_REUSED_TOKENS * vocab_size;
        let logits = HostMemory::new(count)?.ok_or_else(|| {
            let source = ort::Error::new(format!("no room for {count} numbers"));
            engine_error("logits cannot be allocated".into(), source)
        })?;
        Ok(Self {
            session,
            hidden_size,
            vocab_size,
            passes: HashMap::new(),
            logits,
            tokens: 0,
        })
    }

    /// Compute the logits of `rows` of the residual stream.
    pub(super) fn run(&mut self, rows: &[f32]) -> Result<()> {
        let tokens = rows.len() / self.hidden_size;
        if tokens > MAX_REUSED_TOKENS && !self.passes.contains_key(&tokens) {
            self.passes.retain(|&tokens, _| tokens <= MAX_REUSED_TOKENS);
        }
        if !self.passes.contains_key(&tokens) {
            let pass = self.new_pass(tokens)?;
            self.passes.insert(tokens, pass);
        }
        let pass = self.passes.get_mut(&tokens).expect("inserted above");
        write(&mut pass.input, rows);
        self.tokens = tokens;
        run(&mut self.session, &pass.binding, || "head engine".into())
    }

    /// The logits that were computed last.
    pub(super) fn logits(&self) -> &[f32] {
        match self.passes.get(&self.tokens) {
            None => &[],
            Some(HeadPass {
                logits: Some(logits),
                ..
            }) => read(logits),
            Some(_) => &self.logits.numbers()[..self.tokens * self.vocab_size],
        }
    }

    fn new_pass(&self, tokens: usize) -> Result<HeadPass> {
        let shape = [1, tokens, self.vocab_size];
        let mut pass = HeadPass {
            binding: binding(&self.session)?,
            input: tensor(&[1, tokens, self.hidden_size])?,
            logits: None,
        };
        bind_input(&mut pass.binding, "x", &pass.input)?;
        if tokens > MAX_REUSED_TOKENS {
            let logits = pass.logits.insert(tensor(&shape)?);
            bind_output(&mut pass.binding, "logits", logits)?;
            return Ok(pass);
        }
        let outputs = self.session.outputs();
        let output = outputs
            .iter()
            .find(|output: &&Outlet| output.name() == "logits");
        let output = output.ok_or_else(|| {
            let source = ort::Error::new("the head engine does not give it");
            engine_error("output logits cannot be bound".into(), source)
        })?;
        let memory = self.logits.tensor(0, &shape);
        // SAFETY: `self` keeps the memory and the binding, which runs while `self` is borrowed mutably,
        // so that nobody reads it.
        unsafe { bind_memory(&mut pass.binding, Side::Output, output, &memory)? };
        Ok(pass)
    }
}
