//! Wall-clock comparison of ways to run the same prompt: interleaved, warm-up excluded.

use std::ops::ControlFlow;

use crate::bundle::KvFill;
use crate::chain::{Chain, Exit, Request};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::sampler::Sampling;

/// One way to run the prompt.
#[derive(Debug, Clone)]
pub struct Case {
    /// The row's name.
    pub name: String,
    /// Which of the chains runs it.
    pub chain: usize,
    /// When tokens exit.
    pub exit: Exit,
}

/// One way's measurements, per decoded token.
#[derive(Debug, Clone)]
pub struct Row {
    /// The case's name.
    pub name: String,
    /// Median over the repeats, in milliseconds.
    pub ms_per_token: f64,
    /// The fastest repeat.
    pub min_ms: f64,
    /// The slowest repeat.
    pub max_ms: f64,
    /// Mean layers executed per decoded token.
    pub mean_exit_layer: f64,
}

/// Run every case once to warm up, then `repeat` times in turn, over `prompt` and `new_tokens`
/// greedily generated tokens (at least 2). Filling the caches after exits is part of the time,
/// prefill is not.
///
/// # Errors
/// [`Error::Setting`] when prompt and new tokens do not fit the cache, and what
/// [`Chain::generate`] reports.
pub fn run(
    chains: &mut [Chain],
    cases: &[Case],
    prompt: &[u32],
    new_tokens: usize,
    repeat: usize,
    interrupt: &Interrupt,
) -> Result<Vec<Row>> {
    for chain in chains.iter_mut() {
        check_room(chain, prompt.len(), new_tokens)?;
    }
    let mut times = vec![Vec::with_capacity(repeat); cases.len()];
    let mut depths = vec![0.0; cases.len()];
    for round in 0..=repeat {
        for (index, case) in cases.iter().enumerate() {
            let request = Request {
                prompt: prompt.to_vec(),
                max_new_tokens: new_tokens,
                stop_tokens: Vec::new(),
                exit: case.exit.clone(),
                kv_fill: KvFill::default(),
                sampling: Sampling::default(),
            };
            let (ms, depth) = measure(&mut chains[case.chain], &request, interrupt)?;
            if round > 0 {
                times[index].push(ms);
                depths[index] = depth;
            }
        }
    }
    Ok(cases
        .iter()
        .zip(times)
        .zip(depths)
        .map(|((case, times), depth)| summarise(&case.name, times, depth))
        .collect())
}

/// A generation that the cache cuts short would not be comparable.
fn check_room(chain: &mut Chain, prompt_tokens: usize, new_tokens: usize) -> Result<()> {
    let capacity = chain.capacity();
    // the last token is never run through the model
    if new_tokens < 2 || prompt_tokens + new_tokens - 1 > capacity {
        let range = format!(
            "2 or more, and with a prompt of {prompt_tokens} at most the cache's {capacity} \
             positions"
        );
        return Err(Error::setting("new_tokens", new_tokens, range));
    }
    Ok(())
}

/// Milliseconds and mean layers per decoded token.
fn measure(chain: &mut Chain, request: &Request, interrupt: &Interrupt) -> Result<(f64, f64)> {
    let mut layers = Vec::with_capacity(request.max_new_tokens);
    let summary = chain.generate(request, interrupt, |token| {
        layers.push(token.step.exit_layer);
        ControlFlow::Continue(())
    })?;
    let decoded = &layers[1..];
    let count = decoded.len() as f64;
    let mean = decoded.iter().sum::<usize>() as f64 / count;
    Ok((summary.decode.as_secs_f64() * 1e3 / count, mean))
}

fn summarise(name: &str, mut times: Vec<f64>, mean_exit_layer: f64) -> Row {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    let median = if times.len() % 2 == 1 {
        times[middle]
    } else {
        (times[middle - 1] + times[middle]) / 2.0
    };
    Row {
        name: name.to_owned(),
        ms_per_token: median,
        min_ms: times[0],
        max_ms: times[times.len() - 1],
        mean_exit_layer,
    }
}
