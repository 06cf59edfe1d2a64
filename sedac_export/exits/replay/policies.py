"""The exit policies over many tokens at once, as the core's decide for one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import numpy as np

from sedac_export.arrays import Floats, Mask
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.exits.replay.signals import Signals


class Policy(Protocol):
    """Decides after each layer which tokens are done."""

    def begin(self, tokens: int) -> None:
        """Start `tokens` new tokens."""

    def observe(self, signals: Signals) -> Mask:
        """Which tokens may leave after signals.depth layers; asked after every layer, in order."""

    def soft_ratio(self) -> Floats | None:
        """Share of the remaining MLPs to skip if a token left now; None where exits are hard."""


class _Hard:
    def begin(self, tokens: int) -> None:
        pass

    def soft_ratio(self) -> Floats | None:
        return None


class Stability(_Hard):
    """V7: k consecutive layers of stability tau, from min_depth layers on."""

    def __init__(self, tau: float, k: int, min_depth: int) -> None:
        self.tau, self.k, self.min_depth = np.float32(tau), k, min_depth

    def begin(self, tokens: int) -> None:
        self.run = np.zeros(tokens, dtype=np.int64)

    def observe(self, signals: Signals) -> Mask:
        self.run = np.where(signals.stability >= self.tau, self.run + 1, 0)
        done: Mask = self.run >= self.k
        return done & (signals.depth >= self.min_depth)


class _Thresholds(_Hard, ABC):
    def __init__(self, thresholds: dict[int, float]) -> None:
        self.thresholds = {depth: np.float32(value) for depth, value in thresholds.items()}

    def observe(self, signals: Signals) -> Mask:
        if signals.depth not in self.thresholds:
            return np.zeros(len(signals.stability), dtype=bool)
        return self.done(signals, self.thresholds[signals.depth])

    @abstractmethod
    def done(self, signals: Signals, threshold: np.float32) -> Mask:
        """Which tokens may leave by the signals at a depth that has this threshold, [n]."""


class Probe(_Thresholds):
    """V6: the probe's risk is below the depth's threshold."""

    def done(self, signals: Signals, threshold: np.float32) -> Mask:
        return signals.read_risk() < threshold


class Margin(_Thresholds):
    """The exit head's top two are far enough apart."""

    def done(self, signals: Signals, threshold: np.float32) -> Mask:
        return signals.margin >= threshold


class Learned(_Thresholds):
    """The learned probe is sure enough that the exit's token is full depth's."""

    def done(self, signals: Signals, threshold: np.float32) -> Mask:
        return signals.learned >= threshold


class Cascade(_Thresholds):
    """V6.1: confidence gathers over the probes' depths."""

    def __init__(self, config: ExitConfig) -> None:
        assert config.thresholds and config.weights and config.targets
        super().__init__(config.thresholds)
        self.decay = np.float32(config.decay or 0.0)
        self.weights, self.targets = config.weights, config.targets
        self.soft = config.exit_kind == "soft"

    def begin(self, tokens: int) -> None:
        self.confidence: Floats = np.zeros(tokens, dtype=np.float32)

    def done(self, signals: Signals, threshold: np.float32) -> Mask:
        gained = np.clip((threshold - signals.read_risk()) / threshold, 0, 1)
        weight = np.float32(self.weights[signals.depth])
        self.confidence = (self.confidence * self.decay + gained * weight).astype(np.float32)
        reached: Mask = self.confidence >= np.float32(self.targets[signals.depth])
        return reached

    def soft_ratio(self) -> Floats | None:
        """tanh(2C - 1) / 2 + 1 / 2 of the confidences C."""
        if not self.soft:
            return None
        ratio = np.tanh(2 * self.confidence - 1) / 2 + 0.5
        return ratio.astype(np.float32)


def make_policy(config: ExitConfig, num_layers: int) -> Policy:
    """The policy of `config` for a model of `num_layers` layers."""
    if config.policy == "stability":
        assert config.tau is not None and config.consecutive_k is not None
        assert config.min_layer_ratio is not None
        min_depth = math.ceil(config.min_layer_ratio * num_layers)
        return Stability(config.tau, config.consecutive_k, min_depth)
    if config.policy == "cascade":
        return Cascade(config)
    assert config.thresholds is not None
    kinds: dict[str, Callable[[dict[int, float]], Policy]] = {
        "probe": Probe,
        "margin": Margin,
        "learned": Learned,
    }
    return kinds[config.policy](config.thresholds)
