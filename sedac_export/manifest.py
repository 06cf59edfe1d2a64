"""The bundle's manifest, bundle.json."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sedac_export.errors import SedacError
from sedac_export.stamp import sha256
from sedac_export.tensorrt.entries import PlanSet, PortableGraphs
from sedac_runtime.flavour import Target
from sedac_runtime.tolerance import DEFAULT_TOLERANCE

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
MANIFEST_DIGEST = "bundle.sha256"
EXIT_CONFIG = "sedac_config.json"
VALIDATION = "validation.json"

Precision = Literal["fp32", "fp16", "bf16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelFacts(_Strict):
    """What the runtime must know of the model."""

    name: str
    type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    eos_token_ids: list[int]


class ContextTensor(_Strict):
    """An embed output that layers take, of shape [1, tokens, ...]: -1 stands for tokens."""

    name: str
    shape: list[int]
    dtype: Literal["float32", "int64", "int32", "bool"]


class KeyValueHeads(_Strict):
    """Cache geometry of one layer."""

    heads: int
    head_size: int


class LayerEngineEntry(_Strict):
    """One engine of consecutive decoder layers, counted from 0."""

    file: str
    first_layer: int
    num_layers: int
    contexts: list[str]
    risk: bool = False


class KeyValueEngineEntry(_Strict):
    """The engine that fills one layer's cache when the layer is skipped."""

    file: str
    contexts: list[str]


class ExitEngineEntry(_Strict):
    """The engine that gives an exit depth's signals, and the lens before the head there."""

    depth: int
    file: str
    lens: str | None = None


class Engines(_Strict):
    """Every engine of the bundle. `monolith` runs all layers at once and is for comparison."""

    embed: str
    layers: list[LayerEngineEntry]
    key_value: list[KeyValueEngineEntry]
    head: str
    monolith: LayerEngineEntry
    exits: list[ExitEngineEntry] = Field(default_factory=list)
    attention: list[LayerEngineEntry] = Field(default_factory=list)


class FileEntry(_Strict):
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


class Manifest(_Strict):
    """bundle.json. engines/README.md describes each field."""

    schema_version: int = SCHEMA_VERSION
    model: ModelFacts
    precision: Precision
    target: Literal["onnxruntime"] = "onnxruntime"
    layers_per_engine: int
    exit_layers: list[int]
    max_cache_length: int
    key_value_heads: list[KeyValueHeads]
    contexts: list[ContextTensor]
    engines: Engines
    tokenizer: bool
    tolerance: float = DEFAULT_TOLERANCE
    unread_tensors: list[str] = Field(default_factory=list)
    tool_versions: dict[str, str]
    portable: PortableGraphs | None = None
    plans: dict[Target, PlanSet] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 of the head's weights, which tells one model's bundles from another's."""
        own = self.files.get("onnx/head.data")
        return (own or self.files["onnx/embed.data"]).sha256

    def cache_bytes(self) -> int:
        """Bytes of one sequence's full cache; keys and values are fp32 on CPU."""
        per_token = sum(2 * 4 * kv.heads * kv.head_size for kv in self.key_value_heads)
        return per_token * self.max_cache_length


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Size and digest of every file below `directory` but the exit configuration."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST, MANIFEST_DIGEST, EXIT_CONFIG):
            entries[name] = file_entry(directory, name)
    return entries


def file_entry(directory: Path, name: str) -> FileEntry:
    """Size and digest of the file `name` of the bundle in `directory`."""
    path = directory / name
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write bundle.json and its digest, in the form that `sha256sum -c` reads.

    Both are whole before either takes its name.
    """
    new = directory / f".{MANIFEST}"
    new.write_text(manifest.model_dump_json(indent=1) + "\n")
    digest = directory / f".{MANIFEST_DIGEST}"
    digest.write_text(f"{sha256(new)}  {MANIFEST}\n")
    new.rename(directory / MANIFEST)
    digest.rename(directory / MANIFEST_DIGEST)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the bundle in `directory`.

    Raises SedacError when there is none, it is of a newer schema, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SedacError(
            f"{directory} is no bundle: it holds no {MANIFEST}; build one with sedac-export build"
        ) from error
    try:
        # first, because a newer manifest need not fit the fields and is not damaged
        _check_schema(path, json.loads(text))
        _check_digest(path)
        return Manifest.model_validate_json(text)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SedacError(f"{path} cannot be read ({reason}); build the bundle again") from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise SedacError naming the first file that is missing, truncated or altered."""
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise _damaged(path, "missing")
        if path.stat().st_size < entry.bytes:
            raise _damaged(path, "truncated")
        if sha256(path) != entry.sha256:
            raise _damaged(path, "altered")


def _check_schema(path: Path, manifest: object) -> None:
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ValueError("it has no schema_version")
    if version > SCHEMA_VERSION:
        raise SedacError(
            f"{path}: schema {version} is newer than {SCHEMA_VERSION}, the newest this sedac reads;"
            " update sedac"
        )


def _check_digest(path: Path) -> None:
    digest = path.with_name(MANIFEST_DIGEST)
    if not digest.is_file():
        raise _damaged(digest, "missing")
    if digest.read_bytes().split()[:1] != [sha256(path).encode()]:
        raise _damaged(path, "altered")


def _damaged(path: Path, state: str) -> SedacError:
    return SedacError(f"{path} is {state}; build or copy the bundle again")
