//! Whatever is drafted and however much of it is right: the tokens are those of full depth, and
//! they end where full depth's end.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::{ControlFlow, Range};
use std::time::Duration;

use proptest::prelude::*;
use sedac_core::Result;
use sedac_core::backend::{Backend, Costs, Engines, HostDecided, Step};
use sedac_core::chain::{Chain, Drafting, Exit, FinishReason, Request, Summary};
use sedac_core::draft::DrafterKind;
use sedac_core::exit_config::KvFill;
use sedac_core::interrupt::Interrupt;
use sedac_core::policy::{ExitSignals, Policy};
use sedac_core::sampler::Sampling;

const VOCABULARY: usize = 6;
const CAPACITY: usize = 80;

/// What stands for a hidden state: the token, and a digest of all tokens that it attended to.
#[derive(Debug, Clone, Copy, Default)]
struct Hidden {
    token: u32,
    digest: u64,
}

/// A toy model that computes from its caches: an entry too many, too few or stale in any layer
/// changes every later logit.
struct Toy {
    layers: Vec<Range<usize>>,
    caches: Vec<Vec<Option<u32>>>,
    kept: Vec<Hidden>,
    start: usize,
    pass: Vec<Hidden>,
    depth: usize,
    logits: Vec<f32>,
    /// Share, of 256, of the tokens on which an exit agrees with full depth.
    agreement: u64,
}

impl Toy {
    fn new(engine_sizes: &[usize], agreement: u64) -> Self {
        let mut layers = Vec::new();
        let mut next = 0;
        for &size in engine_sizes {
            layers.push(next..next + size);
            next += size;
        }
        Self {
            layers,
            caches: vec![vec![None; CAPACITY]; next],
            kept: vec![Hidden::default(); CAPACITY],
            start: 0,
            pass: Vec::new(),
            depth: 0,
            logits: Vec::new(),
            agreement,
        }
    }

