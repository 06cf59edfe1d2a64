//! Drafts by the model's own shallow layers.

use super::baseline::baseline_cost;
use super::round_costs::{DECAY, RoundCosts};
use super::{
    Acceptance, AcceptanceRate, DepthAcceptance, Draft, DraftContext, Drafter, Foresight, Proposal,
    TakenExit, TokenCost, full_depth_cost,
};
use crate::backend::{
    Ahead, Costs, DraftChoice, MARGIN_BINS, MAX_AHEAD, SequenceStep, StepOutcome, margin_bin,
};
use crate::error::Result;
use crate::exponential::sum_of_exponentials;
use crate::policy::{Criterion, ExitReason, ExitRule, Signal};

/// Longer drafts are seldom accepted whole.
const MAX_DRAFTED: usize = 8;
/// Shares of the layers that drafts go through, each at the nearest exit; the deepest first.
const DEPTH_SHARES: [f64; 5] = [0.5, 0.375, 0.25, 0.1875, 0.125];
/// Drafted tokens are binned by an exit head's probability that they are full depth's, or else by
/// the margin of the most probable token.
const BINS: usize = MARGIN_BINS;
/// The prior speedup of the deepest drafts,
const PRIOR_SPEEDUP: f64 = 1.2;
/// and of shallower ones relative to the next deeper.
const SHALLOWER_SPEEDUP: f64 = 1.1;

/// Decodes to an exit layer and drafts the token there, again and again, for as long as the next
/// token is worth what it costs. The tokens' hidden states at the exit are saved, so that
/// verification starts there. Where the rule takes an exit before that depth, its token is final.
#[derive(Debug)]
pub(super) struct EarlyExit {
    layers: usize,
    depths: Vec<Depth>,
    current: usize,
    expected_speedup: f64,
    /// Seconds that a token takes without drafts.
    baseline: f64,
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
    /// The token of an exit that the rule took.
    Exited(u32),
    /// A drafted token, and its bin of probability.
    Drafted(u32, usize),
    /// Full depth's logits are there.
    Verified,
}

/// What was observed of drafts to one depth.
#[derive(Debug)]
struct Depth {
    depth: usize,
    /// Mean of the layers that positions ran, fewer where the rule let them exit.
    ran: f64,
    rounds: RoundCosts,
    /// By bin, of tokens drafted after accepted ones.
    rates: Vec<AcceptanceRate>,
}

impl Depth {
    fn new(depth: usize) -> Self {
        let middle = |bin| (bin as f64 + 0.5) / BINS as f64;
        Self {
            depth,
            ran: depth as f64,
            rounds: RoundCosts::default(),
            // a token that leads clearly is mostly right, and others are often
            rates: (0..BINS)
                .map(|bin| AcceptanceRate::new(0.5 + 0.5 * middle(bin)))
                .collect(),
        }
    }

    /// The lower edge of the bins from which on every acceptance rate is at least `min_rate`;
    /// infinite where there are none.
    fn min_probability(&self, min_rate: f64) -> f32 {
        let rates = self.rates.iter().rev();
        let bins = rates.take_while(|rate| rate.estimate() >= min_rate).count();
        match bins {
            0 => f32::INFINITY,
            bins => (BINS - bins) as f32 / BINS as f32,
        }
    }
}

impl Depth {
    fn recall(&mut self, remembered: &DepthAcceptance) {
        self.rounds.recall(remembered.baseline, remembered.cost);
        for (rate, &remembered) in self.rates.iter_mut().zip(&remembered.rates) {
            rate.recall(remembered);
        }
    }

    fn record(&self) -> DepthAcceptance {
        DepthAcceptance {
            depth: self.depth,
            baseline: self.rounds.baseline,
            cost: self.rounds.cost,
            rates: self.rates.iter().map(AcceptanceRate::estimate).collect(),
        }
    }
}

impl EarlyExit {
    pub(super) fn new(exit_layers: &[usize], layers: usize, min_depth: usize) -> Self {
        let mut depths: Vec<usize> = DEPTH_SHARES
            .iter()
            .filter_map(|share| nearest(exit_layers, layers, share * layers as f64))
            .filter(|&depth| depth >= min_depth)
            .collect();
        depths.dedup();
        Self {
            layers,
            depths: depths.into_iter().map(Depth::new).collect(),
            current: 0,
            expected_speedup: 1.0,
            baseline: 0.0,
            runs: Vec::new(),
        }
    }

    /// What it costs to run one more token to where drafts exit, and to verify it after `drafted`
    /// others.
    fn cost_of_next(&self, drafted: usize, costs: &Costs) -> f64 {
        let Depth { depth, ran, .. } = self.depths[self.current];
        let verify = |tokens| costs.layers(self.layers - depth, tokens) + costs.head(tokens);
        ran * costs.layers(1, 1) + costs.head(1) + verify(drafted + 2) - verify(drafted + 1)
    }

