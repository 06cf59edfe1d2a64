//! Decisions over 4096 tokens of 36 layers.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sedac_core::policy::{ByDepth, Stability, Thresholds, exits_by_risk, exits_by_stability};

const TOKENS: usize = 4096;
const LAYERS: usize = 36;

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decisions");
    group.throughput(Throughput::Elements(TOKENS as u64));
    // numbers without a pattern that a branch predictor would learn
    let stability: Vec<f32> = (0..TOKENS * LAYERS)
        .map(|n| 0.9 + (n.wrapping_mul(2_654_435_761) >> 7) as u16 as f32 / 655_360.0)
        .collect();
    let mut exits = vec![0; TOKENS];
    let policy = Stability::default();
    group.bench_function("stability", |bench| {
        bench.iter(|| exits_by_stability(black_box(&stability), LAYERS, &policy, &mut exits));
    });
    let thresholds: ByDepth = (1..=LAYERS).map(|depth| (depth, 0.905)).collect();
    let thresholds = Thresholds::new(&thresholds);
    group.bench_function("risk", |bench| {
        bench.iter(|| exits_by_risk(black_box(&stability), &thresholds, LAYERS, &mut exits));
    });
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
