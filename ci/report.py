"""The report of ci/validate_engines.sh: report.json and report.md from what its runs left."""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.cuda.compiler import Compiler
from sedac_export.errors import SedacError
from sedac_export.tensorrt.build_plans import check_options
from sedac_runtime.flavour import FLAVOURS, find_gpu, this_platform

TITLES = {
    "cuda": "CUDA chain",
    "onnxruntime-cuda": "ONNX Runtime's CUDA provider",
    **{name: flavour.title for name, flavour in FLAVOURS.items()},
}

# of the tokens that both chains generate; after a tie texts may part for good
LEAST_SAME_TOKENS = 0.5


def installed(target: str) -> int:
    """0 when this host can build for `target`; else 1 and the reason on stderr."""
    try:
        if target == "cuda":
            Compiler()
        for flavour in FLAVOURS:
            if target == flavour:
                check_options(flavour, BuildOptions())
    except SedacError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_run(directory: Path) -> dict[str, Any]:
    """What one model and target came to."""
    target = (directory / "target").read_text().strip()
    result: dict[str, Any] = {
        "model": (directory / "model").read_text().strip(),
        "target": target,
        "built": (directory / "validate.json").exists(),
    }
    if not result["built"]:
        lines = (directory / "build.log").read_text().strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else "the build left no message"
        # what this host has not got, or the kernel does not compute, is no failure of the engines
        refused = _json(directory / "bundle" / "bundle.json").get("cuda_refusal") is not None
        return result | {"reason": reason, "failed": installed(target) == 0 and not refused}
    report = _json(directory / "validate.json").get("targets", {}).get(target)
    if report is None:
        return result | {"reason": "validate gave no report", "failed": True}
    seconds: dict[str, float] = report.get("build_seconds", {})
    layers = [s for name, s in seconds.items() if name.startswith(("layer_", "block_"))]
    measured = {}
    if seconds:
        measured["seconds"] = round(sum(seconds.values()), 1)
        measured["seconds_per_layer_engine"] = round(mean(layers), 3)
    generated = _json(directory / "generate.json")
    chain = _chain(directory, report["checks"]["execution"]["checked"], generated)
    return (
        result
        | measured
        | {
            "version": report["version"],
            "files": len(report["checks"]["structure"]["engines"]),
            "checks": report["checks"] | {"chain": chain},
            "generated_tokens": len(generated.get("tokens", [])),
            "failed": not report["passed"] or not generated or chain["passed"] is False,
        }
    )


def _chain(directory: Path, executed: bool, generated: dict[str, Any]) -> dict[str, Any]:
    """Whether the chain over the plans generates what it does over ONNX Runtime's engines."""
    tokens = _json(directory / "plans.json").get("tokens")
    if not executed and tokens is None:
        reason = "the engines were not executed"
        return {"checked": False, "passed": None, "reason": reason, "problems": []}
    log = directory / "plans.log"
    problems = []
    if tokens is None:
        problems = log.read_text().strip().splitlines()[-1:] if log.exists() else ["it did not run"]
    else:
        pairs = list(zip(tokens, generated.get("tokens", []), strict=False))
        same = sum(ours == theirs for ours, theirs in pairs) / max(1, len(pairs))
        if same < LEAST_SAME_TOKENS:
            problems = [f"{same:.0%} of the tokens are those of ONNX Runtime's chain"]
    return {"checked": True, "passed": not problems, "problems": problems}


def gpu_tests(output: Path) -> dict[str, Any]:
    """What the tests marked gpu came to."""
    code = output / "gpu_tests.code"
    if not code.exists():
        reason = "this host has no NVIDIA GPU"
        return {"checked": False, "passed": None, "reason": reason, "problems": []}
    passed = int(code.read_text()) == 0
    lines = (output / "gpu_tests.log").read_text().strip().splitlines()
    return {"checked": True, "passed": passed, "problems": [] if passed else lines[-1:]}


def _json(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return report


def outcome(check: dict[str, Any]) -> str:
    """A check in a word or two."""
    if not check["checked"]:
        return "not run"
    return "passed" if check["passed"] else "FAILED"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    gpu = report["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}" if gpu else "no GPU"
    lines = [
        "# Engines for NVIDIA GPUs",
        "",
        f"Host: {report['platform']}, {device}",
        "",
        "| model | target | files | s per layer engine | structure | ONNX Runtime | execution"
        " | chain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    tests = report["gpu_tests"]
    reasons = tests["problems"] if tests["checked"] else [tests["reason"]]
    notes = [": ".join([f"tests on the GPU {outcome(tests)}", *reasons])]
    for run in report["runs"]:
        title = TITLES[run["target"]]
        if "checks" not in run:
            word = "FAILED" if run["failed"] else "not built"
            lines.append(f"| {run['model']} | {title} | {word} | | | | | |")
            notes.append(f"{run['model']}, {title}: {run['reason']}")
            continue
        cells = [outcome(check) for check in run["checks"].values()]
        lines.append(
            f"| {run['model']} | {title} {run['version']} | {run['files']}"
            f" | {run.get('seconds_per_layer_engine', '')} | {' | '.join(cells)} |"
        )
        for name, check in run["checks"].items():
            reasons = check["problems"] if check["checked"] else [check["reason"]]
            notes += [f"{run['model']}, {title}, {name}: {reason}" for reason in reasons]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def write(output: Path, allow_no_gpu: bool) -> int:
    """Write both reports; the script's exit code."""
    number = len("run-")
    directories = sorted(output.glob("run-*"), key=lambda path: int(path.name[number:]))
    runs = [read_run(directory) for directory in directories]
    gpu = find_gpu()
    executed = [run for run in runs if run.get("checks", {}).get("execution", {}).get("checked")]
    tests = gpu_tests(output)
    failed = any(run["failed"] for run in runs) or not any(run["built"] for run in runs)
    failed = failed or tests["passed"] is False
    report = {
        "platform": this_platform(),
        "gpu": vars(gpu) if gpu else None,
        "passed": not failed,
        "executed": bool(executed),
        "gpu_tests": tests,
        "runs": runs,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text(markdown(report))
    print(markdown(report))
    if failed:
        return 1
    return 0 if executed or allow_no_gpu else 3


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("installed").add_argument("target", choices=list(TITLES))
    writer = commands.add_parser("write")
    writer.add_argument("output", type=Path)
    writer.add_argument("--allow-no-gpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "installed":
        return installed(arguments.target)
    return write(arguments.output, arguments.allow_no_gpu)


if __name__ == "__main__":
    sys.exit(main())
