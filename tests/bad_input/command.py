"""Run the commands in this process, and say what a good refusal looks like."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def call(
    main: Callable[[], None], arguments: list[str], capture: pytest.CaptureFixture[str]
) -> Result:
    """What `main` does with `arguments`. An exception that it lets through fails the test."""
    capture.readouterr()
    saved = sys.argv
    sys.argv = ["command", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = saved
    return Result(code, *capture.readouterr())


def assert_one_line_error(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, and on stderr one line that names every word."""
    lines = result.err.splitlines()
    assert (result.code, result.out, len(lines)) == (2, "", 1), result
    assert lines[0].startswith("error: "), result
    assert "Traceback" not in lines[0], result
    for word in words:
        assert word in lines[0], (word, result)


def parse_only_json(result: Result) -> dict[str, Any]:
    """The one object on stdout, which must be JSON by the book: NaN and Infinity are not."""
    assert result.code == 0, result
    assert result.out.count("\n") == 1, result

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON: {result.out}")

    parsed = json.loads(result.out, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def snapshot(directory: Path) -> dict[str, str]:
    """Every path below `directory`, hidden ones too, with what it holds."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        )
        for path in sorted(directory.rglob("*"))
    }


def rewrite_manifest(bundle: Path, **changes: Any) -> None:
    """Change fields of bundle.json as whoever builds bundles could: with the digest of the new."""
    path = bundle / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "bundle.sha256").write_text(f"{digest}  bundle.json\n")


def rewrite_file(bundle: Path, name: str, data: bytes) -> None:
    """Replace file `name` of a bundle, and what the manifest says of it."""
    (bundle / name).write_bytes(data)
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(bundle, files=files | {name: entry})


def spoil(bundle: Path, engine: str, number: float) -> None:
    """Put `number` into a weight of `engine`, as whoever builds bundles could."""
    graph = bundle / "onnx" / f"{engine}.onnx"
    for weight in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place:
            break
    file = graph.parent / place["location"]
    data = bytearray(file.read_bytes())
    offset = int(place.get("offset", 0))
    data[offset : offset + 4] = np.float32(number).tobytes()
    rewrite_file(bundle, str(file.relative_to(bundle)), bytes(data))


@contextmanager
def mounted_tmpfs(directory: Path, *options: str) -> Iterator[Path]:
    """`directory` as a file system of its own; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    directory.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
