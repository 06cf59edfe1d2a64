//! The toy model as a kernel that runs passes, and checks that they keep the contract.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sedac_core::backend::cuda::{
    BatchLimits, BatchOutcome, BatchPlan, BatchRow, ChainDevice, DraftPlan, FollowingDraft,
    MAX_CRITERIA, MAX_DRAFTS, MAX_ROWS, MAX_TABLES, PassOutcome, PassPlan, PassRow, RowExit,
    RowOutcome, RowRule, SequenceOutcome, SequenceRows,
};
use sedac_core::backend::{DraftedToken, margin_bin};
use sedac_core::policy::Condition;
use sedac_core::sampler::argmax;
use sedac_core::{Error, Result};

use super::checks::{check_batch, check_pass, rows_of};
use super::choices::{State, margin, race};
use super::drafts::{
    Verified, draft_logits, probability, taken_in, told, verified_by_batch, verified_by_pass,
};
use super::{CAPACITY, Cache, Caches, Hidden, VOCABULARY, ends};

/// Rows of batches.
const BATCHES: BatchLimits = BatchLimits {
    rows: 40,
    logits_rows: 20,
    rules: true,
};

/// Runs passes of the toy model.
pub(crate) struct ToyKernel {
    exit_layers: Vec<usize>,
    layers: usize,
    agreement: u64,
    caches: Vec<Caches>,
    saved: Vec<Vec<Option<Hidden>>>,
    conditions: Vec<Vec<Condition>>,
    logits: Vec<Vec<f32>>,
    clock: u64,
    /// The number of rows of each pass so far.
    pub(crate) passes: Vec<usize>,
    /// The number of passes so far.
    pub(crate) launches: Arc<AtomicUsize>,
    /// The number of rows of each batch so far.
    pub(crate) batches: Arc<Mutex<Vec<usize>>>,
    /// The number of sequences of each launch of a trained drafter so far.
    pub(crate) drafts: Arc<Mutex<Vec<usize>>>,
    /// Whether launches of a trained drafter fail.
    pub(crate) drafting_fails: bool,
    /// The number of steps of all passes so far.
    pub(crate) steps: Arc<AtomicUsize>,
    /// A token whose logits are NaN.
    pub(crate) poison: Option<u32>,
    /// Positions that a trained drafter takes in at once; 0 for none.
    pub(crate) draft_rows: usize,
    /// By slot, the tokens whose states its cache holds.
    drafter_caches: Vec<Vec<u32>>,
    /// What drafts after the last pass gave, until the host has waited for it.
    following: Vec<FollowingDraft>,
    /// The number of drafts that followed passes so far.
    pub(crate) followed: Arc<AtomicUsize>,
    /// Slots that its memory has room for beside those that there are.
    pub(crate) room: usize,
}

impl ToyKernel {
    /// A kernel with `slots` slots, of which the first one's cache is `first`.
    pub(crate) fn new(
        engine_sizes: &[usize],
        agreement: u64,
        slots: usize,
        first: &Caches,
    ) -> Self {
        let exit_layers = ends(engine_sizes);
        let layers = *exit_layers.last().unwrap();
        let empty: Cache = vec![vec![None; CAPACITY]; layers];
        *first.lock().unwrap() = empty.clone();
        let mut caches = vec![first.clone()];
        caches.resize_with(slots, || Arc::new(Mutex::new(empty.clone())));
        Self {
            exit_layers,
            layers,
            agreement,
            caches,
            saved: vec![vec![None; CAPACITY]; slots],
            conditions: vec![Vec::new(); MAX_TABLES],
            logits: Vec::new(),
            clock: 0,
            passes: Vec::new(),
            launches: Arc::default(),
            batches: Arc::default(),
            drafts: Arc::default(),
            drafting_fails: false,
            steps: Arc::default(),
            poison: None,
            draft_rows: 0,
            drafter_caches: vec![Vec::new(); slots],
            following: Vec::new(),
            followed: Arc::default(),
            room: usize::MAX,
        }
    }

    /// The cache of `slot`.
    pub(crate) fn cache(&self, slot: usize) -> Cache {
        self.caches[slot].lock().unwrap().clone()
    }

