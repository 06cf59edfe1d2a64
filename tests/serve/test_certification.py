"""What the server says of tokens that may not be full depth's."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from build_cache import BuildCache
from conftest import DEMO_MODEL, THREADS

pytest.importorskip("fastapi", reason="of the extra sedac-runtime[serve]")

from fastapi.testclient import TestClient
from kernel_bits import rows_have_the_same_bits

from sedac_export import BuildRequest
from sedac_runtime import SedacModel
from sedac_runtime.serve.launch import SchedulerSettings, load_application
from sedac_runtime.serve.server_settings import ServerSettings


@pytest.fixture(scope="module")
def bundle(build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose products some CPUs round otherwise for a row alone."""
    output = tmp_path_factory.mktemp("certification") / "int4"
    return build_cache.bundle(BuildRequest(str(DEMO_MODEL), output, "int4"))


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, str | None]:
    """What generate says, by mode."""
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    return {
        mode: model.generate("import", mode=mode, max_new_tokens=2).certification  # type: ignore[arg-type]
        for mode in ("full", "lossless", "exit")
    }


@pytest.fixture
def client(bundle: Path, caplog: pytest.LogCaptureFixture) -> Iterator[TestClient]:
    application = load_application(
        [bundle],
        partial(SedacModel.from_pretrained, threads=THREADS),
        SchedulerSettings(max_sequences=2, max_queue=2, cache_tokens=None),
        ServerSettings(),
    )
    with caplog.at_level(logging.WARNING, "sedac_runtime.serve"), TestClient(application) as client:
        yield client


def test_the_server_says_what_generate_says(
    client: TestClient, expected: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    assert (expected["lossless"] is None) == rows_have_the_same_bits(4)
    (model,) = client.get("/v1/models").json()["data"]
    assert model["sedac"]["certification"] == expected["lossless"]
    for mode, sentence in expected.items():
        body: dict[str, Any] = {"model": model["id"], "prompt": "import", "max_tokens": 2}
        answer = client.post(
            "/v1/completions", json=body | {"temperature": 0, "sedac": {"mode": mode}}
        )
        summary = answer.json()["choices"][0]["sedac"]["summary"]
        assert summary.get("certification") == sentence
        assert ("certification" in summary) == (sentence is not None)
    started = caplog.get_records("setup") + caplog.records
    warnings = [record for record in started if record.levelno == logging.WARNING]
    said = [(record.getMessage(), record.__dict__["fields"]) for record in warnings]
    lossless = expected["lossless"]
    assert said == ([] if lossless is None else [(lossless, {"model": model["id"]})])
