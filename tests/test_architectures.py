"""Each architecture gives transformers' tokens after long prompts, or is refused in one true line.

docs/architectures.md lists the outcomes.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import THREADS, TinyBundle
from eager import assert_decoded
from tiny_models import ARCHITECTURES, OTHERS, REFUSED, save_tiny_model

from sedac_export import BuildRequest, SedacError, build_bundle
from sedac_export.build import exporter
from sedac_runtime import InputError, SedacModel

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
PROMPT = 300


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (PROMPT,), generator=generator).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.rotating) for name in OTHERS)]
)
def test_long_prompts_equal_transformers(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    reference, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    for prompt in prompts(3):
        output = model.generate(prompt, mode="full", max_new_tokens=8, stop_tokens=[])
        assert_decoded(reference, prompt, output.tokens)
        assert len(output.tokens) == 8


@pytest.mark.parametrize("name", REFUSED)
def test_what_engines_cannot_express_is_refused_before_tracing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(name, tmp_path / "model")
    monkeypatch.setattr(exporter, "trace_graphs", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(SedacError) as refused:
        build_bundle(BuildRequest(model=str(tmp_path / "model"), output=tmp_path / "bundle"))
    assert "\n" not in str(refused.value)
    for word in REFUSED[name][2]:
        assert word in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["phi3 with longrope"])
def test_no_text_goes_past_where_rotary_tables_change(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    """At 311 positions transformers takes the long factors, for all positions anew."""
    _, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    with pytest.raises(InputError, match="310"):
        model.generate([*prompts(1)[0], *range(11)], mode="full")


def test_the_page_lists_every_outcome() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) +\| (equal|refused)", PAGE.read_text(), re.MULTILINE))
    equal = dict.fromkeys(ARCHITECTURES | OTHERS, "equal")
    assert rows == equal | dict.fromkeys(REFUSED, "refused")
