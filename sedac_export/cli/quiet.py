"""Keep libraries from writing to the terminal."""

import os
import warnings


def silence_libraries() -> None:
    """Progress and advice of torch and transformers is not about the user's model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
