//! What rounds of drafts cost, beside what their tokens cost without drafts.

/// The prior speedup counts as much as this number of rounds without drafts.
pub(super) const PRIOR_WEIGHT: f64 = 3.0;
/// Rounds count less with every newer one,
pub(super) const DECAY: f64 = 0.98;
/// and less with every token, whoever drafts: what did not pay may pay again.
const IDLE_DECAY: f64 = 0.999;
/// Rounds of earlier processes count as much as this number of rounds at full depth's cost.
pub(super) const MAX_REMEMBERED: f64 = 16.0;

/// Sums over rounds, relative to a token at full depth.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RoundCosts {
    /// What the tokens that rounds gave cost without drafts.
    pub(super) baseline: f64,
    /// What the rounds cost.
    pub(super) cost: f64,
    /// The text's length when it was last asked whether a round pays.
    asked_at: Option<usize>,
}

impl RoundCosts {
    /// The speedup to expect; `prior` before anything was observed.
    pub(super) fn speedup(&self, prior: f64) -> f64 {
        (self.baseline + prior * PRIOR_WEIGHT) / (self.cost + PRIOR_WEIGHT)
    }

    /// Another text begins. Rounds of earlier ones count no more than those of earlier processes.
    pub(super) fn start(&mut self) {
        self.asked_at = None;
        self.recall(self.baseline, self.cost);
    }

    /// The text has `length` tokens. A pass may have given several.
    pub(super) fn idle(&mut self, length: usize) {
        let factor = idle_decay(&mut self.asked_at, length);
        self.decay(factor);
    }

    /// A round gave tokens that cost `baseline` without drafts, for `cost`.
    pub(super) fn observe(&mut self, baseline: f64, cost: f64) {
        self.decay(DECAY);
        self.baseline += baseline;
        self.cost += cost;
    }

    /// Start from what an earlier process observed.
    pub(super) fn recall(&mut self, baseline: f64, cost: f64) {
        let scale = (MAX_REMEMBERED / cost).min(1.0);
        (self.baseline, self.cost) = (scale * baseline, scale * cost);
    }

    fn decay(&mut self, factor: f64) {
        self.baseline *= factor;
        self.cost *= factor;
    }
}

/// By how much rounds count less now that the text has `length` tokens: it had as many as `asked_at`
/// says when this was last asked of it.
pub(super) fn idle_decay(asked_at: &mut Option<usize>, length: usize) -> f64 {
    let before = asked_at.replace(length);
    let tokens = before.map_or(1, |before| length.saturating_sub(before));
    IDLE_DECAY.powi(tokens as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speedup_goes_from_the_prior_to_what_was_observed() {
        let mut costs = RoundCosts::default();
        assert!((costs.speedup(1.3) - 1.3).abs() < 1e-12);
        for _ in 0..500 {
            costs.observe(3.0, 2.0);
        }
        assert!((costs.speedup(1.3) - 1.5).abs() < 0.02);
        let before = costs.speedup(1.3);
        costs.idle(10);
        costs.idle(5010);
        assert!(costs.speedup(1.3) < before);
    }

    #[test]
    fn tokens_count_and_not_how_often_it_is_asked() {
        let observed = || {
            let mut costs = RoundCosts::default();
            (0..500).for_each(|_| costs.observe(1.0, 2.0));
            costs.idle(1);
            costs
        };
        let (mut often, mut seldom) = (observed(), observed());
        (2..=801).for_each(|length| often.idle(length));
        (1..=100).for_each(|step| seldom.idle(1 + 8 * step));
        assert!((often.cost - seldom.cost).abs() < 1e-9 * often.cost);
        seldom.start();
        let started = seldom.cost;
        assert!(started <= MAX_REMEMBERED);
        // a prompt is no idle time
        seldom.idle(5000);
        assert!((seldom.cost - IDLE_DECAY * started).abs() < 1e-12);
    }

    #[test]
    fn earlier_processes_weigh_no_more_than_some_rounds() {
        let mut costs = RoundCosts::default();
        costs.recall(3000.0, 2000.0);
        assert!((costs.cost - MAX_REMEMBERED).abs() < 1e-9);
        assert!((costs.baseline / costs.cost - 1.5).abs() < 1e-9);
        costs.recall(3.0, 2.0);
        assert!((costs.cost - 2.0).abs() < 1e-9);
    }
}
