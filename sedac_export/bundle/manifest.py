"""The bundle's manifest, bundle.json."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from sedac_export.bundle.cuda_entry import CudaChain
from sedac_export.bundle.hashing import sha256
from sedac_export.bundle.plan_entries import PlanSet, PortableGraphs
from sedac_export.bundle.schema import StrictModel
from sedac_export.bundle.signature import SIGNATURE, withdraw_signature
from sedac_export.bundle.staging import sync
from sedac_export.errors import SedacError
from sedac_runtime import _core
from sedac_runtime.flavour import Target
from sedac_runtime.tolerance import DEFAULT_TOLERANCE

SCHEMA_VERSION = _core.SCHEMA_VERSION
MANIFEST = "bundle.json"
MANIFEST_DIGEST = "bundle.sha256"
EXIT_CONFIG = "sedac_config.json"
VALIDATION = "validation.json"

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


class ModelFacts(StrictModel):
    """What the runtime must know of the model."""

    name: str
    type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    eos_token_ids: list[int]


class ContextTensor(StrictModel):
    """A tensor that contexts gives and layers take, [1, tokens, ...]: -1 stands for tokens."""

    name: str
    shape: list[int]
    dtype: Literal["float32", "int64", "int32", "bool"]


class KeyValueHeads(StrictModel):
    """Cache geometry of one layer."""

    heads: int
    head_size: int


class LayerEngineEntry(StrictModel):
    """One engine of consecutive decoder layers, counted from 0."""

    file: str
    first_layer: int
    num_layers: int
    contexts: list[str]
    risk: bool = False


class KeyValueEngineEntry(StrictModel):
    """The engine that fills one layer's cache when the layer is skipped."""

    file: str
    contexts: list[str]


class ExitEngineEntry(StrictModel):
    """The engine that gives an exit depth's signals, and the lens before the head there."""

    depth: int
    file: str
    lens: str | None = None


class DrafterEntry(StrictModel):
    """The engines of a trained drafter.

    state makes a state of the residual streams after feature_layers; file takes states to the next
    one and the logits of `tokens`, ascending. key_value_size: numbers in a key, and in a value.
    """

    state: str
    file: str
    feature_layers: list[int]
    key_value_size: int
    tokens: list[int]


class EngineFiles(StrictModel):
    """Every engine of the bundle. `monolith` runs all layers at once and is for comparison.

    contexts is None where no layer takes a context tensor.
    """

    embed: str
    contexts: str | None = None
    layers: list[LayerEngineEntry]
    key_value: list[KeyValueEngineEntry]
    head: str
    monolith: LayerEngineEntry
    exits: list[ExitEngineEntry] = Field(default_factory=list)
    attention: list[LayerEngineEntry] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As the digest of the engines is taken: without contexts where there is no such engine."""
        fields: dict[str, Any] = handler(self)
        if self.contexts is None:
            del fields["contexts"]
        return fields


class QuantizedWeights(StrictModel):
    """How the weights of an int8 or int4 bundle are quantized, and what is left in fp32.

    kept: layers, and whether the head and what is tied to it.
    """

    block_size: int
    symmetric: bool
    method: Literal["rtn", "gptq"]
    kept_layers: list[int] = Field(default_factory=list)
    kept_head: bool = False


class FileEntry(StrictModel):
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


class Manifest(StrictModel):
    """bundle.json. docs/reference/bundle.md describes each field.

    cuda_refusal is why the CUDA kernel cannot run the model, once that was asked for.
    """

    schema_version: int = SCHEMA_VERSION
    model: ModelFacts
    precision: Precision
    target: Literal["onnxruntime"] = "onnxruntime"
    quantization: QuantizedWeights | None = None
    layers_per_engine: int
    exit_layers: list[int]
    max_cache_length: int
    key_value_heads: list[KeyValueHeads]
    contexts: list[ContextTensor]
    engines: EngineFiles
    drafter: DrafterEntry | None = None
    tokenizer: bool
    tolerance: float = DEFAULT_TOLERANCE
    unread_tensors: list[str] = Field(default_factory=list)
    tool_versions: dict[str, str]
    portable: PortableGraphs | None = None
    plans: dict[Target, PlanSet] = Field(default_factory=dict)
    onnxruntime_cuda: PortableGraphs | None = None
    cuda: CudaChain | None = None
    cuda_refusal: str | None = None
    files: dict[str, FileEntry] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 of the head's weights, which distinguishes the bundles of different models."""
        own = self.files.get("onnx/head.data")
        return (own or self.files["onnx/embed.data"]).sha256

    def device_precision(self) -> Precision:
        """What engines for GPUs compute in."""
        return self.precision if self.quantization is None else "fp16"

    def cache_bytes(self) -> int:
        """Bytes of one sequence's full cache; keys and values are fp32 on CPU."""
        per_token = sum(2 * 4 * kv.heads * kv.head_size for kv in self.key_value_heads)
        return per_token * self.max_cache_length


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Size and digest of every file below `directory` but exit configuration and signature."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST, MANIFEST_DIGEST, EXIT_CONFIG, SIGNATURE):
            entries[name] = file_entry(directory, name)
    return entries


def file_entry(directory: Path, name: str) -> FileEntry:
    """Size and digest of the file `name` of the bundle in `directory`."""
    path = directory / name
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write bundle.json and its digest, in the form that `sha256sum -c` reads.

    Both are whole before either takes its name. A signature goes.
    """
    withdraw_signature(directory)
    new = directory / f".{MANIFEST}"
    new.write_text(manifest.model_dump_json(indent=1) + "\n")
    digest = directory / f".{MANIFEST_DIGEST}"
    digest.write_text(f"{sha256(new)}  {MANIFEST}\n")
    sync(new)
    sync(digest)
    new.rename(directory / MANIFEST)
    digest.rename(directory / MANIFEST_DIGEST)
    sync(directory)


def settle_manifest(directory: Path) -> None:
    """Give the digest its name where a process was killed after the manifest had got its own."""
    digest, path = directory / f".{MANIFEST_DIGEST}", directory / MANIFEST
    if (
        digest.is_file()
        and not digest.is_symlink()
        and path.is_file()
        and digest.read_text().split()[:1] == [sha256(path)]
    ):
        digest.rename(directory / MANIFEST_DIGEST)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the bundle in `directory`.

    Raises SedacError when there is none, it is of a newer schema, or it is damaged.
    """
    return parse_manifest(directory, _core.read_manifest(directory))


def parse_manifest(directory: Path, text: bytes) -> Manifest:
    """The manifest that is `text`, of the bundle in `directory`.

    Raises SedacError naming the first field that is wrong.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise SedacError(
            f"{directory / MANIFEST}: {name}: {first['msg']}; build the bundle again"
        ) from error
