//! A trained drafter drafts from states of the model at verified positions, and changes no token.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::{Chain, DecodingMode, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::PolicySettings;
use sedac_core::sampler::Sampling;
use sedac_core::scheduler::{Scheduler, SchedulerSettings};

use super::lossless::{generate, requests};
use super::scheduled;
use super::toy::{
    CAPACITY, Caches, Decides, Toy, ToyKernel, chain, chain_over, chain_over_kernel, ends,
};

/// What a trained drafter works with: engines that the host drives, or a kernel.
const WITH: [Decides; 2] = [Decides::Host, Decides::Kernel];

/// A chain over a toy with a trained drafter that is right on the share `agreement`, of 256.
fn trained(with: Decides, engine_sizes: &[usize], agreement: u64, per_token: f64) -> Chain {
    if with == Decides::Kernel {
        let mut kernel = ToyKernel::new(engine_sizes, agreement, 1, &Caches::default());
        kernel.draft_rows = 3;
        return chain_over_kernel(kernel, &ends(engine_sizes), per_token);
    }
    let mut toy = Toy::new(engine_sizes, agreement, &Caches::default());
    toy.draft_text = Some(Vec::new());
    chain_over(toy, &ends(engine_sizes), per_token)
}

fn request(mode: DecodingMode, seed: u64) -> Request {
    let mut request = Request {
        prompt: vec![1, 2, 3, 1, 2],
        max_new_tokens: 60,
        stop_tokens: Vec::new(),
        mode,
        kv_fill: KvFill::Defer,
        sampling: Default::default(),
    };
    (request.sampling.temperature, request.sampling.seed) = (0.3, seed);
    request
}

fn refusal(chain: &mut Chain, mode: DecodingMode) -> String {
    let nothing = |_| ControlFlow::Continue(());
    let result = chain.generate(&request(mode, 0), &Interrupt::default(), nothing);
    result.unwrap_err().to_string()
}

proptest! {
    #[test]
    fn it_changes_neither_the_tokens_nor_their_end(
        engine_sizes in prop::collection::vec(1..=2_usize, 1..4),
        with in prop::sample::select(WITH.to_vec()),
        agreement in prop_oneof![Just(0), Just(256), 1..256_u64],
        per_token in 0.0..1.0_f64,
        drafter in prop::sample::select(vec![DrafterKind::Trained, DrafterKind::Auto]),
        requests in prop::collection::vec((requests(), 1..100_usize), 1..6),
    ) {
        // one chain for all: nothing of a request may survive into the next
        let mut chain = trained(with, &engine_sizes, agreement, per_token);
        for (mut request, wanted) in requests {
            let (expected, full) = generate(&mut chain, &request, wanted);
            request.mode = DecodingMode::Lossless { drafter };
            let (tokens, lossless) = generate(&mut chain, &request, wanted);
            prop_assert_eq!(tokens, expected);
            prop_assert_eq!(lossless.finish_reason, full.finish_reason);
        }
    }
}

proptest! {
    #[test]
    fn it_follows_each_of_several_texts(
        with in prop::sample::select(WITH.to_vec()),
        agreement in prop_oneof![Just(256), 100..256_u64],
        requests in prop::collection::vec((requests(), 30..60_usize), 4..9),
        max_sequences in 2..5_usize,
        // so few that texts are preempted and go on in other slots
        cache_tokens in prop::option::of(CAPACITY..CAPACITY * 3 / 2),
    ) {
        let mut chain = trained(with, &[1, 2, 1], agreement, 0.1);
        let settings = SchedulerSettings { max_sequences: Some(max_sequences), cache_tokens, prefill_chunk: Some(5) };
        let scheduler = Scheduler::new(&mut chain, settings).unwrap();
        let mut expected = BTreeMap::new();
        for (mut request, wanted) in requests {
            let mut alone = trained(with, &[1, 2, 1], agreement, 0.1);
            request.prompt.truncate(5);
            request.max_new_tokens = wanted;
            request.stop_tokens.clear();
            let tokens = generate(&mut alone, &request, wanted).0;
            request.mode = DecodingMode::Lossless { drafter: DrafterKind::Trained };
            expected.insert(scheduled::add(&scheduler, &request), tokens);
        }
        let mut outcomes = BTreeMap::new();
        scheduled::finish(&scheduler, &mut chain, &mut outcomes);
        for (number, tokens) in expected {
            prop_assert_eq!(&outcomes[&number].tokens, &tokens);
        }
    }
}

