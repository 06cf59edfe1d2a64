"""A server that benchmarks start."""

from pathlib import Path

import pytest
from server_process import serving


def test_a_server_that_ends_while_it_starts_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with (
        pytest.raises(RuntimeError, match=f"the server ended: error: {missing}"),
        serving(missing, tmp_path / "log"),
    ):
        pass


def test_a_log_that_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A full disk reads as zeros without an end."""
    with (
        pytest.raises(RuntimeError, match="its log is no file"),
        serving(tmp_path / "missing", Path("/dev/full")),
    ):
        pass
