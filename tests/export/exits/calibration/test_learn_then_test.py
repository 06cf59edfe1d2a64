"""Bounds are the known ones, and hold as often as they promise, also for clustered errors."""

import numpy as np
import pytest

from sedac_export.errors import SedacError
from sedac_export.exits.calibration.learn_then_test import Losses, count_certified

RESAMPLES = 100
# a valid procedure goes over this with a chance of 6 %
MOST_VIOLATIONS = 8


def spread_evenly(errors: int, tokens: int, documents: int = 10) -> Losses:
    return Losses(np.full(documents, errors // documents), np.full(documents, tokens // documents))


def test_without_errors_the_bound_is_clopper_pearsons() -> None:
    losses = spread_evenly(0, 1000)
    assert losses.upper_bound(0.95) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-6)
    assert losses.p_value(0.01, 0.95) == pytest.approx(0.99**1000, rel=1e-6)


def test_bound_and_test_agree() -> None:
    losses = Losses(np.array([3, 9, 1, 7, 4]), np.array([900, 1100, 1000, 950, 1050]))
    bound = losses.upper_bound(0.9)
    assert losses.p_value(bound, 0.9) == pytest.approx(0.1, rel=1e-6)
    assert bound > losses.risk


def test_errors_in_few_documents_count_for_less() -> None:
    even = spread_evenly(100, 10000)
    clustered = Losses(np.array([100] + [0] * 9), np.full(10, 1000))
    assert clustered.risk == even.risk
    assert clustered.effective_tokens(0.95) < even.effective_tokens(0.95) / 50
    assert clustered.upper_bound(0.95) > 2 * even.upper_bound(0.95)


def test_a_failure_ends_the_sequence() -> None:
    good, bad = spread_evenly(10, 10000), spread_evenly(200, 10000)
    assert count_certified([good, bad, good], 0.01, 0.95) == 1
    assert count_certified([bad, good], 0.01, 0.95) == 0
    assert count_certified([], 0.01, 0.95) == 0


def test_too_little_data_is_said() -> None:
    with pytest.raises(SedacError, match="3 documents are too few"):
        count_certified([spread_evenly(0, 9000, 3)], 0.01, 0.95)
    with pytest.raises(SedacError, match="100 tokens cannot certify"):
        count_certified([spread_evenly(0, 100)], 0.01, 0.95)


def violations(spread: float, documents: int, seed: int) -> tuple[int, int]:
    """Resamples in which a setting above the risk was certified, and in which any was.

    Documents' risks are beta-distributed around that of the setting with that spread: the larger,
    the more they differ.
    """
    generator = np.random.default_rng(seed)
    max_risk, broken, any_certified = 0.01, 0, 0
    true_risks = np.linspace(0.004, 0.016, 13)
    for _ in range(RESAMPLES):
        tokens = generator.integers(500, 8000, documents)
        quantiles = generator.beta(1 / spread, 1 / spread, documents) * 2
        sequence = [
            Losses(generator.binomial(tokens, np.minimum(risk * quantiles, 1)), tokens)
            for risk in true_risks
        ]
        certified = count_certified(sequence, max_risk, 0.95)
        any_certified += certified > 0
        broken += certified > 0 and true_risks[certified - 1] > max_risk
    return broken, any_certified


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 2.0])
def test_the_promise_holds_in_resamples(spread: float) -> None:
    broken, any_certified = violations(spread, documents=40, seed=0)
    assert broken <= MOST_VIOLATIONS
    assert any_certified > RESAMPLES / 2


def test_the_simulation_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking clustered tokens for independent breaks the promise, and the simulation sees it."""
    monkeypatch.setattr(Losses, "effective_tokens", lambda self, _: int(self.tokens.sum()))
    broken, _ = violations(2.0, documents=40, seed=0)
    assert broken > MOST_VIOLATIONS
