//! What passes cost on this machine.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A measurement may be too low by this much for each newer one: passes are only ever slowed down
/// by what else the machine does, but caches that grow slow them for good.
const RISE: f64 = 1.03;
/// And too high by this much for each later pass over another number of tokens, so that what once
/// seemed too slow to pay, perhaps while the machine did something else, is tried again some hundred
/// passes later. Not those over one token: all others are compared with them, and a drafter that always
/// pays lets none run. Of other numbers of tokens it says nothing that one was not measured for long.
const FALL: f64 = 0.999;
/// What is left in the end.
const LEAST_SHARE: f64 = 0.01;
/// Longer passes are prefill's, and no draft's, also where several texts share them.
const MAX_RECORDED: usize = 64;

/// Seconds that passes over some numbers of tokens took, in a layer and in the head.
///
/// Decoding waits for weights to arrive from memory, so a pass over a few tokens takes little
/// longer than over one. How much is what decides whether a draft pays.
#[derive(Debug, Clone, Default)]
pub struct Costs {
    layer: Curve,
    head: Curve,
    /// Of the trained drafter, for a token of each of so many sequences.
    draft: Curve,
    /// None where there are no such bounds.
    passes: Option<PassTokens>,
}

/// How many tokens passes have on a backend that has bounds.
#[derive(Debug, Clone, Copy)]
struct PassTokens {
    /// Of a pass.
    pass: usize,
    /// Of a batch, which takes as long as one of the next multiple of `pass`.
    batch: usize,
}

impl PassTokens {
    /// Tokens that take as long as `tokens` of them.
    fn alike(self, tokens: usize) -> usize {
        match tokens > self.pass {
            true => tokens.next_multiple_of(self.pass).min(self.batch),
            false => tokens,
        }
    }
}

impl Costs {
    /// Of a backend whose passes have up to `pass` tokens, 1 or more, and whose batches have up to `batch`,
    /// as many or more; it takes more tokens in several batches.
    pub fn of_passes(pass: usize, batch: usize) -> Self {
        Self {
            passes: Some(PassTokens { pass, batch }),
            ..Self::default()
        }
    }

    /// Tokens that take as long as `tokens` of them.
    fn alike(&self, tokens: usize) -> usize {
        self.passes.map_or(tokens, |passes| passes.alike(tokens))
    }

    /// `layers` layers took `elapsed` for `tokens` tokens.
    pub fn note_layers(&mut self, layers: usize, tokens: usize, elapsed: Duration) {
        let tokens = self.alike(tokens);
        self.layer
            .note(tokens, elapsed.as_secs_f64() / layers as f64);
    }

    /// The head, which ends a pass, took `elapsed` for `tokens` tokens.
    pub fn note_head(&mut self, tokens: usize, elapsed: Duration) {
        let tokens = self.alike(tokens);
        self.head.note(tokens, elapsed.as_secs_f64());
        for curve in [&mut self.layer, &mut self.head] {
            curve.fall(|others| others != tokens && others > 1);
        }
        self.draft.fall(|_| true);
    }

    /// The trained drafter took `elapsed` for `tokens` tokens, drafted for `sequences` sequences, up to
    /// `at_once` in one launch.
    pub fn note_draft(
        &mut self,
        (sequences, at_once): (usize, usize),
        tokens: usize,
        elapsed: Duration,
    ) {
        let launches = sequences.div_ceil(at_once);
        let of_each = tokens as f64 / sequences as f64;
        let of_launch = elapsed.as_secs_f64() / launches as f64;
        self.draft
            .note(sequences.div_ceil(launches), of_launch / of_each);
    }

    /// What is known of drafts and of passes that verify them, for later processes.
    pub fn record(&self) -> CostRecord {
        CostRecord {
            layer: self.layer.record(),
            head: self.head.record(),
            draft: self.draft.record(),
        }
    }

    /// Start from what an earlier process [recorded](Self::record).
    pub fn recall(&mut self, record: &CostRecord) {
        self.layer.recall(&record.layer);
        self.head.recall(&record.head);
        self.draft.recall(&record.draft);
    }

    /// Seconds for `tokens` tokens through `layers` layers.
    pub fn layers(&self, layers: usize, tokens: usize) -> f64 {
        layers as f64 * self.in_passes(&self.layer, tokens)
    }

    /// Seconds for the logits of `tokens` tokens.
    pub fn head(&self, tokens: usize) -> f64 {
        self.in_passes(&self.head, tokens)
    }

