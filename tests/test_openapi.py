"""The server keeps to the API's document: Schemathesis generates good and bad requests from it."""

import html
import re
import shutil
import unicodedata
from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance, use_after_free

from counter_server.errors import DeadlineExceeded, InvalidRequest, KeyReused, LimitReached, Unsupported
from counter_server.operations import Assignment, Step, check_name
from counter_server.server.web import create_app
from counter_server.server.web.problems import Problem
from counter_server.server.web.site import NAME
from counter_server.state import State
from tests.processes import PATIENCE, Program, Server

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-operators-in-tests"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}
INCREMENT = "/api/v1/counters/{name}/increment"
NO = {"enabled": False}
OPTIONS = ("--workers", "2", "--badge", "visits")


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidRequest:
        return False
    return True


IN_MEMORY = create_app({"COUNTER_SERVER_STORE": "memory://", "SECRET_KEY": "k"})
DOCUMENT: dict[str, Any] = IN_MEMORY.test_client().get("/openapi.json").get_json()
OPERATIONS = {one["operationId"]: (path, one) for path, item in DOCUMENT["paths"].items() for one in item.values()}


# How Schemathesis fills the format that the document names.
NAMES = (
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=100)
    .map(lambda text: unicodedata.normalize("NFC", text))
    .filter(_is_name)
)
schemathesis.openapi.format("counter-name", NAMES)

api = schemathesis.openapi.from_dict(
    deepcopy(DOCUMENT),  # it writes its own links into it
    config=SchemathesisConfig.from_dict(
        {
            "seed": 1,
            # A bad request may also be refused for its Host header.
            "checks": {"negative_data_rejection": {"expected-statuses": [*range(400, 407), 409, 415, 421, 422]}},
            "auth": {"openapi": {"token": {"bearer": TOKEN}}},
            # PUT .../x/increment sets the counter "x/increment": names may have slashes.
            "operations": [
                {"include-path": INCREMENT, "checks": {"unsupported_method": NO, "allow_header_conformance": NO}}
            ],
        }
    ),
)
Case = schemathesis.Case[Any]
numbers = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("openapi") / "data"
    with Server(*OPTIONS, "--data-dir", data_dir, environment={"COUNTER_SERVER_TOKEN": TOKEN}) as server:
        yield server


def prepare(case: Case) -> None:
    if "Idempotency-Key" in case.headers and is_good(case) and len(case.headers["Idempotency-Key"]) < 200:
        case.headers["Idempotency-Key"] += f"-{next(numbers)}"  # else all examples of one key would be one request


def is_good(case: Case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


def has_crossed_bounds(body: Any) -> bool:
    """Return whether a body that keeps the schema breaks a rule beyond schemas."""
    bounds: list[Any] = [body.get("minimum"), body.get("maximum")] if isinstance(body, dict) else [None]
    return None not in bounds and bounds[0] > bounds[1]


def check(case: Case, response: schemathesis.Response) -> None:
    """Check for no server error, no undocumented status, content type, header or body, nothing bad accepted."""
    assert response.status_code < 500
    if (promised := DOCUMENT["paths"][case.path].get(case.method.lower())) is not None:
        assert str(response.status_code) in promised["responses"]  # Schemathesis ignores odd content types
    excluded: list[Any] = [use_after_free]  # a deleted counter may be counted again
    if is_good(case) and (response.status_code == 422 or has_crossed_bounds(case.body)):
        assert response.status_code in (400, 422)
        excluded.append(positive_data_acceptance)
    case.validate_response(response, excluded_checks=excluded)


@api.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_server_keeps_the_promises_of_the_document(case: Case, server: Server) -> None:
    """Run the phases with single requests: examples, coverage of each rule of the schema, and fuzzing."""
    prepare(case)
    check(case, case.call(base_url=server.url, timeout=PATIENCE))


def test_sequences_of_requests_keep_the_document_too(server: Server) -> None:
    """Run the phase with many requests, each made from earlier answers."""
    machine: Any = api.as_state_machine()

    class Workflow(machine):  # type: ignore[misc] # its base is made from the document
        def before_call(self, case: Case) -> None:
            prepare(case)

        def get_call_kwargs(self, _case: Case) -> dict[str, Any]:
            return {"base_url": server.url, "timeout": PATIENCE}

        def validate_response(self, response: schemathesis.Response, case: Case, **_: Any) -> None:
            check(case, response)

    Workflow.run(settings=settings(max_examples=15, stateful_step_count=10, deadline=None, derandomize=True))


def test_the_document_is_openapi_3_1_and_is_served(server: Server) -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    api.validate()
    assert requests.get(f"{server.url}/openapi.json", timeout=PATIENCE).json() == DOCUMENT


def test_the_paths_are_the_routes_for_programs() -> None:
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in IN_MEMORY.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if re.fullmatch(rf"{NAME}\.((api|badge|health)\.\w+|documentation\.openapi)", rule.endpoint)
    }
    assert routes == {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    mounted = IN_MEMORY.test_client().get("/openapi.json", environ_overrides={"SCRIPT_NAME": "/counters"}).get_json()
    assert mounted["servers"] == [{"url": "/counters"}]


def without_texts(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: without_texts(value) for key, value in schema.items() if key not in ("title", "description")}
    return schema


@pytest.mark.parametrize("body", [Step, Assignment, Problem])
def test_the_schemas_of_bodies_match_the_types_that_read_and_write_them(body: type) -> None:
    _, components = msgspec.json.schema_components([body])
    (schema,) = components.values()
    expected = {key: value for key, value in without_texts(schema).items() if value != []}
    assert without_texts(DOCUMENT["components"]["schemas"][body.__name__]) == expected


# How to get each documented response: method, path, headers or body, and the store's error.

COUNTER = "/api/v1/counters/visits"
BADGE = "/badge/visits.svg"
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "api_page": ("GET", "/api/v1/counters", {}),
    "api_increment": ("POST", f"{COUNTER}/increment", {"json": {"by": 1}}),
    "api_get": ("GET", COUNTER, {}),
    "api_put": ("PUT", COUNTER, {"json": {"value": 1}, "headers": OPERATOR}),
    "api_delete": ("DELETE", COUNTER, {"headers": OPERATOR}),
    "badge_picture": ("GET", BADGE, {}),
    "health_livez": ("GET", "/livez", {}),
    "health_readyz": ("GET", "/readyz", {}),
    "health_metrics": ("GET", "/metrics", {}),
    "documentation_openapi": ("GET", "/openapi.json", {}),
}
ERRORS: dict[int, Exception] = {
    409: LimitReached("of this test"),
    422: KeyReused("of this test"),
    500: ZeroDivisionError("of this test"),
    501: Unsupported("of this test"),
    503: DeadlineExceeded("of this test", "unknown"),
}


