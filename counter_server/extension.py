"""`SharedState`, the Flask extension: shared counters in anybody's app."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar, cast

from flask import Flask, Request, Response, current_app, g, has_request_context, request

from .dicts import DEFAULT_ENTRIES, BoundedDict, SharedDict, check_entries, check_ttl
from .errors import DeadlineExceeded
from .handles import Counter, SharedObject, expect
from .operations import Invoke, Operation, Page, Result, Scan
from .settings import (
    DEFAULT_DEADLINE,
    DEFAULT_STORE,
    DEFAULT_STORE_OPTIONS,
    STORE_VARIABLE,
    StoreOptions,
    check_durability,
    check_seconds,
)
from .state import Declarations, State, open_state
from .visitors import DEFAULT_TTL, VisitorCounter

Kind = TypeVar("Kind")

log = logging.getLogger(__name__)

_NAME = "counter_server"
_BORROWED = "_counter_server"  # in `g`


@dataclass(slots=True)
class _Borrowed:
    """An app's state, as one request has it: what its calls have waited, and may wait yet. Its place is `g`."""

    state: State
    request: Request | None  # whose it is; none in a command
    patience: float  # seconds, for all calls together
    calls: int = 0
    waited: float = 0.0  # seconds

    def call(self, ask: Callable[[State, float], Result]) -> Result:
        """Have the state asked, within the seconds that are left."""
        left = self.patience - self.waited
        if left <= 0:
            raise DeadlineExceeded(
                f"this request has waited {self.patience:g} seconds for shared state, which is all it may; nothing was"
                " counted",
                "not_applied",
            )
        began = time.monotonic()
        try:
            return ask(self.state, left)
        finally:
            self.calls += 1
            self.waited += time.monotonic() - began


class SharedState:
    """State that all workers of an app share.

    ::

        shared = SharedState(app)
        number = shared.counter("visits").increment()

    Configuration, read by `init_app`:

    - ``COUNTER_SERVER_STORE``: the store's URL; default the environment variable of that name, else ``manager://``
      with the data directory ``COUNTER_SERVER_DATA_DIR``, else ``counter-server`` in the app's instance folder.
    - ``COUNTER_SERVER_DEADLINE``: seconds that a call may take, at most 60; default 5.
    - ``COUNTER_SERVER_REQUEST_DEADLINE``: seconds that all calls of one request may wait together;
      default twice the deadline.
    - ``COUNTER_SERVER_TIMING``: whether responses say in ``Server-Timing`` how long that was; default False.
    - ``COUNTER_SERVER_START``: whether the first use starts a manager where there is none; default True.
    - ``COUNTER_SERVER_DURABILITY``: of a manager that is started: ``"commit"`` (default), ``"process"`` or ``"none"``.
    - ``COUNTER_SERVER_IDLE_TIMEOUT``: seconds without any client after which such a manager ends; default 60.

    It holds nothing of an app, only what was declared: each app's state lives in its `extensions`, so one object serves
    any number of apps.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._declarations = Declarations()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give `app` its state. Nothing is connected before the first use.

        :raises InvalidRequest: if the configuration names no store.
        :raises Unsupported: if shared objects are declared, and the store hosts none.
        """
        if _NAME in app.extensions:
            raise RuntimeError("this app has a SharedState already: use that one")
        state = state_of(app, self._declarations)
        app.config.setdefault("COUNTER_SERVER_REQUEST_DEADLINE", 2 * app.config["COUNTER_SERVER_DEADLINE"])
        check_seconds(app.config["COUNTER_SERVER_REQUEST_DEADLINE"], "a request's deadline", inf)
        app.extensions[_NAME] = state
        if app.config.setdefault("COUNTER_SERVER_TIMING", False):
            app.after_request(_tell_the_time)
        app.teardown_appcontext(_give_back)

    @property
    def state(self) -> State:
        """The current app's state. Needs an application context, as a request or a Flask command has."""
        state = current_app.extensions.get(_NAME)
        if not isinstance(state, State):
            raise RuntimeError("this app has no SharedState: call init_app(app) first")
        return state

    def _borrowed(self) -> _Borrowed:
        """The state as the current request has it, borrowed at its first use."""
        borrowed = _borrowed()
        if borrowed is None:
            patience = current_app.config["COUNTER_SERVER_REQUEST_DEADLINE"] if has_request_context() else inf
            borrowed = _Borrowed(self.state, _current_request(), patience)
            setattr(g, _BORROWED, borrowed)
        return borrowed

    def counter(self, name: str) -> Counter:
        """The counter of that name, of whichever app is current when it is used: may be made at import time.

        :raises InvalidRequest: if that cannot be a name.
        """
        return Counter(name, self.submit)

    def object(self, name: str, cls: type[Kind], *arguments: Any, durable: bool = False, **keywords: Any) -> Kind:
        """Declare a shared object, at import time; the handle calls its public methods. See `State.object`.

        ::

            global_obj = shared.object("global_obj", SomeObj, 0)
            global_obj.query()        # in a view: 1, 2, 3, … across all workers

        :raises Unsupported: if the store of an app hosts none; told by `init_app` if that comes later.
        """
        self._declarations.add(name, cls, arguments, keywords, durable=durable)
        return cast(Kind, SharedObject(name, cls, self.invoke))

    def dict(self, name: str, *, max_entries: int = DEFAULT_ENTRIES, ttl: float | None = None) -> SharedDict:
        """Declare a bounded dict with expiry, at import time; one for all workers. See `State.dict`.

        ::

            carts = shared.dict("carts", max_entries=10_000, ttl=3600)
            carts.set("anna", ["tea"])
        """
        check_ttl(ttl)  # what cannot be is not declared
        return SharedDict(self.object(name, BoundedDict, check_entries(max_entries)), ttl)

    def visitor_counter(
        self, name: str, *, max_visitors: int = DEFAULT_ENTRIES, ttl: float = DEFAULT_TTL
    ) -> VisitorCounter:
        """Declare a counter of which each visitor has one, at import time. It needs the app's ``SECRET_KEY``.

        ::

            basket = shared.visitor_counter("basket")
            basket.increment()        # in a view: 1, 2, 3, … for each browser

        :param max_visitors: the most that have a number; when there is no room, the one used least recently goes.
        :param ttl: seconds without use after which a visitor's number is forgotten.
        """
        check_ttl(ttl)
        numbers = self.object(f"visitor counter {name}", BoundedDict, check_entries(max_visitors))
        return VisitorCounter(name, numbers, ttl)

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """A page of the current app's counters; see `State.counters`."""
        return expect(Page, self.submit(Scan(after, limit)))

    def submit(self, operation: Operation) -> Result:
        """Have the current app's state apply one operation; see `State.submit`."""
        return self._borrowed().call(lambda state, within: state.submit(operation, within=within))

    def invoke(self, name: str, operation: Invoke) -> Result:
        """Have a method of one of the current app's shared objects called; see `State.invoke`."""
        return self._borrowed().call(lambda state, within: state.invoke(name, operation, within=within))