    /// What the last round cost.
    fn cost_of_round(&self, costs: &Costs) -> f64 {
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
    fn baseline_of(&self, run: &Run, costs: &Costs) -> f64 {
        let depth = match run.next {
            Next::Exited(_) => run.depth,
            _ => self.layers,
        };
        baseline_cost(costs, self.layers, depth)
    }

    /// The acceptance rate from which on one more token, after `drafted` others of which all are
    /// accepted with probability `all_accepted`, is worth what it costs.
    fn min_rate(&self, drafted: usize, all_accepted: f64, costs: &Costs) -> f64 {
        // a token is worth what it would cost otherwise
        let worth = self.baseline / self.expected_speedup;
        self.cost_of_next(drafted, costs) / (all_accepted * worth)
    }

    /// How far to go on from a token after `drafted` others, at most to `tokens` tokens.
    fn ahead(&self, drafted: usize, tokens: usize, all_accepted: f64, costs: &Costs) -> Ahead {
        let rates = &self.depths[self.current].rates;
        let mut ahead = Ahead {
            acceptance: std::array::from_fn(|bin| rates[bin].estimate() as f32),
            ..Ahead::of(tokens.min(MAX_AHEAD))
        };
        for (index, min_accepted) in ahead.min_accepted.iter_mut().enumerate() {
            *min_accepted = self.min_rate(drafted + index, all_accepted, costs) as f32;
        }
        ahead
    }

    /// Run `newest` up to the draft's depth, and further where its acceptance rate there would be
    /// below `min_rate`: the positions that wait then run with it.
    fn run(
        &mut self,
        newest: u32,
        min_rate: f64,
        ahead: Ahead,
        context: &mut DraftContext<'_>,
    ) -> Result<StepOutcome> {
        let current = &self.depths[self.current];
        let (rule, max_depth) = current.rule(context.rule, self.runs.len(), min_rate, self.layers);
        let ahead = if rule.is_none() {
            ahead
        } else {
            Ahead::default()
        };
        let logits = context.logits(self.runs.len() + ahead.tokens);
        let step = SequenceStep {
            sequence: context.sequence,
            tokens: &[newest],
            rule: rule.as_ref(),
            max_depth,
            logits,
            ahead,
            next_draft: None,
        };
        let mut outcomes = context.backend.step(&mut [step], context.interrupt)?;
        Ok(outcomes.swap_remove(0))
    }

    /// Note the run of the `index`-th token of `outcome`. Returns what it says of the next.
    fn note_run(
        &mut self,
        outcome: &StepOutcome,
        index: usize,
        draft: &mut Draft,
        context: &mut DraftContext<'_>,
    ) -> Next {
        let next = self.next(outcome, index, &mut context.choice);
        let depth = match next {
            Next::Verified => draft.depth,
            _ => outcome.exit.layer,
        };
        self.runs.push(Run { depth, next });
        draft.exits.push(match next {
            Next::Exited(_) => Some(TakenExit {
                exit: outcome.exit,
                logits: outcome.logits.clone(),
            }),
            _ => None,
        });
        next
    }

    /// What `outcome` says of the token after its `index`-th.
    fn next(&self, outcome: &StepOutcome, index: usize, choice: &mut Foresight<'_>) -> Next {
        // of an exit, there is one row
        let row = outcome.logits.rows();
        let logits = outcome.logits.at(index, row.len());
        match outcome.exit.reason {
            ExitReason::FullDepth => Next::Verified,
            ExitReason::DepthLimit | ExitReason::Draft => {
                let probability = outcome.exit_signals.map(|signals| signals.learned);
                let probability = probability.or(outcome.margins.get(index).copied());
                let bin = margin_bin(probability.unwrap_or_else(|| margin(row)));
                Next::Drafted(choice.choose(logits), bin)
            }
            _ => Next::Exited(choice.choose(logits)),
        }
    }
}

impl Depth {
    /// The rule and the depth limit of a token after `waiting` others of the draft. Where the
    /// `policy` reads the exit head at the draft's depth, tokens below `min_rate` go on to full
    /// depth; elsewhere only the head's logits show how probable a token is, and it is drafted.
    fn rule(
        &self,
        policy: Option<&ExitRule>,
        waiting: usize,
        min_rate: f64,
        layers: usize,
    ) -> (Option<ExitRule>, usize) {
        let Some(policy) = policy else {
            return (None, self.depth);
        };
        let mut rule = policy.clone();
        if waiting > 0 {
            // positions that wait would have to run beyond an exit deeper than theirs
            rule = rule.up_to(self.depth);
        }
        if !policy.reads_exit_head(self.depth) {
            return (Some(rule), self.depth);
        }
        let threshold = self.min_probability(min_rate);
        let (reason, signal) = (ExitReason::Draft, Signal::Learned);
        let draft = Criterion::at_depth(reason, layers, self.depth, signal, threshold);
        (Some(rule.or(draft)), layers)
    }
}

impl Drafter for EarlyExit {
    fn start(&mut self) {
        self.depths
            .iter_mut()
            .for_each(|depth| depth.rounds.start());
    }

