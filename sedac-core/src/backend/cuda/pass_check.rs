//! Whether a pass stays inside of what was allocated, and is one that the kernel can run.

use super::abi::{MAX_ROWS, divides_anew};
use super::chain_device::PassPlan;
use super::slot_memory::SlotSizes;

/// Check `pass` over slots of `sizes` and so many tokens; `holds_rule` says whether there may be a rule
/// at an address, of so many criteria.
///
/// # Panics
/// When it is outside, or none that the kernel can run.
pub(super) fn check(
    pass: &PassPlan,
    sizes: &SlotSizes,
    vocabulary: usize,
    holds_rule: impl Fn((u64, i32)) -> bool,
) {
    assert!((1..=MAX_ROWS).contains(&pass.rows.len()), "rows of a pass");
    let sequences = pass.sequences.len();
    assert!(sequences <= pass.rows.len(), "sequences of a pass");
    for row in &pass.rows {
        assert!(row.token < 0 || below(row.token, vocabulary));
        assert!(below(row.position, sizes.capacity) && below(row.sequence, sequences));
        assert!(below(row.first_layer, sizes.layers));
    }
    for pair in pass.rows.windows(2) {
        let is_new = divides_anew(pair[1].position as usize);
        assert!(!is_new || pair[1].sequence != pair[0].sequence);
    }
    check_steps(pass, sizes.capacity);
    check_drafts(pass);
    let mut next = 0;
    for sequence in &pass.sequences {
        assert!(below(sequence.slot, sizes.slots) && sequence.first_row == next);
        assert!(sequence.rows > 0 && (0..=1).contains(&sequence.fills));
        let rows = &pass.rows[next as usize..][..sequence.rows as usize];
        let waits = rows.iter().any(|row| row.first_layer > 0);
        assert!(sequence.fills == 0 || !waits, "rows that wait for a pass");
        assert!(below(sequence.max_depth - 1, sizes.layers));
        let rule = (sequence.conditions, sequence.criteria);
        assert!(sequence.criteria == 0 || holds_rule(rule));
        next += sequence.rows;
    }
    assert_eq!(
        next as usize,
        pass.rows.len(),
        "each row is of one sequence"
    );
}

fn below(value: i32, limit: usize) -> bool {
    usize::try_from(value).is_ok_and(|value| value < limit)
}

/// Check further steps, in caches of `capacity` positions.
fn check_steps(pass: &PassPlan, capacity: usize) {
    let (steps, rows) = (pass.ahead.tokens, pass.rows.len());
    assert!(steps > 0 && steps * rows <= MAX_ROWS, "steps of a pass");
    let alone = pass.sequences.len() == rows && pass.logits_rows == (1 << rows) - 1;
    let mut sequences = pass.sequences.iter();
    let known = sequences.all(|sequence| sequence.criteria == 0 || sequence.fills == 1);
    assert!(steps == 1 || (alone && known), "rows that go on");
    for row in &pass.rows {
        let last = row.position as usize + steps - 1;
        assert!(steps == 1 || (row.token >= 0 && row.first_layer == 0));
        assert!(last < capacity, "positions of a pass");
    }
}

/// Check that each draft follows rows whose tokens are chosen.
fn check_drafts(pass: &PassPlan) {
    let is_one_step = pass.ahead.tokens == 1;
    assert!(is_one_step || pass.drafts.is_empty(), "drafts after steps");
    for plan in &pass.drafts {
        let first = plan.verifying_row.expect("drafts follow what verifies");
        let mut rows = first..first + plan.positions();
        assert!(rows.all(|row| row < pass.rows.len() && pass.logits_rows >> row & 1 == 1));
    }
}
