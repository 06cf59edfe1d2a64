//! What passes are believed to cost, whatever was measured.

use std::time::Duration;

use proptest::prelude::*;
use sedac_core::backend::Costs;

const MOST: usize = 40;

/// A pass: its tokens, and microseconds of a layer and of the head.
fn passes() -> impl Strategy<Value = Vec<(usize, u64, u64)>> {
    prop::collection::vec((1..=16_usize, 1..1000_u64, 1..1000_u64), 0..200)
}

fn costs(bounds: Option<(usize, usize)>) -> Costs {
    bounds.map_or_else(Costs::default, |(pass, batch)| {
        Costs::of_passes(pass, batch)
    })
}

fn note(costs: &mut Costs, passes: &[(usize, u64, u64)]) {
    for &(tokens, layer, head) in passes {
        costs.note_layers(1, tokens, Duration::from_micros(layer));
        costs.note_head(tokens, Duration::from_micros(head));
        costs.note_draft((tokens, 8), tokens, Duration::from_micros(layer));
    }
}

proptest! {
    #[test]
    fn more_tokens_never_cost_less(
        bounds in prop::option::of((1..=8_usize, 8..=16_usize)),
        before in passes(),
        now in passes(),
    ) {
        let mut earlier = costs(bounds);
        note(&mut earlier, &before);
        let mut costs = costs(bounds);
        costs.recall(&earlier.record());
        note(&mut costs, &now);
        for curve in [&|n| costs.layers(1, n), &|n| costs.head(n)] as [&dyn Fn(usize) -> f64; 2] {
            let seconds: Vec<_> = (1..=MOST).map(curve).collect();
            prop_assert!(seconds.iter().all(|seconds| seconds.is_finite() && *seconds >= 0.0));
            // but for rounding
            let grows = seconds.windows(2).all(|pair| pair[0] <= pair[1] * (1.0 + 1e-12));
            prop_assert!(grows, "{:?}", seconds);
        }
        prop_assert!((1..=8).all(|n| costs.draft_token(n).is_finite()));
    }

    #[test]
    fn what_is_measured_now_is_believed(before in passes(), tokens in 1..=16_usize, micros in 1..50_u64) {
        let mut costs = Costs::default();
        note(&mut costs, &before);
        // faster than anything before, and the first pass does not count
        for _ in 0..2 {
            costs.note_layers(1, tokens, Duration::from_nanos(micros));
        }
        let expected = Duration::from_nanos(micros).as_secs_f64();
        prop_assert!((costs.layers(1, tokens) - expected).abs() <= expected * 1e-9);
    }
}
