"""`SharedState`, the Flask extension: shared counters in anybody's app."""

import os

from flask import Flask, current_app

from .operations import Operation, Page, Result
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE, STORE_VARIABLE
from .state import Counter, State, open_state

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

    It holds nothing of an app: each app's state lives in its `extensions`, so one object serves any number of apps.
    """

    def __init__(self, app: Flask | None = None) -> None:
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
        app.extensions[_NAME] = open_state(
            app.config["COUNTER_SERVER_STORE"],
            deadline=app.config["COUNTER_SERVER_DEADLINE"],
            instance_path=app.instance_path,
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

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """A page of the current app's counters; see `State.counters`."""
        return self.state.counters(after=after, limit=limit)

    def submit(self, operation: Operation) -> Result:
        """Have the current app's state apply one operation; see `State.submit`."""
        return self.state.submit(operation)
