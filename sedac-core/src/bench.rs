//! Wall-clock comparison of modes on the same prompt: interleaved, warm-up excluded, and each run
//! as in a new process, which has no earlier text to draft from.

use std::ops::ControlFlow;

use crate::chain::{Chain, DecodingMode, Request, Token};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::sampler::Sampling;

/// One mode to run the prompt in.
#[derive(Debug, Clone)]
pub struct BenchCase {
    /// The row's name.
    pub name: String,
    /// Which of the chains runs it.
    pub chain: usize,
    /// When tokens exit.
    pub mode: DecodingMode,
}

/// The measurements of one case, per decoded token.
#[derive(Debug, Clone)]
pub struct BenchRow {
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
    /// Times as fast as the case compared with; the median over the repeats, each within one turn.
    pub speedup: f64,
    /// Share of the tokens that are those of the case compared with.
    pub agreement: f64,
    /// Drafted tokens that were accepted, of the last repeat.
    pub accepted: usize,
}

/// What the repeats of one case gave.
#[derive(Debug, Clone, Default)]
struct BenchRuns {
    ms: Vec<f64>,
    tokens: Vec<Token>,
    accepted: usize,
}

/// Run every case once to warm up, then `repeat` times in turn, over `prompt` and `new_tokens`
/// greedily generated tokens (at least 2). Filling the caches after exits is part of the time,
/// prefill is not. Rows are compared with that of the case `against`.
///
/// # Errors
/// [`Error::Setting`] when prompt and new tokens do not fit the cache, and what
/// [`Chain::generate`] reports.
pub fn run(
    chains: &mut [&mut Chain],
    cases: &[BenchCase],
    prompt: &[u32],
    new_tokens: usize,
    repeat: usize,
    against: usize,
    interrupt: &Interrupt,
) -> Result<Vec<BenchRow>> {
    if against >= cases.len() {
        return Err(Error::setting("against", against, "the index of a case"));
    }
    for chain in chains.iter() {
        check_room(chain, prompt.len(), new_tokens)?;
    }
    let mut runs = vec![BenchRuns::default(); cases.len()];
    for round in 0..=repeat {
        for (case, runs) in cases.iter().zip(&mut runs) {
            let request = Request {
                prompt: prompt.to_vec(),
                max_new_tokens: new_tokens,
                stop_tokens: Vec::new(),
                mode: case.mode.clone(),
                kv_fill: KvFill::default(),
                sampling: Sampling::default(),
            };
            let (ms, tokens, accepted) = measure(chains[case.chain], &request, interrupt)?;
            if round > 0 {
                runs.ms.push(ms);
                (runs.tokens, runs.accepted) = (tokens, accepted);
            }
        }
    }
    let rows = cases.iter().zip(&runs);
    Ok(rows
        .map(|(case, each)| summarise(&case.name, each, &runs[against]))
        .collect())
}

/// A generation that the cache cuts short would not be comparable.
fn check_room(chain: &Chain, prompt_tokens: usize, new_tokens: usize) -> Result<()> {
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

/// Milliseconds per decoded token, these tokens, and how many drafted ones were accepted.
fn measure(
    chain: &mut Chain,
    request: &Request,
    interrupt: &Interrupt,
) -> Result<(f64, Vec<Token>, usize)> {
    // the runs before had the same text
    chain.forget_texts();
    let mut tokens = Vec::with_capacity(request.max_new_tokens);
    let summary = chain.generate(request, interrupt, |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    })?;
    let decoded = tokens.split_off(1);
    let ms = summary.decode.as_secs_f64() * 1e3 / decoded.len() as f64;
    Ok((ms, decoded, summary.drafts.accepted))
}

fn summarise(name: &str, runs: &BenchRuns, against: &BenchRuns) -> BenchRow {
    let count = runs.tokens.len() as f64;
    let layers: usize = runs.tokens.iter().map(|token| token.exit.layer).sum();
    let pairs = runs.tokens.iter().zip(&against.tokens);
    let same = pairs.filter(|(ours, theirs)| ours.id == theirs.id).count();
    let ratios = against
        .ms
        .iter()
        .zip(&runs.ms)
        .map(|(theirs, ours)| theirs / ours);
    BenchRow {
        name: name.to_owned(),
        ms_per_token: median(runs.ms.iter().copied()),
        min_ms: runs.ms.iter().copied().fold(f64::INFINITY, f64::min),
        max_ms: runs.ms.iter().copied().fold(0.0, f64::max),
        mean_exit_layer: layers as f64 / count,
        speedup: median(ratios),
        agreement: same as f64 / count,
        accepted: runs.accepted,
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    }
}
