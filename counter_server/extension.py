"""`SharedState`, the Flask extension: shared counters in any app."""

import logging
import secrets
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple, cast

from flask import (
    Blueprint,
    Flask,
    Request,
    Response,
    current_app,
    g,
    has_app_context,
    has_request_context,
    jsonify,
    request,
    session,
)
from werkzeug.exceptions import default_exceptions
from werkzeug.local import LocalProxy

from . import settings
from .dicts import DEFAULT_ENTRIES, BoundedDict, check_entries, check_ttl, within_bounds
from .errors import (
    AccessDenied,
    CounterServerError,
    DeadlineExceeded,
    InvalidRequest,
    KeyReused,
    LimitReached,
    NotHosted,
    Outcome,
    OutcomeUnknown,
    StartupError,
    StateLost,
    StorageFull,
)
from .operations import Invoke, Operation, Result, check_step
from .plain import allow_values
from .state import Declarations, Sharing, State, declared_for, open_state
from .store import Store
from .stores import open_store

log = logging.getLogger(__name__)

VISITOR_TTL = 24 * 3600.0  # seconds without use after which a visitor's number is forgotten
_VISITOR = "_counter_server_visitor"  # in Flask's session
_NAME = "counter_server"  # in an app's extensions
_BORROWED = "_counter_server"  # in `g`
_REQUEST_DEADLINE = "COUNTER_SERVER_REQUEST_DEADLINE"


# The answer to an error that no view handles. Any other is a mistake of the app's: it is 500, as any exception is.
_STATUS: dict[type[CounterServerError], int] = {
    LimitReached: 409,
    KeyReused: 422,
    **dict.fromkeys((DeadlineExceeded, OutcomeUnknown, StateLost, StorageFull), 503),
    **dict.fromkeys((AccessDenied, NotHosted, StartupError), 503),
}
_UNAVAILABLE = "shared state could not be reached or written"  # an error's own message names directories and commands
_MEANING: dict[Outcome, str] = {
    "not_applied": "nothing was counted or changed by this call",
    "unknown": "this call may have been counted, once at most",
}


@dataclass(slots=True)
class _Borrowed:
    """An app's state as one request uses it, kept in `g`, which ends with the request."""

    state: State
    request: Request | None  # the request that uses it; None in a command
    patience: float  # seconds, for all calls together
    calls: int = 0
    waited: float = 0.0  # seconds

    def left(self) -> float:
        """Return the seconds that this request may still wait, or raise `DeadlineExceeded`."""
        if self.waited >= self.patience:
            raise DeadlineExceeded(
                f"this request has already waited {self.patience:g} seconds for shared state, its maximum; nothing was"
                " counted",
                "not_applied",
            )
        return self.patience - self.waited

    def note(self, began: float) -> None:
        """Note a call, which began at this time."""
        self.calls += 1
        self.waited += time.monotonic() - began


