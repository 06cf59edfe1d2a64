"""The original SEDAC's environment variables, as defaults."""

import os

from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.errors import SedacError
from sedac_runtime.choices import PolicyName

_METHODS: dict[str, PolicyName] = {
    "v6": "probe",
    "v6.1": "cascade",
    "v7": "stability",
    "stability": "stability",
    "probe": "probe",
    "cascade": "cascade",
    "margin": "margin",
    "learned": "learned",
}


def config_from_environment(num_layers: int) -> ExitConfig:
    """The exit configuration that SEDAC_METHOD and the variables of V6 or V7 ask for.

    SEDAC_METHOD: v7 (the default) or v6. V7 reads SEDAC_V7_TAU, SEDAC_V7_K and SEDAC_V7_MIN_LAYER
    (layers); V6 reads SEDAC_V6_LAYERS and SEDAC_V6_THRESHOLDS, two lists of the same length.

    Raises SedacError naming the variable that cannot be used.
    """
    method = os.environ.get("SEDAC_METHOD", "v7").lower()
    if method not in _METHODS:
        raise SedacError(f"SEDAC_METHOD {method} is unknown: {', '.join(_METHODS)}")
    if _METHODS[method] == "stability":
        return _stability(num_layers)
    if _METHODS[method] == "probe":
        return _probe(num_layers)
    raise SedacError(f"SEDAC_METHOD {method} needs thresholds; pass a configuration")


def _stability(num_layers: int) -> ExitConfig:
    default = ExitConfig.for_layers(num_layers)
    tau = _number("SEDAC_V7_TAU", default.tau or 0.0)
    k = _number("SEDAC_V7_K", default.consecutive_k or 1)
    minimum = _number("SEDAC_V7_MIN_LAYER", (default.min_layer_ratio or 0.0) * num_layers)
    if not (tau >= 0 and k >= 1 and k == int(k) and 0 <= minimum <= num_layers):
        raise SedacError(
            f"SEDAC_V7_TAU {tau:g}, SEDAC_V7_K {k:g} and SEDAC_V7_MIN_LAYER {minimum:g} must be at"
            f" least 0, a whole number of at least 1, and 0 to {num_layers}"
        )
    return ExitConfig(tau=tau, consecutive_k=int(k), min_layer_ratio=minimum / num_layers)


def _probe(num_layers: int) -> ExitConfig:
    names = ("SEDAC_V6_LAYERS", "SEDAC_V6_THRESHOLDS")
    texts = [os.environ.get(name, "") for name in names]
    try:
        layers = [int(part) for part in texts[0].split(",")]
        thresholds = [float(part) for part in texts[1].split(",")]
        pairs = dict(zip(layers, thresholds, strict=True))
        if len(pairs) < len(layers) or not set(layers) <= set(range(1, num_layers + 1)):
            raise ValueError
        return ExitConfig(policy="probe", thresholds=pairs)
    except ValueError as error:
        raise SedacError(
            f"{names[0]}={texts[0]} and {names[1]}={texts[1]} are not two lists of the same length,"
            f" such as 4,8,12 and 0.5,0.6,0.7, of different layers from 1 to {num_layers}"
        ) from error


def _number(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        return default if text is None else float(text)
    except ValueError as error:
        raise SedacError(f"{name} {text} is not a number") from error
