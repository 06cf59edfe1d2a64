"""Keep libraries from writing to the terminal."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Progress and advice of torch and transformers is not about the user's model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    # it writes a traceback where it leaves a graph as it is; engines are compared with the model
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
