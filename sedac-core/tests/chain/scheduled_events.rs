//! What a scheduler does when texts join, leave, wait, resemble each other or fail.

use std::collections::BTreeMap;

use super::scheduled::{Outcome, add, alone, finish, note, request, settings};
use super::toy::{
    CAPACITY, Caches, Decides, Toy, ToyKernel, VOCABULARY, chain, chain_over, chain_over_kernel,
    ends,
};
use sedac_core::Error;
use sedac_core::bundle::DrafterKind;
use sedac_core::chain::{Chain, DecodingMode, FinishReason, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::sampler::{LogitsProcessing, Sampling, TokenLogprobs};
use sedac_core::scheduler::{Scheduler, SchedulerSettings};

const ENGINE_SIZES: [usize; 3] = [1, 2, 1];

fn toy() -> Chain {
    chain(Decides::Host, &ENGINE_SIZES, 256, 0.1).0
}

/// Run one step. Returns the new tokens by number.
fn step(
    scheduler: &Scheduler,
    chain: &mut Chain,
    outcomes: &mut BTreeMap<u64, Outcome>,
) -> BTreeMap<u64, usize> {
    let progress = scheduler.step(chain, &Interrupt::default());
    let tokens = progress
        .iter()
        .map(|progress| (progress.sequence, progress.tokens.len()));
    let tokens = tokens.collect();
    note(outcomes, progress);
    tokens
}

fn long_prompt() -> Vec<u32> {
    (0..40).map(|n| n * 7 % 5).collect()
}

#[test]
fn a_long_prompt_stalls_nobody() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(4, 4)).unwrap();
    let mut outcomes = BTreeMap::new();
    let running = add(&scheduler, &request(vec![1, 2], 60));
    step(&scheduler, &mut chain, &mut outcomes);
    let long = add(&scheduler, &request(long_prompt(), 5));
    for chunk in 0..10 {
        let tokens = step(&scheduler, &mut chain, &mut outcomes);
        assert_eq!(tokens[&running], 1, "in every step");
        assert_eq!(
            tokens.contains_key(&long),
            chunk == 9,
            "after the last chunk"
        );
    }
}

#[test]
fn prompts_take_turns() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(4, 4)).unwrap();
    let mut outcomes = BTreeMap::new();
    let long = add(&scheduler, &request(long_prompt(), 5));
    step(&scheduler, &mut chain, &mut outcomes);
    let short = add(&scheduler, &request(vec![3, 1, 2, 3], 5));
    for _ in 0..3 {
        step(&scheduler, &mut chain, &mut outcomes);
    }
    assert!(outcomes.contains_key(&short) && !outcomes.contains_key(&long));
}

#[test]
fn texts_wait_for_slots_in_their_order() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(2, 8)).unwrap();
    let numbers: Vec<_> = (0..5)
        .map(|n| add(&scheduler, &request(vec![n], 4)))
        .collect();
    assert_eq!(scheduler.statistics().waiting, 5);
    let mut outcomes = BTreeMap::new();
    step(&scheduler, &mut chain, &mut outcomes);
    let statistics = scheduler.statistics();
    assert_eq!((statistics.running, statistics.waiting), (2, 3));
    assert_eq!(outcomes.keys().copied().collect::<Vec<_>>(), numbers[..2]);
    finish(&scheduler, &mut chain, &mut outcomes);
    assert!(
        outcomes
            .values()
            .all(|outcome| outcome.end == Some(Ok(FinishReason::Length)))
    );
    assert!(
        scheduler.step(&mut chain, &Interrupt::default()).is_empty(),
        "nothing is left"
    );
}

#[test]
fn a_cancelled_text_makes_room() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(1, 8)).unwrap();
    let mut outcomes = BTreeMap::new();
    let [first, second, third] = [0, 1, 2].map(|n| add(&scheduler, &request(vec![n], 50)));
    step(&scheduler, &mut chain, &mut outcomes);
    scheduler.cancel(first);
    scheduler.cancel(second);
    let tokens = step(&scheduler, &mut chain, &mut outcomes);
    assert_eq!(tokens.into_keys().collect::<Vec<_>>(), [third]);
    scheduler.cancel(first);
    finish(&scheduler, &mut chain, &mut outcomes);
    assert_eq!(outcomes[&first].end, None);
    assert!(!outcomes.contains_key(&second));
}