    /// Take the sequence number `index` of `pass` as deep as it goes.
    fn run_sequence(
        &mut self,
        pass: &PassPlan,
        index: usize,
        hidden: &mut [Hidden],
    ) -> SequenceOutcome {
        let sequence = &pass.sequences[index];
        let (rows, slot) = (rows_of(pass, sequence), sequence.slot as usize);
        for (row, hidden) in rows.iter().zip(hidden.iter_mut()) {
            *hidden = match u32::try_from(row.token) {
                Ok(token) => Hidden::of(token),
                Err(_) => self.saved[slot][row.position as usize].unwrap(),
            };
        }
        let mut states = [State::default(); MAX_CRITERIA];
        let newest = hidden.len() - 1;
        for layer in rows[newest].first_layer as usize..self.layers {
            let mut cache = self.caches[slot].lock().unwrap();
            for (row, hidden) in rows.iter().zip(hidden.iter_mut()) {
                let position = row.position as usize;
                assert!(cache[layer][..position].iter().all(Option::is_some));
                if row.first_layer as usize > layer {
                    assert!(cache[layer][position].is_some());
                } else {
                    hidden.run(layer, position, &mut cache);
                }
            }
            drop(cache);
            let depth = layer + 1;
            let rule = (sequence.conditions, sequence.criteria);
            let criterion = self.criterion(rule, depth, hidden[newest], &mut states);
            if criterion.is_none() && depth < sequence.max_depth as usize {
                continue;
            }
            assert!(self.exit_layers.contains(&depth));
            for (row, hidden) in rows.iter().zip(hidden.iter()) {
                self.leave(sequence, row, depth, *hidden);
            }
            let signals = hidden[newest].exit_signals(depth);
            return SequenceOutcome {
                depth: depth as i32,
                criterion: criterion.unwrap_or(-1),
                margin: signals.margin,
                learned: signals.learned,
                entropy: signals.entropy,
                ..SequenceOutcome::default()
            };
        }
        unreachable!("every sequence stops at its deepest layer")
    }

    /// What a row that stops after `depth` layers leaves to those that follow.
    fn leave(&mut self, sequence: &SequenceRows, row: &PassRow, depth: usize, hidden: Hidden) {
        let (slot, position) = (sequence.slot as usize, row.position as usize);
        let is_active = (row.first_layer as usize) < depth;
        if sequence.fills == 1 {
            let mut cache = self.caches[slot].lock().unwrap();
            (depth..self.layers).for_each(|layer| hidden.fill(layer, position, &mut cache));
        } else if is_active && depth < self.layers {
            self.saved[slot][position] = Some(hidden);
        }
    }

    /// Which criterion of the rule says stop after `depth` layers.
    fn criterion(
        &self,
        (conditions, criteria): (u64, i32),
        depth: usize,
        newest: Hidden,
        states: &mut [State; MAX_CRITERIA],
    ) -> Option<i32> {
        let table = match conditions {
            0 => &[][..],
            address => &self.conditions[address as usize - 1],
        };
        let rule = table.chunks(self.layers).take(criteria as usize);
        let mut found = None;
        for (number, (rows, state)) in rule.zip(states).enumerate() {
            if state.stops(rows[depth - 1], newest, depth) {
                found = found.or(Some(number as i32));
            }
        }
        found
    }

    /// Take a row of a batch through all layers. Returns its exit, and what it exits with.
    fn run_row(
        &self,
        row: BatchRow,
        mut hidden: Hidden,
        rule: Option<RowRule>,
    ) -> (RowExit, Hidden) {
        let (position, mut states) = (row.position as usize, [State::default(); MAX_CRITERIA]);
        let mut exit: Option<(RowExit, Hidden)> = None;
        for layer in 0..self.layers {
            let mut cache = self.caches[row.slot as usize].lock().unwrap();
            assert!(cache[layer][..position].iter().all(Option::is_some));
            match (exit, rule) {
                (Some(_), Some(rule)) if rule.freezes == 1 => {
                    hidden.fill(layer, position, &mut cache);
                }
                _ => hidden.run(layer, position, &mut cache),
            }
            let depth = layer + 1;
            if let (None, Some(rule)) = (exit, rule) {
                let rule = (rule.conditions, rule.criteria);
                exit = self
                    .criterion(rule, depth, hidden, &mut states)
                    .map(|criterion| {
                        let depth = depth as i32;
                        (RowExit { depth, criterion }, hidden)
                    });
            }
        }
        let full = RowExit {
            depth: self.layers as i32,
            criterion: -1,
        };
        exit.unwrap_or((full, hidden))
    }