    /// Seconds for a token of the trained drafter, which drafts for `sequences` sequences in one launch.
    pub fn draft_token(&self, sequences: usize) -> f64 {
        self.draft.at(sequences) / sequences as f64
    }

    /// Of as many passes or batches as `tokens` tokens take.
    fn in_passes(&self, curve: &Curve, tokens: usize) -> f64 {
        let most = self.passes.map_or(tokens, |passes| passes.batch).max(1);
        let rest = match tokens % most {
            0 => 0.0,
            rest => curve.at(self.alike(rest)),
        };
        match tokens / most {
            0 => rest,
            whole => whole as f64 * curve.at(most) + rest,
        }
    }
}

/// Seconds by the number of tokens in a pass.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostRecord {
    /// For a layer.
    pub layer: BTreeMap<usize, f64>,
    /// For the head.
    pub head: BTreeMap<usize, f64>,
    /// Of the trained drafter, by sequences that it drafts a token for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub draft: BTreeMap<usize, f64>,
}

impl CostRecord {
    /// Whether every cost is finite and above 0.
    pub(crate) fn is_sound(&self) -> bool {
        let passes = self.layer.values().chain(self.head.values());
        let mut seconds = passes.chain(self.draft.values());
        seconds.all(|&seconds| seconds > 0.0 && seconds.is_finite())
    }
}

/// Measurements by the number of tokens.
#[derive(Debug, Clone, Default)]
struct Curve {
    costs: BTreeMap<usize, Cost>,
    /// What follows of these, in the order of tokens: it is asked for more often than it changes.
    known: Vec<KnownCost>,
}

/// Seconds of a known number of tokens.
#[derive(Debug, Clone, Copy)]
struct KnownCost {
    tokens: usize,
    /// As measured, however long ago. More tokens never cost less than fewer: a measurement that says so
    /// was disturbed.
    measured: f64,
    /// The same of the next fewer tokens that are known.
    fewer: f64,
    /// What share of `measured` it is believed to take now.
    share: f64,
}

impl KnownCost {
    /// What it is believed to cost now.
    fn believed(&self) -> f64 {
        (self.measured * self.share).max(self.fewer)
    }
}

/// Seconds of something that runs again and again.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Whether it has run. The first run makes buffers too and does not count.
    has_run: bool,
    measured: Option<f64>,
    /// In an earlier process.
    remembered: Option<f64>,
    /// What share of that it is believed to take now.
    share: f64,
}

impl Default for Cost {
    fn default() -> Self {
        Self {
            has_run: false,
            measured: None,
            remembered: None,
            share: 1.0,
        }
    }
}

impl Curve {
    fn note(&mut self, tokens: usize, seconds: f64) {
        self.costs.entry(tokens).or_default().note(seconds);
        self.conclude();
    }

    /// Believe less of the costs of those numbers of tokens that `falls` names.
    fn fall(&mut self, falls: impl Fn(usize) -> bool) {
        let known = self.costs.iter_mut().filter(|(_, cost)| cost.is_known());
        for (_, cost) in known.filter(|&(&tokens, _)| falls(tokens)) {
            cost.share = (cost.share * FALL).max(LEAST_SHARE);
        }
        self.conclude();
    }

    fn record(&self) -> BTreeMap<usize, f64> {
        let recorded = self.known.iter().filter(|of| of.tokens <= MAX_RECORDED);
        recorded.map(|of| (of.tokens, of.measured)).collect()
    }

    fn recall(&mut self, record: &BTreeMap<usize, f64>) {
        for (&tokens, &seconds) in record {
            self.costs.entry(tokens).or_default().remembered = Some(seconds);
        }
        self.conclude();
    }

    /// How much slower passes are now than when they were recorded: by as much as those over one
    /// token.
    fn scale(&self) -> f64 {
        let one = self.costs.get(&1);
        let scale = one.and_then(|one| Some(one.measured? / one.remembered?));
        scale.unwrap_or(1.0)
    }

    fn conclude(&mut self) {
        let scale = self.scale();
        let known = |(&tokens, cost): (&usize, &Cost)| {
            Some(KnownCost {
                tokens,
                measured: cost.seconds(scale)?,
                fewer: 0.0,
                share: cost.share,
            })
        };
        self.known.clear();
        self.known.extend(self.costs.iter().filter_map(known));
        let mut most = f64::INFINITY;
        for of in self.known.iter_mut().rev() {
            most = most.min(of.measured);
            of.measured = most;
        }
        for index in 1..self.known.len() {
            self.known[index].fewer = self.known[index - 1].measured;
        }
    }

