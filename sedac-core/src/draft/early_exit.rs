//! Drafts by the model's own shallow layers.

use super::plain::plain;
use super::up_to::{UpTo, step};
use super::{Draft, Drafter, Exited, Share, Tools, full_depth};
use crate::backend::Costs;
use crate::error::Result;
use crate::policy::ExitReason;

/// Longer drafts are seldom accepted whole.
const LONGEST: usize = 8;
/// Shares of the layers that drafts go through, each at the nearest exit; the surest first.
const DEPTH_SHARES: [f64; 5] = [0.5, 0.375, 0.25, 0.1875, 0.125];
/// Guesses are told apart by an exit engine's probability that they are right, or else by the lead
/// of the likeliest token, in so many steps.
const STEPS: usize = 8;
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
    /// The positions of the last draft.
    runs: Vec<Run>,
}

/// A position that was run.
#[derive(Debug)]
struct Run {
    /// Layers that ran before it waited, or went on with others.
    depth: usize,
    next: Next,
}

/// What is known of the next token.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Next {
    /// The policy is sure of this one.
    Certain(u32),
    /// A guess, and its step of probability.
    Guess(u32, usize),
    /// Full depth's logits.
    Verified,
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
    /// By step: how often a guess after right ones was right.
    shares: Vec<Share>,
}

impl Depth {
    fn new(depth: usize) -> Self {
        let prior = |step| (step as f64 + 0.5) / STEPS as f64;
        Self {
            depth,
            ran: depth as f64,
            plain: 0.0,
            cost: 0.0,
            // a token that leads clearly is mostly right, and others are often
            shares: (0..STEPS)
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
    pub(super) fn new(exit_layers: &[usize], layers: usize, least_depth: usize) -> Self {
        let mut depths: Vec<usize> = DEPTH_SHARES
            .iter()
            .filter_map(|share| nearest(exit_layers, layers, share * layers as f64))
            .filter(|&depth| depth >= least_depth)
            .collect();
        depths.dedup();
        Self {
            layers,
            depths: depths.into_iter().map(Depth::new).collect(),
            current: 0,
            promised: 1.0,
            plain: 0.0,
            runs: Vec::new(),
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
        let alone = |run: &Run| {
            let head = if run.next == Next::Verified {
                0.0
            } else {
                costs.head(1)
            };
            costs.layers(run.depth, 1) + head
        };
        let draft: f64 = self.runs.iter().map(alone).sum();
        let depth = self.depths[self.current].depth;
        let tokens = self.runs.len();
        draft + costs.layers(self.layers - depth, tokens) + costs.head(tokens)
    }

    /// What the token of a position costs without drafts.
    fn without(&self, run: &Run, costs: &Costs) -> f64 {
        let depth = match run.next {
            Next::Certain(_) => run.depth,
            _ => self.layers,
        };
        plain(costs, self.layers, depth)
    }

    /// Run `newest`, as a guess if that is right with a probability of `least`.
    fn run(&mut self, newest: u32, least: f64, tools: &mut Tools<'_>) -> Result<Option<Exited>> {
        let Depth { depth, shares, .. } = &self.depths[self.current];
        let mut policy = UpTo {
            depth: *depth,
            policy: tools.policy,
            shares,
            least,
            waiting: self.runs.len(),
            step: None,
        };
        let step = tools.backend.decode(newest, &mut policy, tools.interrupt)?;
        let logits = tools.backend.logits();
        let next = match step.reason {
            ExitReason::FullDepth => Next::Verified,
            ExitReason::Forced => {
                let step = policy.step.unwrap_or_else(|| margin_step(logits));
                Next::Guess((tools.choose)(logits), step)
            }
            _ => Next::Certain((tools.choose)(logits)),
        };
        self.runs.push(Run {
            depth: match next {
                Next::Verified => *depth,
                _ => step.exit_layer,
            },
            next,
        });
        let certain = matches!(next, Next::Certain(_));
        Ok(certain.then(|| Exited {
            step,
            logits: logits.to_vec(),
        }))
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
        self.runs.clear();
        loop {
            let drafted = draft.tokens.len();
            let least = match most.min(LONGEST) {
                longest if drafted == longest => f64::INFINITY,
                _ => self.price(drafted, tools.backend.costs()) / (all_right * per_token),
            };
            draft.exits.push(self.run(newest, least, tools)?);
            match self.runs[drafted].next {
                Next::Certain(token) => newest = token,
                Next::Guess(token, step) => {
                    let share = self.depths[self.current].shares[step].estimate();
                    if share < least {
                        return Ok(draft);
                    }
                    all_right *= share;
                    newest = token;
                }
                Next::Verified => draft.verified = true,
            }
            // before the first guess there is nothing that a token would have to wait for
            if draft.is_certain() || draft.verified || drafted == most.min(LONGEST) {
                return Ok(draft);
            }
            draft.tokens.push(newest);
        }
    }

    fn learn(&mut self, tokens: &[u32], costs: &Costs) {
        let full = full_depth(costs, self.layers, 1);
        let came = &self.runs[..tokens.len()];
        let without: f64 = came.iter().map(|run| self.without(run, costs)).sum();
        let guessed = self
            .runs
            .iter()
            .any(|run| matches!(run.next, Next::Guess(..)));
        let cost = if guessed { self.round(costs) } else { without };
        let depth = &mut self.depths[self.current];
        for (token, run) in tokens.iter().zip(&self.runs) {
            if let Next::Guess(guess, step) = run.next {
                depth.shares[step].note(*token == guess);
            }
        }
        for run in &self.runs {
            depth.ran = MEMORY * depth.ran + (1.0 - MEMORY) * run.depth as f64;
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

fn margin_step(logits: &[f32]) -> usize {
    step(margin(logits), STEPS)
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
