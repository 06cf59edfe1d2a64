//! A trained drafter.

use std::ops::Range;

use sedac_core::Result;
use sedac_core::backend::DraftEngine;

use super::Toy;

/// Drafts as an exit would.
impl DraftEngine for Toy {
    fn verified(&mut self, positions: Range<usize>, tokens: &[u32]) -> Result<()> {
        let slot = &mut self.slots[self.selected];
        let caches = slot.caches.lock().unwrap().clone();
        let run = |layer: &Vec<Option<(u32, u64)>>| {
            let tokens = layer[..positions.end].iter();
            tokens.map(|entry| entry.map(|(token, _)| token)).collect()
        };
        let known: Option<Vec<u32>> = run(&caches[0]);
        let mut text = known.expect("the model has run all verified positions");
        let last: Option<Vec<u32>> = run(&caches[caches.len() - 1]);
        assert_eq!(last.as_ref(), Some(&text), "through every layer");
        assert_eq!(text[positions.start + 1..], tokens[..tokens.len() - 1]);
        let known = &slot.drafter_cache[..positions.start];
        assert_eq!(*known, text[..positions.start], "the slot's own text");
        text.extend(tokens.last());
        slot.drafter_cache = text[..positions.end].to_vec();
        self.set_draft_text(text);
        Ok(())
    }

    fn roll_out(&mut self, token: u32) -> Result<()> {
        let mut text = self.draft_text.take().unwrap();
        text.push(token);
        self.set_draft_text(text);
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        self.draft_logits.as_slice()
    }

    fn probability(&self, token: u32) -> f32 {
        let logits = &self.draft_logits;
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        logits[token as usize].exp() / sum
    }
}
