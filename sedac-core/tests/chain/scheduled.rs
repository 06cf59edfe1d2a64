//! Sequences that are generated together have the tokens that each has alone, whoever joins, leaves,
//! is cancelled or has to give up its cache.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::toy::{CAPACITY, Decides, VOCABULARY, chain};
use proptest::prelude::*;
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::{Chain, DecodingMode, FinishReason, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{ByDepth, Learned, PolicySettings, Stability};
use sedac_core::sampler::{LogitsProcessing, Sampling};
use sedac_core::scheduler::{Progress, Scheduler, SchedulerSettings};

/// Steps within which every text of these tests ends, if none starves.
const MAX_STEPS: usize = 5000;

/// A request, when it comes and when it is cancelled.
#[derive(Debug, Clone)]
struct Arrival {
    request: Request,
    at: usize,
    cancelled_at: Option<usize>,
}

/// What a text has become.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) tokens: Vec<u32>,
    pub(super) end: Option<Result<FinishReason, String>>,
    pub(super) cached_prompt_tokens: usize,
}

/// Note `progress` of texts, each by its number.
pub(super) fn note(outcomes: &mut BTreeMap<u64, Outcome>, progress: Vec<Progress>) {
    for progress in progress {
        let outcome = outcomes.entry(progress.sequence).or_default();
        assert!(outcome.end.is_none(), "nothing comes after the end");
        outcome
            .tokens
            .extend(progress.tokens.iter().map(|token| token.id));
        outcome.cached_prompt_tokens = progress.cached_prompt_tokens;
        outcome.end = progress
            .end
            .map(|end| end.map_err(|error| error.to_string()));
    }
}

/// Step until nothing runs or waits.
pub(super) fn finish(
    scheduler: &Scheduler,
    chain: &mut Chain,
    outcomes: &mut BTreeMap<u64, Outcome>,
) {
    for _ in 0..MAX_STEPS {
        note(outcomes, scheduler.step(chain, &Interrupt::default()));
        let statistics = scheduler.statistics();
        if statistics.running + statistics.waiting == 0 {
            return;
        }
    }
    panic!("a text does not end: {:?}", scheduler.statistics());
}

/// The tokens of `request` alone, and why they end.
pub(super) fn alone(chain: &mut Chain, request: &Request) -> (Vec<u32>, FinishReason) {
    let mut tokens = Vec::new();
    let summary = chain.generate(request, &Interrupt::default(), |token| {
        tokens.push(token.id);
        ControlFlow::Continue(())
    });
    (tokens, summary.unwrap().finish_reason)
}

pub(super) fn request(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request {
        prompt,
        max_new_tokens,
        stop_tokens: Vec::new(),
        mode: DecodingMode::Full,
        kv_fill: KvFill::Defer,
        sampling: Sampling::default(),
    }
}

pub(super) fn settings(max_sequences: usize, prefill_chunk: usize) -> SchedulerSettings {
    SchedulerSettings {
        max_sequences: Some(max_sequences),
        cache_tokens: None,
        prefill_chunk: Some(prefill_chunk),
    }
}

/// Add `request` as it is.
pub(super) fn add(scheduler: &Scheduler, request: &Request) -> u64 {
    scheduler.add(request, LogitsProcessing::default()).unwrap()
}

/// Prompts of which many begin alike.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    let base: Vec<u32> = (0..CAPACITY as u32).map(|n| n * n / 3 % 5).collect();
    let tail = prop::collection::vec(0..VOCABULARY as u32, 1..8);
    (0..CAPACITY - 8, tail).prop_map(move |(length, tail)| [&base[..length], &tail].concat())
}

fn modes() -> impl Strategy<Value = DecodingMode> {
    // a trained drafter follows one sequence only
    let mut kinds = DrafterKind::ALL.to_vec();
    kinds.retain(|&kind| kind != DrafterKind::Trained);
    let drafters = prop::sample::select(kinds);
    let stability = (0.3..1.0_f32).prop_map(|tau| DecodingMode::Exit {
        policy: PolicySettings::Stability(Stability {
            tau,
            consecutive_k: 1,
            min_layer_ratio: 0.0,
        }),
        drafter: None,
    });
    prop_oneof![
        1 => Just(DecodingMode::Full),
        2 => drafters.prop_map(|drafter| DecodingMode::Lossless { drafter }),
        2 => stability,
        1 => prop::collection::vec(1..3_usize, 1..4)
            .prop_map(|depths| DecodingMode::Forced { depths }),
    ]
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    let stops = prop::collection::vec(0..VOCABULARY as u32, 0..2);
    let temperature = prop_oneof![Just(0.0_f32), Just(0.7)];
    let penalty = prop_oneof![3 => Just(1.0_f32), 1 => Just(1.3)];
    let sampling =
        (temperature, penalty, any::<u64>()).prop_map(|(temperature, repetition_penalty, seed)| {
            Sampling {
                temperature,
                repetition_penalty,
                seed,
                ..Sampling::default()
            }
        });
    let kv_fill = prop::sample::select(KvFill::ALL.to_vec());
    let request = (prompts(), 1..60_usize, stops, modes(), kv_fill, sampling);
    let request = request.prop_map(
        |(prompt, max_new_tokens, stop_tokens, mode, kv_fill, sampling)| Request {
            prompt,
            max_new_tokens,
            stop_tokens,
            mode,
            kv_fill,
            sampling,
        },
    );
    let cancelled_at = prop::option::weighted(0.2, 0..40_usize);
    (request, 0..30_usize, cancelled_at).prop_map(|(request, at, cancelled_at)| Arrival {
        request,
        at,
        cancelled_at,
    })
}

