"""The sentence: never slower than full depth, and nothing notably faster is left unnamed."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedac_export.advice.recommendation import NOTABLE, AdviceRow, recommend
from sedac_export.advice.speedup import Speedup
from sedac_runtime.choices import Drafter, Mode

RISKS = (0.01, 0.05)


def row(
    mode: Mode, drafter: Drafter, value: float, spread: float = 0.01, risk: float | None = None
) -> AdviceRow:
    speed = Speedup(value, value - spread, value + spread)
    return AdviceRow(mode, drafter, risk, 10 / value, speed, 0.99, 1.1)


FULL = row("full", "none", 1.0, 0.0)
SLOW = row("lossless", "early-exit", 0.9)
LOOKUP = row("lossless", "prompt-lookup", 1.3)


def test_a_faster_drafter_is_chosen_and_exits_that_gain_nothing_are_refused() -> None:
    exits = [row("exit", "none", 1.01, risk=0.01), row("exit", "auto", 1.33, risk=0.05)]
    found = recommend([FULL, SLOW, LOOKUP, *exits], RISKS)
    assert (found.chosen, found.exits) == (LOOKUP, [])
    assert found.sentence == (
        "Use lossless mode with prompt lookup: 1.30x; do not exit early on this model: at 1 % risk"
        " it saves nothing, at 5 % risk it saves 2 %."
    )


def test_without_a_certain_gain_it_is_full_depth() -> None:
    found = recommend([FULL, SLOW, row("lossless", "auto", 1.04, 0.1)], RISKS)
    assert found.chosen is FULL
    assert found.sentence == (
        "Use full depth: no drafter is certain to be faster here (at best 1.04x, the drafter auto);"
        " do not exit early on this model: at 1 % risk nothing is certified, at 5 % risk nothing is"
        " certified."
    )


def test_what_may_be_faster_is_named_with_its_interval() -> None:
    found = recommend([FULL, LOOKUP, row("lossless", "trained", 1.5, 0.6)], RISKS)
    assert found.chosen is LOOKUP
    assert found.sentence.endswith(
        "more --prompts would tell about lossless mode with the trained drafter (1.50x, 0.90 to"
        " 2.10)."
    )


def test_exits_are_named_where_they_beat_what_has_less_risk() -> None:
    exits = [
        row("exit", "none", 1.4, risk=0.01),
        row("exit", "auto", 1.6, risk=0.01),
        row("exit", "none", 1.62, risk=0.05),
    ]
    found = recommend([FULL, LOOKUP, *exits], RISKS)
    assert (found.chosen, found.exits) == (LOOKUP, [exits[1]])
    assert "where some tokens may differ, at 1 % risk exit mode gives 1.60x" in found.sentence
    faster = row("exit", "none", 1.8, risk=0.05)
    found = recommend([FULL, LOOKUP, *exits, faster], RISKS)
    assert found.exits == [exits[1], faster]
    assert "and at 5 % risk exit mode gives 1.80x with no drafter" in found.sentence


SETTINGS: list[tuple[Mode, Drafter, float | None]] = [
    *(("lossless", drafter, None) for drafter in ("auto", "early-exit", "prompt-lookup")),
    *(("exit", drafter, risk) for drafter, risk in product(("none", "auto"), RISKS)),
]  # type: ignore[list-item]
SPEEDS = st.tuples(st.floats(0.5, 3.0), st.floats(0.0, 0.5))


@given(st.lists(SPEEDS, min_size=len(SETTINGS), max_size=len(SETTINGS)), st.data())
def test_the_advice_holds_whatever_was_measured(
    speeds: list[tuple[float, float]], data: st.DataObject
) -> None:
    rows = [
        row(mode, drafter, value, spread, risk)
        for (mode, drafter, risk), (value, spread) in zip(SETTINGS, speeds, strict=True)
    ]
    certified = data.draw(st.sets(st.sampled_from(RISKS)))
    measured = [r for r in rows if r.max_risk is None or r.max_risk in certified]
    found = recommend([FULL, *measured], RISKS)
    assert found.chosen is FULL or found.chosen.speedup.low > 1
    assert all(exit_row.speedup.low > 1 for exit_row in found.exits)
    best = max(r.speedup.value for r in (found.chosen, *found.exits))
    for other in measured:
        if other.speedup.value > NOTABLE * best * (1 + 1e-9):
            assert f"({other.speedup.value:.2f}x, {other.speedup.low:.2f} to" in found.sentence
    # what no token differs in is chosen among what no token differs in
    assert found.chosen.max_risk is None
    for other in measured:
        if other.mode == "lossless" and other.speedup.low > 1:
            assert other.speedup.value <= found.chosen.speedup.value


@pytest.mark.parametrize("low", [1.0, 0.99])
def test_an_interval_that_reaches_full_depth_is_not_certain(low: float) -> None:
    found = recommend([FULL, row("lossless", "auto", 1.02, 1.02 - low)], RISKS)
    assert found.chosen is FULL
