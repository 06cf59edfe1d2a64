"""The original's environment variables, as the core understands what they set."""

import numpy as np
import pytest

from sedac_export.errors import SedacError
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


def test_thresholds_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEDAC_METHOD", "v6")
    monkeypatch.setenv("SEDAC_V6_LAYERS", "4,8")
    monkeypatch.setenv("SEDAC_V6_THRESHOLDS", "0.5,0.6")
    assert config_from_environment(8).thresholds == {4: 0.5, 8: 0.6}


@pytest.mark.parametrize("layers", ["4", "4,8,12", "4,4", "4,9", "0,4", "4,"])
def test_layers_that_cannot_have_thresholds_are_refused(
    monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    monkeypatch.setenv("SEDAC_METHOD", "v6")
    monkeypatch.setenv("SEDAC_V6_LAYERS", layers)
    monkeypatch.setenv("SEDAC_V6_THRESHOLDS", "0.5,0.6")
    with pytest.raises(SedacError, match=f"SEDAC_V6_LAYERS={layers} .* from 1 to 8"):
        config_from_environment(8)