def state_of(app: Flask, declarations: Declarations | None = None) -> State:
    """A state as `app` is configured; what the configuration does not say is set to its default.

    :raises InvalidRequest: if it names no store, or something else in it cannot be.
    """
    app.config.setdefault("COUNTER_SERVER_STORE", os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
    app.config.setdefault("COUNTER_SERVER_DEADLINE", DEFAULT_DEADLINE)
    app.config.setdefault("COUNTER_SERVER_START", DEFAULT_STORE_OPTIONS.start)
    app.config.setdefault("COUNTER_SERVER_DURABILITY", DEFAULT_STORE_OPTIONS.durability)
    app.config.setdefault("COUNTER_SERVER_IDLE_TIMEOUT", DEFAULT_STORE_OPTIONS.idle_timeout)
    options = StoreOptions(
        instance_path=app.instance_path,
        start=bool(app.config["COUNTER_SERVER_START"]),
        durability=check_durability(app.config["COUNTER_SERVER_DURABILITY"]),
        idle_timeout=check_seconds(app.config["COUNTER_SERVER_IDLE_TIMEOUT"], "an idle timeout"),
    )
    return open_state(
        app.config["COUNTER_SERVER_STORE"],
        deadline=app.config["COUNTER_SERVER_DEADLINE"],
        options=options,
        declarations=declarations,
    )


def _current_request() -> Request | None:
    return cast(Request, request._get_current_object()) if has_request_context() else None  # type: ignore[attr-defined]


def _borrowed() -> _Borrowed | None:
    """What the current request has borrowed. In an app context that was there before, `g` may hold another one's."""
    borrowed: _Borrowed | None = g.get(_BORROWED)
    return borrowed if borrowed is not None and borrowed.request is _current_request() else None


def _tell_the_time(response: Response) -> Response:
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
