"""Text of a model or a bundle on a terminal."""

import re

# all but tab and newline of C0, DEL, C1, and what turns the direction of text
# (https://trojansource.codes)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """`text` with its control characters, but tab and newline, written as Python's escapes.

    A terminal would obey them: move its cursor, change its title, hide what was printed before.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
