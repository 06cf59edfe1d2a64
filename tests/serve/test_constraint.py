"""Grammars of JSON."""

import json
from typing import Any

import pytest

from sedac_runtime import InputError
from sedac_runtime.serve.constraint import Constraint, json_grammar, lark_grammar, schema_text
from serve.byte_grammar import admits

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"cities": {"type": "array", "items": {"enum": ["Bern", "Rome"]}}},
    "required": ["cities"],
    "additionalProperties": False,
}
CITIES = {"cities": ["Bern", "Rome"]}
GRAMMARS = [
    pytest.param(json_grammar(SCHEMA), id="alone"),
    pytest.param(
        lark_grammar(f"start: answer\nanswer: %json {schema_text(SCHEMA)}"), id="in another"
    ),
]


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize(
    "layout", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 8}, {"indent": "\t"}]
)
def test_json_may_be_laid_out_as_usual(grammar: str, layout: dict[str, Any]) -> None:
    text = json.dumps(CITIES, **layout)
    assert admits(grammar, text)
    assert admits(grammar, text.replace("\n", "\r\n"))


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("space", ["\n\n", " " * 3, "\n" + " " * 41])
def test_white_space_does_not_go_on(grammar: str, space: str) -> None:
    assert not admits(grammar, f'{{{space}"cities": []}}')


class Stuck:
    """A matcher whose text can neither end nor go on."""

    def compute_bitmask(self) -> bytes:
        return bytes(8)

    def is_error(self) -> bool:
        return False


def test_a_text_that_no_token_can_continue_is_refused() -> None:
    constraint = object.__new__(Constraint)
    constraint._matcher = Stuck()
    with pytest.raises(InputError, match="no token can come next"):
        constraint.mask()
