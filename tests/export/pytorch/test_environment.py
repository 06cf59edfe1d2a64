"""The original's environment variables, as the core understands what they set."""

import numpy as np
import pytest

from sedac_export.pytorch.environment import config_from_environment
from sedac_runtime import exits_by_stability


def test_the_minimum_is_that_many_layers_in_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEDAC_V7_TAU", "0.5")
    monkeypatch.setenv("SEDAC_V7_K", "1")
    for layers in range(1, 201):
        stable = np.ones((1, layers), dtype=np.float32)
        for minimum in range(1, layers + 1):
            monkeypatch.setenv("SEDAC_V7_MIN_LAYER", str(minimum))
            ratio = config_from_environment(layers).min_layer_ratio
            assert ratio is not None
            assert exits_by_stability(stable, 0.5, 1, ratio) == [minimum], (minimum, layers)
