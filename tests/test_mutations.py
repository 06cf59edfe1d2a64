"""Some hundreds of mutated bundles: refused or right, and nothing outside of them is opened."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_cache import BuildCache
from tiny_models import save_model_with_tokenizer

from sedac_export import BuildRequest

COUNT, QUICK_COUNT = 300, 100
TESTS = Path(__file__).parent
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"

# a successful open, its file as the kernel resolved it
_OPENED = re.compile(r"^(\d+) +open(?:at2?)?\(.*\) = \d+<(.*?)>(?:\(deleted\))?$")


@pytest.fixture(scope="module")
def bundle(build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("mutations")
    save_model_with_tokenizer(directory / "model")
    (directory / "model" / "chat_template.jinja").write_text(TEMPLATE)
    request = BuildRequest(str(directory / "model"), directory / "bundle", max_cache_length=320)
    return build_cache.bundle(request)


def run(bundle: Path, count: int, log: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Judge `count` mutations under strace; also every file that a child opened."""
    command = [sys.executable, "-m", "mutations", str(bundle), "--count", str(count)]
    traced = ["strace", "-f", "-y", "-qq", "-e", "trace=open,openat,openat2", "-o", str(log)]
    temporary = log.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(temporary),
        # what the core remembers of bundles, under names that do not come from them
        "XDG_CACHE_HOME": str(temporary),
    }
    ended = subprocess.run(
        [*traced, *command], capture_output=True, text=True, env=environment, check=False
    )
    opened: set[str] = set()
    parent = None
    for line in log.read_text(errors="replace").splitlines():
        parent = parent or line.split()[0]
        if (found := _OPENED.match(line)) and found[1] != parent:
            opened.add(found[2])
    return ended, opened


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_mutated_bundles_are_refused_or_right_and_open_nothing_outside(
    bundle: Path, tmp_path: Path, quick: bool
) -> None:
    _, usual = run(bundle, 0, tmp_path / "whole")
    assert any(path.endswith("onnx/head.onnx") for path in usual)
    ended, opened = run(bundle, QUICK_COUNT if quick else COUNT, tmp_path / "mutated")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"'refused': \d+", ended.stdout), ended.stdout
    # modules that only an error needs are Python's and the packages' own, and temporary files ours
    installed = (sys.prefix, sys.base_prefix, str(TESTS.parent / "runtime"), "/proc/", "/sys/")
    temporary = str(tmp_path / "temporary")
    inside = re.compile(re.escape(str(bundle.parent)) + r"/[^/]+/bundle(/|$)")
    outside = {
        path
        for path in opened - usual
        if not inside.match(path) and not path.startswith((*installed, temporary))
    }
    assert not outside
