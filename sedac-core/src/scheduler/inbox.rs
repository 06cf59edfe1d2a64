//! What was asked for since the last step.

use super::SchedulerStatistics;
use crate::chain::Decoding;
use crate::sampler::TokenMask;

/// Requests that arrive while a step runs.
pub(super) struct Inbox {
    next: u64,
    added: Vec<(u64, Decoding)>,
    pub(super) cancelled: Vec<u64>,
    pub(super) masks: Vec<(u64, TokenMask)>,
    statistics: SchedulerStatistics,
}

/// What a step takes from the inbox, in this order.
pub(super) struct News {
    pub(super) added: Vec<(u64, Decoding)>,
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
        }
    }

    /// Queue a text. Returns its number.
    pub(super) fn add(&mut self, decoding: Decoding) -> u64 {
        let number = self.next;
        self.next += 1;
        self.added.push((number, decoding));
        number
    }

    pub(super) fn take_news(&mut self) -> News {
        News {
            added: std::mem::take(&mut self.added),
            masks: std::mem::take(&mut self.masks),
            cancelled: std::mem::take(&mut self.cancelled),
        }
    }

    /// Note how the scheduler stands after a step.
    pub(super) fn note(&mut self, statistics: SchedulerStatistics) {
        self.statistics = statistics;
    }

    pub(super) fn statistics(&self) -> SchedulerStatistics {
        let mut statistics = self.statistics;
        statistics.waiting += self.added.len();
        statistics
    }
}
