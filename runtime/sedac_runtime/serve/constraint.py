"""Texts that follow a grammar: which tokens may come next."""

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from sedac_runtime._core import InputError

_LONGEST_REASON = 300
# between the tokens of JSON: small models may not find an end to more
_WHITESPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,2}"


class Constraint:
    """Follows the tokens of one sequence through a grammar of llguidance.

    Raises InputError where the grammar cannot be used.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._check()

    def fork(self) -> "Constraint":
        """The same state, for another sequence."""
        fork = object.__new__(Constraint)
        fork._matcher = self._matcher.deep_copy()
        return fork

    def mask(self) -> bytes:
        """A bit for each token that may come next: little-endian words of 32."""
        mask = self._matcher.compute_bitmask()
        self._check()
        if not mask.strip(b"\0"):
            raise _refused("no token can come next")
        return mask

    def advance(self, tokens: list[int]) -> None:
        """Go on with `tokens`, each of which the mask before it allows."""
        self._matcher.consume_tokens(tokens)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(_first_sentence(self._matcher.get_error()))


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that conforms to `schema`. Raises InputError."""
    return _checked(LLMatcher.grammar_from_json_schema(schema_text(schema)))


def schema_text(schema: dict[str, Any]) -> str:
    """`schema` for llguidance, which else lets white space go on for ever."""
    return json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema})


def lark_grammar(lark: str) -> str:
    """The grammar that llguidance's variant of Lark describes. Raises InputError."""
    return _checked(LLMatcher.grammar_from_lark(lark))


def _checked(grammar: str) -> str:
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        reason = _first_sentence(messages[0])
        raise InputError(f"the schema cannot be used ({reason}); simplify it")
    return grammar


def _refused(reason: str) -> InputError:
    return InputError(f"the text cannot follow the schema ({reason}); simplify it")


def _first_sentence(message: str) -> str:
    """A message of llguidance without the state of the parser."""
    return " ".join(message.partition("<state>")[0].split())[:_LONGEST_REASON]
