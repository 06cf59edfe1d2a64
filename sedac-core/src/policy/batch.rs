//! The exits of many tokens at once.

use rayon::prelude::*;

use super::rule::{ExitRule, RuleState};
use super::{ByDepth, ExitPolicy, ExitSignals, Probe, Signals, Stability, Thresholds};
use crate::error::Result;

/// Tokens that one task decides.
const TOKENS_PER_TASK: usize = 256;

/// Signals of n tokens after one depth.
#[derive(Debug, Clone, Copy)]
pub struct BatchSignals<'a> {
    /// Stabilities, `[n]`.
    pub stability: &'a [f32],
    /// The entropy probe's risks, `[n]`, where the depth has a probe.
    pub risk: Option<&'a [f32]>,
    /// What the exit head gives, `[n]`, where the rule [reads](ExitRule::reads_exit_head) it.
    pub exit: Option<&'a [ExitSignals]>,
}

impl BatchSignals<'_> {
    fn of(&self, token: usize) -> Signals {
        Signals {
            stability: self.stability[token],
            risk: self.risk.map(|risk| risk[token]),
            exit: self.exit.map(|exit| exit[token]),
        }
    }

    fn len(&self) -> usize {
        let lengths = [
            Some(self.stability.len()),
            self.risk.map(<[f32]>::len),
            self.exit.map(<[ExitSignals]>::len),
        ];
        lengths.into_iter().flatten().min().unwrap_or(0)
    }
}

/// Where n tokens exit that go through the layers together.
#[derive(Debug, Clone)]
pub struct BatchDecision {
    rule: ExitRule,
    exit_layers: Vec<usize>,
    layers: usize,
    tokens: Vec<TokenDecision>,
}

/// What is decided of one token.
#[derive(Debug, Clone)]
struct TokenDecision {
    state: RuleState,
    decided: bool,
    exit_layer: usize,
    /// The first layer that runs without its MLP; the number of layers if none does.
    skip_from: usize,
}

impl BatchDecision {
    /// Of tokens that exit by `rule`, after the depths `exit_layers`, in a model of `layers`
    /// layers. Tokens that are `full_depth`, `[n]`, never exit.
    pub fn new(rule: ExitRule, exit_layers: &[usize], layers: usize, full_depth: &[bool]) -> Self {
        let start = rule.start();
        let token = |&decided: &bool| TokenDecision {
            state: start.clone(),
            decided,
            exit_layer: layers,
            skip_from: layers,
        };
        Self {
            tokens: full_depth.iter().map(token).collect(),
            exit_layers: exit_layers.to_vec(),
            layers,
            rule,
        }
    }

    /// The rule.
    pub fn rule(&self) -> &ExitRule {
        &self.rule
    }

    /// `depth` layers have run, with these signals. Asked after every layer, in order.
    ///
    /// # Panics
    /// When there are fewer signals than tokens.
    pub fn observe(&mut self, depth: usize, signals: &BatchSignals<'_>) {
        assert!(signals.len() >= self.tokens.len(), "signals for each token");
        let (rule, layers) = (&self.rule, self.layers);
        let may_exit = depth < layers && self.exit_layers.contains(&depth);
        let tasks = self.tokens.par_chunks_mut(TOKENS_PER_TASK).enumerate();
        tasks.for_each(|(task, tokens)| {
            for (token, index) in tokens.iter_mut().zip(task * TOKENS_PER_TASK..) {
                let decision = token.state.observe(rule, depth, &signals.of(index));
                let Some(decision) = decision.filter(|_| may_exit && !token.decided) else {
                    continue;
                };
                token.decided = true;
                token.exit_layer = depth;
                if let Some(share) = decision.skipped_mlps {
                    token.skip_from = layers - (share * (layers - depth) as f32).round() as usize;
                }
            }
        });
    }

    /// The depth of each token's decision to exit, `[n]`; the number of layers without one.
    pub fn exit_layers(&self) -> impl Iterator<Item = usize> {
        self.tokens.iter().map(|token| token.exit_layer)
    }

    /// Whether each token has left, `[n]`; soft exits stay.
    pub fn exited(&self) -> impl Iterator<Item = bool> {
        let soft = self.rule.is_soft();
        let layers = self.layers;
        let tokens = self.tokens.iter();
        tokens.map(move |token| token.exit_layer < layers && !soft)
    }

    /// The first layer that each token runs without its MLP, `[n]`; the number of layers if none.
    pub fn skip_from(&self) -> impl Iterator<Item = usize> {
        self.tokens.iter().map(|token| token.skip_from)
    }
}

/// The depth after which each token exits under `policy`; the number of layers if it never does.
///
/// stability: `[tokens, layers]`, row by row; exits: `[tokens]`.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) when a setting of the policy is out of range.
///
/// # Panics
/// When `stability` is not `layers` numbers for each of `exits`.
pub fn exits_by_stability(
    stability: &[f32],
    layers: usize,
    policy: &Stability,
    exits: &mut [u32],
) -> Result<()> {
    let rule = policy.compile(layers)?;
    decide(stability, layers, exits, |row| {
        let mut state = rule.start();
        let mut depths = (1..).zip(row);
        let exit = depths.find(|&(depth, &stability)| {
            let signals = Signals {
                stability,
                ..Signals::default()
            };
            state.observe(&rule, depth, &signals).is_some()
        });
        exit.map_or(layers, |(depth, _)| depth)
    });
    Ok(())
}

