"""`SharedState`, the Flask extension: shared counters in any app."""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import cast

from flask import Flask, Request, Response, current_app, g, has_app_context, has_request_context, request, session

from . import settings
from .dicts import DEFAULT_ENTRIES, BoundedDict, check_entries, check_ttl, within_bounds
from .errors import DeadlineExceeded
from .operations import Invoke, Operation, Result, check_step
from .state import Declarations, Sharing, State, open_state

log = logging.getLogger(__name__)

VISITOR_TTL = 24 * 3600.0  # seconds without use after which a visitor's number is forgotten
_VISITOR = "_counter_server_visitor"  # in Flask's session
_NAME = "counter_server"  # in an app's extensions
_BORROWED = "_counter_server"  # in `g`


@dataclass(slots=True)
class _Borrowed:
    """An app's state as one request uses it, kept in `g`."""

    state: State
    request: Request | None  # the request that uses it; None in a command
    patience: float  # seconds, for all calls together
    calls: int = 0
    waited: float = 0.0  # seconds


class SharedState(Sharing):
    """State that all workers of an app share.

    ::

        shared = SharedState(app)
        number = shared.counter("visits").increment()

    `init_app` reads this configuration:

    - ``COUNTER_SERVER_STORE``: the store's URL; default the environment variable of that name, else ``manager://``
      with the data directory ``COUNTER_SERVER_DATA_DIR``, else ``counter-server`` in the app's instance folder.
    - ``COUNTER_SERVER_DEADLINE``: seconds that a call may take, at most 60; default 5.
    - ``COUNTER_SERVER_REQUEST_DEADLINE``: seconds that all calls of one request may take together;
      default twice the deadline.
    - ``COUNTER_SERVER_TIMING``: whether responses report these seconds in ``Server-Timing``; default False.
    - ``COUNTER_SERVER_START``: whether the first use starts a manager if there is none; default True.
    - ``COUNTER_SERVER_DURABILITY``: of a manager that is started: ``"commit"`` (default), ``"process"`` or ``"none"``.
    - ``COUNTER_SERVER_IDLE_TIMEOUT``: seconds without clients after which such a manager exits; default 60.

    Each app's state is in its `extensions`, so one object serves any number of apps.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self.declarations = Declarations()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give `app` its state, which connects at its first use.

        :raises InvalidRequest: if the configuration is not valid.
        :raises Unsupported: if shared objects are declared, and the store hosts none.
        """
        if _NAME in app.extensions:
            raise RuntimeError("this app has a SharedState already: use it, and call init_app only once")
        state = state_of(app, self.declarations)
        app.config.setdefault("COUNTER_SERVER_REQUEST_DEADLINE", 2 * app.config["COUNTER_SERVER_DEADLINE"])
        settings.check_seconds(app.config["COUNTER_SERVER_REQUEST_DEADLINE"], "a request's deadline", inf)
        app.extensions[_NAME] = state
        if app.config.setdefault("COUNTER_SERVER_TIMING", False):
            app.after_request(_report_time)
        app.teardown_appcontext(_give_back)

    @property
    def state(self) -> State:
        """The current app's state. It needs an application context, which a request or a Flask command has."""
        state = current_app.extensions.get(_NAME)
        if not isinstance(state, State):
            raise RuntimeError("this app has no SharedState: call init_app(app) first")
        return state

    def submit(self, operation: Operation) -> Result:
        """See `Sharing`."""
        with self._borrow() as (state, seconds):
            return state.submit(operation, within=seconds)

    def invoke(self, name: str, operation: Invoke) -> Result:
        with self._borrow() as (state, seconds):
            return state.invoke(name, operation, within=seconds)

    @contextmanager
    def _borrow(self) -> Iterator[tuple[State, float]]:
        """Yield the current app's state, and the seconds that this request may still wait for it."""
        borrowed = _borrowed()
        if borrowed is None:
            patience = current_app.config["COUNTER_SERVER_REQUEST_DEADLINE"] if has_request_context() else inf
            borrowed = _Borrowed(self.state, _current_request(), patience)
            setattr(g, _BORROWED, borrowed)
        left = borrowed.patience - borrowed.waited
        if left <= 0:
            raise DeadlineExceeded(
                f"this request has already waited {borrowed.patience:g} seconds for shared state, its maximum; nothing"
                " was counted",
                "not_applied",
            )
        began = time.monotonic()
        try:
            yield borrowed.state, left
        finally:
            borrowed.calls += 1
            borrowed.waited += time.monotonic() - began

    def visitor_counter(
        self, name: str, *, max_visitors: int = DEFAULT_ENTRIES, ttl: float = VISITOR_TTL
    ) -> "VisitorCounter":
        """Declare a per-visitor counter, at import time. It needs the app's ``SECRET_KEY``.

        ::

            basket = shared.visitor_counter("basket")
            basket.increment()        # in a view: 1, 2, 3, … for each browser

        :param max_visitors: beyond this number, a new visitor replaces the longest idle one.
        :param ttl: seconds without use after which a visitor's number is forgotten.
        """
        check_ttl(ttl)
        numbers = self.object(f"visitor counter {name}", BoundedDict, check_entries(max_visitors), durable=False)
        return VisitorCounter(name, numbers, ttl)