    fn run_step(&mut self, pass: &PassPlan, step: usize, outcome: &mut PassOutcome) {
        let mut hidden = vec![Hidden::default(); pass.rows.len()];
        let first_sequence = step * pass.sequences.len();
        for (index, sequence) in pass.sequences.iter().enumerate() {
            assert_eq!(sequence.criteria == 0, sequence.conditions == 0);
            let rows = sequence.first_row as usize..(sequence.first_row + sequence.rows) as usize;
            outcome.sequence[first_sequence + index] =
                self.run_sequence(pass, index, &mut hidden[rows]);
        }
        for (index, hidden) in hidden.into_iter().enumerate() {
            let of_step = step * pass.rows.len() + index;
            let sequence = first_sequence + pass.rows[index].sequence as usize;
            if pass.logits_rows & 1 << index == 0 {
                self.logits.push(vec![f32::NAN; VOCABULARY]);
            } else {
                outcome.row[of_step] = self.head(hidden, outcome.sequence[sequence].depth);
                if pass.sampled_rows >> index & 1 == 1 {
                    let logits = self.logits.last().unwrap();
                    outcome.race[of_step] = race(pass.races[of_step], logits);
                }
            }
        }
        self.clock += 1000;
        (outcome.layers_ended[step], outcome.ended[step]) = (self.clock - 10, self.clock);
        outcome.steps = step as i32 + 1;
    }

    /// A launch of the trained drafter.
    fn launch(&mut self, plans: &[DraftPlan]) -> Result<Vec<Vec<DraftedToken>>> {
        assert!((1..=MAX_DRAFTS).contains(&plans.len()));
        let slots: HashSet<_> = plans.iter().map(|plan| plan.slot).collect();
        assert_eq!(slots.len(), plans.len());
        assert!(self.following.is_empty(), "drafts under way");
        if self.drafting_fails {
            return Err(Error::Cancelled);
        }
        self.drafts.lock().unwrap().push(plans.len());
        Ok(plans.iter().map(|plan| self.draft_one(plan)).collect())
    }

    fn draft_one(&mut self, plan: &DraftPlan) -> Vec<DraftedToken> {
        let count = plan.tokens.len();
        assert!((1..=self.draft_rows).contains(&count));
        let cache = self.cache(plan.slot);
        let known = &mut self.drafter_caches[plan.slot];
        let mut text = taken_in(&cache, known, plan.start..plan.start + count, &plan.tokens);
        let (mut drafted, mut accepted) = (Vec::new(), 1.0);
        while let Some(ahead) = &plan.ahead {
            let logits = draft_logits(&text, self.layers, self.agreement);
            let token = match &plan.races {
                Some(races) => race(races[drafted.len()], &logits).token,
                None => argmax(&logits),
            };
            let probability = probability(&logits, token);
            drafted.push(DraftedToken { token, probability });
            text.push(token);
            accepted *= ahead.acceptance[margin_bin(probability)];
            if !ahead.goes_on(drafted.len(), accepted) {
                break;
            }
        }
        drafted
    }

    /// Draft what is to follow a pass or a batch.
    fn follow(&mut self, drafts: &[DraftPlan], verified: &[Verified]) {
        for plan in drafts {
            self.followed.fetch_add(1, Ordering::Relaxed);
            let told = told(plan, verified);
            let draft = told.map(|told| FollowingDraft {
                positions: told.tokens.len(),
                followed: *told.tokens.last().unwrap(),
                drafted: self.draft_one(&told),
                span: self.clock..self.clock + 100,
            });
            self.following.push(draft.unwrap_or_default());
        }
    }

    fn head(&mut self, hidden: Hidden, depth: i32) -> RowOutcome {
        let mut logits = hidden.logits(depth as usize, self.layers, self.agreement);
        if self.poison == Some(hidden.token) {
            logits[0] = f32::NAN;
        }
        let token = argmax(&logits);
        let outcome = RowOutcome {
            token,
            logit: logits[token as usize],
            finite: logits.iter().all(|logit| logit.is_finite()).into(),
            margin: margin(&logits),
        };
        self.logits.push(logits);
        outcome
    }
}

/// Make the tokens chosen in a step those of the next. Returns whether it runs.
fn go_on(
    pass: &mut PassPlan,
    step: usize,
    outcome: &PassOutcome,
    accepted: &mut [f32; MAX_ROWS],
) -> bool {
    let (count, mut goes_on) = (pass.rows.len(), true);
    for (index, row) in pass.rows.iter_mut().enumerate() {
        let of_step = step * count + index;
        let chosen = outcome.row[of_step];
        row.token = match pass.sampled_rows >> index & 1 {
            1 => outcome.race[of_step].token as i32,
            _ => chosen.token as i32,
        };
        row.position += 1;
        accepted[index] *= pass.ahead.acceptance[margin_bin(chosen.margin)];
        let worth = accepted[index] >= pass.ahead.min_accepted[step];
        // as at the beginning of a chunk of attention
        goes_on &= worth && chosen.finite == 1 && row.position % 5 > 0;
    }
    goes_on
}

impl ChainDevice for ToyKernel {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn probes(&self) -> &[usize] {
        &self.exit_layers
    }

