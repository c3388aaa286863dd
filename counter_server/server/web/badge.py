"""Badges: a counter as a small picture that other sites can show."""

from collections.abc import Collection
from typing import Annotated, Literal

from flask import Blueprint, Response, request
from msgspec import Meta, Struct
from werkzeug.exceptions import Forbidden

from ...errors import CounterServerError, InvalidRequest
from ...extension import SharedState
from ...operations import Get, check_name
from ...state import expect
from . import problems
from .badge_picture import PALETTE, draw
from .described import Answer, described
from .forms import is_prefetch, read_query

_SVG = "image/svg+xml"
_COLOUR = "^(?:{}|[0-9a-fA-F]{{3}}|[0-9a-fA-F]{{6}})$".format("|".join(PALETTE))


class BadgeQuery(Struct, frozen=True):
    """How a badge looks, and whether to count."""

    count: Annotated[Literal[0, 1], Meta(description="1: count this view, where the operator has allowed it")] = 0
    label: Annotated[
        str,
        Meta(
            max_length=64,
            pattern=r"^[^\u0000-\u001f\u007f-\u009f]*$",
            description="The words on the left; the counter's name, if there are none",
            examples=["visitors"],
        ),
    ] = ""
    color: Annotated[
        str, Meta(pattern=_COLOUR, description="A name, or three or six hexadecimal digits", examples=["green"])
    ] = "blue"

    def __post_init__(self) -> None:
        # Python's `$` lets a newline pass at the end, which that of a schema does not.
        if "\n" in self.label + self.color:
            raise ValueError("neither label nor color has a line break")


def blueprint(shared: SharedState, counting: Collection[str] = ()) -> Blueprint:
    """The badges.

    :param counting: the counters whose badges count when they are asked to.
    :raises InvalidRequest: if those are no names.
    """
    if isinstance(counting, str):
        raise InvalidRequest(f"COUNTER_SERVER_BADGES is a list of counters' names, not {counting!r}")
    for name in counting:
        check_name(name)
    allowed = frozenset(counting)
    badge = Blueprint("badge", __name__)

    @badge.get("/badge/<counter:name>.svg")
    @described(
        "Show a counter as a picture",
        query=BadgeQuery,
        answers={
            200: Answer("A badge with the number", draw("visits", "42", PALETTE["blue"]), _SVG),
            404: Answer("A badge that says `none`: there is no such counter", "<svg/>", _SVG),
            503: Answer("A badge that says `unavailable`: the store is away", "<svg/>", _SVG),
        },
        refusals=[403, 409, 501],
    )
    def picture(name: str) -> Response:
        """An SVG image for any page. It only reads, unless `count=1` asks to count, and the operator has allowed that
        for this name. HEAD, and a browser that fetches ahead, never count. It is not to be cached."""
        query = read_query(BadgeQuery)
        check_name(name)
        if query.count and name not in allowed:
            raise Forbidden(f"the badge of {name!r} does not count: the operator has not allowed it")
        if query.count and request.method == "GET" and not is_prefetch():
            value: int | None = shared.counter(name).increment()
        else:
            read = shared.submit(Get(name))
            value = None if read is None else expect(int, read)
        label = query.label or name
        if value is None:
            return _answer(draw(label, "none", PALETTE["lightgrey"]), 404)
        return _answer(draw(label, str(value), PALETTE.get(query.color, query.color)), 200)

    @badge.errorhandler(CounterServerError)
    def unavailable(error: CounterServerError) -> Response:
        """Where a number was to be shown, a page should say that there is none now."""
        problem = problems.refuse(error)
        if problem.status_code != 503:
            return problem
        name = (request.view_args or {}).get("name", "")
        return _answer(draw(name, "unavailable", PALETTE["lightgrey"]), 503, problem.headers["Retry-After"])

    return badge


def _answer(picture: str, status: int, retry_after: str | None = None) -> Response:
    response = Response(picture, status, content_type=f"{_SVG}; charset=utf-8")
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # it is for other sites
    if retry_after is not None:
        response.headers["Retry-After"] = retry_after
    return response
