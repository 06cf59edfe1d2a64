"""Gather the texts that the drafter was trained on: modules and descriptions of installed packages.

    python demo/smollm2-drafter/texts.py FOLDER

Modules of 4 to 40 KB of the packages below, as far as they are installed, and the descriptions of
all installed packages, of 4 to 80 KB. None of them is of Python's standard library, which the
repository measures with.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("torch", "jax", "pandas", "networkx", "sympy", "matplotlib")
KILOBYTE = 1024


def texts(site: Path) -> Iterator[tuple[str, str]]:
    """Suffixes and contents of the texts below `site`; files that are no UTF-8 are left out."""
    modules = [path for name in PACKAGES for path in sorted((site / name).rglob("*.py"))]
    descriptions = sorted(site.glob("*.dist-info/METADATA"))
    for paths, suffix, most in ((modules, ".py", 40), (descriptions, ".md", 80)):
        for path in paths:
            if 4 * KILOBYTE < path.stat().st_size < most * KILOBYTE:
                try:
                    yield suffix, path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def main() -> None:
    """Write the texts to a folder, and how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    characters = count = 0
    for count, (suffix, text) in enumerate(texts(Path(sysconfig.get_path("purelib"))), 1):
        (folder / f"{count:05}{suffix}").write_text(text, encoding="utf-8")
        characters += len(text)
    print(f"{count} texts of {characters} characters")


if __name__ == "__main__":
    main()
