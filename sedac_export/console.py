"""What is shown on stderr while the exporter works."""

from collections.abc import Callable

from rich.console import Console

console = Console(stderr=True)

# called with steps done and steps in total
CountProgress = Callable[[int, int], None]
# called with the stage's name, steps done and steps in total
StageProgress = Callable[[str, int, int], None]