/// The depth after which each token exits, the first whose risk is below its threshold; `layers`
/// if none is. Decided by the values that `thresholds` has at the start.
///
/// risks: `[tokens, depths]`, the depths of `thresholds`, row by row; exits: `[tokens]`.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) when a threshold is not above 0.
///
/// # Panics
/// When `risks` is not a number for each depth and each of `exits`.
pub fn exits_by_risk(
    risks: &[f32],
    thresholds: &Thresholds,
    layers: usize,
    exits: &mut [u32],
) -> Result<()> {
    let thresholds: ByDepth = thresholds.iter().collect();
    let depths: Vec<usize> = thresholds.keys().copied().collect();
    let rule = Probe { thresholds }.compile(layers)?;
    decide(risks, depths.len(), exits, |row| {
        let mut state = rule.start();
        let mut risks = depths.iter().zip(row);
        let exit = risks.find(|&(&depth, &risk)| {
            let signals = Signals {
                risk: Some(risk),
                ..Signals::default()
            };
            state.observe(&rule, depth, &signals).is_some()
        });
        exit.map_or(layers, |(&depth, _)| depth)
    });
    Ok(())
}

fn decide(
    signals: &[f32],
    width: usize,
    exits: &mut [u32],
    exit_layer: impl Fn(&[f32]) -> usize + Sync,
) {
    assert_eq!(signals.len(), width * exits.len(), "a row for each token");
    let rows = signals.par_chunks(width.max(1) * TOKENS_PER_TASK);
    rows.zip(exits.par_chunks_mut(TOKENS_PER_TASK))
        .for_each(|(rows, exits)| {
            for (row, exit) in rows.chunks_exact(width.max(1)).zip(exits) {
                *exit = exit_layer(row) as u32;
            }
        });
}

#[cfg(test)]
mod tests {
    use super::super::{Cascade, ExitKind};
    use super::*;

    fn pseudo_random(count: usize) -> Vec<f32> {
        (0..count)
            .map(|n| (n * 7919 % 101) as f32 / 100.0)
            .collect()
    }

    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn tokens_exit_together_as_one_by_one() {
        let (layers, count) = (7, 1000);
        let stability = pseudo_random(layers * count);
        let policy = Stability {
            tau: 0.4,
            consecutive_k: 2,
            min_layer_ratio: 0.3,
        };
        let mut exits = vec![0; count];
        exits_by_stability(&stability, layers, &policy, &mut exits).unwrap();
        let rule = policy.compile(layers).unwrap();
        let all: Vec<usize> = (1..=layers).collect();
        let mut batch = BatchDecision::new(rule, &all, layers, &vec![false; count]);
        for depth in 1..=layers {
            let column: Vec<f32> = stability
                .iter()
                .skip(depth - 1)
                .step_by(layers)
                .copied()
                .collect();
            batch.observe(
                depth,
                &BatchSignals {
                    stability: &column,
                    risk: None,
                    exit: None,
                },
            );
        }
        assert!(
            batch
                .exit_layers()
                .eq(exits.iter().map(|&exit| exit as usize))
        );
        assert!(exits.contains(&7) && exits.contains(&3));
    }

    #[test]
    fn full_depth_tokens_and_forbidden_depths_never_exit() {
        let policy = Stability {
            tau: 0.0,
            consecutive_k: 1,
            min_layer_ratio: 0.0,
        };
        let rule = policy.compile(4).unwrap();
        let mut batch = BatchDecision::new(rule, &[2, 4], 4, &[true, false]);
        for depth in 1..=4 {
            let signals = BatchSignals {
                stability: &[1.0, 1.0],
                risk: None,
                exit: None,
            };
            batch.observe(depth, &signals);
        }
        assert!(batch.exit_layers().eq([4, 2]));
        assert!(batch.exited().eq([false, true]));
    }

    #[test]
    fn soft_exits_stay_and_skip_mlps() {
        let one = ByDepth::from([(2, 1.0)]);
        let policy = Cascade {
            thresholds: one.clone(),
            decay: 1.0,
            weights: one.clone(),
            targets: ByDepth::from([(2, 0.5)]),
            exit_kind: ExitKind::Soft,
        };
        let rule = policy.compile(10).unwrap();
        let mut batch = BatchDecision::new(rule, &[2, 10], 10, &[false, false]);
        let signals = BatchSignals {
            stability: &[0.0, 0.0],
            risk: Some(&[0.0, 0.9]),
            exit: None,
        };
        batch.observe(2, &signals);
        assert!(batch.exit_layers().eq([2, 10]));
        assert!(batch.exited().eq([false, false]));
        // (tanh(1) / 2 + 1 / 2) of 8 layers
        assert!(batch.skip_from().eq([3, 10]));
    }

    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn the_first_risk_below_its_threshold_counts() {
        let thresholds = Thresholds::new(&ByDepth::from([(2, 0.5), (4, 0.3)]));
        let risks = [0.4, 0.0, 0.5, 0.2, 0.6, 0.3, f32::NAN, f32::NAN];
        let mut exits = [0; 4];
        exits_by_risk(&risks, &thresholds, 6, &mut exits).unwrap();
        assert_eq!(exits, [2, 4, 6, 6]);
    }

    /// Decisions read thresholds while others move them: every token is decided by values that a
    /// threshold had.
    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn moving_thresholds_race_decisions() {
        let thresholds = Thresholds::new(&ByDepth::from([(2, 0.1)]));
        let risks = vec![0.5; 4096];
        rayon::scope(|scope| {
            scope.spawn(|_| {
                for round in 0..500 {
                    let goal = if round % 2 == 0 { 1.0 } else { 0.1 };
                    thresholds.follow(2, &mut [goal], 0.5, 1.0).unwrap();
                }
            });
            for _ in 0..20 {
                let mut exits = vec![0; risks.len()];
                exits_by_risk(&risks, &thresholds, 6, &mut exits).unwrap();
                assert!(
                    exits
                        .iter()
                        .all(|&exit| exit == exits[0] && (exit == 2 || exit == 6))
                );
            }
        });
    }
}
