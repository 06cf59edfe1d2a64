"""probes.safetensors and lens.safetensors: what was trained for a bundle, and for which model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import Manifest
from sedac_export.errors import SedacError
from sedac_export.exits.replay.probes import LREProbe

PROBES = "probes.safetensors"
LENSES = "lens.safetensors"


def write_probes(
    directory: Path, manifest: Manifest, tensors: dict[str, Tensor], medians: dict[int, float]
) -> None:
    """Write the probes' tensors, by names such as risk.8.down.weight, and which model's they are.

    medians: each V6 probe's median risk where it was trained.
    """
    metadata = _whose(manifest) | {"median_risk": json.dumps(medians)}
    # unlike save_file, which leaves files that only their owner reads
    (directory / PROBES).write_bytes(save(tensors, metadata))


def write_lenses(directory: Path, manifest: Manifest, lenses: Mapping[int, nn.Module]) -> None:
    """Write the lenses' tensors, by names such as 8.weight, and whose; no file without any."""
    if not lenses:
        (directory / LENSES).unlink(missing_ok=True)
        return
    states = {depth: lens.state_dict() for depth, lens in lenses.items()}
    tensors = {f"{depth}.{name}": v for depth, state in states.items() for name, v in state.items()}
    (directory / LENSES).write_bytes(save(tensors, _whose(manifest)))


def check_probes(bundle: Bundle) -> None:
    """Raise SedacError when probes or lenses are of another model or cannot be read."""
    for name in (PROBES, LENSES):
        _read(bundle, name)


def median_risks(bundle: Bundle) -> dict[int, float]:
    """Each V6 probe's median risk where it was trained, by depth; none without probes."""
    metadata, _ = _read(bundle, PROBES)
    medians = json.loads(metadata.get("median_risk", "{}"))
    return {int(depth): max(float(value), 1e-6) for depth, value in medians.items()}


def risk_probes(bundle: Bundle) -> dict[int, LREProbe]:
    """The V6 probes by depth; none where none was trained."""
    _, tensors = _read(bundle, PROBES)
    depths = {int(name.split(".")[1]) for name in tensors if name.startswith("risk.")}
    probes = {}
    for depth in sorted(depths):
        prefix = f"risk.{depth}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        probes[depth] = LREProbe(state["down.weight"].shape[1])
        probes[depth].load_state_dict(state)
    return probes


def _whose(manifest: Manifest) -> dict[str, str]:
    return {
        "model": manifest.model.name,
        "hidden_size": str(manifest.model.hidden_size),
        "head_sha256": manifest.fingerprint(),
    }


def _read(bundle: Bundle, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    if not bundle.lists(name):
        return {}, {}
    path = bundle.path(name)
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SedacError(f"{path} cannot be read ({error}); train the probes again") from error
    if metadata.get("head_sha256") != bundle.manifest.fingerprint():
        raise SedacError(f"{path} is trained for another model; train probes for this one")
    return metadata, tensors