    /// What is not known lies on a line between what is, and costs as much as the nearest known
    /// beyond.
    fn at(&self, tokens: usize) -> f64 {
        let (below, above) = self
            .known
            .split_at(self.known.partition_point(|of| of.tokens < tokens));
        match (below.last(), above.first()) {
            (Some(low), Some(high)) => {
                let along = (tokens - low.tokens) as f64 / (high.tokens - low.tokens) as f64;
                low.measured + (high.believed() - low.measured) * along
            }
            (None, Some(high)) => high.believed(),
            (Some(low), None) => low.measured,
            (None, None) => 0.0,
        }
    }
}

impl Cost {
    /// It took `seconds`.
    fn note(&mut self, seconds: f64) {
        if self.has_run {
            let known = self.measured.unwrap_or(f64::INFINITY);
            self.measured = Some(seconds.min(known * RISE));
            self.share = 1.0;
        }
        self.has_run = true;
    }

    fn is_known(&self) -> bool {
        self.measured.is_some() || self.remembered.is_some()
    }

    /// What was remembered takes `scale` times as long now.
    fn seconds(&self, scale: f64) -> Option<f64> {
        let remembered = || self.remembered.map(|seconds| scale * seconds);
        self.measured.or_else(remembered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measured twice, as the first time does not count.
    fn note(costs: &mut Costs, tokens: usize, seconds: u64) {
        for _ in 0..2 {
            costs.note_layers(2, tokens, Duration::from_secs(seconds));
        }
    }

    #[test]
    fn costs_between_measurements_lie_on_a_line() {
        let mut costs = Costs::default();
        assert_eq!(costs.layers(1, 1), 0.0);
        note(&mut costs, 1, 2);
        note(&mut costs, 5, 4);
        let layer = |tokens| costs.layers(1, tokens);
        assert_eq!(
            [layer(1), layer(3), layer(5), layer(9)],
            [1.0, 1.5, 2.0, 2.0]
        );
        assert_eq!(costs.layers(3, 1), 3.0);
        assert_eq!(costs.head(1), 0.0);
    }

    #[test]
    fn more_tokens_than_a_pass_has_take_several() {
        let mut costs = Costs::of_passes(4, 4);
        note(&mut costs, 1, 2);
        note(&mut costs, 4, 6);
        let layer = |tokens| costs.layers(1, tokens);
        assert_eq!(
            [layer(4), layer(5), layer(8), layer(9)],
            [3.0, 4.0, 6.0, 7.0]
        );
    }

    #[test]
    fn batches_of_about_as_many_tokens_take_as_long() {
        let mut costs = Costs::of_passes(4, 12);
        for (tokens, seconds) in [(1, 2), (4, 6), (5, 10), (11, 12)] {
            note(&mut costs, tokens, seconds);
        }
        let layer = |tokens| costs.layers(1, tokens);
        assert_eq!([layer(3), layer(4)], [1.0 + 4.0 / 3.0, 3.0]);
        assert_eq!([5, 8, 9, 12].map(layer), [5.0, 5.0, 6.0, 6.0]);
        assert_eq!([13, 17].map(layer), [7.0, 11.0]);
    }

    #[test]
    fn drafts_for_several_sequences_are_cheaper_for_each() {
        let mut costs = Costs::default();
        assert_eq!(costs.draft_token(2), 0.0);
        // the last is two launches for four
        for (sequences, tokens, seconds) in [(1, 3, 12), (4, 8, 16), (8, 8, 16)] {
            for _ in 0..2 {
                costs.note_draft((sequences, 4), tokens, Duration::from_secs(seconds));
            }
        }
        assert_eq!([1, 4].map(|n| costs.draft_token(n)), [4.0, 2.0]);
        let known: Vec<_> = costs.record().draft.into_keys().collect();
        assert_eq!(known, [1, 4]);
        let mut later = Costs::default();
        later.recall(&costs.record());
        assert_eq!(later.draft_token(4), 2.0);
    }

    #[test]
    fn a_drafter_that_was_disturbed_is_believed_to_be_faster_in_the_end() {
        let mut costs = Costs::default();
        for _ in 0..2 {
            costs.note_draft((1, 1), 1, Duration::from_secs(100));
        }
        for _ in 0..3000 {
            costs.note_head(1, Duration::from_secs(1));
        }
        assert!((4.0..6.0).contains(&costs.draft_token(1)));
    }

    #[test]
    fn neither_the_first_pass_nor_a_slow_one_counts() {
        let mut costs = Costs::default();
        for seconds in [5, 2, 1, 9] {
            costs.note_head(1, Duration::from_secs(seconds));
        }
        assert_eq!(costs.head(1), RISE);
    }

    #[test]
    fn what_is_not_measured_any_more_is_believed_to_get_cheaper() {
        let mut costs = Costs::default();
        note(&mut costs, 1, 2);
        note(&mut costs, 4, 8);
        for _ in 0..200 {
            costs.note_head(1, Duration::from_secs(1));
        }
        assert!((3.2..3.3).contains(&costs.layers(1, 4)));
        for _ in 0..10_000 {
            costs.note_head(1, Duration::from_secs(1));
        }
        assert_eq!(costs.layers(1, 4), costs.layers(1, 1));
    }

    #[test]
    fn what_was_measured_long_ago_makes_fewer_tokens_no_cheaper() {
        let mut costs = Costs::default();
        for (tokens, seconds) in [(1, 4), (2, 5), (8, 7), (60, 20)] {
            note(&mut costs, tokens, seconds);
        }
        let layer = |costs: &Costs, tokens| costs.layers(2, tokens);
        for _ in 0..10_000 {
            costs.note_head(1, Duration::from_secs(1));
            // as passes do that verify drafts
            costs.note_layers(2, 2, Duration::from_secs(5));
            costs.note_layers(2, 8, Duration::from_secs(7));
        }
        assert_eq!([2, 8].map(|tokens| layer(&costs, tokens)), [5.0, 7.0]);
        // these are tried again
        assert_eq!([9, 60].map(|tokens| layer(&costs, tokens)), [7.0, 7.0]);
        let mut later = Costs::default();
        later.recall(&costs.record());
        assert_eq!(layer(&later, 60), 20.0);
        note(&mut costs, 60, 20);
        assert_eq!(layer(&costs, 60), 20.0);
    }

    #[test]
    fn one_token_costs_what_it_did_while_others_are_verified() {
        let mut costs = Costs::default();
        note(&mut costs, 1, 2);
        note(&mut costs, 4, 3);
        for _ in 0..5000 {
            costs.note_head(4, Duration::from_secs(1));
        }
        assert_eq!(costs.layers(1, 1), 1.0);
    }

    #[test]
    fn more_tokens_show_that_fewer_were_disturbed() {
        let mut costs = Costs::default();
        for (tokens, seconds) in [(1, 2), (3, 30), (4, 4), (8, 6)] {
            note(&mut costs, tokens, seconds);
        }
        let layer = |tokens| costs.layers(1, tokens);
        assert_eq!(
            [layer(1), layer(2), layer(3), layer(4)],
            [1.0, 1.5, 2.0, 2.0]
        );
        assert_eq!(costs.record().layer[&3], 2.0);
    }

    #[test]
    fn remembered_costs_are_relative_to_those_of_one_token() {
        let mut before = Costs::default();
        note(&mut before, 1, 2);
        note(&mut before, 8, 4);
        note(&mut before, 256, 90);
        let record = before.record();
        assert_eq!(record.layer, BTreeMap::from([(1, 1.0), (8, 2.0)]));
        let mut costs = Costs::default();
        costs.recall(&record);
        assert_eq!([costs.layers(1, 1), costs.layers(1, 8)], [1.0, 2.0]);
        note(&mut costs, 1, 6);
        assert_eq!([costs.layers(1, 1), costs.layers(1, 8)], [3.0, 6.0]);
        assert_eq!(costs.record().layer, BTreeMap::from([(1, 3.0), (8, 6.0)]));
        note(&mut costs, 8, 14);
        assert_eq!(costs.layers(1, 8), 7.0);
    }

    #[test]
    fn costs_are_numbers_above_zero() {
        let of = |seconds| CostRecord {
            layer: BTreeMap::from([(1, seconds)]),
            ..CostRecord::default()
        };
        assert!(of(0.5).is_sound());
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(!of(seconds).is_sound(), "{seconds}");
        }
    }
}
