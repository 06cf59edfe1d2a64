"""Texts to calibrate a quantizer on, and others to compare the quantized model on."""

import itertools
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sedac_export.arrays import Array
from sedac_export.errors import SedacError

WINDOW = 256
_CALIBRATION, _EVALUATION = 32, 8
# of the standard library: as text beside the language reference
_MODULES = ("argparse", "difflib")
SHIPPED = "Python's language reference and standard library"


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, int64 [tokens]; no token is in both lists."""

    name: str
    calibration: list[Array]
    evaluation: list[Array]

    def tokens(self) -> int:
        """How many are evaluated."""
        return sum(len(window) for window in self.evaluation)


def read_texts(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], length: int) -> Texts:
    """Cut `files`, or texts that ship with Python, into windows of at most `length` tokens.

    Calibration and evaluation take turns. Raises SedacError for a file that cannot be read or is
    shorter than two windows.
    """
    length = min(length, WINDOW)
    texts = {str(path): _read(path) for path in files} if files else _shipped()
    cut = [_windows(tokenizer, name, text, length) for name, text in texts.items()]
    turns = itertools.zip_longest(*map(_pairs, cut))
    pairs = [pair for turn in turns for pair in turn if pair is not None]
    calibration, evaluation = zip(*pairs, strict=True)
    name = ", ".join(texts) if files else SHIPPED
    return Texts(name, list(calibration[:_CALIBRATION]), list(evaluation[:_EVALUATION]))


def _windows(tokenizer: PreTrainedTokenizerBase, name: str, text: str, length: int) -> list[Array]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = np.array(encoded, dtype=np.int64)
    if len(tokens) < 2 * length:
        raise SedacError(
            f"--data {name} has {len(tokens)} tokens, and at least {2 * length} are needed to"
            " calibrate and to compare; add text"
        )
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def _pairs(windows: list[Array]) -> list[tuple[Array, Array]]:
    """Each window but a last odd one, beside its neighbour."""
    return list(zip(windows[::2], windows[1::2], strict=False))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SedacError(f"--data {path} is not UTF-8 text") from error
    except OSError as error:
        raise SedacError(
            f"--data {path} cannot be read: {error.strerror}; name a file of UTF-8 text"
        ) from error


def _shipped() -> dict[str, str]:
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [_read(library / f"{module}.py") for module in _MODULES]
    return {"reference": "\n\n".join(topics.values()), "library": "\n\n".join(modules)}
