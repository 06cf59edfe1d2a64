//! A toy model whose every logit depends on every cache entry, in a chain on a toy machine.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sedac_core::Result;
use sedac_core::backend::{Backend, Costs, Engines, HostDecided, Step};
use sedac_core::chain::Chain;
use sedac_core::exit_config::KvFill;
use sedac_core::interrupt::Interrupt;
use sedac_core::policy::{ExitSignals, Policy};

pub(crate) const VOCABULARY: usize = 6;
pub(crate) const CAPACITY: usize = 80;

/// Caches by layer and position, shared with the test. An entry is the token, and a digest of the
/// hidden state that the layer was given.
pub(crate) type Caches = Arc<Mutex<Vec<Vec<Option<(u32, u64)>>>>>;

/// What stands for a hidden state: the token, a digest of all tokens that it attended to, which is
/// the same after every layer, and one of all that went into it, which is not.
#[derive(Debug, Clone, Copy, Default)]
struct Hidden {
    token: u32,
    digest: u64,
    history: u64,
}

/// A toy model that computes from its caches: an entry too many, too few or stale in any layer
/// changes every later logit.
pub(crate) struct Toy {
    layers: Vec<Range<usize>>,
    caches: Caches,
    kept: Vec<Hidden>,
    start: usize,
    pass: Vec<Hidden>,
    depth: usize,
    stability: Vec<f32>,
    logits: Vec<f32>,
    /// Share, of 256, of the tokens on which an exit agrees with full depth.
    agreement: u64,
    /// A token whose numbers are NaN after so many layers and more: 0 is the embedding, one more
    /// than there are the head.
    pub(crate) poison: Option<(u32, usize)>,
}

impl Toy {
    pub(crate) fn new(engine_sizes: &[usize], agreement: u64, caches: &Caches) -> Self {
        let mut layers = Vec::new();
        let mut next = 0;
        for &size in engine_sizes {
            layers.push(next..next + size);
            next += size;
        }
        *caches.lock().unwrap() = vec![vec![None; CAPACITY]; next];
        Self {
            layers,
            caches: caches.clone(),
            kept: vec![Hidden::default(); CAPACITY],
            start: 0,
            pass: Vec::new(),
            depth: 0,
            stability: vec![0.0; next],
            logits: Vec::new(),
            agreement,
            poison: None,
        }
    }

    /// After which depths engines end.
    pub(crate) fn exits(&self) -> Vec<usize> {
        self.layers.iter().map(|layers| layers.end).collect()
    }

    /// A number in 0..1 that says nothing, of the newest token.
    fn signal(&self, kind: u64) -> f32 {
        let digest = self.pass.last().map_or(0, |hidden| hidden.digest);
        (mix(mix(digest, self.depth as u64), kind) % 1000) as f32 / 1000.0
    }

    /// NaN where `hidden` is poisoned after `depth` layers, 0 otherwise.
    fn poisoned(&self, hidden: Hidden, depth: usize) -> f32 {
        match self.poison {
            Some((token, from)) if hidden.token == token && depth >= from => f32::NAN,
            _ => 0.0,
        }
    }

    fn write_logits(&mut self, hidden: Hidden) {
        let early = self.depth < self.stability.len();
        let wrong = early && mix(hidden.digest, self.depth as u64) % 256 >= self.agreement;
        let seed = mix(hidden.digest, u64::from(wrong));
        let poison = self.poisoned(hidden, self.depth + 1);
        let logit = |token| (mix(seed, token) % 1000) as f32 / 250.0 + poison;
        self.logits.extend((0..VOCABULARY as u64).map(logit));
    }
}

