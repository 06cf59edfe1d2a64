"""The bars that commands show on stderr while they work."""

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sedac_export.console import StageProgress, console


@contextlib.contextmanager
def progress_bar(*stages: str) -> Iterator[StageProgress]:
    """A bar for each stage on an interactive terminal; the function that moves them."""
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # after a mistake the one line that names it stands alone
    quiet = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        tasks = {stage: bar.add_task(stage, total=None) for stage in stages}
        yield lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total)
