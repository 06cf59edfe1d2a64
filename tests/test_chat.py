"""Chat templates: what a bundle's program may do."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sedac_runtime import InputError
from sedac_runtime.chat import ChatTemplates, render
from sedac_runtime.template_process import TemplateProcess

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
        render(
            "the chat template of b", TemplateProcess(template), {"messages": [{"role": "user"}]}
        )
    message = str(error.value)
    assert message.startswith("the chat template of b fails on these messages")
    assert HOSTILE[template] in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


def test_characters_of_any_kind_pass() -> None:
    text = "é 漢 \U0001f600 \x1b \ud800 \r\n"
    assert (
        render("t", TemplateProcess("{{ messages }}|{{ '\\n' }}"), {"messages": text})
        == f"{text}|\n"
    )


def test_messages_that_are_no_json_are_refused() -> None:
    with pytest.raises(InputError, match="not JSON"):
        render("t", TemplateProcess("{{ messages }}"), {"messages": [object()]})


@pytest.mark.parametrize(
    "arguments", ["", "indent=2", "separators=(',', ':'), sort_keys=true", "ensure_ascii=true"]
)
def test_json_is_written_as_transformers_writes_it(arguments: str) -> None:
    messages = [{"role": "user", "content": "é <b>", "a": [1, {}]}]
    template = "{{ messages[0] | tojson(" + arguments + ") }}"
    (expected,), _ = render_jinja_template([messages], chat_template=template)
    assert render("t", TemplateProcess(template), {"messages": messages}) == expected


@pytest.mark.parametrize("as_files", [True, False])
def test_tools_take_the_template_that_is_for_them(as_files: bool) -> None:
    named = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    texts: dict[str, str | None] = {
        "chat_template.jinja": named["default"] if as_files else None,
        "additional_chat_templates/tool_use.jinja": named["tool_use"] if as_files else None,
        "tokenizer_config.json": "{}" if as_files else json.dumps({"chat_template": listed}),
    }
    messages = [{"role": "user", "content": "hi"}]
    assert ChatTemplates(Path("b"), texts).render(messages) == "plain"
    assert ChatTemplates(Path("b"), texts).render(messages, [{"name": "search"}]) == "search"


def test_settings_are_no_special_tokens() -> None:
    """`add_bos_token` is none to transformers, and a text of "False" would count as true."""
    texts: dict[str, str | None] = {
        "chat_template.jinja": "{{ bos_token }}{% if add_bos_token %}twice{% endif %}",
        "additional_chat_templates/tool_use.jinja": None,
        "tokenizer_config.json": '{"bos_token": {"content": "<s>"}, "add_bos_token": false}',
    }
    assert ChatTemplates(Path("b"), texts).render([{"role": "user", "content": "hi"}]) == "<s>"


def test_what_is_none_is_not_there() -> None:
    texts: dict[str, str | None] = {
        "chat_template.jinja": "{{ messages[0].content }}{{ messages[0].name is defined }}",
        "additional_chat_templates/tool_use.jinja": None,
        "tokenizer_config.json": None,
    }
    messages = [{"role": "assistant", "content": None, "name": None}]
    assert ChatTemplates(Path("b"), texts).render(messages) == "False"
