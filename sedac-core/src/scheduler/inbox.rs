//! What was asked for since the last step.

use super::SchedulerStatistics;
use super::scheduled_text::ScheduledText;
use crate::chain::Decoding;
use crate::sampler::TokenMask;

/// Requests that arrive while a step runs.
pub(super) struct Inbox {
    next: u64,
    added: Vec<(u64, ScheduledText)>,
    pub(super) cancelled: Vec<u64>,
    pub(super) masks: Vec<(u64, TokenMask)>,
    statistics: SchedulerStatistics,
    rest: Rest,
}

/// Whether a step would do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// It would.
    None,
    /// Not until others give slots of the backend back.
    LacksSlots,
    /// Not until something comes.
    Idle,
}

/// What a step takes from the inbox, in this order.
pub(super) struct News {
    pub(super) added: Vec<(u64, ScheduledText)>,
    pub(super) masks: Vec<(u64, TokenMask)>,
    pub(super) cancelled: Vec<u64>,
}

impl Inbox {
    pub(super) fn new(cache_tokens: usize) -> Self {
        Self {
            next: 0,
            added: Vec::new(),
            cancelled: Vec::new(),
            masks: Vec::new(),
            statistics: SchedulerStatistics {
                cache_tokens,
                ..SchedulerStatistics::default()
            },
            rest: Rest::Idle,
        }
    }

    /// Queue a text. Returns its number.
    pub(super) fn add(&mut self, decoding: Decoding) -> u64 {
        let number = self.next;
        self.next += 1;
        self.added.push((number, ScheduledText::new(decoding)));
        number
    }

    pub(super) fn take_news(&mut self) -> News {
        News {
            added: std::mem::take(&mut self.added),
            masks: std::mem::take(&mut self.masks),
            cancelled: std::mem::take(&mut self.cancelled),
        }
    }

    pub(super) fn rest(&self) -> Rest {
        let has_news =
            !(self.added.is_empty() && self.masks.is_empty() && self.cancelled.is_empty());
        match has_news {
            true => Rest::None,
            false => self.rest,
        }
    }

    /// Note how the scheduler stands after a step.
    pub(super) fn note(&mut self, statistics: SchedulerStatistics, rest: Rest) {
        self.statistics = statistics;
        self.rest = rest;
    }

    pub(super) fn statistics(&self) -> SchedulerStatistics {
        let mut statistics = self.statistics;
        statistics.waiting += self.added.len();
        statistics
    }
}