class VisitorCounter:
    """A number for each visitor, found by a random id in Flask's signed session cookie.

    Two browsers never share a number, and two tabs of one browser lose no update: the number is not in the cookie.
    A browser gets its id with the first response that used a method or `value`.
    """

    def __init__(self, name: str, hosted: BoundedDict, ttl: float) -> None:
        self.name = name
        self._hosted = hosted
        self._ttl = check_ttl(ttl)

    def __repr__(self) -> str:
        return f"<VisitorCounter {self.name!r}>"

    def increment(self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None) -> int:
        """Add `by` and return the result, which lies within the bounds, or raise `LimitReached` and change nothing."""
        check_step(by, minimum, maximum)
        number = self._hosted.incr(_visitor(), by, self._ttl, minimum, maximum, renew=True)
        return cast(int, within_bounds(number, self.name))

    def decrement(self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None) -> int:
        """Subtract `by` and return the result; see `increment`."""
        check_step(by, minimum, maximum)  # before the sign is changed: -True is an int
        return self.increment(-by, minimum=minimum, maximum=maximum)

    @property
    def value(self) -> int:
        """The current number; 0 if this visitor has counted nothing, or the number has expired."""
        return cast(int, self._hosted.renew(_visitor(), 0, self._ttl))

    def reset(self) -> None:
        """Begin at 0 again."""
        self._hosted.delete(_visitor())


def _visitor() -> str:
    """Return the current visitor's id; create it if there is none. It needs a request, and a ``SECRET_KEY``."""
    visitor = session.get(_VISITOR)
    if not isinstance(visitor, str):
        visitor = session[_VISITOR] = secrets.token_urlsafe(16)
    return visitor


def state_of(app: Flask, declarations: Declarations | None = None) -> State:
    """Return a state as `app` is configured, and set the missing defaults."""
    app.config.setdefault("COUNTER_SERVER_STORE", os.environ.get(settings.STORE_VARIABLE) or settings.DEFAULT_STORE)
    app.config.setdefault("COUNTER_SERVER_DEADLINE", settings.DEFAULT_DEADLINE)
    for name in ("start", "durability", "idle_timeout"):
        app.config.setdefault(f"COUNTER_SERVER_{name.upper()}", getattr(settings.DEFAULT_STORE_OPTIONS, name))
    config = app.config.get_namespace("COUNTER_SERVER_")
    options = settings.StoreOptions(
        instance_path=app.instance_path,
        start=bool(config["start"]),
        durability=settings.check_durability(config["durability"]),
        idle_timeout=settings.check_seconds(config["idle_timeout"], "an idle timeout"),
    )
    return open_state(config["store"], deadline=config["deadline"], options=options, declarations=declarations)


def open_for_app(url: str, *, deadline: float, options: settings.StoreOptions) -> State:
    """Open a state with the data directory of the current app, if there is one and `url` names none."""
    if has_app_context():
        options = replace(options, instance_path=current_app.instance_path)
    return open_state(url, deadline=deadline, options=options)


def _current_request() -> Request | None:
    return cast(Request, request._get_current_object()) if has_request_context() else None  # type: ignore[attr-defined] # the proxy's own method


def _borrowed() -> _Borrowed | None:
    """Return the state that the current request uses. In an outer app context, `g` may hold another request's."""
    borrowed: _Borrowed | None = g.get(_BORROWED)
    return borrowed if borrowed is not None and borrowed.request is _current_request() else None


def _report_time(response: Response) -> Response:
    borrowed = _borrowed()
    if borrowed is not None:
        response.headers.add(
            "Server-Timing", f'counter-server;dur={borrowed.waited * 1000:.3f};desc="{borrowed.calls} calls"'
        )
    return response


def _give_back(_error: BaseException | None) -> None:
    borrowed = g.pop(_BORROWED, None)
    if borrowed is not None:
        log.debug("%d calls in %.6f s", borrowed.calls, borrowed.waited)
