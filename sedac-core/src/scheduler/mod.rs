//! Continuous batching: sequences that are generated together, and join and leave at every step.
//!
//! A [`Scheduler`] admits sequences in the order in which they were added. In each
//! [step](Scheduler::step) every running sequence gets tokens: those that are being prefilled take
//! turns at a chunk of their prompts, all others decode, draft and verify as
//! [`Chain::generate`] would. Steps of all sequences go to the backend in one call, which shares
//! passes between them where it can.
//!
//! Caches lie in slots, and their positions have a budget. When it is exceeded, the youngest
//! sequence gives its cache up and is recomputed from its tokens later. The caches of sequences that
//! have ended stay until their slots are needed, and are continued by sequences that begin with the
//! same tokens.

mod inbox;
mod prefix_cache;
mod progress;
mod rounds;
mod scheduled_text;
mod step_thread;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::inbox::{Inbox, Rest};
pub use self::progress::{Progress, SchedulerStatistics};
use self::rounds::Rounds;
pub use self::step_thread::StepThread;
use crate::chain::{Chain, Decoding, ModelLimits, Request};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::sampler::{LogitsProcessing, TokenMask};

/// How often texts that wait for a slot ask for one that is not this scheduler's.
const RETRY: Duration = Duration::from_millis(5);

/// How many sequences run at once, and what their caches may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// The most sequences that run at once, 1 or more; None for what suits the backend and fits in its
    /// memory.
    pub max_sequences: Option<usize>,
    /// Cache positions of all of them together, and of sequences that have ended; None for what
    /// their slots have.
    pub cache_tokens: Option<usize>,
    /// Tokens of prompts that a step prefills, 1 or more; None for what suits the backend.
    pub prefill_chunk: Option<usize>,
}

impl SchedulerSettings {
    fn check(self) -> Result<()> {
        let numbers = [
            ("max_sequences", self.max_sequences.unwrap_or(1)),
            ("cache_tokens", self.cache_tokens.unwrap_or(1)),
            ("prefill_chunk", self.prefill_chunk.unwrap_or(1)),
        ];
        match numbers.into_iter().find(|&(_, value)| value == 0) {
            Some((name, value)) => Err(Error::setting(name, value, "1 or more")),
            None => Ok(()),
        }
    }
}

/// Sequences that are generated together. Every method may be called from any thread.
pub struct Scheduler {
    limits: ModelLimits,
    inbox: Mutex<Inbox>,
    /// Something has come into the inbox.
    has_come: Condvar,
    rounds: Mutex<Rounds>,
    max_sequences: usize,
}

impl Scheduler {
    /// A scheduler for sequences of `chain`, whose backend makes slots for them, and for one more that
    /// [`Chain::generate`] may use.
    ///
    /// # Errors
    /// [`Error::Setting`] when a setting is out of range, [`Error::Memory`] when the slots do not fit,
    /// and what the backend reports.
    pub fn new(chain: &mut Chain, settings: SchedulerSettings) -> Result<Self> {
        settings.check()?;
        let backend = chain.backend_mut();
        let wanted = match settings.max_sequences {
            Some(most) => most.saturating_add(1),
            None => backend.usual_slots()?,
        };
        backend.reserve(wanted)?;
        let mut limits = chain.limits();
        let slots = limits.capabilities.sequences.min(wanted);
        let slots = slots.saturating_sub(1).max(1);
        let cache_tokens = settings.cache_tokens.unwrap_or(slots * limits.capacity);
        let prefill_chunk = settings
            .prefill_chunk
            .unwrap_or(limits.capabilities.prefill_chunk);
        limits.capacity = limits.capacity.min(cache_tokens);
        Ok(Self {
            rounds: Mutex::new(Rounds::new(slots, cache_tokens, prefill_chunk)),
            inbox: Mutex::new(Inbox::new(cache_tokens)),
            has_come: Condvar::new(),
            limits,
            max_sequences: slots,
        })
    }

    /// The most sequences that run at once.
    #[must_use]
    pub fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    /// Queue the sequence of `request`, whose logits are processed as `processing` says. Returns its
    /// number.
    ///
    /// # Errors
    /// [`Error::Setting`] and [`Error::Prompt`] where the model does not take it.
    pub fn add(&self, request: &Request, processing: LogitsProcessing) -> Result<u64> {
        let decoding = Decoding::new(request, processing, &self.limits)?;
        let number = self.inbox().add(decoding);
        self.has_come.notify_all();
        Ok(number)
    }

    /// End a sequence before the next step; nothing more is reported of it.
    pub fn cancel(&self, sequence: u64) {
        self.inbox().cancelled.push(sequence);
        self.has_come.notify_all();
    }

    /// Choose the next token of each constrained sequence among those whose bits are set: token t has
    /// bit t % 32 of word t / 32. Others are not constrained by it. What is allowed in one call is
    /// allowed before the same step.
    ///
    /// # Errors
    /// [`Error::Setting`] when a sequence is allowed no token; then none of them is allowed any.
    pub fn allow(&self, masks: impl IntoIterator<Item = (u64, Vec<u32>)>) -> Result<()> {
        let masks = masks.into_iter().map(|(sequence, words)| {
            let mask = TokenMask::new(words, self.limits.vocab_size)?;
            Ok((sequence, mask))
        });
        let masks = masks.collect::<Result<Vec<_>>>()?;
        self.inbox().masks.extend(masks);
        self.has_come.notify_all();
        Ok(())
    }

    /// Run one step of each sequence that can run, and report what came of it; empty where none can.
    /// A failure ends the sequences that it concerns.
    pub fn step(&self, chain: &mut Chain, interrupt: &Interrupt) -> Vec<Progress> {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let news = self.inbox().take_news();
        let progress = rounds.step(news, chain, interrupt);
        self.inbox().note(rounds.statistics(), rounds.rest());
        // others may have looked at how it stood while this step took the news
        self.has_come.notify_all();
        progress
    }

    /// Wait until there is something for a step to do, or `is_over`, which [`Self::wake`] has this look
    /// at. Where only slots lack, which others have, that is some time later.
    fn wait(&self, is_over: impl Fn() -> bool) {
        let inbox = self.inbox();
        let most = match inbox.rest() {
            Rest::None => return,
            Rest::LacksSlots => RETRY,
            Rest::Idle => Duration::MAX,
        };
        let rests = |inbox: &mut Inbox| inbox.rest() != Rest::None && !is_over();
        drop(self.has_come.wait_timeout_while(inbox, most, rests));
    }

    fn wake(&self) {
        // not between a look and the wait that follows it
        drop(self.inbox());
        self.has_come.notify_all();
    }

    /// What it does, as of the end of the last step.
    pub fn statistics(&self) -> SchedulerStatistics {
        self.inbox().statistics()
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
