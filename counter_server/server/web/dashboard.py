"""The dashboard: all counters, live, with forms to change them; the manager and the processes of the server."""

import unicodedata
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import msgspec
from flask import Blueprint, Response, current_app, flash, redirect, render_template, request, url_for
from msgspec import Struct

from ...errors import CounterServerError, InvalidRequest, Unsupported
from ...extension import SharedState
from ...operations import Get
from ...status import FIGURES, Process, Status
from .problems import problem, refuse
from .security import operators_only, wants_page

_ROWS = "50"  # counters on a page by default
_MOST_ROWS = 500
_TOTALS = ("epoch", "pid", "batches", "operations", "commits", "commit_seconds")  # the script makes rates of them

_encode = msgspec.json.Encoder().encode


class CounterRow(Struct, frozen=True):
    """A counter. Its value is text, as JavaScript's numbers are exact only up to 2^53."""

    name: str
    value: str


class Figures(Struct, frozen=True):
    """The manager's figures: those of now by their labels, and totals, which only grow in one epoch and process."""

    now: dict[str, str]
    totals: dict[str, Any]


class ProcessRow(Struct, frozen=True):
    """A process of the server."""

    name: str
    pid: str
    uptime: str
    restarts: str


class Live(Struct, frozen=True):
    """Everything that can change on the page: its script asks for this again and again."""

    counters: list[CounterRow]
    next: str | None
    manager: Figures | None
    processes: list[ProcessRow] | None


class Listing(Struct, frozen=True):
    """A page of counters; `next` is its last name if others follow, and `refusal` says why the store lists none."""

    counters: list[tuple[str, int]]
    next: str | None = None
    refusal: str | None = None


def blueprint(shared: SharedState) -> Blueprint:
    """Make the dashboard's routes. Its errors are pages for browsers."""
    dashboard = Blueprint("dashboard", __name__)
    dashboard.register_error_handler(CounterServerError, lambda error: _for_people(refuse(error)))

    @dashboard.get("/counters")
    def page() -> str:
        """List the counters whose names begin with `q`, in order: `limit` of them, after the name `after`."""
        listing = _listing(shared)
        status = shared.state.status()
        return render_template(
            "dashboard.html",
            listing=listing,
            here=_here(),
            next=None if listing.next is None else url_for(".page", **{**_here(), "after": listing.next}),
            manager=None if status is None else figures(status),
            means=None if status is None else means(status),
            processes=_processes(),
            scheme=str(shared.state.store).partition("://")[0],
        )

    @dashboard.get("/counters.json")
    def live() -> Response:
        """Return the same as data, or 304 if nothing changed."""
        listing = _listing(shared)
        status = shared.state.status()
        found = Live(
            [CounterRow(name, str(value)) for name, value in listing.counters],
            listing.next,
            None if status is None else figures(status),
            _processes(),
        )
        content = _encode(found)
        response = Response(content, content_type="application/json")
        response.set_etag(blake2b(content, digest_size=16).hexdigest())
        return response.make_conditional(request)  # type: ignore[return-value]

    @dashboard.post("/counters/increment")
    def increment() -> Response:
        counter = shared.counter(_name())
        return _say(f"{_isolated(counter.name)} gave {counter.increment()}.")

    @dashboard.post("/counters/set")
    @operators_only
    def set_() -> Response:
        counter = shared.counter(_name())
        value = counter.set(_number(request.form.get("value", "")))
        return _say(f"{_isolated(counter.name)} is {value} now.")

    @dashboard.get("/counters/delete")
    @operators_only
    def confirm() -> str | Response:
        name = request.args.get("name", "")
        value = shared.submit(Get(name))
        if value is None:
            return _for_people(problem(404, "Not Found", f"there is no counter {name!r}", "not_applied"))
        return render_template("dashboard_delete.html", name=name, value=value, here=_here())

    @dashboard.post("/counters/delete")
    @operators_only
    def delete() -> Response:
        counter = shared.counter(_name())
        result = "is deleted" if counter.delete() else "was not there"
        return _say(f"{_isolated(counter.name)} {result}.")

    return dashboard


