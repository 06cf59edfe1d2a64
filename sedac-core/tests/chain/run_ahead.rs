//! A pass goes on by itself as far as its tokens are those that are chosen.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use super::lossless::generate;
use super::toy::{Caches, Decides, ToyKernel, chain, chain_over_kernel};
use sedac_core::chain::{Chain, DecodingMode, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{PolicySettings, Stability};
use sedac_core::sampler::Sampling;

/// Steps that ran for each of 70 tokens, of which the `top_k` most probable are kept.
fn steps_a_token(temperature: f32, top_k: usize) -> f64 {
    let exits = [1, 2, 3, 4];
    let kernel = ToyKernel::new(&[1; 4], 200, 1, &Caches::default());
    let steps = kernel.steps.clone();
    let mut chain = chain_over_kernel(kernel, &exits, 0.05);
    let request = Request {
        prompt: vec![1],
        max_new_tokens: 70,
        stop_tokens: Vec::new(),
        mode: DecodingMode::Full,
        kv_fill: KvFill::default(),
        sampling: Sampling {
            temperature,
            top_k,
            seed: 4,
            ..Sampling::default()
        },
    };
    let (tokens, _) = generate(&mut chain, &request, 70);
    steps.load(Ordering::Relaxed) as f64 / tokens.len() as f64
}

#[test]
fn no_step_is_lost_where_no_filter_is_set() {
    assert_eq!(steps_a_token(0.0, 0), 1.0);
    assert!(steps_a_token(3.0, 0) < 1.05);
}

#[test]
fn few_steps_are_lost_where_filters_often_keep_other_tokens() {
    let steps = steps_a_token(3.0, 1);
    assert!((1.02..1.4).contains(&steps), "{steps} steps a token");
}

/// The tokens of a text that exits, and where each did.
fn exits(chain: &mut Chain, kv_fill: KvFill) -> Vec<(u32, usize)> {
    let policy = PolicySettings::Stability(Stability {
        tau: 0.5,
        consecutive_k: 1,
        min_layer_ratio: 0.0,
    });
    let request = Request {
        prompt: vec![1],
        max_new_tokens: 70,
        stop_tokens: Vec::new(),
        mode: DecodingMode::Exit {
            policy,
            drafter: None,
        },
        kv_fill,
        sampling: Sampling::default(),
    };
    let mut tokens = Vec::new();
    let summary = chain.generate(&request, &Interrupt::default(), |token| {
        tokens.push((token.id, token.exit.layer));
        ControlFlow::Continue(())
    });
    summary.unwrap();
    tokens
}

#[test]
fn tokens_that_exit_go_on_where_caches_are_filled_and_each_has_its_own_exit() {
    for (kv_fill, most) in [(KvFill::Propagate, 30), (KvFill::Defer, 90)] {
        let kernel = ToyKernel::new(&[1; 4], 200, 1, &Caches::default());
        let launches = kernel.launches.clone();
        let ahead = exits(&mut chain_over_kernel(kernel, &[1, 2, 3, 4], 0.05), kv_fill);
        let (mut by_token, _) = chain(Decides::KernelByToken, &[1; 4], 200, 0.05);
        assert_eq!(ahead, exits(&mut by_token, kv_fill));
        let at = |depth| ahead.iter().filter(|&&(_, layer)| layer == depth).count();
        assert!((1..=4).all(|depth| at(depth) > 2), "{ahead:?}");
        // chunks of attention are five positions
        let launches = launches.load(Ordering::Relaxed);
        assert!((most / 2..most).contains(&launches), "{launches} passes");
    }
}
