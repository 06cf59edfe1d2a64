"""Lossless mode on quantized bundles: the tokens of the quantized model at full depth."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_cache import BuildCache
from conftest import DEMO_MODEL, THREADS

from sedac_export import BuildRequest
from sedac_runtime import SedacModel

PROMPTS, NEW_TOKENS = 24, 64
# never seen by the demo model
MODULES = ("argparse", "difflib", "tarfile", "zipfile", "typing", "inspect")


def prompts() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for index in range(PROMPTS):
        text = (library / f"{MODULES[index % len(MODULES)]}.py").read_text(encoding="utf-8")
        start = 3000 + 331 * index
        yield text[start : start + 300]


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_no_token_flips(precision: str, build_cache: BuildCache, tmp_path: Path) -> None:
    """Where sums had other bits in passes of several tokens, half of the texts would differ."""
    request = BuildRequest(str(DEMO_MODEL), tmp_path / "bundle", precision)
    model = SedacModel.from_pretrained(build_cache.bundle(request), threads=THREADS)
    settings = {"max_new_tokens": NEW_TOKENS, "stop_tokens": []}
    accepted = 0
    for prompt in prompts():
        expected = model.generate(prompt, mode="full", **settings).tokens
        lossless = model.generate(prompt, mode="lossless", **settings)
        assert lossless.tokens == expected
        accepted += lossless.accepted
    assert accepted > 0
