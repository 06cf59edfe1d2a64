"""Traced graphs and built bundles, shared by the tests, by their workers and by later runs.

An entry is found by the digest of all it was made from: the sources, the installed packages and
what the test asked for. A change to any of them misses the cache, and a fresh clone has none.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import sedac_export
import sedac_runtime
from sedac_export import BuildRequest, build_bundle
from sedac_export.console import StageProgress
from sedac_export.graph.trace import Tracer
from sedac_export.graph.trace_model import TracedGraphs
from sedac_export.model.skeleton import Skeleton

TESTS = Path(__file__).parent
EXPORTER, RUNTIME = (Path(module.__file__ or "").parent for module in (sedac_export, sedac_runtime))
# of each kind: the current sources' entries and those of the last change
GENERATIONS = 2

TraceGraphs = Callable[..., TracedGraphs]


def digest(*parts: object) -> str:
    """A digest of the parts' text; a directory or file among them stands for what it holds."""
    result = hashlib.sha256()
    for part in parts:
        for text in _contents(part) if isinstance(part, Path) else [str(part).encode()]:
            result.update(len(text).to_bytes(8, "little") + text)
    return result.hexdigest()[:32]


def _contents(path: Path) -> Iterable[bytes]:
    if path.is_file():
        yield path.read_bytes()
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield str(file.relative_to(path)).encode()
            yield file.read_bytes()


@functools.cache
def exporter_digest() -> str:
    """Of what decides on the graphs of a model: the exporter, Python and all packages."""
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    return digest(sys.version, *packages, EXPORTER)


@functools.cache
def sources_digest() -> str:
    """Of what decides on a bundle: also the runtime, its compiled core and the tests' helpers."""
    helpers = (file for file in TESTS.rglob("*.py") if not file.name.startswith("test_"))
    return digest(exporter_digest(), RUNTIME, *sorted(helpers))


@dataclass(frozen=True)
class BuildCache:
    """A cache in `directory`, which any number of processes may use at once."""

    directory: Path

    def fetch(self, generation: str, key: str, make: Callable[[Path], object]) -> Path:
        """The directory that `make` filled, by now or before. It must not be changed."""
        entry = self.directory / generation / key
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if not entry.exists():
                partial = entry.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(entry)
        return entry

    def bundle(self, request: BuildRequest) -> Path:
        """What `build_bundle` makes, at the request's output; a copy that may be changed."""
        fields = vars(request) | {"output": None, "model": Path(request.model).name}
        key = digest("build", fields, Path(request.model))
        built = self.made(
            key, lambda partial: build_bundle(replace(request, output=partial / "bundle"))
        )
        shutil.copytree(built / "bundle", request.output)
        return request.output

    def made(self, key: str, make: Callable[[Path], object]) -> Path:
        """`fetch` for what the runtime, the exporter or a helper of the tests makes."""
        return self.fetch(f"bundles-{sources_digest()}", key, make)

    def tracing(self, trace: TraceGraphs) -> TraceGraphs:
        """`trace_graphs`, each model traced once."""

        def cached(
            skeleton: Skeleton,
            progress: StageProgress,
            tracer: type[Tracer] = Tracer,
            dtype: torch.dtype = torch.float32,
            batch: int = 1,
        ) -> TracedGraphs:
            def make(partial: Path) -> None:
                graphs = trace(skeleton, progress, tracer, dtype, batch)
                # the recorded calls hold the model's own modules and serve only to trace
                graphs = replace(graphs, interface=replace(graphs.interface, calls=[]))
                (partial / "graphs").write_bytes(pickle.dumps(graphs))

            config = skeleton.model.config.to_dict() | {"_name_or_path": None}
            key = digest(json.dumps(config, sort_keys=True, default=str), tracer, dtype, batch)
            entry = self.fetch(f"graphs-{exporter_digest()}", key, make)
            graphs: TracedGraphs = pickle.loads((entry / "graphs").read_bytes())
            return graphs

        return cached

    def prune(self) -> None:
        """Remove what was made from older sources."""
        with FileLock(self.directory / "prune.lock"):
            for kind, current in (("graphs", exporter_digest()), ("bundles", sources_digest())):
                directory = self.directory / f"{kind}-{current}"
                directory.mkdir(parents=True, exist_ok=True)
                os.utime(directory)
                found = sorted(self.directory.glob(f"{kind}-*"), key=lambda d: d.stat().st_mtime)
                for old in found[:-GENERATIONS]:
                    shutil.rmtree(old, ignore_errors=True)


def save(directory: Path, value: Any) -> None:
    """Keep a Python value with an entry."""
    (directory / "value").write_bytes(pickle.dumps(value))


def load(directory: Path) -> Any:
    """The value that `save` kept."""
    return pickle.loads((directory / "value").read_bytes())
