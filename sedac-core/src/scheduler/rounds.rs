//! The steps of a scheduler: who is admitted, who runs, and what came of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, debug_span};

use super::inbox::{News, Rest};
use super::prefix_cache::{PrefixCache, common_prefix};
use super::scheduled_text::{RunningText, ScheduledText};
use super::{Progress, SchedulerStatistics};
use crate::backend::Backend;
use crate::chain::{Chain, Company, Decoding, draft_together};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::sequence::Sequence;

/// Where all slots are taken, the share of its tokens that an ended sequence has to keep to be
/// continued as another; else the one that ended first makes room.
const MIN_KEPT: f64 = 0.5;
/// Shorter beginnings are prefilled again as fast as they are copied.
const MIN_COPIED: usize = 16;

/// All texts that are not at their end, by number: those added first are the oldest.
pub(super) struct Rounds {
    /// Running texts and ended ones have no more than this number of slots together.
    slots: usize,
    cache_tokens: usize,
    /// Tokens of prompts that a step prefills.
    prefill_chunk: usize,
    waiting: BTreeMap<u64, ScheduledText>,
    running: BTreeMap<u64, RunningText>,
    /// Running texts that are not prefilled yet, in the order of their next chunks.
    prefilling: VecDeque<u64>,
    ended: PrefixCache,
    preemptions: u64,
    prefix_hits: u64,
    prefix_tokens: u64,
    rest: Rest,
}

impl Rounds {
    pub(super) fn new(slots: usize, cache_tokens: usize, prefill_chunk: usize) -> Self {
        Self {
            slots,
            cache_tokens,
            prefill_chunk,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            prefilling: VecDeque::new(),
            ended: PrefixCache::default(),
            preemptions: 0,
            prefix_hits: 0,
            prefix_tokens: 0,
            rest: Rest::Idle,
        }
    }

    pub(super) fn statistics(&self) -> SchedulerStatistics {
        let lengths = self.running.values().map(RunningText::length);
        SchedulerStatistics {
            running: self.running.len(),
            waiting: self.waiting.len(),
            used_cache_tokens: lengths.sum::<usize>() + self.ended.tokens(),
            cache_tokens: self.cache_tokens,
            preemptions: self.preemptions,
            prefix_hits: self.prefix_hits,
            prefix_tokens: self.prefix_tokens,
        }
    }

    /// Whether the next step has something to run, by what the last one had.
    pub(super) fn rest(&self) -> Rest {
        self.rest
    }

    /// Take `news`, and run one step.
    pub(super) fn step(
        &mut self,
        news: News,
        chain: &mut Chain,
        interrupt: &Interrupt,
    ) -> Vec<Progress> {
        self.take_news(news, chain);
        self.preempt();
        self.admit(chain);
        let mut progress = Vec::new();
        let chosen = self.plan(chain, interrupt, &mut progress);
        let shares_passes = chain.backend_mut().capabilities().shares_passes;
        for group in self.groups(chosen, shares_passes) {
            if let Err(error) = self.run(&group, chain.backend_mut(), interrupt) {
                self.fail(&group, error, chain, &mut progress);
            }
        }
        self.report(chain, &mut progress);
        progress
    }

    fn take_news(&mut self, news: News, chain: &mut Chain) {
        self.waiting.extend(news.added);
        for (number, mask) in news.masks {
            let running = self
                .running
                .get_mut(&number)
                .map(|running| &mut running.text);
            let text = running.or_else(|| self.waiting.get_mut(&number));
            if let Some(text) = text.filter(|text| text.decoding.is_constrained()) {
                text.decoding.allow(mask);
            }
        }
        for number in news.cancelled {
            if let Some(mut text) = self.waiting.remove(&number) {
                chain.return_drafter(&mut text.decoding);
            }
            if let Some(running) = self.running.remove(&number) {
                self.keep(running, chain);
            }
        }
    }

    /// Positions that running texts may have after the next step.
    fn reach(&self) -> usize {
        let texts = self.running.values();
        texts.map(|running| running.text.decoding.reach()).sum()
    }

    /// Take caches from ended texts, and then from the youngest running ones, until there is room for
    /// a step. The oldest always has room.
    fn preempt(&mut self) {
        while self.running.len() > 1 && self.reach() > self.cache_tokens {
            if let Some((number, running)) = self.running.pop_last() {
                debug!(sequence = number, "preempted");
                self.waiting.insert(number, running.preempt());
                self.preemptions += 1;
            }
        }
        self.evict();
    }

    /// Evict ended texts until running ones have room for a step.
    fn evict(&mut self) {
        let reach = self.reach();
        while reach + self.ended.tokens() > self.cache_tokens && self.ended.evict() {}
    }