#[test]
fn what_cannot_fit_is_refused() {
    let mut chain = toy();
    let settings = SchedulerSettings {
        cache_tokens: Some(30),
        ..settings(2, 8)
    };
    let scheduler = Scheduler::new(&mut chain, settings).unwrap();
    let add = |request: &Request| scheduler.add(request, LogitsProcessing::default());
    for wrong in [vec![], vec![VOCABULARY as u32], vec![0; 31]] {
        assert!(matches!(add(&request(wrong, 5)), Err(Error::Prompt(_))));
    }
    assert!(matches!(
        add(&request(vec![0], 0)),
        Err(Error::Setting { .. })
    ));
    // one that fills the cache ends there
    let number = add(&request(vec![0; 30], 50)).unwrap();
    let mut outcomes = BTreeMap::new();
    finish(&scheduler, &mut chain, &mut outcomes);
    assert_eq!(outcomes[&number].tokens.len(), 1);
    assert_eq!(outcomes[&number].end, Some(Ok(FinishReason::Length)));
    for (max_sequences, cache_tokens, prefill_chunk) in
        [(0, None, None), (1, Some(0), None), (1, None, Some(0))]
    {
        let settings = SchedulerSettings {
            max_sequences: Some(max_sequences),
            cache_tokens,
            prefill_chunk,
        };
        assert!(Scheduler::new(&mut chain, settings).is_err());
    }
}

#[test]
fn a_conversation_goes_on_from_its_cache() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(3, 8)).unwrap();
    let mut outcomes = BTreeMap::new();
    let mut turn = |prompt: &[u32]| {
        let number = add(&scheduler, &request(prompt.to_vec(), 6));
        finish(&scheduler, &mut chain, &mut outcomes);
        let outcome = outcomes.remove(&number).unwrap();
        assert_eq!(
            outcome.tokens,
            alone(&mut toy(), &request(prompt.to_vec(), 6)).0
        );
        outcome
    };
    let prompt = &long_prompt()[..20];
    let first = turn(prompt);
    assert_eq!(first.cached_prompt_tokens, 0);
    let answered = [prompt, &first.tokens[..]].concat();
    let second = turn(&[&answered[..], &[5, 1]].concat());
    // the last token of an answer is never run
    assert_eq!(second.cached_prompt_tokens, answered.len() - 1);
    // a prompt is run to its last token, whose logits are needed
    assert_eq!(turn(&answered).cached_prompt_tokens, answered.len() - 1);
    let statistics = scheduler.statistics();
    assert_eq!(statistics.prefix_hits, 2);
    assert_eq!(statistics.prefix_tokens as usize, 2 * (answered.len() - 1));
}

/// Whether the other text still runs or has ended, and goes on from there itself.
#[test]
fn beginnings_are_copied() {
    let prompt = long_prompt();
    let kernel = ToyKernel::new(&ENGINE_SIZES, 256, 1, &Caches::default());
    for mut chain in [toy(), chain_over_kernel(kernel, &ends(&ENGINE_SIZES), 0.1)] {
        let scheduler = Scheduler::new(&mut chain, settings(3, 64)).unwrap();
        let mut outcomes = BTreeMap::new();
        let requests =
            [&[1, 2], &[3][..], &[1, 2, 3]].map(|tail| request([&prompt, tail].concat(), 20));
        let mut numbers = vec![add(&scheduler, &requests[0])];
        step(&scheduler, &mut chain, &mut outcomes);
        numbers.push(add(&scheduler, &requests[1]));
        finish(&scheduler, &mut chain, &mut outcomes);
        numbers.push(add(&scheduler, &requests[2]));
        finish(&scheduler, &mut chain, &mut outcomes);
        let shared = numbers
            .iter()
            .map(|number| outcomes[number].cached_prompt_tokens);
        assert_eq!(
            shared.collect::<Vec<_>>(),
            [0, prompt.len(), prompt.len() + 2]
        );
        for (request, number) in requests.iter().zip(&numbers) {
            assert_eq!(outcomes[number].tokens, alone(&mut toy(), request).0);
        }
    }
}

