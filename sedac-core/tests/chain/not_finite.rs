//! Logits that are no numbers end a generation, with the position and the engine they come from.

use std::ops::ControlFlow;

use super::toy::{Caches, Decides, Toy, UNTRAINED, chain, chain_over, ends};
use sedac_core::chain::{Chain, DecodingMode, Request};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::sampler::Sampling;
use sedac_core::{Error, Result};

const ENGINE_SIZES: [usize; 3] = [1, 2, 1];
const LAYERS: usize = 4;
const PROMPT: [u32; 6] = [0, 1, 0, 1, 0, 1];

fn poisoned(token: u32, depth: usize) -> Chain {
    let mut toy = Toy::new(&ENGINE_SIZES, 256, &Caches::default());
    toy.poison = Some((token, depth));
    chain_over(toy, &ends(&ENGINE_SIZES), 0.1)
}

fn generate(chain: &mut Chain, prompt: &[u32], mode: DecodingMode) -> (Vec<u32>, Result<()>) {
    let request = Request {
        prompt: prompt.to_vec(),
        max_new_tokens: 20,
        stop_tokens: Vec::new(),
        mode,
        kv_fill: KvFill::Defer,
        sampling: Sampling::default(),
    };
    let mut tokens = Vec::new();
    let summary = chain.generate(&request, &Interrupt::default(), |token| {
        tokens.push(token.id);
        ControlFlow::Continue(())
    });
    (tokens, summary.map(|_| ()))
}

/// The position and the engine of an error about logits.
fn place(result: Result<()>) -> (usize, Option<String>) {
    match result {
        Err(Error::NotFinite { position, engine }) => (position, engine),
        other => panic!("{other:?} is not about logits"),
    }
}

#[test]
fn the_engine_is_named() {
    for (depth, engine) in [
        (0, "the embed engine"),
        (1, "the engine of layer 0"),
        (2, "the engine of layers 1 to 2"),
        (3, "the engine of layers 1 to 2"),
        (4, "the engine of layer 3"),
        (5, "the head engine"),
    ] {
        let mut chain = poisoned(1, depth);
        let (tokens, result) = generate(&mut chain, &PROMPT, DecodingMode::Full);
        assert!(tokens.is_empty());
        assert_eq!(place(result), (PROMPT.len() - 1, Some(engine.into())));
    }
}

/// Whatever decides and drafts, the token that full depth fails at is the one.
#[test]
fn the_position_is_named_in_every_mode() {
    let (expected, _) = generate(
        &mut chain(Decides::Host, &ENGINE_SIZES, 256, 0.1).0,
        &PROMPT,
        DecodingMode::Full,
    );
    let fresh = |token: &u32| !PROMPT.contains(token);
    let index = expected.iter().position(fresh).unwrap();
    let lossless = UNTRAINED.map(|drafter| DecodingMode::Lossless { drafter });
    let forced = DecodingMode::Forced { depths: vec![3] };
    for mode in lossless.into_iter().chain([DecodingMode::Full, forced]) {
        let mut chain = poisoned(expected[index], 1);
        let (tokens, result) = generate(&mut chain, &PROMPT, mode.clone());
        assert!(expected[..=index].starts_with(&tokens), "{mode:?}");
        let engine = Some("the engine of layer 0".into());
        assert_eq!(place(result), (PROMPT.len() + index, engine), "{mode:?}");
    }
}

#[test]
fn an_exit_whose_head_fails_is_told_from_the_layers() {
    let (expected, _) = generate(
        &mut chain(Decides::Host, &ENGINE_SIZES, 256, 0.1).0,
        &PROMPT,
        DecodingMode::Full,
    );
    let mut chain = poisoned(expected[0], LAYERS);
    let depths = DecodingMode::Forced { depths: vec![3] };
    let (_, engine) = place(generate(&mut chain, &PROMPT, depths).1);
    assert_eq!(engine.unwrap(), "the head engine, or the lens of depth 3,");
}

#[test]
fn the_next_generation_is_sound() {
    let mut broken = poisoned(5, 1);
    place(generate(&mut broken, &[5], DecodingMode::Full).1);
    let (expected, _) = generate(
        &mut chain(Decides::Host, &ENGINE_SIZES, 256, 0.1).0,
        &PROMPT,
        DecodingMode::Full,
    );
    let (tokens, _) = generate(&mut broken, &PROMPT, DecodingMode::Full);
    assert!(!tokens.is_empty() && expected.starts_with(&tokens));
}
