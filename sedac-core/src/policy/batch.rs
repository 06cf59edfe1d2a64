//! The exits of many tokens at once, from signals that were recorded.

use rayon::prelude::*;

use super::{Policy, Signals, Stability, Thresholds};

/// Tokens that one task decides.
const TOKENS_PER_TASK: usize = 256;

/// The depth after which each token exits under `policy`; the number of layers if it never does.
///
/// stability: `[tokens, layers]`, row by row; exits: `[tokens]`.
///
/// # Panics
/// When `stability` is not `layers` numbers for each of `exits`.
pub fn exits_by_stability(stability: &[f32], layers: usize, policy: &Stability, exits: &mut [u32]) {
    by_token(
        stability,
        layers,
        exits,
        |row| {
            let mut policy = policy.clone();
            policy.begin();
            let mut depths = (1..).zip(row);
            depths.find_map(|(depth, &stability)| {
                let signals = Signals {
                    stability,
                    ..Signals::default()
                };
                policy.observe(depth, signals).map(|_| depth)
            })
        },
        layers,
    );
}

/// The depth after which each token exits, the first whose risk is below its threshold; `layers`
/// if none is.
///
/// risks: `[tokens, depths]`, the depths of `thresholds`, row by row; exits: `[tokens]`.
///
/// # Panics
/// When `risks` is not a number for each depth and each of `exits`.
pub fn exits_by_risk(risks: &[f32], thresholds: &Thresholds, layers: usize, exits: &mut [u32]) {
    by_token(
        risks,
        thresholds.depths().len(),
        exits,
        |row| {
            let mut pairs = thresholds.iter().zip(row);
            pairs.find_map(|((depth, threshold), &risk)| (risk < threshold).then_some(depth))
        },
        layers,
    );
}

fn by_token(
    signals: &[f32],
    width: usize,
    exits: &mut [u32],
    decide: impl Fn(&[f32]) -> Option<usize> + Sync,
    otherwise: usize,
) {
    assert_eq!(signals.len(), width * exits.len(), "a row for each token");
    let rows = signals.par_chunks(width.max(1) * TOKENS_PER_TASK);
    rows.zip(exits.par_chunks_mut(TOKENS_PER_TASK))
        .for_each(|(rows, exits)| {
            for (row, exit) in rows.chunks_exact(width.max(1)).zip(exits) {
                *exit = decide(row).unwrap_or(otherwise) as u32;
            }
        });
}

#[cfg(test)]
mod tests {
    use super::super::ByDepth;
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn tokens_exit_as_one_by_one() {
        let layers = 7;
        let stability: Vec<f32> = (0..layers * 1000)
            .map(|n| (n * 7919 % 101) as f32 / 100.0)
            .collect();
        let mut policy = Stability::new(0.4, 2, 0.3, layers).unwrap();
        let mut exits = vec![0; 1000];
        exits_by_stability(&stability, layers, &policy, &mut exits);
        for (row, exit) in stability.chunks(layers).zip(&exits) {
            policy.begin();
            let alone = (1..).zip(row).find(|&(depth, &stability)| {
                let signals = Signals {
                    stability,
                    ..Signals::default()
                };
                policy.observe(depth, signals).is_some()
            });
            assert_eq!(*exit as usize, alone.map_or(layers, |(depth, _)| depth));
        }
        assert!(exits.contains(&7) && exits.contains(&3));
    }

    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn the_first_risk_below_its_threshold_counts() {
        let thresholds = Thresholds::new(&ByDepth::from([(2, 0.5), (4, 0.3)]));
        let risks = [0.4, 0.0, 0.5, 0.2, 0.6, 0.3, f32::NAN, f32::NAN];
        let mut exits = [0; 4];
        exits_by_risk(&risks, &thresholds, 6, &mut exits);
        assert_eq!(exits, [2, 4, 6, 6]);
    }

    /// Decisions read thresholds while others move them: every token is decided by values that a
    /// threshold had.
    #[test]
    #[cfg_attr(miri, ignore = "rayon's threads outlive the test")]
    fn moving_thresholds_race_decisions() {
        let thresholds = Thresholds::new(&ByDepth::from([(2, 0.0)]));
        let risks = vec![0.5; 4096];
        rayon::scope(|scope| {
            scope.spawn(|_| {
                for round in 0..500 {
                    let goal = if round % 2 == 0 { 1.0 } else { 0.0 };
                    thresholds.follow(2, &mut [goal], 0.5, 1.0).unwrap();
                }
            });
            for _ in 0..20 {
                let mut exits = vec![0; risks.len()];
                exits_by_risk(&risks, &thresholds, 6, &mut exits);
                assert!(exits.iter().all(|&exit| exit == 2 || exit == 6));
            }
        });
    }
}