/// What exits leave in caches is of the text that exited, not of others that begin like it.
#[test]
fn what_exits_left_is_not_shared() {
    let of = || {
        let mut toy = Toy::new(&ENGINE_SIZES, 256, &Caches::default());
        toy.is_sensitive = true;
        chain_over(toy, &ends(&ENGINE_SIZES), 0.1)
    };
    let mut chain = of();
    let scheduler = Scheduler::new(&mut chain, settings(2, 8)).unwrap();
    let mut outcomes = BTreeMap::new();
    let exits = Request {
        mode: DecodingMode::Forced { depths: vec![1] },
        kv_fill: sedac_core::kv::KvFill::Propagate,
        ..request(vec![1, 2, 3, 4], 8)
    };
    let number = add(&scheduler, &exits);
    finish(&scheduler, &mut chain, &mut outcomes);
    let longer = request([&[1, 2, 3, 4], &outcomes[&number].tokens[..]].concat(), 8);
    let number = add(&scheduler, &longer);
    finish(&scheduler, &mut chain, &mut outcomes);
    assert_eq!(outcomes[&number].cached_prompt_tokens, 4);
    assert_eq!(outcomes[&number].tokens, alone(&mut of(), &longer).0);
}

/// Of texts in one pass, the one whose logits are NaN ends; the others go on as if it had not been
/// there, and so do later ones.
#[test]
fn a_failing_text_takes_no_other_with_it() {
    const POISON: u32 = 5;
    let add = |scheduler: &Scheduler, first: u32, bias: f32| {
        let processing = LogitsProcessing {
            bias: vec![(POISON, bias)],
            ..LogitsProcessing::default()
        };
        let request = request(vec![first, 1, 2], 30);
        scheduler.add(&request, processing).unwrap()
    };
    let sound = |first| {
        let mut chain = toy();
        let scheduler = Scheduler::new(&mut chain, settings(1, 8)).unwrap();
        let number = add(&scheduler, first, -100.0);
        let mut outcomes = BTreeMap::new();
        finish(&scheduler, &mut chain, &mut outcomes);
        outcomes.remove(&number).unwrap().tokens
    };
    let mut kernel = ToyKernel::new(&ENGINE_SIZES, 256, 1, &Caches::default());
    kernel.poison = Some(POISON);
    let mut engines = Toy::new(&ENGINE_SIZES, 256, &Caches::default());
    engines.poison = Some((POISON, 1));
    let exits = ends(&ENGINE_SIZES);
    for mut chain in [
        chain_over_kernel(kernel, &exits, 0.1),
        chain_over(engines, &exits, 0.1),
    ] {
        let scheduler = Scheduler::new(&mut chain, settings(4, 8)).unwrap();
        let mut outcomes = BTreeMap::new();
        let others = [0, 3].map(|first| (first, add(&scheduler, first, -100.0)));
        step(&scheduler, &mut chain, &mut outcomes);
        let failing = add(&scheduler, 4, 100.0);
        finish(&scheduler, &mut chain, &mut outcomes);
        assert_eq!(outcomes[&failing].tokens, [POISON]);
        let error = outcomes[&failing]
            .end
            .as_ref()
            .unwrap()
            .as_ref()
            .unwrap_err();
        assert!(error.contains("not finite"), "{error}");
        let later = add(&scheduler, 4, -100.0);
        finish(&scheduler, &mut chain, &mut outcomes);
        for (first, number) in others.into_iter().chain([(4, later)]) {
            assert_eq!(outcomes[&number].tokens, sound(first));
            assert_eq!(outcomes[&number].end, Some(Ok(FinishReason::Length)));
        }
    }
}

