"""The level of one thread: the processor time of a request in our layers alone, without a server and a network."""

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flask import Flask, render_template
from werkzeug.test import create_environ

from counter_server.server.web import create_app as create_our_app
from counter_server.server.web.site import templates
from tests.benchmarks.application import PATH, create_app, increment
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results

CASE = "WSGI call"
VIEW, API = "the bare view", "our API"
TEMPLATE, HOME = "its template in a bare view", "the home page"
_REQUESTS = 1000  # of each round


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Measure all in turn: each is one WSGI application, one method and one path."""
    bare = create_app("bare", "")
    bare.jinja_loader = templates.loader
    pages = {"/": "Home", "/lab": "Lab", "/counters": "Counters", "/docs": "API"}
    values: dict[str, Any] = {
        "links": SimpleNamespace(root=lambda: "", has_page=lambda _: True, navigation=lambda: pages),
        "link": lambda *_, **__: "/link",
        "pid": os.getpid,
        "is_signed_in": lambda: False,
        "scheme": "memory",
        "processes": None,
        "visits": [("1", ("w0", "A", 1), True, "12:00:00")] * 5,
    }
    bare.add_url_rule("/", "page", lambda: render_template("index.html", number=increment(), **values))
    ours = create_our_app({"COUNTER_SERVER_STORE": "memory://"})
    contestants = [
        (VIEW, bare, "POST", f"{PATH}/increment"),
        (API, ours, "POST", f"{PATH}/increment"),
        (TEMPLATE, bare, "GET", "/"),
        (HOME, ours, "GET", "/"),
    ]
    for number in range(plan.rounds(bar=True)):
        for who, app, method, path in in_turn(contestants, number):
            say(f"one thread, round {number + 1}: {who}")
            results.add(Place("thread", CASE, who), {"cpu us/request": _measure(app, method, path)})


def _measure(app: Flask, method: str, path: str) -> float:
    """Return the processor time of a request in microseconds."""
    environ = create_environ(path, "http://127.0.0.1:8000", method=method)
    began = time.process_time()
    for _ in range(_REQUESTS):
        answer = app.wsgi_app(environ.copy(), _start)
        b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
    return (time.process_time() - began) / _REQUESTS * 1e6


def _start(status: str, _headers: list[tuple[str, str]], _error: Any = None) -> Callable[[bytes], object]:
    if not status.startswith("200"):
        raise RuntimeError(status)
    return sys.stdout.buffer.write
