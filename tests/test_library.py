"""The ONNX Runtime library that the core loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from sedac_runtime.library import find_onnxruntime

OLDER = """
static const void *api(unsigned version) { return 0; }
static const char *version(void) { return "1.30.0"; }
static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base =
    {api, version};
const void *OrtGetApiBase(void) { return &base; }
"""
LOAD = "import sys; from sedac_runtime import _core; _core.Model(sys.argv[1], sys.argv[2], 1)"


def test_an_older_library_is_refused_with_the_remedy(demo_bundle: Path, tmp_path: Path) -> None:
    library = tmp_path / "libonnxruntime.so"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(compiler, input=OLDER, text=True, check=True)
    # a process loads ONNX Runtime once, and this one may have
    command = [sys.executable, "-c", LOAD, demo_bundle, library]
    run = subprocess.run(command, capture_output=True, text=True)
    wanted = f"cannot be loaded from {library}: it is version 1.30.0; install onnxruntime 1.31"
    assert wanted in run.stderr.splitlines()[-1]


def test_the_library_for_gpus_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wheels put their library into the same package."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (capi.parent / "__init__.py").touch()
    for version in ("1.31.1", "1.32.0", "1.33.0"):
        (capi / f"libonnxruntime.so.{version}").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert find_onnxruntime().name == "libonnxruntime.so.1.31.1"
    metadata = tmp_path / "onnxruntime_gpu-1.32.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 1.32.0\n")
    assert find_onnxruntime().name == "libonnxruntime.so.1.32.0"