/// What fails whatever the text is ends all that run, and no later ones.
#[test]
fn a_failure_of_the_backend_ends_all_that_run() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(2, 8)).unwrap();
    let numbers = [0, 1, 2].map(|n| add(&scheduler, &request(vec![n], 20)));
    let interrupt = Interrupt::default();
    interrupt.raise();
    let mut outcomes = BTreeMap::new();
    note(&mut outcomes, scheduler.step(&mut chain, &interrupt));
    for number in &numbers[..2] {
        assert_eq!(outcomes[number].end, Some(Err("stopped".into())));
    }
    finish(&scheduler, &mut chain, &mut outcomes);
    assert_eq!(
        outcomes[&numbers[2]].tokens,
        alone(&mut toy(), &request(vec![2], 20)).0
    );
    assert_eq!(outcomes.len(), 3);
}

/// The words of a mask of `tokens`.
fn mask(tokens: &[u32]) -> Vec<u32> {
    vec![tokens.iter().fold(0, |word, token| word | 1 << token)]
}

#[test]
fn a_constrained_text_waits_for_each_mask() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(2, 2)).unwrap();
    let mut outcomes = BTreeMap::new();
    let processing = LogitsProcessing {
        constrained: true,
        ..LogitsProcessing::default()
    };
    let drafted = Request {
        mode: DecodingMode::Lossless {
            drafter: DrafterKind::Auto,
        },
        ..request(vec![1, 2, 3, 4, 1], 4)
    };
    let constrained = scheduler.add(&drafted, processing).unwrap();
    let other = add(&scheduler, &request(vec![2], 50));
    for _ in 0..6 {
        step(&scheduler, &mut chain, &mut outcomes);
    }
    assert!(!outcomes.contains_key(&constrained) && outcomes.contains_key(&other));
    assert!(scheduler.allow([(constrained, vec![0])]).is_err());
    for token in [3, 0, 5, 3] {
        scheduler.allow([(constrained, mask(&[token]))]).unwrap();
        for tokens in [Some(1), None] {
            let given = step(&scheduler, &mut chain, &mut outcomes);
            assert_eq!(given.get(&constrained).copied(), tokens);
        }
    }
    assert_eq!(outcomes[&constrained].tokens, [3, 0, 5, 3]);
    assert_eq!(outcomes[&constrained].end, Some(Ok(FinishReason::Length)));
}

/// A choice among two tokens is that of all logits where the others are excluded by their bias.
#[test]
fn a_bias_changes_the_tokens_and_not_their_logprobs() {
    for temperature in [0.0, 0.9] {
        let request = Request {
            sampling: Sampling {
                temperature,
                seed: 1,
                ..Sampling::default()
            },
            ..request(vec![1, 2, 3], 12)
        };
        let mut tokens = Vec::new();
        for (bias, top_logprobs) in [(vec![], Some(2)), (vec![(4, 50.0), (5, 50.0)], Some(6))] {
            let mut chain = toy();
            let scheduler = Scheduler::new(&mut chain, settings(1, 8)).unwrap();
            let processing = LogitsProcessing {
                bias,
                top_logprobs,
                ..LogitsProcessing::default()
            };
            scheduler.add(&request, processing).unwrap();
            let mut all = Vec::new();
            while scheduler.statistics().running + scheduler.statistics().waiting > 0 {
                for progress in scheduler.step(&mut chain, &Interrupt::default()) {
                    all.extend(progress.tokens);
                }
            }
            for token in &all {
                let logprobs = token.logprobs.as_ref().unwrap();
                assert_eq!(Some(logprobs.top.len()), top_logprobs);
                assert!(logprobs.logprob <= logprobs.top[0].1 && logprobs.logprob < 0.0);
                let total: f32 = logprobs.top.iter().map(|(_, logprob)| logprob.exp()).sum();
                assert!(total < 1.0 + 1e-5);
                assert!(logprobs.top.len() < 6 || total > 1.0 - 1e-5);
            }
            tokens.push(all.iter().map(|token| token.id).collect::<Vec<_>>());
        }
        assert_eq!(
            tokens[0],
            alone(&mut toy(), &request).0,
            "logprobs change nothing"
        );
        assert!(tokens[1].iter().all(|token| [4, 5].contains(token)));
    }
}

