"""Check which top-level modules of the Rust core use which others: python ci/rust_modules.py."""

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "sedac-core" / "src"

# module: the modules it may use, lowest first
ALLOWED = {
    "cache_file": "",
    "error": "",
    "exponential": "",
    "interrupt": "error",
    "sampler": "error exponential",
    "text": "error",
    "kv": "error",
    "policy": "error",
    "sequence": "error kv",
    "bundle": "cache_file error interrupt kv policy",
    "backend": "error exponential interrupt sampler kv policy sequence bundle",
    "draft": "error exponential interrupt sampler policy sequence bundle backend",
    "chain": "cache_file error interrupt sampler kv policy sequence bundle backend draft",
    "scheduler": "error interrupt sampler sequence backend chain",
    "certification": "error sampler kv policy bundle chain",
    "bench": "error interrupt sampler kv chain",
    "python": (
        "error interrupt sampler text kv policy bundle backend chain scheduler certification bench"
    ),
}

_COMMENT = re.compile(r"//.*")
_PATH = re.compile(r"\bcrate::(?:(\w+)|\{)")
_DECLARATION = re.compile(r"^(?:pub )?mod (\w+);", re.MULTILINE)


def used(source: str) -> set[str]:
    """The top-level modules that `source` names by paths that begin with `crate::`."""
    text = _COMMENT.sub("", source)
    names: set[str] = set()
    for match in _PATH.finditer(text):
        names |= {match[1]} if match[1] else _group(text, match.end())
    return names


def _group(text: str, start: int) -> set[str]:
    """The first name of each path in a group of imports; `start` is behind its opening brace."""
    depth, names, fresh = 1, set(), True
    for token in re.finditer(r"\w+|[{},]", text[start:]):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            break
        if fresh and token[0].isidentifier():
            names.add(token[0])
        fresh = depth == 1 and token[0] == ","
    return names


def errors(sources: Path, allowed: dict[str, str]) -> list[str]:
    """One line for each cycle in `allowed`, undeclared module and arrow that is not allowed."""
    table = {module: set(names.split()) for module, names in allowed.items()}
    try:
        tuple(TopologicalSorter(table).static_order())
    except CycleError as error:
        return [f"the table has a cycle: {' -> '.join(error.args[1])}"]
    declared = set(_DECLARATION.findall((sources / "lib.rs").read_text()))
    found = [
        f"{module}: in the table or in lib.rs only" for module in sorted(declared ^ set(table))
    ]
    for file in sorted(sources.rglob("*.rs")):
        module = file.relative_to(sources).parts[0].removesuffix(".rs")
        others = used(file.read_text()) & declared - {module}
        found += [
            f"{file.relative_to(sources)}: {module} may not use {other}"
            for other in sorted(others - table.get(module, set()))
            if module != "lib"
        ]
    return found


if __name__ == "__main__":
    lines = errors(SOURCES, ALLOWED)
    print("\n".join(lines) or "Rust modules: no cycle, every arrow is allowed")
    sys.exit(bool(lines))
