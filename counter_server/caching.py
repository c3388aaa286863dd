"""A cache that all workers share, with the interface of cachelib: for Flask-Caching, Flask-Session, or directly.

`CACHE_TYPE = "counter_server.caching.ManagerCache"`, or `SESSION_CACHELIB = ManagerCache("manager:///...")`.
"""

import pickle
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

from .dicts import BoundedDict, check_entries
from .extension import open_for_app, state_of
from .settings import DEFAULT_STORE, StoreOptions
from .state import State, forgetful

try:
    from cachelib.base import BaseCache
    from cachelib.serializers import BaseSerializer
except ImportError as error:
    raise ImportError("a cache needs cachelib: pip install 'counter-server[cache]'") from error
try:  # Flask-Caching wants its own base class, which is a `cachelib.BaseCache` too
    from flask_caching.backends.base import BaseCache as _Base
except ImportError:
    _Base = BaseCache  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from flask import Flask

DEFAULT_NAME = "cache"
FLASK_CACHING_NAME = "flask-caching"  # another one, so that clearing Flask-Caching's cache ends no sessions
_DEFAULT_PREFIX = "flask_cache_"  # of Flask-Caching


class ManagerCache(_Base):  # pyright: ignore[reportGeneralTypeIssues] - one of two base classes
    """A `cachelib.BaseCache` in the manager process, shared by all workers. `add`, `inc` and `dec` are atomic.

    An entry expires exactly when its timeout is over. A new entry without room replaces the entry that was used least
    recently; expired entries go first. If the manager is killed, the cache is empty. Values are pickled by `serializer`
    in this process; only integers and floats are sent as they are, for the manager to add to.

    :param url: `manager:///absolute/data/directory`; without a directory, the app's that first uses the cache; or
        a `State`, with its connections, deadline and options.
    :param name: caches with the same name share their entries.
    :param threshold: the maximum number of entries.
    :param default_timeout: seconds, or a `timedelta`; 0 means forever.
    :param deadline: seconds that each call may take; later it raises `CounterServerError`.
    :param options: whether and how to start a manager on demand.
    """

    serializer = BaseSerializer()

    def __init__(
        self,
        url: str | State = DEFAULT_STORE,
        name: str = DEFAULT_NAME,
        *,
        threshold: int = 10_000,
        default_timeout: int | timedelta = 300,
        ignore_delete_many_errors: bool = True,
        deadline: float | None = None,
        options: StoreOptions | None = None,
    ) -> None:
        BaseCache.__init__(self, default_timeout, ignore_delete_many_errors)
        self._name, self._threshold = name, check_entries(threshold)
        if isinstance(url, State):
            self._state = url
        else:
            self._open = partial(open_for_app, url, deadline=deadline, options=options)
        if url != DEFAULT_STORE:
            _ = self._entries  # reports a wrong URL now

    @cached_property
    def _state(self) -> State:
        """The state; without a directory in the URL opened at its first use, in the app whose directory it takes."""
        return self._open()

    @cached_property
    def _entries(self) -> BoundedDict:
        return forgetful(self._state.object(self._name, BoundedDict, self._threshold, durable=False))

    @classmethod
    def factory(cls, app: "Flask", config: dict[str, Any], args: list[Any], kwargs: dict[str, Any]) -> Self:
        """Make the cache for Flask-Caching: ``CACHE_ARGS`` and ``CACHE_OPTIONS`` go to the class.

        ``CACHE_KEY_PREFIX`` gives an app a cache of its own, so that it can clear that and fill only that.
        """
        options = {"threshold": config["CACHE_THRESHOLD"], "name": FLASK_CACHING_NAME, **kwargs}
        options |= zip(("url", "name"), args, strict=False)
        if "url" not in options:
            options["url"] = state_of(app)
        prefix = config.get("CACHE_KEY_PREFIX")
        if prefix and prefix != _DEFAULT_PREFIX:
            options["name"] += f" {prefix}"
        return cls(**options)

    def _seconds(self, timeout: int | timedelta | None) -> int | None:
        return self._normalize_timeout(timeout) or None

    def _pack(self, value: Any) -> Any:
        if type(value) in (int, float):
            return value
        packed = self.serializer.dumps(value)
        if packed is None:
            raise pickle.PicklingError(f"{type(value).__qualname__} cannot be serialised; the log says why")
        return packed

    def get(self, key: str) -> Any:
        (packed,) = self._entries.find(_plain(key)) or (None,)
        return packed if packed is None or type(packed) in (int, float) else self.serializer.loads(packed)

    def set(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        self._entries.set(_plain(key), self._pack(value), self._seconds(timeout))
        return True

    def add(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        return self._entries.add(_plain(key), self._pack(value), self._seconds(timeout))

    def delete(self, key: str) -> bool:
        return self._entries.delete(_plain(key))

    def has(self, key: str) -> bool:
        return self._entries.has(_plain(key))

    def clear(self) -> bool:
        self._entries.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> Any:
        """Add to a number, or raise `TypeError`. Like `set`, this renews the entry with the default timeout."""
        return self._entries.incr(_plain(key), delta, self._seconds(None), renew=True)

    def dec(self, key: str, delta: int = 1) -> Any:
        return self.inc(key, -delta)

    def close(self) -> None:
        """Close the connections, including a given `State`'s. The next call opens them again."""
        self._state.close()


def _plain(key: Any) -> Any:
    return str.__str__(key) if isinstance(key, str) else key  # a subclass of str is not plain data
