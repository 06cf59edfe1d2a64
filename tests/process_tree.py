"""Processes as /proc shows them."""

from pathlib import Path


def parent(pid: int) -> int | None:
    """The parent of a process; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[1])


def has_ended(pid: int) -> bool:
    """Whether a process no longer runs."""
    return parent(pid) is None


def children(pid: int) -> set[int]:
    """Those that `pid` has started and that run."""
    running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {child for child in running if parent(child) == pid}


def renderers(pid: int) -> set[int]:
    """Those of its children that render chat templates."""
    return {child for child in children(pid) if _renders(child)}


def _renders(pid: int) -> bool:
    try:
        return b"rendering.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
