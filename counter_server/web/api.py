"""The JSON API: counters under `/api/v1/counters`."""

import json
from typing import TypeVar

import msgspec
from flask import Blueprint, Response, request
from werkzeug.exceptions import NotFound, UnsupportedMediaType
from werkzeug.routing import PathConverter

from ..errors import InvalidRequest
from ..extension import SharedState
from ..operations import Assignment, Get, Increment, Replayed, Step
from .access import operators_only

Body = TypeVar("Body")

_encode = msgspec.json.Encoder().encode


class _Name(PathConverter):
    """A counter's name: the rest of the path, slashes and all; whether it is a good one is the counter's to say."""

    regex = "(?s:.*?)"
    part_isolating = False


def blueprint(shared: SharedState) -> Blueprint:
    api = Blueprint("api", __name__, url_prefix="/api/v1/counters")
    api.record_once(lambda setup: setup.app.url_map.converters.update(counter=_Name))

    @api.get("")
    def page() -> Response:
        """Counters in the order of their names, `limit` (100, at most 1000) from the one after `after`."""
        limit = request.args.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10):
            raise InvalidRequest("limit must be a number of counters")
        found = shared.counters(after=request.args.get("after", ""), limit=int(limit))
        return _json(
            {
                "counters": [{"counter": name, "value": value} for name, value in found.counters],
                "next": found.counters[-1][0] if found.more else None,
            }
        )

    @api.post("/<counter:name>/increment")
    def increment(name: str) -> Response:
        step = _body(Step, default=Step())
        result = shared.submit(Increment(name, step.by, step.minimum, step.maximum, _idempotency_key()))
        if isinstance(result, Replayed):
            return _json({"counter": name, "value": result.value}, {"Idempotent-Replayed": "true"})
        return _json({"counter": name, "value": result})

    @api.get("/<counter:name>")
    def get(name: str) -> Response:
        value = shared.submit(Get(name))
        if value is None:
            raise _unknown(name)
        return _json({"counter": name, "value": value})

    @api.put("/<counter:name>")
    @operators_only
    def put(name: str) -> Response:
        return _json({"counter": name, "value": shared.counter(name).set(_body(Assignment).value)})

    @api.delete("/<counter:name>")
    @operators_only
    def delete(name: str) -> Response:
        if not shared.counter(name).delete():
            raise _unknown(name)
        return Response(status=204)

    return api


def _json(content: object, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(content), headers=headers, content_type="application/json")


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no counter {name!r}")


def _body(form: type[Body], *, default: Body | None = None) -> Body:
    """The request's JSON body as a `form`.

    :param default: for a request without a body; without a default that is an error.
    """
    data = request.get_data(cache=False)
    if not data and default is not None:
        return default
    if data and request.mimetype != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    try:
        body = msgspec.json.decode(data, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not acceptable: {error}") from None
    # msgspec takes the last of two members of the same name. What it has passed is a flat object of numbers.
    names = [name for name, _ in json.loads(data, object_pairs_hook=list)]
    if len(set(names)) < len(names):
        raise InvalidRequest("the body is not acceptable: it has two members of the same name")
    return body


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and "," in key:
        # WSGI joins repeated headers with a comma, so the two cannot be told apart.
        raise InvalidRequest("an Idempotency-Key may be given once, without a comma")
    return key
