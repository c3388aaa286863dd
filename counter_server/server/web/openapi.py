"""The API's document: OpenAPI 3.1, gathered from the views that describe themselves and the types that they use."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import msgspec
from flask import Flask
from werkzeug.routing import Rule

from .described import JSON, Answer, Description, description_of
from .problems import Problem
from .rate_limit import is_limited

Document = dict[str, Any]

_VARIABLE = re.compile(r"<(?:([^:<>]+):)?([^<>]+)>")  # in a rule: its converter, and its name

_INTRODUCTION = (
    "Counters that all workers share: every increment is counted exactly once. Every refusal is a problem document"
    " (RFC 9457) whose `outcome` says whether something may have been counted: `not_applied` is no, and trying again is"
    " safe; `unknown` is once at most: ask again with the same `Idempotency-Key`."
)

# What each status means, wherever it comes.
_REFUSALS = {
    400: "The request is not acceptable; the detail says what of it.",
    401: "The operator's token is needed, and was not given or is another one.",
    403: "Not allowed here, or asked for by another site's page.",
    404: "There is no such counter.",
    409: "The result would lie outside the bounds, or outside 64 bits. Nothing was changed.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The server does not go by the name in the Host header.",
    422: "The Idempotency-Key belongs to another request. Nothing was changed.",
    429: "Too many requests, or too many wrong tokens, from this client's address. Nothing was counted or changed; try"
    " again after `Retry-After` seconds.",
    500: "The server failed; its log says how, and the outcome is unknown.",
    501: "The store in use cannot do this, and says so by name.",
    503: "The store cannot be reached or written. `outcome` says whether something may have been counted; try again"
    " after `Retry-After` seconds.",
}
_RETRIED = (429, 503)
_LIMIT_HEADERS = {
    "RateLimit": "What is left: `r` requests in the next `t` seconds",
    "RateLimit-Policy": "What each address may ask: `q` requests in a window of `w` seconds",
}


def document(app: Flask) -> Document:
    """The document of all views of `app` that describe themselves, in the order in which they were added."""
    schemas = _Schemas()
    paths: Document = {}
    used: set[int] = set()
    any_limited = False
    for rule in app.url_map.iter_rules():
        description = description_of(app.view_functions[rule.endpoint])
        if description is None:
            continue
        path = _VARIABLE.sub(r"{\2}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            limited = is_limited(app, rule.endpoint)
            any_limited |= limited
            statuses = _refusals(description, method, in_path=bool(rule.arguments), limited=limited)
            used.update(statuses)
            paths.setdefault(path, {})[method.lower()] = {
                "operationId": rule.endpoint.replace(".", "_"),
                "summary": description.summary,
                "description": description.text,
                "parameters": [
                    *_path_parameters(app, rule, schemas),
                    *_query_parameters(description),
                    *_header_parameters(description, schemas),
                ],
                **_request_body(description, schemas),
                **({"security": [{"token": []}]} if description.operators else {}),
                "responses": {
                    **{
                        str(status): _answer(answer, schemas, limited=limited)
                        for status, answer in description.answers.items()
                    },
                    **{str(status): {"$ref": f"#/components/responses/{_component(status)}"} for status in statuses},
                },
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "counter_server", "version": version("counter-server"), "description": _INTRODUCTION},
        "paths": paths,
        "components": {
            "responses": {
                _component(status): _problem(status, schemas, limited=any_limited) for status in sorted(used)
            },
            "schemas": schemas.components,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The operator's token, if the server has one",
                }
            },
        },
    }


class _Schemas:
    """The JSON Schemas of types. Those of structs become components, and are referred to."""

    def __init__(self) -> None:
        self.components: Document = {}

    def of(self, kind: object) -> Document:
        (schema,), components = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
        self.components.update(components)
        return schema


def _component(status: int) -> str:
    return f"Problem{status}"


def _refusals(description: Description, method: str, *, in_path: bool, limited: bool) -> list[int]:
    """The statuses of an operation's problem documents: its own, and those that follow from what it takes and does."""
    found = {421, 500, *description.refusals}
    if in_path or description.query or description.headers or description.body:
        found.add(400)
    if description.body:
        found |= {413, 415}
    if method != "GET":
        found.add(403)  # from another site's page
    if description.operators:
        found |= {401, 403, 429}
    if limited:
        found.add(429)
    if description.stored:
        found.add(503)
    return sorted(found - set(description.answers))


def _path_parameters(app: Flask, rule: Rule, schemas: _Schemas) -> Iterator[Document]:
    for converter, name in _VARIABLE.findall(rule.rule):
        schema = schemas.of(getattr(app.url_map.converters[converter], "described_as", str))
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(description: Description) -> Iterator[Document]:
    if description.query is not None:
        _, components = msgspec.json.schema_components([description.query])
        schema = components[description.query.__name__]
        for name, of_one in schema["properties"].items():
            yield {"name": name, "in": "query", "required": name in schema["required"], "schema": of_one}


def _header_parameters(description: Description, schemas: _Schemas) -> Iterator[Document]:
    for name, kind in description.headers.items():
        yield {"name": name, "in": "header", "required": False, "schema": schemas.of(kind)}


def _request_body(description: Description, schemas: _Schemas) -> Document:
    if description.body is None:
        return {}
    content = {"schema": schemas.of(type(description.body)), "example": msgspec.to_builtins(description.body)}
    return {"requestBody": {"required": description.body_required, "content": {JSON: content}}}


def _answer(answer: Answer, schemas: _Schemas, *, limited: bool) -> Document:
    made: Document = {"description": answer.what}
    if headers := {**answer.headers, **(_LIMIT_HEADERS if limited else {})}:
        made["headers"] = _headers(headers)
    if answer.example is not None:
        content = {"schema": schemas.of(type(answer.example)), "example": msgspec.to_builtins(answer.example)}
        made["content"] = {answer.media_type: content}
    return made


def _problem(status: int, schemas: _Schemas, *, limited: bool) -> Document:
    made: Document = {
        "description": _REFUSALS[status],
        "content": {"application/problem+json": {"schema": schemas.of(Problem)}},
    }
    if status in _RETRIED:
        limits = _LIMIT_HEADERS if status == 429 and limited else {}
        made["headers"] = _headers({"Retry-After": "Seconds to wait before trying again", **limits})
    return made


def _headers(texts: Mapping[str, str]) -> Document:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}
