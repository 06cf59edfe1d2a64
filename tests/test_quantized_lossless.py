"""Decoding on quantized bundles: full depth's tokens where they are promised, and exits."""

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from build_cache import BuildCache
from conftest import DEMO_MODEL, THREADS
from kernel_bits import rows_have_the_same_bits, skip_where_rows_differ

from sedac_export import BuildRequest
from sedac_runtime import SedacModel
from sedac_runtime._core import Sampling, Scheduler

PROMPTS, NEW_TOKENS = 24, 64
# never seen by the demo model
MODULES = ("argparse", "difflib", "tarfile", "zipfile", "typing", "inspect")
SHARED = """
import logging, sys
from sedac_runtime import SedacModel
from sedac_runtime._core import Sampling, Scheduler

logging.basicConfig(level=logging.DEBUG)
core = SedacModel.from_pretrained(sys.argv[1], threads=int(sys.argv[2])).core
scheduler = Scheduler(core, max_sequences=4)
for prompt in ([1], [2, 3], [4, 5]):
    full = core.decoding("full")
    scheduler.add(prompt, full, Sampling(), max_new_tokens=4, stop_tokens=[])
scheduler.step()
while scheduler.statistics().running:
    scheduler.step()
"""


@pytest.fixture(scope="module", params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def any_model(
    bits: int, build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> SedacModel:
    output = tmp_path_factory.mktemp(f"int{bits}") / "bundle"
    bundle = build_cache.bundle(BuildRequest(str(DEMO_MODEL), output, f"int{bits}"))
    return SedacModel.from_pretrained(bundle, threads=THREADS)


@pytest.fixture(scope="module")
def model(bits: int, any_model: SedacModel) -> SedacModel:
    """Where this CPU's products let lossless mode be exact."""
    skip_where_rows_differ(f"int{bits}")
    return any_model


def prompts(count: int = PROMPTS) -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for index in range(count):
        text = (library / f"{MODULES[index % len(MODULES)]}.py").read_text(encoding="utf-8")
        start = 3000 + 331 * index
        yield text[start : start + 300]


def test_lossless_mode_says_whether_this_cpu_lets_it_be_exact(
    bits: int, any_model: SedacModel
) -> None:
    said = {
        mode: any_model.generate("import", mode=mode, max_new_tokens=2).certification
        for mode in ("full", "lossless")
    }
    assert said["full"] is None
    if rows_have_the_same_bits(bits):
        assert said["lossless"] is None
    else:
        assert said["lossless"].startswith("lossless mode is not exact on this CPU")


def test_no_token_flips(model: SedacModel) -> None:
    """Where sums had other bits in passes of several tokens, half of the texts would differ."""
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "stop_tokens": []}
    accepted = 0
    for prompt in prompts():
        expected = model.generate(prompt, mode="full", **settings).tokens
        lossless = model.generate(prompt, mode="lossless", **settings)
        assert lossless.tokens == expected
        accepted += lossless.accepted
    assert accepted > 0


def test_deferred_tokens_leave_what_full_depth_leaves(model: SedacModel) -> None:
    """Waiting tokens go through the skipped layers in one pass of several; every third token goes
    to full depth, and it finds the caches that full depth would have left."""
    for prompt in prompts(4):
        deferred = model.generate(
            prompt,
            mode="exit",
            forced_exit=[3, 6, 12],
            kv_fill="defer",
            max_new_tokens=NEW_TOKENS,
            stop_tokens=[],
        )
        assert deferred.exit_layers[1:] == ([3, 6, 12] * NEW_TOKENS)[: NEW_TOKENS - 1]
        text = model.encode(prompt) + deferred.tokens
        # with all layers no token exits
        chosen, depths = model.follow(text, policy="stability", min_layer_ratio=1.0)
        assert set(depths) == {12}
        full = [n for n, depth in enumerate(deferred.exit_layers) if depth == 12]
        expected = chosen[-1 - NEW_TOKENS : -1]
        assert [deferred.tokens[n] for n in full] == [expected[n] for n in full]


def test_sampled_texts_do_not_flip(model: SedacModel) -> None:
    for seed, prompt in enumerate(prompts(6)):
        settings: dict[str, Any] = {"temperature": 0.8, "seed": seed, "max_new_tokens": NEW_TOKENS}
        expected = model.generate(prompt, mode="full", **settings).tokens
        assert model.generate(prompt, mode="lossless", **settings).tokens == expected


def test_texts_in_company_are_those_alone(model: SedacModel) -> None:
    core = model.core
    scheduler = Scheduler(core, max_sequences=3, prefill_chunk=256)
    settings: dict[str, Any] = {"max_new_tokens": 24, "stop_tokens": []}
    modes: tuple[dict[str, Any], ...] = (
        {"mode": "full"},
        {"mode": "lossless"},
        {"mode": "exit", "forced_exit": [6, 12], "kv_fill": "propagate"},
    )
    for mode in modes:
        encoded = [model.encode(prompt) for prompt in prompts(3)]
        for tokens in encoded:
            scheduler.add(tokens, core.decoding(**mode), Sampling(), **settings)
        texts: dict[int, list[int]] = {}
        while scheduler.statistics().running + scheduler.statistics().waiting:
            for each in scheduler.step():
                texts.setdefault(each.sequence, []).extend(token.id for token in each.tokens)
        alone = [model.generate(tokens, **mode, **settings).tokens for tokens in encoded]
        assert [texts[number] for number in sorted(texts)] == alone


def test_sequences_share_passes_where_rows_have_equal_bits(any_model: SedacModel) -> None:
    """Tokens would not tell. No prompt has three of them, so that only a shared pass has.

    Loggers' levels are read once in a process.
    """
    command = [sys.executable, "-c", SHARED, str(any_model.bundle), str(THREADS)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    certification = any_model.generate("import", mode="lossless", max_new_tokens=2).certification
    assert ("sedac_core.step:tokens=3 depth=12" in log) == (certification is None)
