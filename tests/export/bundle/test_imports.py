"""Bundles are read where torch and TensorRT are not installed."""

import subprocess
import sys
from pathlib import Path

import sedac_export.bundle

HEAVY = ("polygraphy", "tensorrt", "tensorrt_rtx", "torch", "transformers")
MODULES = sorted(path.stem for path in Path(sedac_export.bundle.__path__[0]).glob("[a-z]*.py"))


def test_bundles_are_read_without_torch_and_tensorrt() -> None:
    imports = "".join(f"import sedac_export.bundle.{name}\n" for name in MODULES)
    code = (
        f"import sys\nfrom sedac_export.bundle import Bundle\n{imports}"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "manifest" in MODULES
    assert run.stdout.strip() == "[]"