/// How probable the tokens of `prompt` are, from the second on, when each is the only one allowed.
fn forced_logprobs(prompt: &[u32]) -> Vec<TokenLogprobs> {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(1, 8)).unwrap();
    let processing = LogitsProcessing {
        constrained: true,
        top_logprobs: Some(2),
        ..LogitsProcessing::default()
    };
    let request = request(prompt[..1].to_vec(), prompt.len() - 1);
    let number = scheduler.add(&request, processing).unwrap();
    let forced = prompt[1..].iter().flat_map(|&token| {
        scheduler.allow([(number, mask(&[token]))]).unwrap();
        let progress = scheduler.step(&mut chain, &Interrupt::default());
        progress.into_iter().flat_map(|progress| progress.tokens)
    });
    forced.map(|token| token.logprobs.unwrap()).collect()
}

/// Prompts are scored at full depth, in small chunks, and again from where a cache was lost; what
/// others have in their caches is not skipped.
#[test]
fn prompts_are_scored_as_they_are_prefilled() {
    let expected = forced_logprobs(&long_prompt());
    let processing = LogitsProcessing {
        top_logprobs: Some(2),
        prompt_logprobs: true,
        ..LogitsProcessing::default()
    };
    let exits = Request {
        mode: DecodingMode::Forced { depths: vec![1] },
        ..request(long_prompt(), 3)
    };
    for decides in [Decides::Host, Decides::Device, Decides::Kernel] {
        for (prefill_chunk, cache_tokens) in [(1, Some(60)), (7, Some(60)), (64, None)] {
            let mut chain = chain(decides, &ENGINE_SIZES, 256, 0.1).0;
            let settings = SchedulerSettings {
                max_sequences: Some(2),
                cache_tokens,
                prefill_chunk: Some(prefill_chunk),
            };
            let scheduler = Scheduler::new(&mut chain, settings).unwrap();
            let plain = add(&scheduler, &request(vec![1, 2], 30));
            let mut outcomes = BTreeMap::new();
            let mut scored: BTreeMap<u64, Vec<TokenLogprobs>> = BTreeMap::new();
            for _ in 0..3 {
                scheduler.add(&exits, processing.clone()).unwrap();
            }
            while scheduler.statistics().running + scheduler.statistics().waiting > 0 {
                let mut progress = scheduler.step(&mut chain, &Interrupt::default());
                for progress in &mut progress {
                    let logprobs = std::mem::take(&mut progress.prompt_logprobs);
                    assert!(
                        logprobs.len() <= 16,
                        "a longer chunk would stall the others"
                    );
                    scored
                        .entry(progress.sequence)
                        .or_default()
                        .extend(logprobs);
                }
                note(&mut outcomes, progress);
            }
            let preemptions = scheduler.statistics().preemptions;
            assert_eq!(
                preemptions > 0,
                cache_tokens.is_some(),
                "before the prompt ends"
            );
            assert!(scored.remove(&plain).unwrap().is_empty());
            assert!(
                outcomes
                    .values()
                    .all(|outcome| outcome.end == Some(Ok(FinishReason::Length)))
            );
            assert_eq!(scored.len(), 3);
            assert!(scored.values().all(|logprobs| *logprobs == expected));
        }
    }
}

/// The model is free for a generation between two steps.
#[test]
fn one_generation_has_room_beside_them() {
    let mut chain = toy();
    let scheduler = Scheduler::new(&mut chain, settings(2, 8)).unwrap();
    let mut outcomes = BTreeMap::new();
    let requests = [0, 1, 2, 3].map(|n| request(vec![n], 20));
    let numbers = requests.each_ref().map(|request| add(&scheduler, request));
    for _ in 0..30 {
        step(&scheduler, &mut chain, &mut outcomes);
        let prompt: Vec<u32> = (0..CAPACITY as u32 / 2).map(|n| n % 5).collect();
        alone(&mut chain, &request(prompt, 3));
    }
    finish(&scheduler, &mut chain, &mut outcomes);
    for (request, number) in requests.iter().zip(numbers) {
        assert_eq!(outcomes[&number].tokens, alone(&mut toy(), request).0);
    }
}