def changed(name: str, status: int) -> tuple[str, str, dict[str, Any]]:
    """Return a call of an operation that gets this status without an error of the store."""
    method, path, options = CALLS[name]
    headers = dict(options.get("headers", {}))
    match status:
        case 400 if name in ("api_page", "badge_picture"):
            path += "?limit=0&count=2"
        case 400:
            path = path.replace("visits", "%00")
        case 401:
            headers = {"Authorization": "Bearer of-another-server"}
        case 403 if name == "badge_picture":
            path += "?count=1"
        case 403:
            headers["Origin"] = "http://evil.example"
        case 404:
            path = path.replace("visits", "unknown")
        case 413:
            return method, path, {"data": b" " * 20_000, "content_type": "application/json", "headers": headers}
        case 415:
            return method, path, {"data": b"1", "content_type": "text/plain", "headers": headers}
        case 421:
            headers["Host"] = "evil.example"
    return method, path, {**options, "headers": headers}


@pytest.mark.parametrize(
    ("name", "status"), [(name, int(status)) for name, (_, one) in OPERATIONS.items() for status in one["responses"]]
)
def test_each_response_in_the_document_is_given_as_it_says(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "2/hour" if status == 429 else "100/hour"
    config = {"STORE": "memory://", "HOST": "127.0.0.1", "TOKEN": TOKEN, "RATE_LIMIT": limit}
    app = create_app({f"COUNTER_SERVER_{option}": value for option, value in config.items()})
    client = app.test_client()
    app.extensions["counter_server"].counter("visits").set(1)
    if status == 500:  # in the view itself: not every operation asks the store
        app.view_functions[f"{NAME}.{name.replace('_', '.', 1)}"] = lambda **_: str(1 // 0)
    elif status in ERRORS:

        def fail(*_: object, **__: object) -> None:
            raise ERRORS[status]

        monkeypatch.setattr(State, "submit", fail)
    method, path, options = changed(name, status)
    for _ in range(2 if status == 429 else 0):
        client.open(path, method=method, **options)
    response = client.open(path, method=method, **options)
    assert response.status_code == status, response.text
    place, operation = OPERATIONS[name]
    api[place][method].validate_response(schemathesis.Response.from_any(response))
    promised = operation["responses"][str(status)]
    if "$ref" in promised:
        promised = DOCUMENT["components"]["responses"][promised["$ref"].rpartition("/")[2]]
    assert ([response.mimetype] if response.data else []) == list(promised.get("content", {}))
    assert set(promised.get("headers", {})) - set(response.headers.keys()) <= {"Idempotent-Replayed"}


def test_the_document_says_what_is_guarded_refused_and_limited() -> None:
    assert {name for name, (_, one) in OPERATIONS.items() if one.get("security")} == {"api_put", "api_delete"}
    for path, operation in OPERATIONS.values():
        assert ("429" in operation["responses"]) == path.startswith(("/api/", "/badge/"))
    problems = DOCUMENT["components"]["responses"]
    assert {kind for problem in problems.values() for kind in problem["content"]} == {"application/problem+json"}
    assert set(problems["Problem429"]["headers"]) == {"Retry-After", "RateLimit", "RateLimit-Policy"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: install the Debian package curl")
def test_the_examples_of_the_page_run_unchanged(server: Server) -> None:
    page = requests.get(f"{server.url}/docs", timeout=PATIENCE).text
    commands = [html.unescape(found) for found in re.findall(r"<pre[^>]*><code>(.*?)</code>", page)]
    assert len(commands) == len(OPERATIONS)
    requests.put(f"{server.url}/api/v1/counters/visits", json={"value": 1}, headers=OPERATOR, timeout=PATIENCE)
    answers = []
    for command in commands:
        shell = Program(
            "-c", f"{command} -sw '%{{http_code}}'", program="/bin/sh", environment={"COUNTER_SERVER_TOKEN": TOKEN}
        )
        with shell:
            assert shell.wait() == 0, shell.errors
            answers.append(shell.output[-1])
    reported = dict(zip(OPERATIONS, answers, strict=True))
    assert reported["api_increment"] == '{"counter":"visits","value":6}200'
    assert reported["api_get"] == '{"counter":"visits","value":6}200'
    assert reported["api_put"] == '{"counter":"visits","value":42}200'
    assert reported["api_delete"] == "204"
    assert reported["api_page"].endswith("200")
    assert reported["badge_picture"].endswith("</svg>404")  # by then it is deleted