def _listing(shared: SharedState) -> Listing:
    here = _here()
    limit = here.get("limit", _ROWS)
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= _MOST_ROWS):
        raise InvalidRequest(f"limit must be 1 to {_MOST_ROWS}")
    return find(shared, beginning=here.get("q", ""), after=here.get("after", ""), limit=int(limit))


def find(shared: SharedState, *, beginning: str, after: str, limit: int) -> Listing:
    """List counters whose names begin with `beginning`, in order, after the name `after`.

    Such names are neighbours, so this costs the same among any number of counters.
    """
    found: list[tuple[str, int]] = []
    if after < beginning:
        # The first such name may be the text itself, and a scan begins after a name: read that counter too.
        after = beginning
        value = shared.submit(Get(beginning))
        if isinstance(value, int):
            found.append((beginning, value))
    try:
        page = shared.counters(after=after, limit=limit + 1)
    except Unsupported as error:
        return Listing(found, refusal=str(error))
    found += takewhile(lambda counter: counter[0].startswith(beginning), page.counters)
    return Listing(found[:limit], found[limit - 1][0] if len(found) > limit else None)


def _here() -> dict[str, Any]:
    """Return the parameters of a URL for this place in the list, without the empty ones."""
    given = {name: request.args.get(name, "") for name in ("q", "after", "limit")}
    return {name: unicodedata.normalize("NFC", text) for name, text in given.items() if text}


def _name() -> str:
    return request.form.get("name", "")


def _number(text: str) -> int:
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise InvalidRequest("a value is a whole number within 64 bits")
    return int(text)


def _isolated(name: str) -> str:
    """Isolate a name's writing direction from its sentence, as `<bdi>` does in HTML."""
    return f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE}"


def _say(sentence: str) -> Response:
    """Answer the page's script with a sentence, and show it to people on the page that they came from."""
    if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
        return Response(_encode({"sentence": sentence}), content_type="application/json")
    flash(sentence)
    return redirect(url_for(".page", **_here()), 303)  # type: ignore[return-value]


def _for_people(answer: Response) -> Response:
    """Turn a problem document into a page if the client is a browser."""
    if wants_page():
        answer.set_data(render_template("dashboard_refused.html", problem=answer.get_json(), here=_here()))
        answer.content_type = "text/html; charset=utf-8"
    return answer


def figures(status: Status) -> Figures:
    """Return a manager's figures for people; apart from its uptime they stay the same while nothing happens."""
    now = {figure.label: _shown(getattr(status, name), figure.unit) for name, figure in FIGURES.items() if figure.label}
    return Figures(now, {name: getattr(status, name) for name in _TOTALS})


def _shown(value: Any, unit: str) -> str:
    if isinstance(value, list):
        return ", ".join(f"{call.object}.{call.method}" for call in value) or "none"
    show: dict[str, Callable[[Any], str]] = {"number": "{:,}".format, "seconds": duration, "bytes": size, "text": str}
    return show[unit](value)


def means(status: Status) -> dict[str, str]:
    """Return rates and means since the manager's start. The page's script shows those of the last seconds instead."""
    return {
        "batches": f"{status.batches / max(status.uptime, 1):,.1f}/s",
        "batch": _mean(status.operations, status.batches, "operations"),
        "commit": _mean(status.commit_seconds * 1000, status.commits, "ms"),
    }


def _mean(total: float, number: int, unit: str) -> str:
    return f"{total / number:,.2f} {unit}" if number else "none yet"


def _processes() -> list[ProcessRow] | None:
    """Return the server's processes, if our own supervisor started it."""
    found: Callable[[], list[Process]] | None = current_app.config.get("COUNTER_SERVER_PROCESSES")
    return None if found is None else processes(found())


def processes(found: Sequence[Process]) -> list[ProcessRow]:
    """Return rows for people."""
    return [
        ProcessRow(
            process.name,
            "being started" if process.pid is None else str(process.pid),
            "" if process.pid is None else duration(process.uptime),
            f"{process.restarts:,}",
        )
        for process in found
    ]


def duration(seconds: float) -> str:
    """Return a time in its largest unit: as people say it, and the same text for a while."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        number = int(seconds // length)
        if number:
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return "under a minute"


def size(number: int) -> str:
    """Return bytes in the unit that makes the number less than 1000."""
    amount, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