    /// Admit waiting texts, the oldest first, as long as there is room.
    fn admit(&mut self, chain: &mut Chain) {
        while self.running.len() < self.slots
            && let Some((_, next)) = self.waiting.first_key_value()
            && self.reach() + next.decoding.reach() <= self.cache_tokens
        {
            let Some(sequence) = self.open(chain.backend_mut()) else {
                break;
            };
            let Some((number, mut text)) = self.waiting.pop_first() else {
                break;
            };
            let length = sequence.tokens().len();
            if text.cached_prompt_tokens.is_none() && length > 0 {
                self.prefix_hits += 1;
                self.prefix_tokens += length as u64;
            }
            text.cached_prompt_tokens.get_or_insert(length);
            chain.lend_drafter(&mut text.decoding);
            self.running
                .insert(number, RunningText::new(text, sequence));
            // one that was preempted may still be there
            if !self.prefilling.contains(&number) {
                self.prefilling.push_back(number);
            }
            self.evict();
        }
    }

    /// A sequence for the oldest waiting text, with as many of its first tokens as another holds: one
    /// that has ended is continued, or what they share is copied.
    fn open(&mut self, backend: &mut dyn Backend) -> Option<Sequence> {
        let decoding = &self.waiting.first_key_value()?.1.decoding;
        let all_taken = self.running.len() + self.ended.len() >= self.slots;
        let min_kept = if all_taken { MIN_KEPT } else { 1.0 };
        let shared = self.longest_prefix(decoding).0;
        if let Some(sequence) = self.ended.take(decoding, shared, min_kept) {
            return Some(sequence);
        }
        if all_taken {
            self.ended.evict();
        }
        let mut sequence = loop {
            match backend.open(decoding.kv_fill()) {
                Ok(sequence) => break sequence,
                // others have slots of the backend, too
                Err(_) if self.ended.evict() => {}
                Err(error) => {
                    debug!(%error, "no slot");
                    return None;
                }
            }
        };
        if let (length @ MIN_COPIED.., Some(source)) = self.longest_prefix(decoding) {
            match backend.copy(source, length, &mut sequence) {
                Ok(true) => {}
                Ok(false) => return self.ended.take(decoding, 1, MIN_KEPT).or(Some(sequence)),
                Err(error) => debug!(%error, "a prefix is not copied"),
            }
        }
        Some(sequence)
    }

    /// The most first tokens of `decoding` that a sequence holds, and this sequence.
    fn longest_prefix(&self, decoding: &Decoding) -> (usize, Option<&Sequence>) {
        let wanted = decoding.reusable();
        let ended = self.ended.sequences();
        let ended = ended.map(|sequence| (sequence.tokens().len(), sequence));
        let running = self.running.values().map(|running| {
            let sequence = &running.sequence;
            let decoding = &running.text.decoding;
            (decoding.exact(sequence.complete()), sequence)
        });
        let shared = ended.chain(running).map(|(length, sequence)| {
            let length = common_prefix(&sequence.tokens()[..length], wanted);
            (length, Some(sequence))
        });
        shared.max_by_key(|&(length, _)| length).unwrap_or_default()
    }

    /// Plan a step of each text that can run. Returns those for which the backend has to.
    fn plan(
        &mut self,
        chain: &mut Chain,
        interrupt: &Interrupt,
        progress: &mut Vec<Progress>,
    ) -> Vec<u64> {
        let mut chosen = self.choose_prefill();
        let decodes = |running: &RunningText| {
            let chunk = running.text.decoding.chunk(running.length(), 1);
            chunk == 0 && !running.text.decoding.waits(running.length(), 1)
        };
        let decoding = self.running.iter().filter(|(_, running)| decodes(running));
        let decoding: Vec<_> = decoding.map(|(&number, _)| number).collect();
        let shares_passes = chain.backend_mut().capabilities().shares_passes;
        let drafting = decoding.iter().filter(|number| self.drafts(number)).count();
        let company = |drafts: bool| match shares_passes {
            true => Company {
                others: decoding.len().saturating_sub(1),
                drafting: drafting.saturating_sub(usize::from(drafts)),
            },
            false => Company::default(),
        };
        chosen.extend(&decoding);
        self.rest = match chosen.is_empty() {
            false => Rest::None,
            true if self.running.is_empty() && !self.waiting.is_empty() => Rest::LacksSlots,
            true => Rest::Idle,
        };
        chosen.retain(|number| {
            let Some(running) = self.running.get_mut(number) else {
                return false;
            };
            let RunningText { text, sequence, .. } = running;
            let backend = chain.backend_mut();
            let company = company(text.decoding.drafts());
            let planned =
                text.decoding
                    .plan(backend, sequence, self.prefill_chunk, company, interrupt);
            if let Err(error) = planned {
                self.end(*number, &Arc::new(error), chain, progress);
                return false;
            }
            true
        });
        self.draft(&mut chosen, chain, interrupt, progress);
        chosen.retain(|number| {
            let Some(running) = self.running.get_mut(number) else {
                return false;
            };
            let has_step = running.text.decoding.has_step();
            if !has_step {
                running.take(None, chain.backend_mut().costs());
            }
            has_step
        });
        chosen
    }

    /// Whether a running text drafts.
    fn drafts(&self, number: &u64) -> bool {
        let running = self.running.get(number);
        running.is_some_and(|running| running.text.decoding.drafts())
    }

