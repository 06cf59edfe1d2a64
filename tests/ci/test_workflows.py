"""What the workflows run of others."""

import re
from pathlib import Path

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))


def test_actions_are_pinned_by_commit_and_say_of_which_version() -> None:
    """A tag can be moved to other code; a commit cannot."""
    lines = [line for path in WORKFLOWS for line in path.read_text().splitlines()]
    used = [line.split("uses:", 1)[1].strip() for line in lines if "uses:" in line]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
