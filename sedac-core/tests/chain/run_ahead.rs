//! A pass goes on by itself as far as its tokens are those that are chosen.

use std::sync::atomic::Ordering;

use super::lossless::generate;
use super::toy::{Caches, ToyKernel, chain_over_kernel};
use sedac_core::chain::{DecodingMode, Request};
use sedac_core::kv::KvFill;
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
