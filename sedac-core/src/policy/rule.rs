//! Exit rules as data: what a policy compiles to, and the interpreter that hosts use.
//!
//! A rule is a table with a row for each depth. The host interprets it between engines; a device
//! gets [`Criterion::conditions`] as they are laid out in memory and decides by itself.

use super::{ExitReason, Signals};

/// What is compared after a depth.
#[repr(u32)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Signal {
    /// Nothing: the depth leaves the criterion's state as it is.
    #[default]
    None = 0,
    /// The layer's [stability](Signals::stability).
    Stability = 1,
    /// The entropy probe's [risk](Signals::risk).
    Risk = 2,
    /// The exit head's [margin](super::ExitSignals::margin).
    Margin = 3,
    /// The exit head's [probability](super::ExitSignals::learned) that its token is full depth's.
    Learned = 4,
}

impl Signal {
    /// Whether it comes from an exit head.
    pub fn is_of_exit_head(self) -> bool {
        matches!(self, Self::Margin | Self::Learned)
    }

    /// Its value; None where it was not measured.
    fn of(self, signals: &Signals) -> Option<f32> {
        match self {
            Self::None => None,
            Self::Stability => Some(signals.stability),
            Self::Risk => signals.risk,
            Self::Margin => signals.exit.map(|exit| exit.margin),
            Self::Learned => signals.exit.map(|exit| exit.learned),
        }
    }
}

/// When a signal's value v satisfies a condition. NaN never does.
#[repr(u32)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Comparison {
    /// v >= threshold.
    #[default]
    AtLeast = 0,
    /// v < threshold.
    Below = 1,
    /// The accumulator a reaches the target, after
    /// a = a * decay + clamp((threshold - v) / threshold, 0, 1) * weight.
    Accumulated = 2,
}

/// The row of one depth. The state of a token is a run of satisfied depths and an accumulator, both
/// 0 at first.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Condition {
    /// What is compared.
    pub signal: Signal,
    /// How.
    pub comparison: Comparison,
    /// With what.
    pub threshold: f32,
    /// The token may stop once this many depths in a row satisfied the condition; a depth that does
    /// not satisfy it sets the run to 0.
    pub run_length: u32,
    /// Of the accumulator, see [`Comparison::Accumulated`].
    pub decay: f32,
    /// Of the accumulator.
    pub weight: f32,
    /// Of the accumulator.
    pub target: f32,
    /// 1 where the token may stop, 0 where the depth only counts for the run and accumulator.
    pub may_exit: u32,
}

/// One reason to stop: a row for each depth from 1 to the number of layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Criterion {
    /// The reason.
    pub reason: ExitReason,
    /// The rows; the first is of depth 1.
    pub conditions: Vec<Condition>,
}

impl Criterion {
    /// A criterion whose row at each depth of a model of `layers` layers is `condition`'s.
    pub fn new(reason: ExitReason, layers: usize, condition: impl Fn(usize) -> Condition) -> Self {
        Self {
            reason,
            conditions: (1..=layers).map(condition).collect(),
        }
    }

    /// A criterion that compares `signal` with `threshold` after one depth only.
    pub fn at_depth(
        reason: ExitReason,
        layers: usize,
        depth: usize,
        signal: Signal,
        threshold: f32,
    ) -> Self {
        Self::new(reason, layers, |each| {
            if each != depth {
                return Condition::default();
            }
            Condition {
                signal,
                threshold,
                run_length: 1,
                may_exit: 1,
                ..Condition::default()
            }
        })
    }
}

/// When a token stops: where the first of its criteria says so.
#[derive(Debug, Clone, PartialEq)]
pub struct ExitRule {
    /// The criteria, each over the same depths.
    criteria: Vec<Criterion>,
    /// Whether a token that stops goes on without MLPs; see [`Decision::skipped_mlps`].
    soft: bool,
}

/// That a token stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Why.
    pub reason: ExitReason,
    /// Where exits are soft, the share of the remaining layers whose MLPs the token skips, the last
    /// ones: tanh(2a - 1) / 2 + 1 / 2 of the accumulator a. Attention always runs. None where the
    /// token leaves.
    pub skipped_mlps: Option<f32>,
}

impl ExitRule {
    /// A rule of one criterion.
    pub fn new(criterion: Criterion) -> Self {
        Self {
            criteria: vec![criterion],
            soft: false,
        }
    }

    /// The same rule with soft exits.
    #[must_use]
    pub fn soft(mut self) -> Self {
        self.soft = true;
        self
    }

    /// Whether exits are soft.
    pub fn is_soft(&self) -> bool {
        self.soft
    }

    /// The tables.
    pub fn criteria(&self) -> &[Criterion] {
        &self.criteria
    }

    /// Add a criterion that is asked after the present ones.
    #[must_use]
    pub fn or(mut self, criterion: Criterion) -> Self {
        self.criteria.push(criterion);
        self
    }

    /// The same rule without exits deeper than `depth`.
    #[must_use]
    pub fn up_to(mut self, depth: usize) -> Self {
        for criterion in &mut self.criteria {
            for condition in criterion.conditions.iter_mut().skip(depth) {
                *condition = Condition::default();
            }
        }
        self
    }

    /// The signals that are compared after `depth` layers.
    pub fn signals(&self, depth: usize) -> impl Iterator<Item = Signal> {
        let rows = self.criteria.iter();
        let rows = rows.filter_map(move |criterion| criterion.conditions.get(depth - 1));
        rows.map(|condition| condition.signal)
    }

    /// Whether what is decided after `depth` layers depends on the exit head there.
    pub fn reads_exit_head(&self, depth: usize) -> bool {
        self.signals(depth).any(Signal::is_of_exit_head)
    }

