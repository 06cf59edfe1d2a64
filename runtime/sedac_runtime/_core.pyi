"""The Rust core's binding. Everything public is re-exported by sedac_runtime."""

import os
from pathlib import Path
from typing import Any, Literal, final

from typing_extensions import Buffer

from sedac_runtime.flavour import Executor

__all__ = [
    "SCHEMA_VERSION",
    "BundleError",
    "BundleFiles",
    "EngineError",
    "Generation",
    "InputError",
    "Model",
    "SedacError",
    "Thresholds",
    "__version__",
    "exits_by_risk",
    "exits_by_stability",
    "read_manifest",
    "read_unlisted",
]

SCHEMA_VERSION: int
__version__: str

class SedacError(Exception):
    """Base of all errors of sedac_runtime."""

class BundleError(SedacError):
    """A bundle is missing, damaged, of another schema or too large for the memory it may take."""

class InputError(SedacError):
    """A setting is out of range or a prompt cannot be used."""

class EngineError(SedacError):
    """ONNX Runtime, TensorRT or the tokenizer failed, or an engine gave NaN or infinity."""

@final
class BundleFiles:
    """A bundle's files, checked."""

    def __new__(
        cls,
        directory: str | os.PathLike[str],
        *,
        verify: str = "always",
        threads: int = 0,
        replaced: str | os.PathLike[str] | None = None,
        older: bool = False,
    ) -> BundleFiles: ...
    @property
    def manifest(self) -> bytes: ...
    @property
    def engines_sha256(self) -> str: ...
    def certification(self) -> tuple[str | None, str]: ...
    @property
    def hashed_and_skipped(self) -> tuple[int, int]: ...
    def read(self, name: str | os.PathLike[str]) -> bytes: ...
    def graph(self, name: str | os.PathLike[str]) -> tuple[bytes, Path]: ...
    def path(self, name: str | os.PathLike[str]) -> Path: ...

@final
class Model:
    """A bundle with its engines loaded."""

    def __new__(
        cls,
        directory: str | os.PathLike[str],
        library: str | os.PathLike[str],
        threads: int,
        plans: tuple[str, Executor, bool] | None = None,
        *,
        verify: str = "always",
        memory_limit: int | None = None,
    ) -> Model: ...
    def read_text(self, name: str | os.PathLike[str]) -> str | None: ...
    @property
    def name(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_cache_length(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def exit_layers(self) -> list[int]: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def exit_config(
        self,
    ) -> tuple[
        str,
        Literal["propagate", "defer"],
        Literal["auto", "early-exit", "prompt-lookup"] | None,
    ]: ...
    @property
    def trained_depths(self) -> dict[str, list[int]]: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def follow(
        self,
        tokens: list[int],
        *,
        policy: str | None = None,
        forced_exit: list[int] | None = None,
        kv_fill: str = "propagate",
    ) -> tuple[list[int], list[int]]: ...
    def generate(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        stop_tokens: list[int],
        stop_strings: list[str] = ...,
        policy: str | None = None,
        forced_exit: list[int] | None = None,
        drafter: str | None = None,
        kv_fill: str = "propagate",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        profile: bool = False,
    ) -> Generation: ...
    def bench(
        self,
        cases: list[tuple[str, bool, int | None, str | None]],
        prompt: list[int] | tuple[str, int],
        new_tokens: int,
        repeat: int,
        against: int,
    ) -> list[dict[str, Any]]: ...

@final
class Generation:
    """Yields (token id, text, exit layer, exit reason) for each token as it is generated, from when
    the first is asked for. Threads that read it take turns."""

    def __iter__(self) -> Generation: ...
    def __next__(self) -> tuple[int, str, int, str]: ...
    def close(self) -> None: ...
    @property
    def certification(self) -> tuple[str | None, str] | None: ...
    def summary(self) -> dict[str, Any]: ...

@final
class Thresholds:
    """Thresholds by depth that threads read and move without locks."""

    def __new__(cls, values: dict[int, float]) -> Thresholds: ...
    def get(self, depth: int) -> float | None: ...
    def follow(self, depth: int, risks: Buffer, exit_rate: float, step: float) -> float: ...

def exits_by_stability(
    stability: Buffer, tau: float, consecutive_k: int, min_layer_ratio: float
) -> list[int]: ...
def exits_by_risk(risks: Buffer, thresholds: Thresholds, layers: int) -> list[int]: ...
def read_manifest(directory: str | os.PathLike[str]) -> bytes:
    """The text of bundle.json in `directory`, which has its digest and a schema that is known."""

def read_unlisted(directory: str | os.PathLike[str], name: str | os.PathLike[str]) -> bytes | None:
    """The text of the file `name` of the bundle in `directory`, None where there is none."""
