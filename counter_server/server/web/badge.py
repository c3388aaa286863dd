"""Badges: a counter as a small picture that other sites can show."""

import unicodedata
from collections.abc import Collection
from typing import Annotated, Literal

from flask import Blueprint, Flask, Response, current_app, request
from msgspec import Meta, Struct
from werkzeug.exceptions import Forbidden

from ...errors import CounterServerError, InvalidRequest
from ...extension import SharedState
from ...operations import Get, check_name
from .api import NAMED, read_query
from .pages import is_prefetch
from .problems import refuse
from .site import Site, templates

shared = SharedState()  # of the current app
badge = Blueprint("badge", __name__)

PALETTE = {
    "brightgreen": "44cc11",
    "green": "97ca00",
    "yellowgreen": "a4a61d",
    "yellow": "dfb317",
    "orange": "fe7d37",
    "red": "e05d44",
    "blue": "007ec6",
    "grey": "555555",
    "lightgrey": "9f9f9f",
}
_COLOUR = rf"^(?:{'|'.join(PALETTE)}|[0-9a-fA-F]{{3}}|[0-9a-fA-F]{{6}})\Z"


class BadgeQuery(Struct, frozen=True):
    """The query string of a badge."""

    count: Literal[0, 1] = 0
    label: Annotated[str, Meta(max_length=64, pattern=r"^[^\u0000-\u001f\u007f-\u009f]*\Z")] = ""
    color: Annotated[str, Meta(pattern=_COLOUR)] = "blue"


def init_app(app: Flask, site: Site) -> None:
    """Add the badges to the site of `app`. ``COUNTER_SERVER_BADGES`` lists the counters whose badges may count.

    :raises InvalidRequest: if these are not names.
    """
    counting: Collection[str] = app.config.setdefault("COUNTER_SERVER_BADGES", ())
    if isinstance(counting, str):
        raise InvalidRequest(f"COUNTER_SERVER_BADGES must be a list of counters' names, not {counting!r}")
    for name in counting:
        check_name(name)
    site.register_blueprint(badge)


@badge.get(f"/badge{NAMED}.svg")
def picture(name: str) -> Response:
    query = read_query(BadgeQuery)
    check_name(name)
    if query.count and name not in current_app.config["COUNTER_SERVER_BADGES"]:
        raise Forbidden(f"the badge of {name!r} does not count: the operator has not allowed it")
    counts = query.count and request.method == "GET" and not is_prefetch()
    value = shared.counter(name).increment() if counts else shared.submit(Get(name))
    if value is None:
        return _answer(query.label or name, "none", 404)
    return _answer(query.label or name, str(value), 200, PALETTE.get(query.color, query.color))


@badge.errorhandler(CounterServerError)
def unavailable(error: CounterServerError) -> Response:
    """Show in a picture that the store is unavailable: a page has no place for a problem document."""
    problem = refuse(error)
    if problem.status_code != 503:
        return problem
    response = _answer((request.view_args or {}).get("name", ""), "unavailable", 503)
    response.headers["Retry-After"] = problem.headers["Retry-After"]
    return response


def _answer(label: str, message: str, status: int, colour: str = PALETTE["lightgrey"]) -> Response:
    response = Response(draw(label, message, colour), status, content_type="image/svg+xml; charset=utf-8")
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # other sites show it
    return response


def draw(label: str, message: str, colour: str) -> str:
    """Draw a badge as SVG.

    :param colour: of the ground behind the message, as three or six hexadecimal digits.
    """
    # XML cannot hold U+FFFE and U+FFFF; names can.
    left, right = (text.translate({0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}) for text in (label, message))
    widths = {"left_width": _width(left), "right_width": _width(right)}
    return templates.get_template("badge.svg").render(left=left, right=right, **widths, colour=colour, ink=_ink(colour))


def _width(text: str) -> int:
    """Estimate the width of a text in pixels; the picture makes the letters fit."""
    letters = (letter for letter in text if not unicodedata.combining(letter))
    return max(1, round(sum(11 if unicodedata.east_asian_width(letter) in "WF" else 6.5 for letter in letters)))


def _ink(ground: str) -> str:
    """Return white or black, whichever contrasts more with the colour `ground` (WCAG 2)."""
    digits = ground if len(ground) == 6 else "".join(2 * digit for digit in ground)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "000000"
