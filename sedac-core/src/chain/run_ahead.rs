//! How far steps go on without the host.

use crate::backend::MAX_AHEAD;

/// What a pass costs beside its steps, relative to one. SmolLM2's took 0.2 on one H200, and steps of
/// larger models are longer; a length that is off by one costs little.
const PASS_COST: f64 = 0.1;
/// Observations count less with every newer token: what went wrong too often may go well again.
const DECAY: f64 = 0.99;
/// Steps that went well count as this number more.
const PRIOR_WEIGHT: f64 = 8.0;

/// How often steps went on with a token that was then not chosen, since the sampler's filters keep
/// others than the device knew: what ran after it was for nothing.
#[derive(Debug, Default)]
pub(super) struct RunAhead {
    mispredicted: f64,
    went_on: f64,
}

impl RunAhead {
    /// The number of tokens at which a pass costs the least for each that is chosen: about where the
    /// steps that are lost by then cost as much as another pass.
    pub(super) fn tokens(&self) -> usize {
        let rate = self.mispredicted / (self.went_on + PRIOR_WEIGHT);
        let tokens = (2.0 * PASS_COST / rate).sqrt().round();
        tokens.clamp(1.0, MAX_AHEAD as f64) as usize
    }

    /// A step gave `tokens` tokens, of which the last was `mispredicted` or ended it.
    pub(super) fn observe(&mut self, tokens: usize, mispredicted: bool) {
        let decay = DECAY.powi(tokens as i32);
        self.mispredicted = decay * self.mispredicted + f64::from(u8::from(mispredicted));
        let went_on = tokens - usize::from(!mispredicted);
        self.went_on = decay * self.went_on + went_on as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a chosen token costs where every `period`-th one is mispredicted, relative to a step.
    fn cost(period: usize, tokens: impl Fn(&RunAhead) -> usize) -> f64 {
        let (mut ahead, mut chosen, mut cost) = (RunAhead::default(), 0, 0.0);
        while chosen < 2000 {
            let wanted = tokens(&ahead);
            let until_wrong = period - chosen % period;
            let given = wanted.min(until_wrong);
            ahead.observe(given, until_wrong < wanted);
            chosen += given;
            cost += wanted as f64 + PASS_COST;
        }
        cost / chosen as f64
    }

    #[test]
    fn steps_that_went_well_go_on_as_far_as_they_can() {
        let mut ahead = RunAhead::default();
        assert_eq!(ahead.tokens(), MAX_AHEAD);
        for _ in 0..100 {
            ahead.observe(MAX_AHEAD, false);
            assert_eq!(ahead.tokens(), MAX_AHEAD);
        }
        ahead.observe(1, false);
        assert_eq!(
            ahead.tokens(),
            MAX_AHEAD,
            "a step of one token shows nothing"
        );
    }

    #[test]
    fn mispredictions_make_steps_short_for_a_while() {
        let mut ahead = RunAhead::default();
        for _ in 0..20 {
            ahead.observe(2, true);
        }
        assert_eq!(ahead.tokens(), 1);
        for _ in 0..1000 {
            ahead.observe(1, false);
        }
        assert!(ahead.tokens() > 4);
    }

    #[test]
    fn less_is_lost_than_by_steps_of_one_length() {
        let adapted = |period| cost(period, RunAhead::tokens);
        for period in [5, 10, 20] {
            assert!(
                adapted(period) < 0.9 * cost(period, |_| MAX_AHEAD),
                "{period}"
            );
        }
        for period in [50, 200] {
            assert!(adapted(period) < 0.98 * cost(period, |_| 1), "{period}");
        }
    }
}
