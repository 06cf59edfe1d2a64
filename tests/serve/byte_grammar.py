"""What grammars admit, where every byte of a text is a token."""

from llguidance import LLMatcher, LLTokenizer

_BYTES = LLTokenizer("byte")


def admits(grammar: str, text: str) -> bool:
    """Whether `text` is all that `grammar` asks for."""
    matcher = LLMatcher(_BYTES, grammar, log_level=0)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
