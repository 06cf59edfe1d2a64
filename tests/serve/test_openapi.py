"""Schemathesis: requests made from the server's own OpenAPI schema, valid and not."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

from serve.running_server import RunningServer

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]

@pytest.fixture(scope="session")
def api_schema(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_those_of_the_schema(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        # a model that there is, and no long texts
        case.body |= {"model": "chat", "max_tokens": 2, "max_completion_tokens": 2}
    response = case.call()
    case.validate_response(response, checks=CHECKS)
