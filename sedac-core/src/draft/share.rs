//! How often guesses were right.

/// What is known fades by this with every round: text changes, and what did not pay may pay again.
const MEMORY: f64 = 0.999;
/// A prior counts as much as so many guesses.
const PRIOR_WEIGHT: f64 = 2.0;

/// The share of guesses of one kind that were right, older ones counting less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    prior: f64,
    right: f64,
    asked: f64,
}

impl Share {
    /// Nothing is known yet; `prior` is believed.
    pub(super) fn new(prior: f64) -> Self {
        Self {
            prior,
            right: 0.0,
            asked: 0.0,
        }
    }

    pub(super) fn estimate(&self) -> f64 {
        (self.right + self.prior * PRIOR_WEIGHT) / (self.asked + PRIOR_WEIGHT)
    }

    pub(super) fn note(&mut self, right: bool) {
        self.right += f64::from(u8::from(right));
        self.asked += 1.0;
    }

    /// A round has passed.
    pub(super) fn fade(&mut self) {
        self.right *= MEMORY;
        self.asked *= MEMORY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_outweigh_the_prior_until_they_fade() {
        let mut share = Share::new(0.8);
        assert_eq!(share.estimate(), 0.8);
        for _ in 0..6 {
            share.note(false);
        }
        assert!((share.estimate() - 0.2).abs() < 1e-9);
        for _ in 0..8000 {
            share.fade();
        }
        assert!(share.estimate() > 0.79);
    }
}
