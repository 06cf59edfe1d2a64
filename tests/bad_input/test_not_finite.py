"""Weights that are no numbers: no text comes of them, and the error says where they are."""

from pathlib import Path

import pytest

from bad_input.command import Command, assert_one_line_error, spoil
from sedac_runtime import EngineError, SedacModel

ENGINES = {
    "embed": "the embed engine",
    "layer_000": "the engine of layer 0",
    "layer_002": "the engine of layer 2",
    "head": "the head engine",
}
MODES = {
    "full": {"mode": "full"},
    "exit": {"mode": "exit", "tau": 2.0},
    "early": {"forced_exit": [3]},
    "lossless": {"mode": "lossless"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_is_named_in_every_mode(bundle: Path, engine: str) -> None:
    spoil(bundle, engine, float("nan"))
    # the weight of token 0 where it is one of the embedding
    model = SedacModel.from_pretrained(bundle)
    for settings in MODES.values():
        with pytest.raises(EngineError) as error:
            model.generate([1, 2, 0], max_new_tokens=8, stop_tokens=[], **settings)  # type: ignore[arg-type]
        assert "the logits of position 2 are not finite" in str(error.value)
        assert ENGINES[engine] in str(error.value)


def test_the_command_ends_with_one_line(runtime: Command, bundle: Path) -> None:
    spoil(bundle, "layer_001", float("inf"))
    result = runtime("generate", "--engines", bundle, "--prompt", "def f", "--json")
    assert_one_line_error(result, "not finite", "layer 1", "build the bundle again")
