"""Certificates as calibrate writes them, for bundles that nobody calibrated."""

import json
from pathlib import Path
from typing import Any

from sedac_export.bundle import Bundle

STABILITY = {"policy": "stability", "tau": 0.98, "consecutive_k": 2, "min_layer_ratio": 0.2}


def certificate_of(bundle: Path, drafter: str = "none") -> dict[str, Any]:
    """A certificate of STABILITY with deferred tokens, on the engines of `bundle`."""
    return {
        "setting": {
            "policy": STABILITY,
            "kv_fill": "defer",
            "drafter": drafter,
            "decoding": "argmax",
            "engines_sha256": Bundle.open(bundle).files.engines_sha256,
        },
        **{"max_risk": 0.01, "confidence": 0.95, "risk_bound": 0.009849, "observed_risk": 0.009},
        **{"tokens": 137102, "documents": 16, "data_sha256": "0" * 64},
        **{"speedup": 1.25, "layer_ratio": 1.3, "mode": "speed"},
        "generation": {
            **{"speedup": 1.75, "speedup_without_drafter": 1.5, "lossless_speedup": 1.6},
            **{"agreement": 0.99, "tokens": 2048},
        },
    }


def write_certified(bundle: Path, certificate: dict[str, Any], /, **changes: Any) -> None:
    """Write the configuration that `certificate` is about, with `changes`, and the certificate."""
    setting = certificate["setting"]
    config = {**setting["policy"], "kv_fill": setting["kv_fill"]}
    if setting["drafter"] != "none":
        config["drafter"] = setting["drafter"]
    text = json.dumps(config | {"certificate": certificate} | changes)
    (bundle / "sedac_config.json").write_text(text)
