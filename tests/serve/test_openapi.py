"""Schemathesis: requests made from the server's own OpenAPI schema, valid and not."""

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from serve.running_server import RunningServer

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def test_answers_are_those_of_the_schema(server: RunningServer, quick: bool) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        statuses = check(operation, quick)
        assert statuses
        if operation.body:
            assert {200, 400} <= statuses


def test_the_schema_has_no_answer_that_is_never_given(server: RunningServer) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert all("422" not in operation["responses"] for operation in operations)
    assert "ValidationError" not in str(schema)


def check(operation: schemathesis.APIOperation, quick: bool) -> set[int]:
    """The statuses of answers, all of which must be those that the schema has.

    A few examples are the same in every run: among other few there may be none that is valid.
    """
    count = {"max_examples": 20, "derandomize": True} if quick else {"max_examples": 100}
    statuses = set()
    valid, invalid = (
        operation.as_strategy(generation_mode=mode)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    )

    @settings(**count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(valid | invalid if operation.body else valid)
    def answers(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # a model that there is, and no long texts
            case.body |= {"model": "chat", "max_tokens": 2}
            if "messages" in case.body:
                case.body["max_completion_tokens"] = 2
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    answers()
    return statuses
