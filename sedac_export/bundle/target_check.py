"""What `sedac-export validate` checks of a target, and what it came to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sedac_export.console import StageProgress

# exit codes of the command, by the first check that failed
FAILED = {"structure": 3, "onnxruntime": 4, "execution": 5}


@dataclass
class TargetCheck:
    """One of the three checks; without `checked` the problems are empty and the reason is given."""

    name: Literal["structure", "onnxruntime", "execution"]
    checked: bool = True
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def not_executed(cls, reason: str) -> "TargetCheck":
        """The last check on a host without a GPU for the target."""
        return cls("execution", checked=False, reason=f"no supported GPU: {reason}")

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        passed = not self.problems if self.checked else None
        report: dict[str, Any] = {"checked": self.checked, "passed": passed}
        if not self.checked:
            report["reason"] = self.reason
        return report | {"problems": self.problems, "engines": self.engines}


def run_checks(progress: StageProgress, *checks: Callable[[], TargetCheck]) -> list[TargetCheck]:
    """What `checks` give, one after another."""
    results = []
    for count, check in enumerate(checks):
        progress("validate", count, len(checks))
        results.append(check())
    progress("validate", len(checks), len(checks))
    return results


@dataclass(frozen=True)
class TargetValidation:
    """The checks of one target, in the order in which they were made.

    title: its name and version. facts: what --json prints beside the checks.
    """

    target: str
    title: str
    facts: dict[str, Any]
    checks: list[TargetCheck]

    def exit_code(self) -> int:
        """0, or that of the first check that failed."""
        return next((FAILED[check.name] for check in self.checks if check.problems), 0)

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints of this target."""
        checks = {check.name: check.as_json() for check in self.checks}
        return self.facts | {"checks": checks, "passed": self.exit_code() == 0}

    def summary(self) -> str:
        """What the command prints: a line for each check, and what is wrong."""
        lines = [self.title]
        for check in self.checks:
            if not check.checked:
                lines.append(f"{check.name} not checked: {check.reason}")
            elif check.problems:
                lines += [f"{check.name} failed:", *(f"  {problem}" for problem in check.problems)]
            else:
                lines.append(f"{check.name} passed: {len(check.engines)} engines")
        return "\n".join(lines)