    fn expected_speedup(
        &mut self,
        history: &[u32],
        _: usize,
        _: &Costs,
        baseline: TokenCost,
    ) -> f64 {
        let (mut best, mut prior) = (0.0, PRIOR_SPEEDUP);
        for (index, depth) in self.depths.iter_mut().enumerate() {
            depth.rounds.idle(history.len());
            depth.rates.iter_mut().for_each(AcceptanceRate::decay);
            let speedup = depth.rounds.speedup(prior);
            if speedup > best {
                (best, self.current) = (speedup, index);
            }
            prior = speedup * SHALLOWER_SPEEDUP;
        }
        // rounds have passes of their own, which were compared with those of a token alone
        best *= baseline.of_alone;
        self.expected_speedup = best.max(1.0);
        self.baseline = baseline.seconds;
        best
    }

    fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Proposal> {
        let mut draft = Draft {
            depth: self.depths[self.current].depth,
            ..Draft::default()
        };
        let max_tokens = max_tokens.min(MAX_DRAFTED);
        let mut newest = history[history.len() - 1];
        let mut all_accepted = 1.0;
        self.runs.clear();
        loop {
            let (drafted, costs) = (draft.tokens.len(), context.backend.costs());
            let min_rate = match max_tokens - drafted {
                0 => f64::INFINITY,
                _ => self.min_rate(drafted, all_accepted, costs),
            };
            let most = (max_tokens - drafted + 1).min(context.backend.capabilities().ahead);
            let ahead = self.ahead(drafted, most, all_accepted, costs);
            let outcome = self.run(newest, min_rate, ahead, context)?;
            let count = match outcome.exit.reason {
                ExitReason::DepthLimit => outcome.logits.tokens().len().max(1),
                _ => 1,
            };
            for index in 0..count {
                let drafted = draft.tokens.len();
                let next = self.note_run(&outcome, index, &mut draft, context);
                match next {
                    Next::Exited(token) => newest = token,
                    Next::Drafted(token, bin) => {
                        let min_rate =
                            self.min_rate(drafted, all_accepted, context.backend.costs());
                        let rate = self.depths[self.current].rates[bin].estimate();
                        if index + 1 == count && (drafted == max_tokens || rate < min_rate) {
                            return Ok(Proposal::Draft(draft));
                        }
                        all_accepted *= rate;
                        newest = token;
                    }
                    Next::Verified => draft.verified = Some(outcome.logits.clone()),
                }
                // before the first drafted token there is nothing that a token would have to wait for
                if draft.is_certain() || draft.verified.is_some() || drafted == max_tokens {
                    return Ok(Proposal::Draft(draft));
                }
                draft.tokens.push(newest);
            }
        }
    }

    fn observe(&mut self, tokens: &[u32], costs: &Costs) {
        let full = full_depth_cost(costs, self.layers, 1);
        let came = &self.runs[..tokens.len()];
        let baseline: f64 = came.iter().map(|run| self.baseline_of(run, costs)).sum();
        let drafted = |run: &Run| matches!(run.next, Next::Drafted(..));
        let cost = if self.runs.iter().any(drafted) {
            self.cost_of_round(costs)
        } else {
            baseline
        };
        let depth = &mut self.depths[self.current];
        for (token, run) in tokens.iter().zip(&self.runs) {
            if let Next::Drafted(drafted, bin) = run.next {
                depth.rates[bin].observe(*token == drafted);
            }
        }
        for run in &self.runs {
            depth.ran = DECAY * depth.ran + (1.0 - DECAY) * run.depth as f64;
        }
        if full > 0.0 {
            depth.rounds.observe(baseline / full, cost / full);
        }
    }

    fn recall(&mut self, acceptance: &Acceptance) {
        for remembered in &acceptance.early_exit {
            let mut depths = self.depths.iter_mut();
            if let Some(depth) = depths.find(|depth| depth.depth == remembered.depth) {
                depth.recall(remembered);
            }
        }
    }

    fn record(&self, acceptance: &mut Acceptance) {
        acceptance.early_exit = self.depths.iter().map(Depth::record).collect();
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

/// The probability of the most probable token less that of the second.
fn margin(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > first {
            (first, second) = (logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    (1.0 - (second - first).exp()) / sum_of_exponentials(logits, first) as f32
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
    fn drafts_continue_below_the_bins_that_pay() {
        let mut depth = Depth::new(4);
        assert_eq!(depth.min_probability(0.0), 0.0);
        assert_eq!(depth.min_probability(f64::INFINITY), f32::INFINITY);
        // priors rise from 0.53 to 0.97
        assert_eq!(depth.min_probability(0.7), 3.0 / BINS as f32);
        for _ in 0..100 {
            depth.rates[6].observe(false);
        }
        assert_eq!(depth.min_probability(0.7), 7.0 / BINS as f32);
    }

    #[test]
    fn drafts_go_to_exits_above_full_depth() {
        assert_eq!(nearest(&[4, 8, 12], 12, 3.0), Some(4));
        assert_eq!(nearest(&[12], 12, 3.0), None);
    }
}
