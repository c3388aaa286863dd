"""`SharedState`, the Flask extension: shared counters in anybody's app."""

import os
from typing import Any, TypeVar, cast

from flask import Flask, current_app

from .operations import Operation, Page, Result
from .settings import (
    DEFAULT_DEADLINE,
    DEFAULT_STORE,
    DEFAULT_STORE_OPTIONS,
    STORE_VARIABLE,
    StoreOptions,
    check_durability,
    check_idle_timeout,
)
from .state import Counter, Declarations, SharedObject, State, open_state

Kind = TypeVar("Kind")

_NAME = "counter_server"


class SharedState:
    """State that all workers of an app share.

    ::

        shared = SharedState(app)
        number = shared.counter("visits").increment()

    Configuration, read by `init_app`:

    - ``COUNTER_SERVER_STORE``: the store's URL; default the environment variable of that name, else ``manager://``
      with the data directory ``COUNTER_SERVER_DATA_DIR``, else ``counter-server`` in the app's instance folder.
    - ``COUNTER_SERVER_DEADLINE``: seconds that a call may take, at most 60; default 5.
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
        """
        if _NAME in app.extensions:
            raise RuntimeError("this app has a SharedState already: use that one")
        app.config.setdefault("COUNTER_SERVER_STORE", os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
        app.config.setdefault("COUNTER_SERVER_DEADLINE", DEFAULT_DEADLINE)
        app.config.setdefault("COUNTER_SERVER_START", DEFAULT_STORE_OPTIONS.start)
        app.config.setdefault("COUNTER_SERVER_DURABILITY", DEFAULT_STORE_OPTIONS.durability)
        app.config.setdefault("COUNTER_SERVER_IDLE_TIMEOUT", DEFAULT_STORE_OPTIONS.idle_timeout)
        options = StoreOptions(
            instance_path=app.instance_path,
            start=bool(app.config["COUNTER_SERVER_START"]),
            durability=check_durability(app.config["COUNTER_SERVER_DURABILITY"]),
            idle_timeout=check_idle_timeout(app.config["COUNTER_SERVER_IDLE_TIMEOUT"]),
        )
        app.extensions[_NAME] = open_state(
            app.config["COUNTER_SERVER_STORE"],
            deadline=app.config["COUNTER_SERVER_DEADLINE"],
            options=options,
            declarations=self._declarations,
        )

    @property
    def state(self) -> State:
        """The current app's state. Needs an application context, as a request or a Flask command has."""
        state = current_app.extensions.get(_NAME)
        if not isinstance(state, State):
            raise RuntimeError("this app has no SharedState: call init_app(app) first")
        return state

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
        """
        self._declarations.add(name, cls, arguments, keywords, durable=durable)
        return cast(Kind, SharedObject(name, lambda name, operation: self.state.invoke(name, operation)))

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """A page of the current app's counters; see `State.counters`."""
        return self.state.counters(after=after, limit=limit)

    def submit(self, operation: Operation) -> Result:
        """Have the current app's state apply one operation; see `State.submit`."""
        return self.state.submit(operation)
