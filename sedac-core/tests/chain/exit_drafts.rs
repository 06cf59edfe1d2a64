//! Exits with a drafter: whatever is drafted, each token is full depth's, or that of the exit which
//! the policy takes there by itself, and caches are full depth's.

use std::ops::ControlFlow;

use super::toy::{CAPACITY, Caches, Decides, Toy, UNTRAINED, VOCABULARY, chain, ends};
use proptest::prelude::*;
use sedac_core::backend::{Ahead, Backend, HostDecided, LogitsRequest, SequenceStep, StepExit};
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::{Chain, DecodingMode, DraftSummary, Request, Token};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{
    ByDepth, Cascade, ExitKind, ExitReason, ExitRule, Learned, Margin, PolicySettings, Probe,
    Stability,
};
use sedac_core::sampler::{Sampler, Sampling};
use sedac_core::sequence::Sequence;

/// The toy without drafts.
struct Plain {
    backend: HostDecided<Toy>,
    caches: Caches,
}

impl Plain {
    fn new(engine_sizes: &[usize], agreement: u64) -> Self {
        let caches = Caches::default();
        let toy = Toy::new(engine_sizes, agreement, &caches);
        let backend = HostDecided::new(toy, &ends(engine_sizes), CAPACITY);
        Self { backend, caches }
    }

    fn step(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        rule: Option<&ExitRule>,
    ) -> (StepExit, Vec<f32>) {
        let step = SequenceStep {
            sequence,
            tokens,
            rule,
            max_depth: self.backend.num_layers(),
            logits: LogitsRequest::Rows(1),
            ahead: Ahead::default(),
            next_draft: None,
        };
        let outcomes = self.backend.step(&mut [step], &Interrupt::default());
        let outcome = outcomes.unwrap().swap_remove(0);
        (outcome.exit, outcome.logits.rows().to_vec())
    }

    fn full(&mut self, text: &[u32]) -> Vec<f32> {
        let mut sequence = self.backend.open(KvFill::Defer).unwrap();
        self.step(&mut sequence, text, None).1
    }

    /// Where the newest token of `text` exits, and the logits there.
    fn exit(&mut self, text: &[u32], policy: &PolicySettings) -> (StepExit, Vec<f32>) {
        let rule = policy.compile(self.backend.num_layers()).unwrap();
        let (newest, before) = text.split_last().unwrap();
        let mut sequence = self.backend.open(KvFill::Defer).unwrap();
        self.step(&mut sequence, before, None);
        self.step(&mut sequence, &[*newest], Some(&rule))
    }
}

