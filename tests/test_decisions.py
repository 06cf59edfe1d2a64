"""Batches of decisions equal the policies written in NumPy, also while thresholds move."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sedac_runtime import InputError, Thresholds, exits_by_risk, exits_by_stability
from sedac_runtime._core import BatchDecision, PolicySettings, stabilities

Floats = npt.NDArray[np.float32]


def test_stability_is_half_of_one_and_the_cosine() -> None:
    before, after = np.random.default_rng(0).standard_normal((2, 5, 70), dtype=np.float32)
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosines = (before * after).sum(-1) / lengths
    np.testing.assert_allclose(stabilities(before, after), (cosines + 1) / 2, atol=1e-6)
    for wrong in (after[:4], after[:, :9], after[0]):
        with pytest.raises(InputError, match="out of range"):
            stabilities(before, np.ascontiguousarray(wrong))


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


@hypothesis_settings(deadline=None)
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


class RuleTable:
    """The table of rules in NumPy: what each policy says of n tokens after a depth."""

    def __init__(self, policy: str, settings: Mapping[str, Any], layers: int, count: int) -> None:
        self.policy, self.settings, self.layers = policy, settings, layers
        self.run = np.zeros(count, dtype=np.int64)
        self.confidence = np.zeros(count, dtype=np.float32)

    def wants(self, depth: int, signals: Mapping[str, Floats]) -> npt.NDArray[np.bool_]:
        settings = self.settings
        if self.policy == "stability":
            stable = signals["stability"] >= np.float32(settings["tau"])
            self.run = np.where(stable, self.run + 1, 0)
            late = depth >= settings["min_layer_ratio"] * self.layers
            return (self.run >= settings["consecutive_k"]) & late
        if depth not in settings["thresholds"]:
            return np.zeros(len(self.run), dtype=bool)
        threshold = np.float32(settings["thresholds"][depth])
        if self.policy in ("margin", "learned"):
            return signals[self.policy] >= threshold
        if self.policy == "probe":
            return signals["risk"] < threshold
        gained = np.clip((threshold - signals["risk"]) / threshold, 0, 1)
        decay, weight = np.float32(settings["decay"]), np.float32(settings["weights"][depth])
        self.confidence = self.confidence * decay + gained * weight
        return self.confidence >= np.float32(settings["targets"][depth])

    def skipped(self, depth: int) -> npt.NDArray[np.float32]:
        """MLPs that soft exits skip, not yet rounded."""
        return (np.tanh(2 * self.confidence - 1) / 2 + 0.5) * np.float32(self.layers - depth)


@st.composite
def policies(draw: st.DrawFn, layers: int) -> tuple[str, dict[str, Any]]:
    policy = draw(st.sampled_from(["stability", "probe", "cascade", "margin", "learned"]))
    share = st.floats(0.125, 1, width=32)
    if policy == "stability":
        return policy, {
            "tau": draw(share),
            "consecutive_k": draw(st.integers(1, layers)),
            "min_layer_ratio": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        }
    depths = draw(st.lists(st.integers(1, layers), min_size=1, unique=True))
    by_depth = st.fixed_dictionaries(dict.fromkeys(depths, share))
    settings = {"thresholds": draw(by_depth)}
    if policy == "cascade":
        settings |= {name: draw(by_depth) for name in ("weights", "targets")}
        settings |= {"decay": draw(share), "exit_kind": draw(st.sampled_from(["hard", "soft"]))}
    return policy, settings


@hypothesis_settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 12), data=st.data())
def test_many_tokens_exit_by_the_table_of_rules(
    seed: int, layers: int, data: st.DataObject
) -> None:
    random, count = np.random.default_rng(seed), 40
    policy, settings = data.draw(policies(layers))
    exit_layers = data.draw(st.lists(st.integers(1, layers), unique=True))
    full_depth = random.random(count) < 0.2
    decision = BatchDecision(PolicySettings(policy, **settings), layers, exit_layers, full_depth)
    table = RuleTable(policy, settings, layers, count)
    soft = settings.get("exit_kind") == "soft"
    exits, skip_from = np.full((2, count), layers)
    close = np.zeros(count, dtype=bool)
    for depth in range(1, layers + 1):
        names = ("stability", "risk", "margin", "entropy", "learned")
        signals = {name: random.random(count, dtype=np.float32) for name in names}
        reads = depth in settings.get("thresholds", ())
        assert decision.reads_risk(depth) == (reads and policy in ("probe", "cascade"))
        assert decision.reads_exit_head(depth) == (reads and policy in ("margin", "learned"))
        exit_signals = np.stack([signals[name] for name in names[2:]], axis=1)
        decision.observe(depth, signals["stability"], signals["risk"], exit_signals)
        wants = table.wants(depth, signals)
        if depth < layers and depth in exit_layers:
            leaving = wants & ~full_depth & (exits == layers)
            exits[leaving] = depth
            if soft:
                skipped = table.skipped(depth)
                skip_from[leaving] = layers - np.floor(skipped[leaving] + 0.5).astype(int)
                # tanh may differ in its last digit
                close[leaving] = abs(skipped[leaving] % 1 - 0.5) < 1e-4
    assert list(decision.exit_layers) == exits.tolist()
    assert list(decision.exited) == ((exits < layers) & (not soft)).tolist()
    assert np.asarray(decision.skip_from)[~close].tolist() == skip_from[~close].tolist()


def test_signals_that_are_missing_or_of_another_shape_are_refused() -> None:
    two = np.zeros(2, dtype=np.float32)
    margin = BatchDecision(PolicySettings("margin", thresholds={2: 0.5}), 4, [2], two > 0)
    margin.observe(1, two)
    with pytest.raises(InputError, match="exit_signals is missing"):
        margin.observe(2, two)
    with pytest.raises(
        InputError, match=r"exit_signals of shape \[2, 2\] is out of range: \[2, 3\]"
    ):
        margin.observe(2, two, None, np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(InputError, match=r"stability of shape \[3\]"):
        margin.observe(1, np.zeros(3, dtype=np.float32))
    with pytest.raises(InputError, match="depth 5 is out of range"):
        margin.observe(5, two)


def test_settings_of_a_policy_are_the_cores() -> None:
    defaults = PolicySettings("stability", tau=0.98, consecutive_k=2, min_layer_ratio=0.2)
    assert PolicySettings("stability") == defaults != PolicySettings("stability", tau=0.5)
    with pytest.raises(InputError, match="unknown field `tau`"):
        PolicySettings("probe", thresholds={2: 0.5}, tau=0.9)
    with pytest.raises(InputError, match="missing field `weights`"):
        PolicySettings("cascade", thresholds={2: 0.5}, targets={2: 0.5})
    with pytest.raises(InputError, match="policy guess is out of range: stability or probe"):
        PolicySettings("guess")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="above 0"):
        BatchDecision(PolicySettings("probe", thresholds={2: 0.0}), 4, [2], b"")
