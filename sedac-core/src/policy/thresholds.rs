//! Thresholds that may change while tokens are decided.

use std::sync::atomic::{AtomicU32, Ordering};

use super::ByDepth;
use crate::error::{Error, Result};

/// One threshold for each of some depths, read and moved by any number of threads without locks.
#[derive(Debug)]
pub struct Thresholds {
    depths: Vec<usize>,
    /// The bits of an f32 each.
    values: Vec<AtomicU32>,
}

impl Thresholds {
    /// Thresholds of these values.
    pub fn new(values: &ByDepth) -> Self {
        Self {
            depths: values.keys().copied().collect(),
            values: values
                .values()
                .map(|value| AtomicU32::new(value.to_bits()))
                .collect(),
        }
    }

    /// The depths, ascending.
    pub fn depths(&self) -> &[usize] {
        &self.depths
    }

    /// The threshold at `depth`; None where there is none.
    pub fn get(&self, depth: usize) -> Option<f32> {
        Some(f32::from_bits(self.slot(depth)?.load(Ordering::Relaxed)))
    }

    /// Each depth and its threshold, depths ascending.
    pub fn iter(&self) -> impl Iterator<Item = (usize, f32)> {
        let values = self.values.iter();
        let values = values.map(|value| f32::from_bits(value.load(Ordering::Relaxed)));
        self.depths.iter().copied().zip(values)
    }

    /// Move the threshold at `depth` towards the one under which `exit_rate` of `risks` would have
    /// been: t + `step` * (quantile - t), an exponential moving average. `risks` are reordered.
    /// Concurrent moves all count, in some order.
    ///
    /// # Errors
    /// [`Error::Setting`] when there is no threshold at `depth`, `exit_rate` or `step` is not in
    /// 0..=1, or `risks` is empty or holds NaN.
    pub fn follow(
        &self,
        depth: usize,
        risks: &mut [f32],
        exit_rate: f32,
        step: f32,
    ) -> Result<f32> {
        let Some(slot) = self.slot(depth) else {
            return Err(Error::setting("depth", depth, "one that has a threshold"));
        };
        for (name, share) in [("exit_rate", exit_rate), ("step", step)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::setting(name, share, "0 to 1"));
            }
        }
        if risks.is_empty() || risks.iter().any(|risk| risk.is_nan()) {
            return Err(Error::setting(
                "risks",
                "(none or NaN)",
                "one or more numbers",
            ));
        }
        let rank = (exit_rate * (risks.len() - 1) as f32).round() as usize;
        let (_, &mut quantile, _) = risks.select_nth_unstable_by(rank, f32::total_cmp);
        let moved = |bits| {
            let old = f32::from_bits(bits);
            (old + step * (quantile - old)).to_bits()
        };
        let before = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |bits| {
            Some(moved(bits))
        });
        Ok(f32::from_bits(before.map_or_else(moved, moved)))
    }

    fn slot(&self, depth: usize) -> Option<&AtomicU32> {
        self.values.get(self.depths.binary_search(&depth).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn at_depth_2(value: f32) -> Thresholds {
        Thresholds::new(&ByDepth::from([(2, value)]))
    }

    #[test]
    fn a_threshold_goes_to_the_quantile_step_by_step() {
        let thresholds = at_depth_2(1.0);
        let mut risks: Vec<f32> = (0..=100).rev().map(|n| n as f32 / 100.0).collect();
        assert_eq!(thresholds.follow(2, &mut risks, 0.2, 0.5).unwrap(), 0.6);
        for _ in 0..50 {
            thresholds.follow(2, &mut risks, 0.2, 0.5).unwrap();
        }
        assert!((thresholds.get(2).unwrap() - 0.2).abs() < 1e-6);
        assert_eq!(thresholds.get(3), None);
    }

    #[test]
    fn wrong_settings_are_refused() {
        let thresholds = at_depth_2(1.0);
        assert!(thresholds.follow(3, &mut [1.0], 0.5, 0.5).is_err());
        assert!(thresholds.follow(2, &mut [1.0], 1.5, 0.5).is_err());
        assert!(thresholds.follow(2, &mut [1.0], 0.5, f32::NAN).is_err());
        assert!(thresholds.follow(2, &mut [], 0.5, 0.5).is_err());
        assert!(thresholds.follow(2, &mut [f32::NAN], 0.5, 0.5).is_err());
        assert_eq!(thresholds.get(2), Some(1.0));
    }

    /// Each move halves the distance to 0, which f32 does exactly: a lost one would show.
    #[test]
    fn no_concurrent_move_is_lost() {
        for _ in 0..200 {
            let thresholds = at_depth_2(1.0);
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..8 {
                            thresholds.follow(2, &mut [0.0], 0.5, 0.5).unwrap();
                            let now = thresholds.get(2).unwrap();
                            assert!(now > 0.0 && now <= 0.5);
                        }
                    });
                }
            });
            assert_eq!(thresholds.get(2), Some(0.5_f32.powi(32)));
        }
    }
}