/// Generate; the consumer wants no more after `wanted` tokens.
fn generate(chain: &mut Chain, request: &Request, wanted: usize) -> (Vec<Token>, DraftSummary) {
    let mut tokens = Vec::new();
    let summary = chain.generate(request, &Interrupt::default(), |token| {
        tokens.push(token);
        if tokens.len() == wanted {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    (tokens, summary.unwrap().drafts)
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

fn request(prompt: Vec<u32>, temperature: f32, seed: u64) -> Request {
    Request {
        prompt,
        max_new_tokens: 40,
        stop_tokens: Vec::new(),
        mode: DecodingMode::Full,
        kv_fill: KvFill::Defer,
        sampling: Sampling {
            temperature,
            seed,
            ..Sampling::default()
        },
    }
}

fn requests() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0..VOCABULARY as u32, 2..CAPACITY);
    let stops = prop::collection::vec(0..VOCABULARY as u32, 0..2);
    let temperature = prop_oneof![Just(0.0_f32), Just(1.0)];
    let penalty = prop_oneof![Just(1.0_f32), Just(1.3)];
    (
        prompt,
        1..40_usize,
        stops,
        temperature,
        penalty,
        any::<u64>(),
    )
        .prop_map(
            |(prompt, max_new_tokens, stop_tokens, temperature, repetition_penalty, seed)| {
                let mut request = request(prompt, temperature, seed);
                request.sampling.repetition_penalty = repetition_penalty;
                Request {
                    max_new_tokens,
                    stop_tokens,
                    ..request
                }
            },
        )
}

/// A policy of `kind`, 0 to 4, with `threshold` after all depths of `exits` but the last.
fn policy(kind: usize, threshold: f32, exits: &[usize]) -> PolicySettings {
    let everywhere = |value| -> ByDepth {
        let early = &exits[..exits.len() - 1];
        early.iter().map(|&depth| (depth, value)).collect()
    };
    let stability = PolicySettings::Stability(Stability {
        tau: threshold,
        consecutive_k: 1,
        min_layer_ratio: 0.3,
    });
    let thresholds = everywhere(threshold);
    match kind {
        _ if exits.len() < 2 => stability,
        0 => stability,
        1 => PolicySettings::Probe(Probe { thresholds }),
        2 => PolicySettings::Margin(Margin { thresholds }),
        3 => PolicySettings::Learned(Learned { thresholds }),
        _ => PolicySettings::Cascade(Cascade {
            thresholds,
            decay: 0.5,
            weights: everywhere(1.0),
            targets: everywhere(0.4),
            exit_kind: ExitKind::Hard,
        }),
    }
}

proptest! {
    #[test]
    fn tokens_are_full_depths_or_of_the_exit_that_the_policy_takes(
        decides in prop::sample::select(Decides::ALL.to_vec()),
        engine_sizes in prop::collection::vec(1..=2_usize, 1..5),
        agreement in prop_oneof![Just(0), Just(256), 1..256_u64],
        per_token in 0.0..1.0_f64,
        (kind, threshold) in (0..5_usize, 0.1..1.0_f32),
        drafter in prop::sample::select(UNTRAINED.to_vec()),
        requests in prop::collection::vec((requests(), 1..60_usize), 1..4),
    ) {
        // the kernel knows no exit heads
        let kind = match (decides, kind) {
            (Decides::Kernel | Decides::KernelByToken, 2 | 3) => 0,
            _ => kind,
        };
        let policy = policy(kind, threshold, &ends(&engine_sizes));
        let (mut chain, caches) = chain(decides, &engine_sizes, agreement, per_token);
        let mut plain = Plain::new(&engine_sizes, agreement);
        let layers = chain.num_layers();
        for (mut request, wanted) in requests {
            request.mode = DecodingMode::Exit { policy: policy.clone(), drafter: Some(drafter) };
            let (tokens, drafting) = generate(&mut chain, &request, wanted);
            prop_assert!(drafting.accepted <= drafting.drafted);
            let mut sampler = Sampler::new(request.sampling).unwrap();
            let mut text = request.prompt.clone();
            for token in tokens {
                let full = StepExit { layer: layers, reason: ExitReason::FullDepth };
                let logits = if token.exit == full {
                    plain.full(&text)
                } else {
                    let (exit, logits) = plain.exit(&text, &policy);
                    prop_assert_eq!(token.exit, exit);
                    logits
                };
                prop_assert_eq!(token.id, sampler.sample(&logits, &text));
                text.push(token.id);
            }
            // the last token is never run
            let length = text.len() - 1;
            plain.full(&text[..length]);
            let (ours, theirs) = (caches.lock().unwrap(), plain.caches.lock().unwrap());
            for (ours, theirs) in ours.iter().zip(theirs.iter()) {
                prop_assert_eq!(&ours[..length], &theirs[..length]);
            }
        }
    }

    #[test]
    fn a_policy_that_never_exits_leaves_full_depths_text(
        decides in prop::sample::select(Decides::ALL.to_vec()),
        engine_sizes in prop::collection::vec(1..=2_usize, 1..5),
        agreement in 0..=256_u64,
        drafter in prop::sample::select(UNTRAINED.to_vec()),
        request in requests(),
    ) {
        let (mut chain, _) = chain(decides, &engine_sizes, agreement, 0.1);
        let (full, _) = generate(&mut chain, &request, 100);
        let policy = policy(0, 2.0, &ends(&engine_sizes));
        let mode = DecodingMode::Exit { policy, drafter: Some(drafter) };
        let (tokens, _) = generate(&mut chain, &Request { mode, ..request }, 100);
        prop_assert_eq!(ids(&tokens), ids(&full));
    }

    #[test]
    fn a_policy_that_always_exits_leaves_nothing_to_draft(
        decides in prop::sample::select(vec![Decides::Host, Decides::Device]),
        engine_sizes in prop::collection::vec(1..=2_usize, 2..5),
        agreement in 0..=256_u64,
        mut request in requests(),
    ) {
        let (mut chain, _) = chain(decides, &engine_sizes, agreement, 0.1);
        let policy = policy(3, 0.0, &ends(&engine_sizes));
        request.mode = DecodingMode::Exit { policy: policy.clone(), drafter: None };
        let (plain, _) = generate(&mut chain, &request, 100);
        request.mode = DecodingMode::Exit { policy, drafter: Some(DrafterKind::EarlyExit) };
        let (tokens, drafting) = generate(&mut chain, &request, 100);
        prop_assert_eq!(ids(&tokens), ids(&plain));
        for (ours, theirs) in tokens.iter().zip(&plain) {
            prop_assert_eq!(ours.exit, theirs.exit);
        }
        prop_assert_eq!(drafting, DraftSummary::default());
    }
}

#[test]
fn every_drafter_drafts_between_exits() {
    let policy = policy(3, 0.7, &ends(&[1; 6]));
    for drafter in UNTRAINED {
        let (mut chain, _) = chain(Decides::Host, &[1; 6], 240, 0.05);
        let (mut drafting, mut exited, mut count) = (DraftSummary::default(), 0, 0);
        for seed in 0..20 {
            let mode = DecodingMode::Exit {
                policy: policy.clone(),
                drafter: Some(drafter),
            };
            let request = Request {
                mode,
                ..request(vec![1, 2, 3, 1, 2], 0.3, seed)
            };
            let (tokens, each) = generate(&mut chain, &request, 100);
            let early = |token: &&Token| token.exit.reason == ExitReason::Learned;
            exited += tokens.iter().filter(early).count();
            count += tokens.len();
            drafting.drafted += each.drafted;
            drafting.accepted += each.accepted;
        }
        let name = drafter.name();
        assert!(drafting.accepted > 0, "{name} was never right");
        assert!(drafting.accepted < drafting.drafted, "{name} always was");
        assert!(exited > 0 && exited < count, "{name}: {exited} of {count}");
    }
}

#[test]
fn drafts_need_hard_exits_that_wait() {
    let (mut chain, _) = chain(Decides::Host, &[1; 4], 240, 0.05);
    let mut refused = |policy, kv_fill| {
        let drafter = Some(DrafterKind::Auto);
        let request = Request {
            mode: DecodingMode::Exit { policy, drafter },
            kv_fill,
            ..request(vec![1], 0.0, 0)
        };
        let nothing = |_| ControlFlow::Continue(());
        let error = chain.generate(&request, &Interrupt::default(), nothing);
        error.unwrap_err().to_string()
    };
    let exits = ends(&[1; 4]);
    let error = refused(policy(0, 0.9, &exits), KvFill::Propagate);
    assert!(error.contains("kv_fill defer"), "{error}");
    let PolicySettings::Cascade(cascade) = policy(4, 0.9, &exits) else {
        unreachable!()
    };
    let soft = PolicySettings::Cascade(Cascade {
        exit_kind: ExitKind::Soft,
        ..cascade
    });
    let error = refused(soft, KvFill::Defer);
    assert!(error.contains("exit_kind hard"), "{error}");
}