class SharedState(Sharing):
    """State that all workers of an app share.

    ::

        shared = SharedState(app)
        number = shared.counter("visits").increment()

    `init_app` reads this configuration. For a missing setting it reads the environment variable of the same name:

    - ``COUNTER_SERVER_STORE``: the store's URL; default ``manager://``.
    - ``COUNTER_SERVER_DATA_DIR``: the directory of ``manager://``; default ``counter-server`` in the app's instance
      folder.
    - ``COUNTER_SERVER_DEADLINE``: seconds that a call may take, at most 60; default 5.
    - ``COUNTER_SERVER_REQUEST_DEADLINE``: seconds that all calls of one request may take together;
      default twice the deadline.
    - ``COUNTER_SERVER_TIMING``: whether responses report these seconds in ``Server-Timing``; default False.
    - ``COUNTER_SERVER_START``: whether the first use starts a manager if there is none; default True.
    - ``COUNTER_SERVER_DURABILITY``: of a manager that is started: ``"commit"`` (default), ``"process"`` or ``"none"``.
    - ``COUNTER_SERVER_IDLE_TIMEOUT``: seconds without clients after which such a manager exits; default 60.
    - ``COUNTER_SERVER_LARGEST_VALUE``: bytes that the arguments or the result of a call may have, and the state of a
      durable object; default 1 MiB. It holds for the whole process; if several apps set it, the largest applies.
    - ``COUNTER_SERVER_LOG``: the log of such a manager: ``"file"`` (default), which is `manager.log` in the data
      directory, or ``"stderr"``, the app's standard error.
    - ``COUNTER_SERVER_ERROR_HANDLER``: whether an error of shared state that no view handles is answered with 503, 409
      or 422, and its outcome; default True.

    The configuration may change until the first use, so an app may be configured after `init_app`, or by its tests.

    Each app's state is in its `extensions`, so one object serves any number of apps.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self.declarations = Declarations()
        self._apps: list[weakref.ref[Flask]] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give `app` its state, which connects at its first use, as the app is configured then.

        :raises InvalidRequest: if the configuration is not valid.
        :raises Unsupported: if shared objects are declared, and the store hosts none.
        """
        if _NAME in app.extensions:
            raise RuntimeError("this app has a SharedState already: use it, and call init_app only once")
        app.extensions[_NAME] = state_of(app, self.declarations)
        self._apps.append(weakref.ref(app))
        if CounterServerError not in app.error_handler_spec[None][None]:
            app.register_error_handler(CounterServerError, _answer)
        app.shell_context_processors.insert(0, self._in_shell)  # the first: the app's own names replace these

    def _in_shell(self) -> dict[str, Any]:
        """Return what `flask shell` has at hand."""
        return {"shared": self, "counter": self.counter}

    def blueprint(self, *, allow: Callable[[], bool] | None = None) -> Blueprint:
        """Make a blueprint with the dashboard, the API, health and metrics, for the app that registers it.

        ::

            app.register_blueprint(shared.blueprint(), url_prefix="/-/counters")

        It is closed: each request needs the token, ``COUNTER_SERVER_TOKEN`` in the app's configuration or in the
        environment, as ``Authorization: Bearer`` or through its form to sign in. It changes nothing else of the app.

        :param allow: a function of the app without arguments. It returns True if the current request may see and
            operate everything without a token, else False. Any other result raises `TypeError`: the request fails.
        """
        from .server.web import blueprint  # the one import upwards, only when it is used

        return blueprint(allow)

    @property
    def state(self) -> State:
        """The current app's state. Without an application context, as in a thread, it is the only app's state."""
        if has_app_context():
            app = current_app
        elif len(self._apps) == 1 and (found := self._apps[0]()):
            app = found
        else:
            raise RuntimeError(
                f"there is no application context here, and this SharedState has {len(self._apps)} apps, not one: use"
                " it within 'with app.app_context():', also in a thread that a view starts"
            )
        state = state_in(app)
        if state is None:
            raise RuntimeError("this app has no SharedState: call init_app(app) first")
        return state

    def submit(self, operation: Operation) -> Result:
        """See `Sharing`."""
        borrowed = self._borrow()
        left, began = borrowed.left(), time.monotonic()
        try:
            return borrowed.state.submit(operation, within=left)
        finally:
            borrowed.note(began)

    def invoke(self, name: str, operation: Invoke) -> Result:
        borrowed = self._borrow()
        left, began = borrowed.left(), time.monotonic()
        try:
            return borrowed.state.invoke(name, operation, within=left)
        finally:
            borrowed.note(began)

    def _borrow(self) -> _Borrowed:
        """Return the current app's state as this request uses it. A generator would cost more than all of this."""
        if not has_app_context():
            return _Borrowed(self.state, None, inf)
        kept, asking = g._get_current_object(), _current_request()  # each use of a proxy costs time
        borrowed = _borrowed(kept, asking)
        if borrowed is None:
            state = self.state
            state.begin()  # before the configuration is read
            patience = inf if asking is None else current_app.config[_REQUEST_DEADLINE]
            borrowed = _Borrowed(state, asking, patience)
            setattr(kept, _BORROWED, borrowed)
        return borrowed

    def reset(self) -> None:
        """Begin again with an empty state, for tests: only on ``memory://``, and within `testing.in_memory`.

        :raises InvalidRequest: on any other store; nothing is deleted.
        """
        self.state.reset()

    def visitor_counter(
        self, name: str, *, max_visitors: int = DEFAULT_ENTRIES, ttl: float = VISITOR_TTL
    ) -> "VisitorCounter":
        """Declare a per-visitor counter, at import time. It needs the app's ``SECRET_KEY``.

        ::

            basket = shared.visitor_counter("basket")
            basket.increment()        # in a view: 1, 2, 3, … for each browser

        The manager keeps the numbers in memory, as an `object` with ``durable=False``.

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


class _RequestDeadline(float):
    """The default of a request's deadline: it follows a deadline that is set later."""


def state_in(app: Flask) -> State | None:
    """Return the state that `init_app` gave to `app`; None without one."""
    return cast(State | None, app.extensions.get(_NAME))


def state_of(app: Flask, declarations: Declarations | None = None) -> State:
    """Return a state as `app` is configured at its first use. Check the configuration now, and complete it."""
    app = cast(Any, app)._get_current_object() if isinstance(app, LocalProxy) else app  # as `current_app`
    config, wanted = _configured(app)
    found = weakref.ref(app)  # a state that held its app would keep its connections until the next garbage collection

    def follow(state: State) -> None:
        nonlocal wanted
        if app := found():
            config, wanted_now = _configured(app)
            if wanted_now != wanted:
                state.take(_open(wanted_now), wanted_now.deadline)
                wanted = wanted_now
            _use(app, config)

    state = State(_open(wanted), deadline=wanted.deadline, declarations=declarations, late=follow)
    _use(app, config)
    return state


