"""Which tests a quick run leaves out, and what the processes of a run have in common.

The process that hands tests out to workers reads this too. PyTorch and transformers take seconds to
import, so what needs them is in shared_fixtures.py, for the processes that run tests.
"""

import os
import tempfile
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import ARCHITECTURES, OTHERS

from sedac_runtime.flavour import find_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# threads of several workers that spin for the same cores hold each other up
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
# PyTorch's and numpy's, and those of the processes that tests start
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# architectures of each list that a quick run takes for the tests marked `rotating`
ROTATED = 3

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
TinyBundle = tuple["PreTrainedModel", Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sedac")
    group.addoption(
        "--quick", action="store_true", help="without what is slow; three architectures a day"
    )
    group.addoption("--day", type=int, help="which three --quick takes; by default today's")


def pytest_configure(config: pytest.Config) -> None:
    """Workers are given the options that result here, so that all of them collect the same."""
    if config.option.day is None:
        config.option.day = date.today().toordinal()
    if not hasattr(config, "workerinput"):
        # what the core keeps there for later processes is for those of this run only
        cache = tempfile.TemporaryDirectory(prefix="sedac-cache-")
        config.add_cleanup(cache.cleanup)
        os.environ["XDG_CACHE_HOME"] = cache.name
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out or config.option.collectonly:
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.option.quick:
        return None
    names = ", ".join(sorted(in_rotation(config)))
    return f"quick run: rotating tests with --day {config.option.day}: {names}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.quick:
        return
    wanted = in_rotation(config)
    left_out = [item for item in items if is_left_out(item, wanted)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def is_left_out(item: pytest.Item, wanted: set[str]) -> bool:
    """Whether a quick run goes without this test."""
    if item.get_closest_marker("rotating"):
        assert isinstance(item, pytest.Function)
        return item.callspec.params["name"] not in wanted
    return item.get_closest_marker("slow") is not None


def in_rotation(config: pytest.Config) -> set[str]:
    """The architectures of the day. Every one has its turn within so many days as there are."""

    def chosen(names: Iterable[str]) -> list[str]:
        listed = list(names)
        first = ROTATED * config.option.day
        return [listed[(first + n) % len(listed)] for n in range(ROTATED)]

    return {*chosen(ARCHITECTURES), *chosen(OTHERS)}


def require_chain() -> None:
    """Skip the test where the target cuda cannot be compiled or run."""
    for module in ("cuda.bindings.nvrtc", "elftools"):
        pytest.importorskip(module, reason="of the extra sedac[cuda]")
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("this host has no NVIDIA GPU")
    if float(gpu.compute_capability) < 9:
        pytest.skip(f"the chain does not run on {gpu.name}")
