//! Whatever is drafted and however much of it is right: the tokens are those of full depth, and
//! they end where full depth's end.

use std::ops::{ControlFlow, Range};

use super::toy::{CAPACITY, Decides, UNTRAINED, VOCABULARY, chain};
use proptest::prelude::*;
use sedac_core::bench::{self, BenchCase};
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::{Chain, DecodingMode, DraftSummary, FinishReason, Request, Summary};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::sampler::Sampling;

/// Generate; the consumer wants no more after `wanted` tokens.
pub(super) fn generate(chain: &mut Chain, request: &Request, wanted: usize) -> (Vec<u32>, Summary) {
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

pub(super) fn requests() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0..VOCABULARY as u32, 1..CAPACITY);
    let stops = prop::collection::vec(0..VOCABULARY as u32, 0..2);
    let temperature = prop_oneof![Just(0.0_f32), Just(0.5), Just(1.0)];
    (prompt, 1..70_usize, stops, temperature, any::<u64>()).prop_map(
        |(prompt, max_new_tokens, stop_tokens, temperature, seed)| Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            mode: DecodingMode::Full,
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
        decides in prop::sample::select(Decides::ALL.to_vec()),
        engine_sizes in prop::collection::vec(1..=2_usize, 1..4),
        agreement in prop_oneof![Just(0), Just(256), 1..256_u64],
        per_token in 0.0..1.0_f64,
        drafter in prop::sample::select(UNTRAINED.to_vec()),
        requests in prop::collection::vec((requests(), 1..100_usize), 1..6),
    ) {
        // one chain for all: nothing of a request may survive into the next
        let mut chain = chain(decides, &engine_sizes, agreement, per_token).0;
        for (mut request, wanted) in requests {
            let (expected, full) = generate(&mut chain, &request, wanted);
            request.mode = DecodingMode::Lossless { drafter };
            let (tokens, lossless) = generate(&mut chain, &request, wanted);
            prop_assert_eq!(tokens, expected);
            prop_assert_eq!(lossless.finish_reason, full.finish_reason);
            let drafting = lossless.drafts;
            prop_assert!(drafting.accepted <= drafting.drafted);
            prop_assert_eq!(
                drafting.verify_passes,
                drafting.draft_depths.values().sum::<usize>()
            );
            if agreement == 256 && drafter == DrafterKind::EarlyExit
                && lossless.finish_reason == FinishReason::Length {
                prop_assert_eq!(drafting.accepted, drafting.drafted);
            }
        }
    }
}

proptest! {
    /// Whether a device says how probable tokens are or the host works it out of logits.
    #[test]
    fn passes_draft_as_engines_do(
        engine_sizes in prop::collection::vec(1..=2_usize, 2..6),
        agreement in 100..256_u64,
        per_token in 0.0..0.5_f64,
        drafter in prop::sample::select(UNTRAINED.to_vec()),
        requests in prop::collection::vec(requests(), 1..6),
    ) {
        let of = |decides| chain(decides, &engine_sizes, agreement, per_token).0;
        let (mut engines, mut passes) = (of(Decides::Host), of(Decides::KernelByToken));
        for mut request in requests {
            request.mode = DecodingMode::Lossless { drafter };
            let (expected, theirs) = generate(&mut engines, &request, 100);
            let (tokens, ours) = generate(&mut passes, &request, 100);
            prop_assert_eq!(tokens, expected);
            prop_assert_eq!(ours.drafts, theirs.drafts);
        }
    }
}

fn request(mode: DecodingMode, temperature: f32, seed: u64) -> Request {
    Request {
        prompt: vec![1, 2, 3, 1, 2],
        max_new_tokens: 70,
        stop_tokens: Vec::new(),
        mode,
        kv_fill: KvFill::default(),
        sampling: Sampling {
            temperature,
            seed,
            ..Sampling::default()
        },
    }
}

/// Drafting over twenty texts of a machine where further tokens are nearly free.
fn drafting(drafter: DrafterKind, agreement: u64) -> DraftSummary {
    let mut chain = chain(Decides::Host, &[1; 6], agreement, 0.05).0;
    let mut all = DraftSummary::default();
    for seed in 0..20 {
        let request = request(DecodingMode::Lossless { drafter }, 0.3, seed);
        let drafting = generate(&mut chain, &request, 100).1.drafts;
        all.drafted += drafting.drafted;
        all.accepted += drafting.accepted;
        all.verify_passes += drafting.verify_passes;
    }
    all
}

#[test]
fn every_drafter_drafts() {
    for drafter in UNTRAINED {
        let drafting = drafting(drafter, 240);
        let name = drafter.name();
        assert!(drafting.accepted > 0, "{name} was never right");
        assert!(drafting.accepted < drafting.drafted, "{name} always was");
    }
}

#[test]
fn forgotten_texts_are_not_drafted_from() {
    let mut chain = chain(Decides::Host, &[1; 6], 240, 0.05).0;
    let drafter = DrafterKind::PromptLookup;
    let request = request(DecodingMode::Lossless { drafter }, 0.0, 0);
    let mut accepted = || generate(&mut chain, &request, 100).1.drafts.accepted;
    let (first, again) = (accepted(), accepted());
    chain.forget_texts();
    let forgotten = generate(&mut chain, &request, 100).1.drafts.accepted;
    assert!(again > first.max(forgotten), "{first} {again} {forgotten}");
}

#[test]
fn repeats_of_a_benchmark_have_no_earlier_text() {
    let mode = DecodingMode::Lossless {
        drafter: DrafterKind::PromptLookup,
    };
    let request = request(mode.clone(), 0.0, 0);
    let case = BenchCase {
        name: "prompt-lookup".into(),
        chain: 0,
        mode,
    };
    let new = || chain(Decides::Host, &[1; 6], 240, 0.05).0;
    let alone = generate(&mut new(), &request, 60).1.drafts.accepted;
    let (mut repeated, interrupt) = (new(), Interrupt::default());
    let cases = [case.clone(), case];
    let chains = &mut [&mut repeated];
    let rows = bench::run(chains, &cases, &request.prompt, 60, 2, 0, &interrupt).unwrap();
    assert_eq!(
        rows.iter().map(|row| row.accepted).collect::<Vec<_>>(),
        [alone; 2]
    );
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
    let count = |mode: &DecodingMode, seeds: Range<u64>| {
        let mut chain = chain(Decides::Host, &[1, 1, 1, 1], 160, 0.05).0;
        let mut counts = [0_f64; VOCABULARY];
        for seed in seeds {
            let request = request(mode.clone(), 1.0, seed);
            let (tokens, _) = generate(&mut chain, &request, 40);
            counts[tokens[tokens.len() - 1] as usize] += 1.0;
        }
        counts
    };
    let drafter = DrafterKind::Auto;
    let drafted = count(&DecodingMode::Lossless { drafter }, 0..3000);
    let full = count(&DecodingMode::Full, 3000..6000);
    let pairs = drafted.iter().zip(&full);
    let chi_squared: f64 = pairs.map(|(a, b)| (a - b).powi(2) / (a + b)).sum();
    // 0.999 quantile for 5 degrees of freedom
    assert!(chi_squared < 20.5, "{drafted:?} {full:?}");
}