    fn exit_heads(&self) -> &[usize] {
        &self.exit_layers
    }

    fn write_conditions(&mut self, table: usize, conditions: &[Condition]) -> Result<u64> {
        assert!(conditions.len() <= MAX_CRITERIA * self.layers);
        self.conditions[table] = conditions.to_vec();
        Ok(1 + table as u64)
    }

    fn run(&mut self, pass: &PassPlan) -> Result<PassOutcome> {
        assert!(self.following.is_empty(), "drafts under way");
        self.passes.push(pass.rows.len());
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.logits = Vec::new();
        let mut outcome = PassOutcome {
            started: self.clock,
            ..PassOutcome::default()
        };
        let (mut of_step, mut accepted) = (pass.clone(), [1.0; MAX_ROWS]);
        for step in 0..pass.ahead.tokens {
            check_pass(&of_step, &self.exit_layers);
            self.run_step(&of_step, step, &mut outcome);
            self.steps.fetch_add(1, Ordering::Relaxed);
            if !go_on(&mut of_step, step, &outcome, &mut accepted) {
                break;
            }
        }
        assert!(pass.drafts.is_empty() || outcome.steps == 1);
        self.follow(&pass.drafts, &verified_by_pass(pass, &outcome));
        Ok(outcome)
    }

    fn batch_limits(&self) -> BatchLimits {
        BATCHES
    }

    fn run_batch(&mut self, plan: &BatchPlan) -> Result<BatchOutcome> {
        check_batch(plan, BATCHES);
        assert!(self.following.is_empty(), "drafts under way");
        self.batches.lock().unwrap().push(plan.rows.len());
        let mut exits = Vec::new();
        for (index, row) in plan.rows.iter().enumerate() {
            let logits_row = plan.logits_rows.iter().position(|&wanted| wanted == index);
            let rule = logits_row.and_then(|logits_row| plan.rules[logits_row]);
            exits.push(self.run_row(*row, Hidden::of(row.token as u32), rule));
        }
        let mut outcome = BatchOutcome {
            started: self.clock,
            layers_ended: self.clock + 990,
            ended: self.clock + 1000,
            ..BatchOutcome::default()
        };
        self.clock += 1000;
        self.logits.clear();
        for (index, (&row, by)) in plan.logits_rows.iter().zip(&plan.races).enumerate() {
            let (exit, hidden) = exits[row];
            outcome.exit[index] = exit;
            outcome.row[index] = self.head(hidden, exit.depth);
            if let Some(by) = by {
                outcome.race[index] = race(*by, self.logits.last().unwrap());
            }
        }
        self.follow(&plan.drafts, &verified_by_batch(plan, &outcome));
        Ok(outcome)
    }

    fn draft_rows(&self) -> usize {
        self.draft_rows
    }

    fn take_in(&mut self, plans: &[DraftPlan]) -> Result<()> {
        let drafted = self.launch(plans)?;
        assert!(plans.iter().all(|plan| plan.ahead.is_none()));
        assert!(drafted.iter().all(Vec::is_empty));
        Ok(())
    }

    fn draft(&mut self, plans: &[DraftPlan]) -> Result<Vec<Vec<DraftedToken>>> {
        let drafts = plans.iter().any(|plan| plan.ahead.is_some());
        assert!(drafts, "nothing to wait for");
        self.launch(plans)
    }

    fn following_drafts(&mut self) -> Result<Vec<FollowingDraft>> {
        Ok(std::mem::take(&mut self.following))
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>> {
        Ok(self.logits[rows].concat())
    }

    fn room(&self) -> Result<usize> {
        Ok(self.room)
    }

    fn reserve(&mut self, slots: usize) -> Result<()> {
        if slots > self.room {
            return Err(Error::Memory {
                path: "toy".into(),
                needed: slots as u64,
                limit: self.room as u64,
            });
        }
        let empty: Cache = vec![vec![None; CAPACITY]; self.layers];
        self.caches
            .resize_with(slots, || Arc::new(Mutex::new(empty.clone())));
        self.saved.resize(slots, vec![None; CAPACITY]);
        self.drafter_caches.resize(slots, Vec::new());
        Ok(())
    }

    fn copy(&mut self, from: usize, length: usize, to: usize) -> Result<()> {
        let source = self.cache(from);
        let mut target = self.caches[to].lock().unwrap();
        for (target, source) in target.iter_mut().zip(&source) {
            target[..length].copy_from_slice(&source[..length]);
        }
        Ok(())
    }

    fn clear(&mut self, slot: usize) -> Result<()> {
        let mut cache = self.caches[slot].lock().unwrap();
        cache.iter_mut().for_each(|layer| layer.fill(None));
        Ok(())
    }
}
