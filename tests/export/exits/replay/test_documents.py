"""Which files --data takes."""

from pathlib import Path

import pytest

from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import text_files


def make(directory: Path, name: str, text: str = "some text") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_of_a_package_its_texts_are_taken_and_no_caches(tmp_path: Path) -> None:
    package = tmp_path / "package"
    wanted = [make(package, "b.py"), make(package, "inner/a.py")]
    make(package, "inner/__init__.py", "")
    make(package, "__pycache__/b.cpython-311.pyc")
    make(package, ".git/HEAD")
    make(package, ".hidden")
    named = make(tmp_path, ".named", "")
    assert list(text_files([named, package])) == [named, *wanted]


def test_a_directory_without_texts_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "__init__.py", "")
    with pytest.raises(SedacError, match="holds no files; give text files"):
        list(text_files([tmp_path]))
