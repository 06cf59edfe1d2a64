"""Whole numbers that the Rust core takes."""

from collections.abc import Sequence
from typing import SupportsIndex

from sedac_runtime._core import InputError

_LARGEST = 2**31 - 1
LARGEST_SEED = 2**64 - 1
# more than any machine can use, few enough for the system to create
MOST_THREADS = 1024


def check_count(name: str, value: int, least: int, largest: int = _LARGEST) -> None:
    """Raise InputError naming setting `name` unless `value` is in `least`..`largest`."""
    if not isinstance(value, SupportsIndex) or isinstance(value, bool):
        raise InputError(f"{name} {value!r} is no whole number")
    if not least <= value <= largest:
        raise InputError(f"{name} {value} is out of range: {least} to {largest}")


def token_ids(tokens: Sequence[int]) -> list[int]:
    """`tokens` as a list. Raises InputError for bytes, whose numbers are no token ids."""
    if isinstance(tokens, bytes | bytearray):
        raise InputError("a text cannot be bytes; decode it to a str")
    return list(tokens)
