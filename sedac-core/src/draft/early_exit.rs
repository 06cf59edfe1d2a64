//! Drafts by the model's own shallow layers.

use super::plain::plain;
use super::up_to::UpTo;
use super::{Draft, Drafter, Exited, Share, Tools, full_depth};
use crate::backend::Costs;
use crate::error::Result;
use crate::policy::ExitReason;

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

/// Decodes to an exit layer and takes the token there as the guess, again and again, for as long
/// as the next guess is worth what it costs. The tokens' hidden states at the exit are kept, so
/// that verification starts there. Where the policy takes an exit on the way, the token is right.
#[derive(Debug)]
pub(super) struct EarlyExit {
    layers: usize,
    depths: Vec<Depth>,
    current: usize,
    promised: f64,
    /// Seconds that a token takes without drafts.
    plain: f64,
    /// One for each position that was run. The last is not part of the draft.
    guesses: Vec<Guess>,
}

/// The next token of a position, by an exit.
#[derive(Debug)]
struct Guess {
    token: u32,
    /// Layers that ran.
    depth: usize,
    /// The step of its margin; None for what the policy is sure of.
    step: Option<usize>,
}

/// What is known of drafts to one depth.
#[derive(Debug)]
struct Depth {
    depth: usize,
    /// Mean of the layers that positions ran, fewer where the policy let them exit.
    ran: f64,
    /// What the tokens that rounds gave cost without drafts, and what they cost, relative to full
    /// depth.
    plain: f64,
    cost: f64,
    /// By margin: how often a guess after right ones was right.
    shares: Vec<Share>,
}

impl Depth {
    fn new(depth: usize) -> Self {
        let prior = |step| (step as f64 + 0.5) / MARGIN_STEPS as f64;
        Self {
            depth,
            ran: depth as f64,
            plain: 0.0,
            cost: 0.0,
            // a token that leads clearly is mostly right, and others are often
            shares: (0..MARGIN_STEPS)
                .map(|step| Share::new(0.5 + 0.5 * prior(step)))
                .collect(),
        }
    }

    fn speedup(&self, hope: f64) -> f64 {
        (self.plain + hope * HOPE_WEIGHT) / (self.cost + HOPE_WEIGHT)
    }

    fn fade(&mut self, memory: f64) {
        self.plain *= memory;
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
            plain: 0.0,
            guesses: Vec::new(),
        }
    }

    /// What it costs to run one more token to where drafts exit, and to verify it after `drafted`
    /// others.
    fn price(&self, drafted: usize, costs: &Costs) -> f64 {
        let Depth { depth, ran, .. } = self.depths[self.current];
        let verify = |tokens| costs.layers(self.layers - depth, tokens) + costs.head(tokens);
        ran * costs.layers(1, 1) + costs.head(1) + verify(drafted + 2) - verify(drafted + 1)
    }

    /// What the last round cost.
    fn round(&self, costs: &Costs) -> f64 {
        let depth = self.depths[self.current].depth;
        let run = |guess: &Guess| costs.layers(guess.depth, 1) + costs.head(1);
        let draft: f64 = self.guesses.iter().map(run).sum();
        let tokens = self.guesses.len();
        draft + costs.layers(self.layers - depth, tokens) + costs.head(tokens)
    }

    /// What the token of a position costs without drafts.
    fn without(&self, guess: &Guess, costs: &Costs) -> f64 {
        let depth = guess.step.map_or(guess.depth, |_| self.layers);
        plain(costs, self.layers, depth)
    }

    /// Run `newest` up to the draft's depth; None for a guess.
    fn run(&mut self, newest: u32, tools: &mut Tools<'_>) -> Result<Option<Exited>> {
        let depth = self.depths[self.current].depth;
        let mut policy = UpTo::new(depth, tools.policy);
        let step = tools.backend.decode(newest, &mut policy, tools.interrupt)?;
        let logits = tools.backend.logits();
        let exited = (step.reason != ExitReason::Forced).then(|| Exited {
            step,
            logits: logits.to_vec(),
        });
        self.guesses.push(Guess {
            token: (tools.choose)(logits),
            depth: step.exit_layer,
            step: exited.is_none().then(|| margin_step(logits)),
        });
        Ok(exited)
    }
}

impl Drafter for EarlyExit {
    fn promise(&mut self, _: &[u32], _: usize, _: &Costs, plain: f64) -> f64 {
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
        self.plain = plain;
        best
    }

    fn draft(&mut self, history: &[u32], most: usize, tools: &mut Tools<'_>) -> Result<Draft> {
        let mut draft = Draft {
            depth: self.depths[self.current].depth,
            ..Draft::default()
        };
        // a token is worth what it would cost otherwise
        let per_token = self.plain / self.promised;
        let mut newest = history[history.len() - 1];
        let mut all_right = 1.0;
        self.guesses.clear();
        loop {
            draft.exits.push(self.run(newest, tools)?);
            let drafted = draft.tokens.len();
            let guess = &self.guesses[drafted];
            if let Some(step) = guess.step {
                all_right *= self.depths[self.current].shares[step].estimate();
            }
            let worth = all_right * per_token;
            // before the first guess there is nothing that a token would have to wait for
            if draft.is_certain()
                || drafted == most.min(LONGEST)
                || worth < self.price(drafted, tools.backend.costs())
            {
                return Ok(draft);
            }
            newest = guess.token;
            draft.tokens.push(newest);
        }
    }

    fn learn(&mut self, tokens: &[u32], costs: &Costs) {
        let full = full_depth(costs, self.layers, 1);
        let pairs = || tokens.iter().zip(&self.guesses);
        let without: f64 = pairs().map(|(_, guess)| self.without(guess, costs)).sum();
        let certain = self.guesses.iter().all(|guess| guess.step.is_none());
        let cost = if certain { without } else { self.round(costs) };
        let depth = &mut self.depths[self.current];
        for (token, guess) in tokens.iter().zip(&self.guesses) {
            if let Some(step) = guess.step {
                depth.shares[step].note(*token == guess.token);
            }
        }
        for guess in &self.guesses {
            depth.ran = MEMORY * depth.ran + (1.0 - MEMORY) * guess.depth as f64;
        }
        depth.fade(MEMORY);
        depth.plain += without / full;
        depth.cost += cost / full;
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

/// The step of a token's margin, below MARGIN_STEPS.
fn margin_step(logits: &[f32]) -> usize {
    let step = (margin(logits) * MARGIN_STEPS as f32) as usize;
    step.min(MARGIN_STEPS - 1)
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
