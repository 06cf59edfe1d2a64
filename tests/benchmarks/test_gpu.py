"""benchmarks/gpu.py with workers that stand in for runtimes, and transformers on the CPU."""

import sys
import time
from pathlib import Path

import gpu
import gpu_worker
import pytest
from chain_cases import MODELS, TINY

CASE = next(case for case in MODELS if case.name == "Qwen2.5-0.5B")
READY = "print('{\"ready\": true}', flush=True)\nfor line in sys.stdin: "
SCRIPTS = {
    "sedac": READY + "print([10.0] * json.loads(line)['passes'], flush=True)",
    "sedac-long": READY + "sys.exit('the kernel was lost')",
    "transformers": 'print(\'{"error": "not installed"}\', flush=True)',
    "onnxruntime-genai": "sys.exit('no such library')",
}


@pytest.fixture
def rows(tmp_path: Path) -> list[gpu.RuntimeRow]:
    rows = gpu.rows_of(CASE.shape)
    workers = {
        runtime: gpu.Worker(
            [sys.executable, "-c", f"import json, sys\n{script}"], runtime, tmp_path
        )
        for runtime, script in SCRIPTS.items()
    }
    try:
        gpu.measure(rows, workers, time.monotonic() + 60)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def test_every_runtime_is_a_row_or_says_why_not(rows: list[gpu.RuntimeRow]) -> None:
    report = gpu.report(CASE, rows, copy_rate=3e12)
    found = report["rows"]
    depths = [(row.get("rows"), row.get("layers")) for row in found if row["runtime"] == "sedac"]
    assert depths == [
        *((1, 24), (1, 12), (1, 6), (1, 3), (2, 24), (4, 24), (8, 24)),
        *((None, None), (None, None)),
    ]
    assert all(len(row["rounds"]) == 5 for row in found if row["runtime"] == "sedac")
    assert {row["microseconds"] for row in found if row["runtime"] == "sedac"} == {10.0}
    failures = {row["runtime"]: row["failure"] for row in found if "failure" in row}
    assert failures == {
        "sedac-long": "the kernel was lost",
        "transformers": "not installed",
        "onnxruntime-genai": "no such library",
    }
    # 24 layers of 29.8 MB, and a head of 272 MB
    assert report["floor"]["layers"] == pytest.approx(238, rel=0.01)
    assert report["floor"]["head"] == pytest.approx(90.8, rel=0.01)
    text = gpu.markdown(report, CASE.shape.layers)
    assert "| SEDAC | 12 | 1 | 10 | 10, 10, 10 | " in text
    assert "| onnxruntime-genai | 24 | 1 | no such library | | |" in text
    assert "First token after a prompt of 512: SEDAC 0.0 ms." in text
    assert text.endswith("A token of each of 32 sequences: SEDAC 10 µs (3200000 tokens/s).")


def test_a_runtime_that_loads_forever_costs_the_others_nothing(tmp_path: Path) -> None:
    worker = gpu.Worker([sys.executable, "-c", "input()"], "transformers", tmp_path)
    try:
        assert "took too long to load" in (worker.wait(time.monotonic() + 0.1) or "")
    finally:
        worker.close()


def test_the_peer_decodes(tmp_path: Path) -> None:
    handle = gpu_worker.load_transformers(TINY, tmp_path, "cpu")
    for request in ({"passes": 3}, {"passes": 3, "prompt": 20}, {"passes": 3, "sequences": 2}):
        times = handle(request)
        assert len(times) == 3
        assert min(times) > 0
