"""The JSON API: counters under `/api/v1/counters`."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from flask import Blueprint, Response, request
from msgspec import Meta, Struct
from werkzeug.exceptions import NotFound

from ...errors import InvalidRequest
from ...extension import SharedState
from ...operations import LARGEST_PAGE, LONGEST_KEY, Assignment, Get, Increment, Integer, Replayed, Step
from ...state import expect
from .access import operators_only
from .described import Answer, described
from .forms import read_body, read_query
from .names import AfterName, CounterName

IdempotencyKey = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=LONGEST_KEY,
        pattern=r"^[!-+\--~]+$",
        description="The same key with the same request is counted once and answered with the same number for 24 hours:"
        " visible ASCII characters, no comma",
        examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
    ),
]


class CounterValue(Struct, frozen=True):
    """A counter and its value."""

    counter: CounterName
    value: Integer


class CounterPage(Struct, frozen=True):
    """Counters in the order of their names. `next` is the `after` of the page that follows, null on the last."""

    counters: list[CounterValue]
    next: CounterName | None


class PageQuery(Struct, frozen=True):
    """Which page of counters."""

    after: AfterName = ""
    limit: Annotated[int, Meta(ge=1, le=LARGEST_PAGE, description="How many counters")] = 100


_VISITS = CounterValue("visits", 42)

_encode = msgspec.json.Encoder().encode


def blueprint(shared: SharedState) -> Blueprint:
    api = Blueprint("api", __name__, url_prefix="/api/v1/counters")

    @api.get("")
    @described(
        "List counters",
        query=PageQuery,
        answers={200: Answer("A page of counters", CounterPage([_VISITS], "visits"))},
        refusals=[501],
    )
    def page() -> Response:
        """Counters in the order of their names, at most `limit` of them, from the one after `after`."""
        query = read_query(PageQuery)
        found = shared.counters(after=query.after, limit=query.limit)
        counters = [CounterValue(name, value) for name, value in found.counters]
        return _json(CounterPage(counters, counters[-1].counter if found.more else None))

    @api.post("/<counter:name>/increment")
    @described(
        "Increment a counter",
        headers={"Idempotency-Key": IdempotencyKey},
        body=Step(by=5, maximum=1000),
        body_required=False,
        answers={
            200: Answer(
                "The counter after it",
                _VISITS,
                headers={"Idempotent-Replayed": "`true`, where the key had been answered before"},
            )
        },
        refusals=[409, 422, 501],
    )
    def increment(name: str) -> Response:
        """Add `by` (1), if the result lies within the bounds. The number that is answered was given to no other."""
        step = read_body(Step, default=Step())
        result = shared.submit(Increment(name, step.by, step.minimum, step.maximum, _idempotency_key()))
        if isinstance(result, Replayed):
            return _json(CounterValue(name, result.value), {"Idempotent-Replayed": "true"})
        return _json(CounterValue(name, expect(int, result)))

    @api.get("/<counter:name>")
    @described("Read a counter", answers={200: Answer("The counter", _VISITS)}, refusals=[404, 409, 501])
    def get(name: str) -> Response:
        """Its value as it is now. Reading counts nothing."""
        value = shared.submit(Get(name))
        if value is None:
            raise _unknown(name)
        return _json(CounterValue(name, expect(int, value)))

    @api.put("/<counter:name>")
    @operators_only
    @described(
        "Set a counter",
        body=Assignment(value=42),
        answers={200: Answer("The counter after it", _VISITS)},
        refusals=[501],
        operators=True,
    )
    def put(name: str) -> Response:
        """Give it a value, whether it was there before or not."""
        return _json(CounterValue(name, shared.counter(name).set(read_body(Assignment).value)))

    @api.delete("/<counter:name>")
    @operators_only
    @described("Delete a counter", answers={204: Answer("It is gone")}, refusals=[404], operators=True)
    def delete(name: str) -> Response:
        """Remove it; the next increment begins anew at 0."""
        if not shared.counter(name).delete():
            raise _unknown(name)
        return Response(status=204)

    return api


def _json(content: Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(content), headers=headers, content_type="application/json")


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no counter {name!r}")


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and "," in key:
        # WSGI joins repeated headers with a comma, so the two cannot be told apart.
        raise InvalidRequest("an Idempotency-Key may be given once, without a comma")
    return key