    fn write_logits(&mut self, hidden: Hidden) {
        let early = self.depth < self.caches.len();
        let wrong = early && mix(hidden.digest, self.depth as u64) % 256 >= self.agreement;
        let seed = mix(hidden.digest, u64::from(wrong));
        let logit = |token| (mix(seed, token) % 1000) as f32 / 250.0;
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

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        let embedded = tokens.iter().map(|&token| Hidden { token, digest: 0 });
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
            for (offset, hidden) in self.pass.iter_mut().enumerate() {
                let position = self.start + offset;
                self.caches[layer][position] = Some(hidden.token);
                hidden.digest = self.caches[layer][..=position]
                    .iter()
                    .fold(0, |digest, entry| mix(digest, entry.map_or(99, u64::from)));
            }
            self.depth += 1;
        }
        Ok(())
    }

    fn run_attention(&mut self, engine: usize) -> Result<()> {
        self.run(engine)
    }

    fn risk(&self, _: usize) -> Option<f32> {
        None
    }

    fn exit_signals(&mut self, _: usize, _: [f32; 3]) -> Result<Option<ExitSignals>> {
        Ok(None)
    }

    fn stability(&self, engine: usize) -> &[f32] {
        &[0.0; 8][self.layers[engine].clone()]
    }

    fn keep(&mut self, positions: Range<usize>) -> Result<()> {
        let count = positions.len();
        self.kept[positions].copy_from_slice(&self.pass[self.pass.len() - count..]);
        Ok(())
    }

    fn fill(&mut self, _: usize, _: Range<usize>) -> Result<()> {
        unreachable!("nothing is propagated in lossless mode")
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

fn chain(engine_sizes: &[usize], agreement: u64, per_token: f64) -> Chain {
    let toy = Toy::new(engine_sizes, agreement);
    let exits: Vec<usize> = toy.layers.iter().map(|layers| layers.end).collect();
    let backend = Timed::new(HostDecided::new(toy, &exits, CAPACITY), per_token);
    Chain::new(Box::new(backend), exits, VOCABULARY)
}

/// Generate; the consumer wants no more after `wanted` tokens.
fn generate(chain: &mut Chain, request: &Request, wanted: usize) -> (Vec<u32>, Summary) {
    let mut tokens = Vec::new();
    let summary = chain.generate(request, &Interrupt::default(), |token| {
        tokens.push(token.id);
        if tokens.len() == wanted {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    (tokens, summary.unwrap())
}

fn requests() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0..VOCABULARY as u32, 1..CAPACITY);
    let stops = prop::collection::vec(0..VOCABULARY as u32, 0..2);
    let temperature = prop_oneof![Just(0.0_f32), Just(0.5), Just(1.0)];
    (prompt, 1..70_usize, stops, temperature, any::<u64>()).prop_map(
        |(prompt, max_new_tokens, stop_tokens, temperature, seed)| Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            exit: Exit::Never,
            kv_fill: KvFill::default(),
            sampling: Sampling {
                temperature,
                seed,
                ..Sampling::default()
            },
        },
    )
}

proptest! {
    #[test]
    fn drafts_change_neither_the_tokens_nor_their_end(
        engine_sizes in prop::collection::vec(1..=2_usize, 1..4),
        agreement in prop_oneof![Just(0), Just(256), 1..256_u64],
        per_token in 0.0..1.0_f64,
        drafter in prop::sample::select(DrafterKind::ALL.to_vec()),
        requests in prop::collection::vec((requests(), 1..100_usize), 1..6),
    ) {
        // one chain for all: nothing of a request may survive into the next
        let mut chain = chain(&engine_sizes, agreement, per_token);
        for (mut request, wanted) in requests {
            let (expected, full) = generate(&mut chain, &request, wanted);
            request.exit = Exit::Lossless { drafter };
            let (tokens, lossless) = generate(&mut chain, &request, wanted);
            prop_assert_eq!(tokens, expected);
            prop_assert_eq!(lossless.finish_reason, full.finish_reason);
            let drafting = lossless.drafting;
            prop_assert!(drafting.accepted <= drafting.drafted);
            prop_assert_eq!(
                drafting.verify_passes,
                drafting.draft_depths.values().sum::<usize>()
            );
            if agreement == 256 && drafter == DrafterKind::EarlyExit && request.sampling.temperature == 0.0
                && lossless.finish_reason == FinishReason::Length {
                prop_assert_eq!(drafting.accepted, drafting.drafted);
            }
        }
    }
}

fn request(exit: Exit, temperature: f32, seed: u64) -> Request {
    Request {
        prompt: vec![1, 2, 3, 1, 2],
        max_new_tokens: 70,
        stop_tokens: Vec::new(),
        exit,
        kv_fill: KvFill::default(),
        sampling: Sampling {
            temperature,
            seed,
            ..Sampling::default()
        },
    }
}

/// Drafting over twenty texts of a machine where further tokens are nearly free.
fn drafting(drafter: DrafterKind, agreement: u64) -> Drafting {
    let mut chain = chain(&[1; 6], agreement, 0.05);
    let mut all = Drafting::default();
    for seed in 0..20 {
        let request = request(Exit::Lossless { drafter }, 0.3, seed);
        let drafting = generate(&mut chain, &request, 100).1.drafting;
        all.drafted += drafting.drafted;
        all.accepted += drafting.accepted;
        all.verify_passes += drafting.verify_passes;
    }
    all
}

#[test]
fn every_drafter_drafts() {
    for drafter in DrafterKind::ALL {
        let drafting = drafting(drafter, 240);
        let name = drafter.name();
        assert!(drafting.accepted > 0, "{name} was never right");
        assert!(drafting.accepted < drafting.drafted, "{name} always was");
    }
}

#[test]
fn drafts_grow_with_their_success() {
    let good = drafting(DrafterKind::EarlyExit, 250);
    let bad = drafting(DrafterKind::EarlyExit, 20);
    assert!(good.drafted > 20 * bad.drafted, "{good:?} {bad:?}");
}

/// The fortieth token's distribution is full depth's: two samples of it, by seeds of their own,
/// pass a chi-squared test.
#[test]
fn sampled_tokens_are_distributed_as_at_full_depth() {
    let count = |exit: &Exit, seeds: Range<u64>| {
        let mut chain = chain(&[1, 1, 1, 1], 160, 0.05);
        let mut counts = [0_f64; VOCABULARY];
        for seed in seeds {
            let request = request(exit.clone(), 1.0, seed);
            let (tokens, _) = generate(&mut chain, &request, 40);
            counts[tokens[tokens.len() - 1] as usize] += 1.0;
        }
        counts
    };
    let drafter = DrafterKind::Auto;
    let drafted = count(&Exit::Lossless { drafter }, 0..3000);
    let full = count(&Exit::Never, 3000..6000);
    let pairs = drafted.iter().zip(&full);
    let chi_squared: f64 = pairs.map(|(a, b)| (a - b).powi(2) / (a + b)).sum();
    // 0.999 quantile for 5 degrees of freedom
    assert!(chi_squared < 20.5, "{drafted:?} {full:?}");
}