    /// Let the trained drafter draft for those of `chosen` that await it. A failure ends these.
    fn draft(
        &mut self,
        chosen: &mut Vec<u64>,
        chain: &mut Chain,
        interrupt: &Interrupt,
        progress: &mut Vec<Progress>,
    ) {
        let running = self.running.iter_mut();
        let awaiting = running.filter(|(number, running)| {
            chosen.contains(number) && running.text.decoding.awaits_draft()
        });
        let (numbers, mut texts): (Vec<_>, Vec<_>) = awaiting
            .map(|(&number, running)| {
                let RunningText { text, sequence, .. } = running;
                (number, (&mut text.decoding, sequence.slot()))
            })
            .unzip();
        if let Err(error) = draft_together(&mut texts, chain.backend_mut(), interrupt) {
            let error = Arc::new(error);
            for number in numbers {
                chosen.retain(|&other| other != number);
                self.end(number, &error, chain, progress);
            }
        }
    }

    /// The texts that prefill a chunk in this step, each in turn. Chunks are whole, so that what they
    /// give does not depend on other texts.
    fn choose_prefill(&mut self) -> Vec<u64> {
        let mut chosen = Vec::new();
        let mut room = self.prefill_chunk;
        for _ in 0..self.prefilling.len() {
            let Some(number) = self.prefilling.pop_front() else {
                break;
            };
            let Some(running) = self.running.get(&number) else {
                continue;
            };
            let (decoding, length) = (&running.text.decoding, running.length());
            let chunk = decoding.chunk(length, self.prefill_chunk);
            if chunk == 0 {
                continue;
            }
            if chunk > room && !chosen.is_empty() {
                self.prefilling.push_front(number);
                break;
            }
            self.prefilling.push_back(number);
            if !decoding.waits(length, self.prefill_chunk) {
                room = room.saturating_sub(chunk);
                chosen.push(number);
            }
        }
        chosen
    }

    /// The calls of the backend that texts run in: a common one where it shares passes, but for those
    /// that run alone.
    fn groups(&self, chosen: Vec<u64>, shares_passes: bool) -> Vec<Vec<u64>> {
        let alone = |number: &u64| {
            !shares_passes
                || self
                    .running
                    .get(number)
                    .is_some_and(|running| running.text.runs_alone)
        };
        let (alone, common): (Vec<_>, Vec<_>) = chosen.into_iter().partition(alone);
        let alone = alone.into_iter().map(|number| vec![number]);
        let common = (!common.is_empty()).then_some(common);
        alone.chain(common).collect()
    }

    /// Run the planned steps of `group` in one call.
    fn run(
        &mut self,
        group: &[u64],
        backend: &mut dyn Backend,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let _span = debug_span!("batch", sequences = group.len()).entered();
        let members = self.running.iter_mut();
        let members = members.filter(|(number, _)| group.contains(number));
        let mut members: Vec<_> = members.map(|(_, running)| running).collect();
        let steps = members.iter_mut();
        let steps = steps.map(|running| running.text.decoding.step(&mut running.sequence));
        let outcomes = backend.step(&mut steps.collect::<Vec<_>>(), interrupt)?;
        for (running, outcome) in members.into_iter().zip(outcomes) {
            running.take(Some(outcome), backend.costs());
        }
        Ok(())
    }

    /// A call of the backend for `group` has failed, and their caches are lost. Where a logit of one of
    /// several is not finite, each is run again by itself, which shows whose it was.
    fn fail(
        &mut self,
        group: &[u64],
        error: Error,
        chain: &mut Chain,
        progress: &mut Vec<Progress>,
    ) {
        let is_of_one = matches!(error, Error::NotFinite { .. }) && group.len() > 1;
        let error = Arc::new(error);
        for &number in group {
            if !is_of_one {
                self.end(number, &error, chain, progress);
            } else if let Some(running) = self.running.remove(&number) {
                let mut text = running.preempt();
                text.runs_alone = true;
                self.waiting.insert(number, text);
            }
        }
    }

    /// End a running text with `error`.
    fn end(
        &mut self,
        number: u64,
        error: &Arc<Error>,
        chain: &mut Chain,
        progress: &mut Vec<Progress>,
    ) {
        if let Some(RunningText { mut text, .. }) = self.running.remove(&number) {
            chain.return_drafter(&mut text.decoding);
            progress.push(text.failure(number, error.clone()));
        }
    }

    /// Report what the step gave each text, and keep the caches of those at their end.
    fn report(&mut self, chain: &mut Chain, progress: &mut Vec<Progress>) {
        let now = Instant::now();
        let running = self.running.iter_mut();
        progress.extend(running.filter_map(|(&number, running)| running.progress(number, now)));
        let is_finished = |running: &RunningText| running.text.decoding.finished().is_some();
        let finished: Vec<_> = self
            .running
            .extract_if(.., |_, running| is_finished(running))
            .collect();
        for (_, running) in finished {
            self.keep(running, chain);
        }
    }

    /// Keep the cache of a text that is no longer run.
    fn keep(&mut self, running: RunningText, chain: &mut Chain) {
        let RunningText {
            mut text, sequence, ..
        } = running;
        chain.return_drafter(&mut text.decoding);
        self.ended.keep(&text.decoding, sequence);
    }
}