/// SplitMix64's finaliser over both numbers.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Engines for Toy {
    fn layers(&self) -> Vec<Range<usize>> {
        self.layers.clone()
    }

    fn most_tokens(&self) -> usize {
        // as few as are allowed, so that what waits longer runs in pieces
        16
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        let embedded = tokens.iter().map(|&token| Hidden {
            token,
            ..Hidden::default()
        });
        (self.pass, self.start, self.depth) = (embedded.collect(), start, 0);
        Ok(())
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.depth = self.layers[engine].start;
        self.start = positions.start;
        self.pass = self.kept[positions].to_vec();
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        for layer in self.layers[engine].clone() {
            assert_eq!(layer, self.depth, "engines run in order");
            let mut caches = self.caches.lock().unwrap();
            for (offset, hidden) in self.pass.iter_mut().enumerate() {
                let position = self.start + offset;
                caches[layer][position] = Some((hidden.token, hidden.history));
                (hidden.digest, hidden.history) = (0, layer as u64);
                for entry in &caches[layer][..=position] {
                    let (token, history) = entry.unwrap_or((99, 0));
                    hidden.digest = mix(hidden.digest, u64::from(token));
                    hidden.history = mix(hidden.history, history);
                }
            }
            drop(caches);
            self.depth += 1;
            self.stability[layer] = self.signal(0);
        }
        Ok(())
    }

    fn run_attention(&mut self, engine: usize) -> Result<()> {
        self.run(engine)
    }

    fn residual(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let rows = &self.pass[self.pass.len() - tokens..];
        let row = |&hidden| self.poisoned(hidden, self.depth);
        Ok(rows.iter().map(row).collect())
    }

    fn risk(&self, _: usize) -> Option<f32> {
        Some(self.signal(1))
    }

    fn exit_signals(&mut self, _: usize, _: [f32; 3]) -> Result<Option<ExitSignals>> {
        Ok(Some(ExitSignals {
            margin: self.signal(2),
            entropy: self.signal(3),
            learned: self.signal(4),
        }))
    }

    fn stability(&self, engine: usize) -> &[f32] {
        &self.stability[self.layers[engine].clone()]
    }

    fn keep(&mut self, positions: Range<usize>) -> Result<()> {
        let count = positions.len();
        self.kept[positions].copy_from_slice(&self.pass[self.pass.len() - count..]);
        Ok(())
    }

    fn fill(&mut self, _: usize, _: Range<usize>) -> Result<()> {
        unreachable!("tokens wait, nothing is propagated")
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        self.logits.clear();
        for index in self.pass.len() - tokens..self.pass.len() {
            self.write_logits(self.pass[index]);
        }
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// The toy on a machine where each further token of a pass adds `per_token` of the first's time:
/// what is drafted must not depend on this machine.
struct Timed {
    inner: HostDecided<Toy>,
    costs: Costs,
}

impl Timed {
    fn new(inner: HostDecided<Toy>, per_token: f64) -> Self {
        let mut costs = Costs::default();
        for tokens in 1..=16 {
            let elapsed = Duration::from_secs_f64(1.0 + per_token * (tokens - 1) as f64);
            for _ in 0..2 {
                costs.note_layers(1, tokens, elapsed);
            }
        }
        Self { inner, costs }
    }
}

impl Backend for Timed {
    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }

    fn room(&self) -> usize {
        self.inner.room()
    }

    fn reset(&mut self, kv_fill: KvFill) {
        self.inner.reset(kv_fill);
    }

    fn prefill(&mut self, tokens: &[u32], interrupt: &Interrupt) -> Result<()> {
        self.inner.prefill(tokens, interrupt)
    }

    fn decode(
        &mut self,
        token: u32,
        policy: &mut dyn Policy,
        interrupt: &Interrupt,
    ) -> Result<Step> {
        self.inner.decode(token, policy, interrupt)
    }

    fn verify(&mut self, new: &[u32], rows: usize, interrupt: &Interrupt) -> Result<()> {
        self.inner.verify(new, rows, interrupt)
    }

    fn truncate(&mut self, length: usize) {
        self.inner.truncate(length);
    }

    fn logits(&self) -> &[f32] {
        self.inner.logits()
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn complete(&mut self, interrupt: &Interrupt) -> Result<()> {
        self.inner.complete(interrupt)
    }
}

/// A chain over the toy, and the toy's caches.
pub(crate) fn chain(engine_sizes: &[usize], agreement: u64, per_token: f64) -> (Chain, Caches) {
    let caches = Caches::default();
    let toy = Toy::new(engine_sizes, agreement, &caches);
    (chain_over(toy, per_token), caches)
}

/// A chain over `toy`.
pub(crate) fn chain_over(toy: Toy, per_token: f64) -> Chain {
    let exits = toy.exits();
    let backend = Timed::new(HostDecided::new(toy, &exits, CAPACITY), per_token);
    Chain::new(Box::new(backend), exits, VOCABULARY)
}
