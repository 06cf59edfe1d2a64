"""Speedups are of paired times, and their interval is for other prompts."""

import numpy as np
import pytest

from sedac_export.advice.speedup import speedup


def test_what_the_machine_does_meanwhile_cancels() -> None:
    generator = np.random.default_rng(0)
    slowness = generator.uniform(1, 9, (6, 3))
    found = speedup(2 * slowness, slowness)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_one_bad_round_does_not_count() -> None:
    reference = np.ones((4, 3))
    times = np.full((4, 3), 0.5)
    times[:, 1] = 40.0
    assert speedup(reference, times).value == pytest.approx(2)


def test_prompts_weigh_the_same_in_the_total_time() -> None:
    # half the prompts take half the time, the others twice: 5 for 4
    times = np.array([[0.5], [2.0], [0.5], [2.0]])
    found = speedup(np.ones((4, 1)), times)
    assert found.value == pytest.approx(4 / 5)
    assert found.low < found.value < found.high


def test_the_interval_narrows_with_more_prompts() -> None:
    few, many = (
        speedup(np.ones((2 * pairs, 1)), np.array([[0.5], [1.0]] * pairs)) for pairs in (2, 32)
    )
    assert few.value == many.value == pytest.approx(4 / 3)
    assert many.high - many.low < 0.5 * (few.high - few.low)
