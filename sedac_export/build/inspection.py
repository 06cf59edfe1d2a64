"""What `sedac-export inspect` shows."""

from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto
from pydantic import BaseModel, ConfigDict, ValidationError

from sedac_export.bundle import Bundle
from sedac_export.bundle.certified import read_certification
from sedac_export.bundle.exit_config import read_exit_config
from sedac_export.bundle.manifest import VALIDATION, Manifest
from sedac_export.errors import SedacError
from sedac_runtime.choices import Verify
from sedac_runtime.tolerance import tolerance_note


class _InspectedRow(BaseModel):
    """What `inspect` shows of a row of validation.json."""

    model_config = ConfigDict(extra="allow")

    engine: str
    error: float
    cosine: float
    agreement: float


class _InspectedQualityRow(BaseModel):
    engine: str
    difference: float


class _InspectedQuality(BaseModel):
    """What `inspect` shows of the quantized model beside the original."""

    text: str
    tokens: int
    original_perplexity: float
    perplexity: float
    agreement: float
    divergence: float
    engines: list[_InspectedQualityRow]


class _InspectedValidation(BaseModel):
    engines: list[_InspectedRow]
    end_to_end: _InspectedRow
    quality: _InspectedQuality | None = None


def inspect_bundle(directory: Path, verify: Verify = "always") -> dict[str, Any]:
    """The bundle's facts as one JSON-able object; `verify` is as `Bundle.open` has it.

    Raises SedacError when `directory` is no bundle or a file of it is damaged.
    """
    bundle = Bundle.open(directory, verify=verify)
    hashed, unchanged = bundle.files.hashed, bundle.files.unchanged
    manifest = bundle.manifest
    validation = _validation(bundle)
    rows = {row.engine: row for row in validation.engines}
    certification = read_certification(bundle)
    engines = []
    for file, layers in _engine_files(manifest):
        name = Path(file).stem
        row = rows.get(name)
        engines.append(
            {
                "name": name,
                "layers": layers,
                "bytes": _weight_bytes(bundle.graph(file)),
                "error": row and row.error,
                "cosine": row and row.cosine,
            }
        )
    return {
        "model": manifest.model.model_dump(),
        "precision": manifest.precision,
        "quantization": manifest.quantization and manifest.quantization.model_dump(),
        "target": manifest.target,
        "plans": {target: plans.version for target, plans in manifest.plans.items()},
        "cuda": manifest.cuda and manifest.cuda.model_dump(),
        "cuda_refusal": manifest.cuda_refusal,
        "onnxruntime_cuda": manifest.onnxruntime_cuda is not None,
        "drafter": manifest.drafter
        and {
            "feature_layers": manifest.drafter.feature_layers,
            "tokens": len(manifest.drafter.tokens),
        },
        "files": {"hashed": hashed, "unchanged": unchanged},
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "max_cache_length": manifest.max_cache_length,
        "cache_bytes": manifest.cache_bytes(),
        "exit_layers": manifest.exit_layers,
        "exit_config": read_exit_config(directory).model_dump(exclude_none=True),
        "certified": certification.certified,
        "certification": certification.sentence,
        "engines": engines,
        "validation": {
            "end_to_end": validation.end_to_end.model_dump(),
            "quality": validation.quality and validation.quality.model_dump(),
        },
        "tolerance": manifest.tolerance,
        "tolerance_note": tolerance_note(manifest.tolerance),
        "unread_tensors": manifest.unread_tensors,
        "tool_versions": manifest.tool_versions,
    }


def _validation(bundle: Bundle) -> _InspectedValidation:
    try:
        return _InspectedValidation.model_validate_json(bundle.read(VALIDATION))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or VALIDATION
        raise SedacError(
            f"{bundle.directory / VALIDATION}: {field}: {first['msg']}; build the bundle again"
        ) from error


def _engine_files(manifest: Manifest) -> list[tuple[str, str]]:
    """(file, layers as text) of every engine, in the order a token passes them."""
    entries = [*manifest.engines.layers, manifest.engines.monolith]
    layers = [(e.file, _range(e.first_layer, e.num_layers)) for e in entries]
    fills = [(e.file, str(layer)) for layer, e in enumerate(manifest.engines.key_value)]
    exits = [
        (file, f"..{e.depth - 1}")
        for e in manifest.engines.exits
        for file in (e.file, e.lens)
        if file is not None
    ]
    attention = [(e.file, _range(e.first_layer, e.num_layers)) for e in manifest.engines.attention]
    engines = manifest.engines
    first = [(file, "") for file in (engines.embed, engines.contexts) if file is not None]
    return [*first, *layers, *fills, *attention, *exits, (engines.head, "")]


def _range(first: int, count: int) -> str:
    """Layers as text, such as 3 or 0..11."""
    return str(first) if count == 1 else f"{first}..{first + count - 1}"


def _weight_bytes(model: ModelProto) -> int:
    """Bytes of the weights that an engine reads; engines may share those beside them."""
    return sum(_bytes(initializer) for initializer in model.graph.initializer)


def _bytes(initializer: TensorProto) -> int:
    external = {entry.key: entry.value for entry in initializer.external_data}
    return int(external.get("length", len(initializer.raw_data)))
