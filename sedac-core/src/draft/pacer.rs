//! Chooses by measured wall-clock time between ways to draft, and not drafting.

use std::time::Duration;

/// Old rounds count less and less: text changes.
const DECAY: f64 = 0.98;
/// An untried way counts as so many tokens gained at [`HOPE`] times the speed without drafts.
const HOPE_WEIGHT: f64 = 3.0;
const HOPE: f64 = 1.5;
/// Time that trials may lose: that of so many tokens, and this share of all time spent.
const LOSS_TOKENS: f64 = 3.0;
const LOSS_SHARE: f64 = 0.01;
/// The first so many tokens measure the speed without drafts,
const TOKENS_UNTIL_DRAFT: f64 = 1.5;
/// and after so many rounds that drafted it is measured anew.
const ROUNDS_UNTIL_MEASURED: usize = 96;

/// What a way of drafting gave so far, old rounds discounted.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    tokens: f64,
    seconds: f64,
}

impl Tally {
    fn add(&mut self, tokens: f64, seconds: f64) {
        self.tokens = self.tokens * DECAY + tokens;
        self.seconds = self.seconds * DECAY + seconds;
    }
}

/// Chooses between a number of ways to draft and not drafting.
///
/// The way with the most tokens per second is taken, where untried ways are given the benefit of
/// the doubt. What losing ways cost is kept under a small share of the time, so that a text on
/// which nothing pays is decoded at nearly the speed without drafts.
#[derive(Debug)]
pub(super) struct Pacer {
    ways: Vec<Tally>,
    without: Tally,
    current: usize,
    drafted_in_a_row: usize,
    elapsed: f64,
    lost: f64,
}

impl Pacer {
    pub(super) fn new(ways: usize) -> Self {
        Self {
            ways: vec![Tally::default(); ways],
            without: Tally::default(),
            current: 0,
            drafted_in_a_row: 0,
            elapsed: 0.0,
            lost: 0.0,
        }
    }

    /// The way to draft in this round; None is not to.
    pub(super) fn choose(&mut self) -> Option<usize> {
        let due = self.drafted_in_a_row == ROUNDS_UNTIL_MEASURED;
        if due || self.without.tokens < TOKENS_UNTIL_DRAFT {
            return None;
        }
        let best = self.best()?;
        self.current = best;
        Some(best)
    }

    /// The way chosen last gave `tokens` tokens in `elapsed`.
    pub(super) fn learn(&mut self, tokens: usize, elapsed: Duration) {
        let (tokens, seconds) = (tokens as f64, elapsed.as_secs_f64());
        self.drafted_in_a_row += 1;
        self.elapsed += seconds;
        self.lost = (self.lost + seconds - tokens * self.seconds_per_token()).max(0.0);
        self.ways[self.current].add(tokens, seconds);
    }

    /// A round that did not draft gave `tokens` tokens in `elapsed`.
    pub(super) fn learn_without(&mut self, tokens: usize, elapsed: Duration) {
        self.drafted_in_a_row = 0;
        self.elapsed += elapsed.as_secs_f64();
        self.without.add(tokens as f64, elapsed.as_secs_f64());
    }

    /// Without drafts.
    fn seconds_per_token(&self) -> f64 {
        self.without.seconds / self.without.tokens
    }

    fn best(&self) -> Option<usize> {
        let without = self.seconds_per_token();
        let speedup = |way: &Tally, hope: f64| {
            (way.tokens + hope) * without / (way.seconds + hope * without / HOPE)
        };
        let hoped = |way: &Tally| speedup(way, HOPE_WEIGHT);
        let ways = self.ways.iter().enumerate();
        let (best, tally) = ways.max_by(|(_, a), (_, b)| hoped(a).total_cmp(&hoped(b)))?;
        let may_lose = self.lost <= LOSS_TOKENS * without + LOSS_SHARE * self.elapsed;
        let hope = if may_lose { HOPE_WEIGHT } else { 0.0 };
        (speedup(tally, hope) > 1.0).then_some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of each way (the last is plain) out of `rounds`, and the time relative to plain.
    fn simulate(ways: &[(usize, f64)], rounds: usize) -> (Vec<usize>, f64) {
        let mut pacer = Pacer::new(ways.len());
        let mut counts = vec![0; ways.len() + 1];
        let (mut tokens_total, mut cost_total) = (0.0, 0.0);
        for _ in 0..rounds {
            let way = pacer.choose();
            let (tokens, cost) = way.map_or((1, 1.0), |way| ways[way]);
            counts[way.unwrap_or(ways.len())] += 1;
            let elapsed = Duration::from_secs_f64(cost);
            match way {
                Some(_) => pacer.learn(tokens, elapsed),
                None => pacer.learn_without(tokens, elapsed),
            }
            tokens_total += tokens as f64;
            cost_total += cost;
        }
        (counts, tokens_total / cost_total)
    }

    #[test]
    fn the_fastest_way_is_found() {
        let (counts, speed) = simulate(&[(1, 1.5), (3, 1.5), (2, 1.6)], 300);
        assert!(counts[1] > 250, "{counts:?}");
        assert!(speed > 1.8, "{speed}");
    }

    #[test]
    fn ways_that_never_pay_cost_nearly_nothing() {
        let (_, speed) = simulate(&[(1, 1.8), (1, 2.5), (1, 1.1)], 500);
        assert!(speed > 0.97, "{speed}");
    }

    #[test]
    fn nothing_is_drafted_before_the_speed_without_is_known() {
        let mut pacer = Pacer::new(1);
        assert_eq!(pacer.choose(), None);
        pacer.learn_without(2, Duration::from_secs(1));
        assert_eq!(pacer.choose(), Some(0));
    }
}