    /// Whether what is decided after `depth` layers depends on the entropy probe there.
    pub fn reads_risk(&self, depth: usize) -> bool {
        self.signals(depth).any(|signal| signal == Signal::Risk)
    }

    /// Whether a token may stop after `depth` layers.
    pub fn may_exit(&self, depth: usize) -> bool {
        let mut rows = self.criteria.iter();
        rows.any(|criterion| {
            let condition = criterion.conditions.get(depth - 1);
            condition.is_some_and(|condition| condition.may_exit != 0)
        })
    }

    /// The interpreter's state for a new token.
    pub fn start(&self) -> RuleState {
        RuleState(vec![CriterionState::default(); self.criteria.len()])
    }
}

/// What an interpreter remembers of one token.
#[derive(Debug, Clone)]
pub struct RuleState(Vec<CriterionState>);

#[derive(Debug, Clone, Copy, Default)]
struct CriterionState {
    run: u32,
    accumulator: f32,
}

impl RuleState {
    /// `depth` layers have run (1 to the number of layers), and `signals` are the last one's. Asked
    /// after every layer, also where the engines allow no exit, so that runs are counted whole.
    pub fn observe(
        &mut self,
        rule: &ExitRule,
        depth: usize,
        signals: &Signals,
    ) -> Option<Decision> {
        let mut decision = None;
        for (state, criterion) in self.0.iter_mut().zip(&rule.criteria) {
            let Some(condition) = criterion.conditions.get(depth - 1) else {
                continue;
            };
            if state.satisfies(condition, signals) && decision.is_none() {
                decision = Some(Decision {
                    reason: criterion.reason,
                    skipped_mlps: rule.soft.then(|| skipped_mlps(state.accumulator)),
                });
            }
        }
        decision
    }
}

impl CriterionState {
    /// Note the depth, and whether the token may stop there.
    fn satisfies(&mut self, condition: &Condition, signals: &Signals) -> bool {
        let Some(value) = condition.signal.of(signals) else {
            return false;
        };
        let satisfied = match condition.comparison {
            Comparison::AtLeast => value >= condition.threshold,
            Comparison::Below => value < condition.threshold,
            Comparison::Accumulated => self.accumulate(condition, value) >= condition.target,
        };
        self.run = if satisfied { self.run + 1 } else { 0 };
        self.run >= condition.run_length && condition.may_exit != 0
    }

    fn accumulate(&mut self, condition: &Condition, value: f32) -> f32 {
        let gained = ((condition.threshold - value) / condition.threshold).clamp(0.0, 1.0);
        self.accumulator = self.accumulator * condition.decay + gained * condition.weight;
        self.accumulator
    }
}

fn skipped_mlps(accumulator: f32) -> f32 {
    (2.0 * accumulator - 1.0).tanh() / 2.0 + 0.5
}

#[cfg(test)]
mod tests {
    use super::super::ExitSignals;
    use super::*;

    fn stable(stability: f32) -> Signals {
        Signals {
            stability,
            ..Signals::default()
        }
    }

    fn runs_of_two(layers: usize) -> ExitRule {
        ExitRule::new(Criterion::new(ExitReason::Stability, layers, |depth| {
            Condition {
                signal: Signal::Stability,
                threshold: 0.9,
                run_length: 2,
                may_exit: u32::from(depth >= 3),
                ..Condition::default()
            }
        }))
    }

    fn exit(rule: &ExitRule, stabilities: &[f32]) -> Option<usize> {
        let mut state = rule.start();
        (1..).zip(stabilities).find_map(|(depth, &stability)| {
            let decision = state.observe(rule, depth, &stable(stability));
            decision.map(|_| depth)
        })
    }

    #[test]
    fn a_dip_restarts_the_run_and_forbidden_depths_count() {
        let rule = runs_of_two(6);
        assert_eq!(exit(&rule, &[0.95, 0.5, 0.95, 0.95]), Some(4));
        assert_eq!(exit(&rule, &[1.0; 6]), Some(3));
        assert_eq!(exit(&rule, &[f32::NAN; 6]), None);
        assert_eq!(exit(&rule.up_to(2), &[1.0; 6]), None);
    }

    #[test]
    fn the_first_criterion_wins_and_every_one_keeps_its_state() {
        let learned = Criterion::at_depth(ExitReason::Draft, 6, 4, Signal::Learned, 0.7);
        let rule = runs_of_two(6).or(learned);
        assert!(rule.reads_exit_head(4) && !rule.reads_exit_head(5));
        assert!(!rule.may_exit(2) && rule.may_exit(4));
        let signals = |stability, learned| Signals {
            exit: Some(ExitSignals {
                learned,
                ..ExitSignals::default()
            }),
            ..stable(stability)
        };
        let reason = |stability, learned| {
            let mut state = rule.start();
            for depth in 1..=3 {
                assert_eq!(state.observe(&rule, depth, &stable(0.0)), None);
            }
            let decision = state.observe(&rule, 4, &signals(stability, learned));
            (decision.map(|decision| decision.reason), state)
        };
        assert_eq!(reason(1.0, 0.7).0, Some(ExitReason::Draft));
        let (none, mut state) = reason(1.0, 0.6);
        assert_eq!(none, None);
        let decision = state.observe(&rule, 5, &stable(1.0)).unwrap();
        assert_eq!(decision.reason, ExitReason::Stability);
        assert_eq!(decision.skipped_mlps, None);
    }

    #[test]
    fn devices_read_rows_of_eight_words() {
        assert_eq!(size_of::<[Condition; 3]>(), size_of::<[u32; 24]>());
    }
}
