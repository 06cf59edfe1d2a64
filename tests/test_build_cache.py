"""What comes from the cache is what would be made now, and a change of anything misses it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from build_cache import BuildCache, digest
from conftest import TinyBundle

from sedac_export.build import exporter
from sedac_export.graph.trace_model import TracedGraphs, trace_graphs
from sedac_export.model.skeleton import Skeleton


def texts(graphs: TracedGraphs) -> list[bytes]:
    every = (
        graphs.embed,
        graphs.head,
        *graphs.layers,
        *graphs.key_value,
        *graphs.attention,
    )
    return [graph.model.SerializeToString(deterministic=True) for graph in every]


def test_cached_graphs_are_those_of_tracing(tiny_bundle: Callable[[str], TinyBundle]) -> None:
    skeleton = Skeleton.load(tiny_bundle("llama")[1].parent / "model")
    assert exporter.trace_graphs is not trace_graphs
    cached = exporter.trace_graphs(skeleton, lambda *_: None)
    traced = trace_graphs(skeleton, lambda *_: None)
    assert texts(cached) == texts(traced)
    assert (cached.kinds, cached.interface.heads) == (traced.kinds, traced.interface.heads)
    assert cached.interface.contexts == traced.interface.contexts


def test_another_configuration_is_another_entry(
    tiny_bundle: Callable[[str], TinyBundle], tmp_path: Path
) -> None:
    skeleton = Skeleton.load(tiny_bundle("llama")[1].parent / "model")
    traced: list[float] = []

    def trace(skeleton: Skeleton, *_: object) -> TracedGraphs:
        traced.append(skeleton.config.rms_norm_eps)
        return trace_graphs_of_llama

    trace_graphs_of_llama = exporter.trace_graphs(skeleton, lambda *_: None)
    cached = BuildCache(tmp_path).tracing(trace)
    epsilon = skeleton.config.rms_norm_eps
    for changed in (epsilon, epsilon, 2 * epsilon, epsilon):
        skeleton.config.rms_norm_eps = changed
        cached(skeleton, lambda *_: None)
    assert traced == [epsilon, 2 * epsilon]


def test_a_digest_is_of_all_that_a_directory_holds(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "source.py"
    file.write_text("x = 1\n")
    seen = [digest(tmp_path)]
    file.write_text("x = 2\n")
    seen.append(digest(tmp_path))
    file.rename(file.with_name("other.py"))
    seen.append(digest(tmp_path))
    (tmp_path / "more").touch()
    seen.append(digest(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "source.pyc").touch()
    assert digest(tmp_path) == seen[-1]
    assert digest("ab", "c") != digest("a", "bc")


def test_an_entry_is_made_once_and_whole(tmp_path: Path) -> None:
    cache, made = BuildCache(tmp_path), []

    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise RuntimeError("stopped")

    def make(directory: Path) -> None:
        made.append(directory)
        (directory / "whole").touch()

    with pytest.raises(RuntimeError):
        cache.fetch("g", "key", fail)
    for _ in range(2):
        assert [path.name for path in cache.fetch("g", "key", make).iterdir()] == ["whole"]
    assert len(made) == 1
    cache.fetch("g", "other", make)
    assert len(made) == 2