/// Tokens that were drafted and accepted over twenty texts.
fn drafted_and_accepted(with: Decides, drafter: DrafterKind, agreement: u64) -> (usize, usize) {
    // of two random tokens of so few, one is often the other: it must cost something to verify
    let mut chain = trained(with, &[1; 6], agreement, 0.6);
    let (mut drafted, mut accepted) = (0, 0);
    for seed in 0..20 {
        let request = request(DecodingMode::Lossless { drafter }, seed);
        let drafts = generate(&mut chain, &request, 100).1.drafts;
        drafted += drafts.drafted;
        accepted += drafts.accepted;
    }
    (drafted, accepted)
}

#[test]
fn it_drafts_more_where_it_is_right() {
    for with in WITH {
        let (drafted, accepted) = drafted_and_accepted(with, DrafterKind::Trained, 250);
        assert!(accepted > drafted / 2, "{accepted} of {drafted}");
        let (few, _) = drafted_and_accepted(with, DrafterKind::Trained, 0);
        assert!(drafted > 2 * few, "{drafted} and {few}");
    }
}

#[test]
fn auto_weighs_it() {
    for with in WITH {
        let (_, accepted) = drafted_and_accepted(with, DrafterKind::Auto, 250);
        assert!(accepted > 100, "{accepted}");
    }
}

#[test]
fn it_is_refused_where_there_is_none() {
    let mode = DecodingMode::Lossless {
        drafter: DrafterKind::Trained,
    };
    for decides in [Decides::Host, Decides::Device, Decides::Kernel] {
        let mut chain = chain(decides, &[1; 4], 200, 0.1).0;
        let error = refusal(&mut chain, mode.clone());
        assert!(error.contains("train-drafter"), "{error}");
        // auto goes on without it
        let auto = DecodingMode::Lossless {
            drafter: DrafterKind::Auto,
        };
        generate(&mut chain, &request(auto, 0), 10);
    }
}

#[test]
fn it_is_refused_between_exits() {
    let mode = DecodingMode::Exit {
        policy: PolicySettings::for_layers(6),
        drafter: Some(DrafterKind::Trained),
    };
    let error = refusal(&mut trained(Decides::Host, &[1; 6], 200, 0.1), mode);
    assert!(error.contains("mode lossless"), "{error}");
}

/// A chain over a kernel with a trained drafter, and its scheduler, to which `texts` texts were added
/// in mode lossless, and one in mode full.
fn scheduled_texts(kernel: ToyKernel, texts: usize, per_token: f64) -> (Chain, Scheduler) {
    let mut chain = chain_over_kernel(kernel, &ends(&[1; 4]), per_token);
    let settings = SchedulerSettings {
        max_sequences: Some(texts + 1),
        cache_tokens: None,
        prefill_chunk: Some(100),
    };
    let scheduler = Scheduler::new(&mut chain, settings).unwrap();
    let mode = DecodingMode::Lossless {
        drafter: DrafterKind::Trained,
    };
    for seed in 0..texts as u64 {
        scheduled::add(&scheduler, &request(mode.clone(), seed));
    }
    scheduled::add(&scheduler, &request(DecodingMode::Full, 0));
    (chain, scheduler)
}

fn kernel_with_drafter() -> ToyKernel {
    let mut kernel = ToyKernel::new(&[1; 4], 256, 1, &Caches::default());
    kernel.draft_rows = 3;
    kernel
}

#[test]
fn drafts_follow_the_passes_that_verify() {
    for (temperature, drafter) in [
        (0.0, DrafterKind::Trained),
        (0.3, DrafterKind::Trained),
        (0.3, DrafterKind::Auto),
    ] {
        let mut kernel = ToyKernel::new(&[1; 4], 256, 1, &Caches::default());
        kernel.draft_rows = 8;
        let (requested, followed) = (kernel.drafts.clone(), kernel.followed.clone());
        // after more than seven drafted tokens, too many positions might be taken in at once
        let mut chain = chain_over_kernel(kernel, &ends(&[1; 4]), 0.2);
        let mut wanted = request(DecodingMode::Lossless { drafter }, 1);
        wanted.sampling.temperature = temperature;
        let drafts = generate(&mut chain, &wanted, 100).1.drafts;
        // those of others, or by other races, would be wrong
        let (drafted, accepted) = (drafts.drafted, drafts.accepted);
        assert!(accepted * 4 > drafted * 3, "{accepted} of {drafted}");
        let (requested, followed) = (requested.lock().unwrap().len(), followed.load(Relaxed));
        // first it must be known that it drafts again
        assert!((4..12).contains(&requested), "{requested}");
        assert!(followed > requested, "{followed}");
    }
}

