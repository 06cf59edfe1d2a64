"""Batches of decisions equal the policies written in NumPy, also while thresholds move."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedac_runtime import InputError, Thresholds, exits_by_risk, exits_by_stability

Floats = npt.NDArray[np.float32]


def numpy_exits_by_stability(
    stability: Floats, tau: float, k: int, min_depth: int
) -> npt.NDArray[np.int64]:
    """V7 over [tokens, layers]."""
    tokens, layers = stability.shape
    run = np.zeros(tokens, dtype=np.int64)
    exits = np.full(tokens, layers)
    for layer in range(layers):
        run = np.where(stability[:, layer] >= np.float32(tau), run + 1, 0)
        done = (run >= k) & (layer + 1 >= min_depth) & (exits == layers)
        exits[done] = layer + 1
    return exits


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 600),
    layers=st.integers(1, 40),
    tau=st.floats(0, 1.125, width=32),
    data=st.data(),
)
def test_stable_tokens_exit_as_in_numpy(
    seed: int, tokens: int, layers: int, tau: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, layers))
    stability = np.random.default_rng(seed).random((tokens, layers), dtype=np.float32)
    exits = exits_by_stability(stability, tau, k, 0.25)
    min_depth = int(np.ceil(0.25 * layers))
    assert exits == numpy_exits_by_stability(stability, tau, k, min_depth).tolist()


def test_risks_below_their_thresholds_exit() -> None:
    thresholds = Thresholds({4: 0.3, 2: 0.5})
    risks = np.array([[0.4, 0.0], [0.5, 0.2], [0.6, 0.3]], dtype=np.float32)
    assert exits_by_risk(risks, thresholds, 6) == [2, 4, 6]
    with pytest.raises(InputError, match="risks of 2 depths"):
        exits_by_risk(risks, Thresholds({1: 1.0}), 6)
    with pytest.raises(InputError, match="stability of shape"):
        exits_by_stability(risks[0], 0.9, 1, 0.0)


def test_thresholds_follow_an_exit_rate_from_many_threads() -> None:
    thresholds = Thresholds({3: 9.0})
    risks = np.random.default_rng(0).random(4000, dtype=np.float32)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: thresholds.follow(3, risks, 0.3, 0.2), range(200)):
            pass
    exits = exits_by_risk(risks[:, None], thresholds, 6)
    assert exits.count(3) / len(exits) == pytest.approx(0.3, abs=0.005)
    with pytest.raises(InputError, match="depth 4 is out of range"):
        thresholds.follow(4, risks, 0.3, 0.2)
    assert thresholds.get(4) is None