proptest! {
    #[test]
    fn texts_do_not_depend_on_their_company(
        decides in prop::sample::select(Decides::ALL.to_vec()),
        engine_sizes in prop::collection::vec(1..=2_usize, 2..4),
        agreement in prop_oneof![Just(0), Just(256), 100..256_u64],
        arrivals in prop::collection::vec(arrivals(), 1..9),
        max_sequences in 1..5_usize,
        cache_tokens in prop::option::of(CAPACITY..3 * CAPACITY),
        prefill_chunk in prop::option::of(1..24_usize),
    ) {
        let of = || chain(decides, &engine_sizes, agreement, 0.1).0;
        let mut together = of();
        let settings = SchedulerSettings { max_sequences: Some(max_sequences), cache_tokens, prefill_chunk };
        let scheduler = Scheduler::new(&mut together, settings).unwrap();
        let mut outcomes = BTreeMap::new();
        let mut numbers = vec![None; arrivals.len()];
        for step in 0..70 {
            for (arrival, number) in arrivals.iter().zip(&mut numbers) {
                if arrival.at == step {
                    *number = Some(add(&scheduler, &arrival.request));
                }
                if arrival.cancelled_at == Some(step) && let &mut Some(number) = number {
                    scheduler.cancel(number);
                }
            }
            note(&mut outcomes, scheduler.step(&mut together, &Interrupt::default()));
            let statistics = scheduler.statistics();
            prop_assert!(statistics.running <= max_sequences);
            prop_assert!(statistics.used_cache_tokens <= statistics.cache_tokens);
        }
        finish(&scheduler, &mut together, &mut outcomes);
        for (arrival, number) in arrivals.iter().zip(numbers) {
            let outcome = outcomes.remove(&number.unwrap()).unwrap_or_default();
            let (tokens, finish_reason) = alone(&mut of(), &arrival.request);
            if arrival.cancelled_at.is_some_and(|step| step >= arrival.at) && outcome.end.is_none() {
                prop_assert!(tokens.starts_with(&outcome.tokens));
            } else {
                prop_assert_eq!(outcome.tokens, tokens);
                prop_assert_eq!(outcome.end, Some(Ok(finish_reason)));
            }
        }
    }
}

/// Whatever an exit leaves in the caches is there again when a text had to give them up.
#[test]
fn preempted_texts_go_on_as_they_were() {
    use super::toy::{Caches, Toy, chain_over, ends};

    let engine_sizes = [1, 1, 2];
    let of = || {
        let mut toy = Toy::new(&engine_sizes, 0, &Caches::default());
        toy.is_sensitive = true;
        chain_over(toy, &ends(&engine_sizes), 0.1)
    };
    let thresholds: ByDepth = [1, 2].map(|depth| (depth, 0.5)).into_iter().collect();
    let policy = PolicySettings::Learned(Learned { thresholds });
    let modes = [
        DecodingMode::Exit {
            policy,
            drafter: None,
        },
        DecodingMode::Forced {
            depths: vec![1, 4, 2],
        },
        DecodingMode::Full,
    ];
    for (mode, kv_fill) in modes
        .into_iter()
        .flat_map(|mode| KvFill::ALL.map(|fill| (mode.clone(), fill)))
    {
        let requests: Vec<_> = (0..4)
            .map(|first| Request {
                mode: mode.clone(),
                kv_fill,
                sampling: Sampling {
                    temperature: 0.8,
                    seed: 3,
                    ..Sampling::default()
                },
                ..request(vec![first, 1, 2, 3, 4], 60)
            })
            .collect();
        let mut together = of();
        let settings = SchedulerSettings {
            cache_tokens: Some(CAPACITY + 20),
            ..settings(4, 3)
        };
        let scheduler = Scheduler::new(&mut together, settings).unwrap();
        let numbers: Vec<_> = requests
            .iter()
            .map(|request| add(&scheduler, request))
            .collect();
        let mut outcomes = BTreeMap::new();
        finish(&scheduler, &mut together, &mut outcomes);
        assert!(scheduler.statistics().preemptions > 0);
        for (request, number) in requests.iter().zip(numbers) {
            assert_eq!(
                outcomes[&number].tokens,
                alone(&mut of(), request).0,
                "{mode:?} {kv_fill:?}"
            );
        }
    }
}