#[test]
fn nothing_follows_what_only_the_host_can_choose() {
    let followed = |change: fn(&mut Sampling)| {
        let mut kernel = ToyKernel::new(&[1; 4], 256, 1, &Caches::default());
        kernel.draft_rows = 8;
        let followed = kernel.followed.clone();
        let mut chain = chain_over_kernel(kernel, &ends(&[1; 4]), 0.2);
        let drafter = DrafterKind::Trained;
        let mut wanted = request(DecodingMode::Lossless { drafter }, 1);
        change(&mut wanted.sampling);
        let drafts = generate(&mut chain, &wanted, 100).1.drafts;
        assert!(drafts.drafted > 0);
        followed.load(Relaxed)
    };
    assert!(followed(|_| ()) > 0);
    assert_eq!(followed(|sampling| sampling.top_k = 4), 0);
    assert_eq!(followed(|sampling| sampling.top_p = 0.95), 0);
    assert_eq!(followed(|sampling| sampling.min_p = 0.05), 0);
    assert_eq!(followed(|sampling| sampling.repetition_penalty = 1.01), 0);
}

#[test]
fn texts_share_its_launches() {
    let kernel = kernel_with_drafter();
    let launches = kernel.drafts.clone();
    let (mut chain, scheduler) = scheduled_texts(kernel, 10, 0.01);
    // prefill, and then a step in which prompts are taken in, of five positions
    scheduler.step(&mut chain, &Interrupt::default());
    let progress = scheduler.step(&mut chain, &Interrupt::default());
    assert_eq!(*launches.lock().unwrap(), [8, 8, 2, 2]);
    // each has its own draft: those of others would be wrong
    let drafts = progress.iter().map(|progress| &progress.drafts);
    let (drafted, accepted) = drafts.fold((0, 0), |(drafted, accepted), of| {
        (drafted + of.drafted, accepted + of.accepted)
    });
    assert!(
        drafted > 10 && accepted * 4 > drafted * 3,
        "{accepted} of {drafted}"
    );
}

#[test]
fn drafts_follow_batches_that_verify() {
    let mut kernel = ToyKernel::new(&[1; 4], 256, 1, &Caches::default());
    kernel.draft_rows = 8;
    let (requested, followed) = (kernel.drafts.clone(), kernel.followed.clone());
    let batches = kernel.batches.clone();
    let (mut chain, scheduler) = scheduled_texts(kernel, 4, 0.2);
    let (mut drafted, mut accepted) = (0, 0);
    while scheduler.statistics().running + scheduler.statistics().waiting > 0 {
        for progress in scheduler.step(&mut chain, &Interrupt::default()) {
            drafted += progress.drafts.drafted;
            accepted += progress.drafts.accepted;
        }
    }
    assert!(batches.lock().unwrap().len() > 5);
    assert!(accepted * 4 > drafted * 3, "{accepted} of {drafted}");
    let (requested, followed) = (
        requested.lock().unwrap().iter().sum::<usize>(),
        followed.load(Relaxed),
    );
    // each text drafts some rounds before it is known that it drafts again
    assert!(followed > requested, "{requested}, {followed}");
}

#[test]
fn a_launch_that_fails_ends_the_texts_that_await_it() {
    let mut kernel = kernel_with_drafter();
    kernel.drafting_fails = true;
    let (mut chain, scheduler) = scheduled_texts(kernel, 3, 0.01);
    let mut step = || scheduler.step(&mut chain, &Interrupt::default());
    assert!(step().iter().all(|progress| progress.end.is_none()));
    let ends = step().into_iter().map(|progress| match progress.end {
        Some(end) => end.is_ok(),
        None => !progress.tokens.is_empty(),
    });
    assert_eq!(ends.collect::<Vec<_>>(), [false, false, false, true]);
    assert_eq!(scheduler.statistics().running, 1);
}
