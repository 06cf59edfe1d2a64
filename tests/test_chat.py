"""Chat templates: what a bundle's program may do."""

import pytest

from sedac_runtime import InputError
from sedac_runtime.chat import render

# each with words of its error
HOSTILE = {
    "{{ raise_exception('no\nusers') }}": "no users",
    "{% for %}": "Syntax",
    "{{ messages[0].x.y }}": "Undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages + 1 }}": "TypeError",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}": "RecursionError",
    "{% for a in range(10**9) %}{% endfor %}": "Range too big",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than",
    "{{ 9 ** 99999999 }}": "longer than",
    "{{ 'a' * 10**10 }}": "memory",
    "{{ 'a' | center(10**9) }}": "memory",
    "{{ 'a' * 5000000 }}": "more than 4194304 characters",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: str(template)[:40])
def test_what_fails_or_is_too_much_is_one_line(template: str) -> None:
    with pytest.raises(InputError) as error:
        render("the chat template of b", template, {"messages": [{"role": "user"}]})
    message = str(error.value)
    assert message.startswith("the chat template of b fails on these messages")
    assert HOSTILE[template] in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


def test_characters_of_any_kind_pass() -> None:
    text = "é 漢 \U0001f600 \x1b \ud800 \r\n"
    assert render("t", "{{ messages }}|{{ '\\n' }}", {"messages": text}) == f"{text}|\n"


def test_messages_that_are_no_json_are_refused() -> None:
    with pytest.raises(InputError, match="not JSON"):
        render("t", "{{ messages }}", {"messages": [object()]})
