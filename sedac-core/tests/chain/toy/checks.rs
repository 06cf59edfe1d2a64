//! Whether passes and batches keep the contract of devices.

use sedac_core::backend::cuda::{
    BatchLimits, BatchPlan, MAX_ROWS, PassPlan, PassRow, SequenceRows,
};

pub(super) fn check_pass(pass: &PassPlan, exit_layers: &[usize]) {
    assert!((1..=MAX_ROWS).contains(&pass.rows.len()));
    assert!(pass.logits_rows < 1 << pass.rows.len());
    assert_eq!(pass.sampled_rows & !pass.logits_rows, 0);
    if pass.ahead.tokens > 1 {
        assert!(pass.ahead.tokens * pass.rows.len() <= MAX_ROWS);
        assert_eq!(pass.sequences.len(), pass.rows.len());
        assert_eq!(pass.logits_rows, (1 << pass.rows.len()) - 1);
        let known = |sequence: &SequenceRows| sequence.criteria == 0 || sequence.fills == 1;
        assert!(pass.sequences.iter().all(known));
        let starts = |row: &PassRow| row.token >= 0 && row.first_layer == 0;
        assert!(pass.rows.iter().all(starts));
    }
    let mut next = 0;
    for (index, sequence) in pass.sequences.iter().enumerate() {
        assert_eq!(sequence.first_row, next);
        assert!(sequence.rows > 0 && (0..=1).contains(&sequence.fills));
        assert!(exit_layers.contains(&(sequence.max_depth as usize)));
        next += sequence.rows;
        let others = &pass.sequences[..index];
        assert!(others.iter().all(|other| other.slot != sequence.slot));
        for (offset, row) in rows_of(pass, sequence).iter().enumerate() {
            assert_eq!(row.sequence, index as i32);
            assert_eq!(row.token < 0, row.first_layer > 0);
            assert!(row.first_layer < sequence.max_depth);
            assert!(row.first_layer == 0 || sequence.fills == 0, "nothing waits");
            if offset > 0 {
                let before = rows_of(pass, sequence)[offset - 1];
                assert_eq!(row.position, before.position + 1);
                assert!(row.first_layer <= before.first_layer);
            }
        }
    }
    assert_eq!(next as usize, pass.rows.len());
}

pub(super) fn check_batch(plan: &BatchPlan, limits: BatchLimits) {
    let rows = plan.rows.len();
    assert_eq!(plan.logits_rows.len(), plan.races.len());
    assert_eq!(plan.logits_rows.len(), plan.rules.len());
    assert!(plan.logits_rows.is_sorted() && plan.logits_rows.iter().all(|&row| row < rows));
    assert!((1..=limits.rows).contains(&rows) && plan.races.len() <= limits.logits_rows);
}

pub(super) fn rows_of<'a>(pass: &'a PassPlan, sequence: &SequenceRows) -> &'a [PassRow] {
    &pass.rows[sequence.first_row as usize..][..sequence.rows as usize]
}
