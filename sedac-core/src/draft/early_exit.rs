//! Drafts by the model's own shallow layers.

use super::{Draft, Drafter, Share, full_depth};
use crate::backend::{Backend, Costs};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::policy::Forced;
use crate::sampler::argmax;

/// Longer drafts are seldom accepted whole.
const LONGEST: usize = 8;
/// Shares of the layers that drafts go through, each at the nearest exit; the surest first.
const DEPTH_SHARES: [f64; 5] = [0.5, 0.375, 0.25, 0.1875, 0.125];
/// Guesses are told apart by the lead of the likeliest token, in so many steps.
const MARGIN_STEPS: usize = 8;
/// What is believed of the deepest drafts at first, as a speed relative to none,
const HOPE: f64 = 1.2;
/// and of shallower ones relative to the next deeper.
const SHALLOWER_HOPE: f64 = 1.1;
/// These count as much as so many rounds without drafts.
const HOPE_WEIGHT: f64 = 3.0;
/// Rounds count less with every newer one.
const MEMORY: f64 = 0.98;
/// What is known of depths that are not used fades more slowly.
const IDLE_MEMORY: f64 = 0.999;

/// Decodes to an exit layer and takes the likeliest token there as the guess, again and again, for
/// as long as the next guess is worth what it costs. The tokens' hidden states at the exit are
/// kept, so that verification starts there.
#[derive(Debug)]
pub(super) struct EarlyExit {
    layers: usize,
    depths: Vec<Depth>,
    current: usize,
    promised: f64,
    /// Guesses at depth `current` and their margin steps. The last is not part of the draft.
    guesses: Vec<(u32, usize)>,
}

/// What is known of drafts to one depth.
#[derive(Debug)]
struct Depth {
    depth: usize,
    /// Tokens that rounds gave, and what they cost relative to tokens without drafts.
    tokens: f64,
    cost: f64,
    /// By margin: how often a guess after right ones was right.
    shares: Vec<Share>,
}

impl Depth {
    fn new(depth: usize) -> Self {
        let prior = |step| (step as f64 + 0.5) / MARGIN_STEPS as f64;
        Self {
            depth,
            tokens: 0.0,
            cost: 0.0,
            // a token that leads clearly is mostly right, and others are often
            shares: (0..MARGIN_STEPS)
                .map(|step| Share::new(0.5 + 0.5 * prior(step)))
                .collect(),
        }
    }

    fn speedup(&self, hope: f64) -> f64 {
        (self.tokens + hope * HOPE_WEIGHT) / (self.cost + HOPE_WEIGHT)
    }

    fn fade(&mut self, memory: f64) {
        self.tokens *= memory;
        self.cost *= memory;
    }
}

impl EarlyExit {
    pub(super) fn new(exit_layers: &[usize], layers: usize) -> Self {
        let mut depths: Vec<usize> = DEPTH_SHARES
            .iter()
            .filter_map(|share| nearest(exit_layers, layers, share * layers as f64))
            .collect();
        depths.dedup();
        Self {
            layers,
            depths: depths.into_iter().map(Depth::new).collect(),
            current: 0,
            promised: 1.0,
            guesses: Vec::new(),
        }
    }

    /// What it costs to run one more token to the draft's depth, and to verify it after `drafted`
    /// others.
    fn price(&self, drafted: usize, costs: &Costs) -> f64 {
        let depth = self.depths[self.current].depth;
        let verify = |tokens| costs.layers(self.layers - depth, tokens) + costs.head(tokens);
        costs.layers(depth, 1) + costs.head(1) + verify(drafted + 2) - verify(drafted + 1)
    }

    /// What a round with `drafted` guesses costs.
    fn round(&self, drafted: usize, costs: &Costs) -> f64 {
        let depth = self.depths[self.current].depth;
        let tokens = drafted + 1;
        let draft = tokens as f64 * (costs.layers(depth, 1) + costs.head(1));
        draft + costs.layers(self.layers - depth, tokens) + costs.head(tokens)
    }
}

impl Drafter for EarlyExit {
    fn promise(&mut self, _: &[u32], _: usize, _: &Costs) -> f64 {
        let (mut best, mut hope) = (0.0, HOPE);
        for (index, depth) in self.depths.iter_mut().enumerate() {
            depth.fade(IDLE_MEMORY);
            depth.shares.iter_mut().for_each(Share::fade);
            let speedup = depth.speedup(hope);
            if speedup > best {
                (best, self.current) = (speedup, index);
            }
            hope = speedup * SHALLOWER_HOPE;
        }
        self.promised = best.max(1.0);
        best
    }

    fn draft(
        &mut self,
        history: &[u32],
        most: usize,
        backend: &mut dyn Backend,
        interrupt: &Interrupt,
    ) -> Result<Draft> {
        let depth = self.depths[self.current].depth;
        let mut policy = Forced::new(vec![depth]);
        // a token is worth what it would cost otherwise
        let per_token = full_depth(backend.costs(), self.layers, 1) / self.promised;
        let mut newest = history[history.len() - 1];
        let mut all_right = 1.0;
        self.guesses.clear();
        loop {
            backend.decode(newest, &mut policy, interrupt)?;
            let logits = backend.logits();
            newest = argmax(logits);
            let drafted = self.guesses.len();
            let step = (margin(logits) * MARGIN_STEPS as f32) as usize;
            let step = step.min(MARGIN_STEPS - 1);
            self.guesses.push((newest, step));
            all_right *= self.depths[self.current].shares[step].estimate();
            let worth = all_right * per_token;
            if drafted == most.min(LONGEST) || worth < self.price(drafted, backend.costs()) {
                let drafted = self.guesses[..drafted].iter();
                let tokens = drafted.map(|&(token, _)| token).collect();
                return Ok(Draft { tokens, depth });
            }
        }
    }

    fn learn(&mut self, tokens: &[u32], costs: &Costs) {
        let cost = self.round(self.guesses.len() - 1, costs) / full_depth(costs, self.layers, 1);
        let depth = &mut self.depths[self.current];
        for (token, (guess, step)) in tokens.iter().zip(&self.guesses) {
            depth.shares[*step].note(token == guess);
        }
        depth.fade(MEMORY);
        depth.tokens += tokens.len() as f64;
        depth.cost += cost;
    }
}

/// The exit above full depth that is nearest to `depth`.
fn nearest(exit_layers: &[usize], layers: usize, depth: f64) -> Option<usize> {
    let distance = |exit: usize| (exit as f64 - depth).abs();
    exit_layers
        .iter()
        .copied()
        .filter(|exit| (1..layers).contains(exit))
        .min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
}

/// The probability of the likeliest token less that of the second.
fn margin(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > first {
            (first, second) = (logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    let total: f32 = logits.iter().map(|logit| (logit - first).exp()).sum();
    (1.0 - (second - first).exp()) / total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_differences_of_probabilities() {
        let logits = [0.2_f32.ln(), 0.7_f32.ln(), 0.1_f32.ln()];
        assert!((margin(&logits) - 0.5).abs() < 1e-6);
        assert_eq!(margin(&[1.0, 1.0]), 0.0);
    }

    #[test]
    fn drafts_go_to_exits_above_full_depth() {
        assert_eq!(nearest(&[4, 8, 12], 12, 3.0), Some(4));
        assert_eq!(nearest(&[12], 12, 3.0), None);
    }
}