class _Wanted(NamedTuple):
    """What a state is made from."""

    url: str
    options: settings.StoreOptions
    deadline: float


def _configured(app: Flask) -> tuple[dict[str, Any], _Wanted]:
    """Return the app's configuration, completed, and what a state is made from, or raise `InvalidRequest`."""
    config = {name: value for name, value in app.config.items() if name.startswith("COUNTER_SERVER_")}
    if isinstance(config.get(_REQUEST_DEADLINE), _RequestDeadline):
        del config[_REQUEST_DEADLINE]
    settings.complete(config)
    deadline = config["COUNTER_SERVER_DEADLINE"]
    if config[_REQUEST_DEADLINE] is None:
        config[_REQUEST_DEADLINE] = _RequestDeadline(2 * deadline)
    if config["COUNTER_SERVER_DATA_DIR"] is None:
        config["COUNTER_SERVER_DATA_DIR"] = settings.default_data_dir(app.instance_path)
    options = settings.StoreOptions(
        data_dir=config["COUNTER_SERVER_DATA_DIR"],
        start=config["COUNTER_SERVER_START"],
        durability=config["COUNTER_SERVER_DURABILITY"],
        idle_timeout=config["COUNTER_SERVER_IDLE_TIMEOUT"],
        log=config["COUNTER_SERVER_LOG"],
    )
    return config, _Wanted(config["COUNTER_SERVER_STORE"], options, deadline)


def _open(wanted: _Wanted) -> Store:
    try:
        return open_store(wanted.url, wanted.options, declared_for)
    except InvalidRequest as error:
        name = "DATA_DIR" if wanted.url == settings.DEFAULT_STORE else "STORE"
        raise InvalidRequest(f"COUNTER_SERVER_{name}: {error}") from None


def _use(app: Flask, config: dict[str, Any]) -> None:
    """Give the app a completed configuration, after a store was made from it."""
    app.config.update(config)
    allow_values(config["COUNTER_SERVER_LARGEST_VALUE"])
    after = app.after_request_funcs[None]
    if config["COUNTER_SERVER_TIMING"] and _report_time not in after:
        after.append(_report_time)  # `app.after_request` refuses once the app serves


def _answer(error: CounterServerError) -> Any:
    """Answer an error that no view handled, unless the app handles every exception, in the way of its HTTP errors."""
    app = current_app
    if every := app.error_handler_spec[None][None].get(Exception):
        return app.ensure_sync(every)(error)
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), None)
    if status is None or not app.config["COUNTER_SERVER_ERROR_HANDLER"]:
        raise error
    log.warning("%s %s: %s (%s)", request.method, request.path, error, error.outcome)
    title, detail = type(error).__name__, _UNAVAILABLE if status == 503 else str(error)
    if request.accept_mimetypes.best_match(("text/plain", "application/json")) == "application/json":
        response = jsonify(title=title, status=status, detail=detail, outcome=error.outcome)
    else:
        text = f"{title}: {detail}\noutcome: {error.outcome} ({_MEANING[error.outcome]})\n"
        response = Response(text, mimetype="text/plain")
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = "1"  # second; a manager is back within two
    return app.handle_http_exception(default_exceptions[status](detail, response))


def open_for_app(url: str, *, deadline: float | None, options: settings.StoreOptions | None) -> State:
    """Open a state with the data directory of the current app, if there is one and `url` names none."""
    options = options or settings.StoreOptions()
    if has_app_context() and options.data_dir is None:
        app = current_app
        named = app.config.get("COUNTER_SERVER_DATA_DIR")
        options = replace(options, data_dir=named or settings.default_data_dir(app.instance_path))
    return open_state(url, deadline=deadline, options=options)


def _current_request() -> Request | None:
    return cast(Request, request._get_current_object()) if has_request_context() else None  # type: ignore[attr-defined] # the proxy's own method


def _borrowed(kept: Any, asking: Request | None) -> _Borrowed | None:
    """Return the state that a request uses. In an outer app context, `g` may hold another request's."""
    borrowed: _Borrowed | None = kept.get(_BORROWED)
    return borrowed if borrowed is not None and borrowed.request is asking else None


def _report_time(response: Response) -> Response:
    borrowed = _borrowed(g, _current_request())
    if borrowed is not None and current_app.config["COUNTER_SERVER_TIMING"]:
        response.headers.add(
            "Server-Timing", f'counter-server;dur={borrowed.waited * 1000:.3f};desc="{borrowed.calls} calls"'
        )
    return response
