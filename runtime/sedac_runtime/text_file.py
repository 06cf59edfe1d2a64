"""Files that are written whole or not at all."""

import tempfile
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, which is unchanged if that fails. Raises OSError."""
    directory = path.absolute().parent
    with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
        written = Path(file.name)
        try:
            file.write(text)
            file.flush()
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
