"""Texts that follow a grammar: which tokens may come next."""

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from sedac_runtime._core import InputError


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
        return mask

    def advance(self, tokens: list[int]) -> None:
        """Go on with `tokens`, each of which the mask before it allows."""
        self._matcher.consume_tokens(tokens)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise InputError(f"the text cannot follow the schema ({reason}); simplify it")


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that conforms to `schema`. Raises InputError."""
    return _checked(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def lark_grammar(lark: str) -> str:
    """The grammar that llguidance's variant of Lark describes. Raises InputError."""
    return _checked(LLMatcher.grammar_from_lark(lark))


def _checked(grammar: str) -> str:
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        reason = " ".join(messages[0].split())
        raise InputError(f"the schema cannot be used ({reason}); simplify it")
    return grammar
