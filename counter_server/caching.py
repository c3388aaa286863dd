"""A cache that all workers share, behind the interface of cachelib: for Flask-Caching, Flask-Session, and by itself.

`CACHE_TYPE = "counter_server.caching.ManagerCache"`, or `SESSION_CACHELIB = ManagerCache("manager:///...")`.
"""

import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from .dicts import BoundedDict, check_entries
from .extension import state_of
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE, DEFAULT_STORE_OPTIONS, StoreOptions
from .state import State, forgetful, open_state

try:
    from cachelib.base import BaseCache
    from cachelib.serializers import BaseSerializer
except ImportError as error:
    raise ImportError("a cache needs cachelib: pip install 'counter-server[cache]'") from error
try:
    # Flask-Caching asks a class of its own for `factory`; it is a `cachelib.BaseCache` too.
    from flask_caching.backends.base import BaseCache as _Base
except ImportError:
    _Base = BaseCache  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from flask import Flask

DEFAULT_NAME = "cache"
FLASK_CACHING_NAME = "flask-caching"  # of a cache that Flask-Caching makes: to clear it is not to end sessions


class ManagerCache(_Base):  # pyright: ignore[reportGeneralTypeIssues] - either one
    """A `cachelib.BaseCache` in the manager process: one for all workers, and `add`, `inc` and `dec` really are atomic.

    An entry expires exactly when its timeout is over. When there is no room, the one used least recently goes; never a
    live one while there is an expired one. Values are serialised here, by `serializer`; the manager never
    unpickles them. Integers and floats are kept as they are, so that the manager can add to them.

    :param url: where: `manager:///absolute/data/directory`; or a `State`, to share its connections.
    :param name: what the cache is known by in the manager; caches of one name are the same, and are declared alike.
    :param threshold: the most entries.
    :param default_timeout: seconds, or a `timedelta`; 0 is for ever.
    :param deadline: seconds that each call may take; a `State` has its own.
    :param options: whether and how a manager is started where there is none; a `State` has its own.
    :raises InvalidRequest: if there is no such store, or the threshold cannot be.

    Each method raises `CounterServerError` where the manager cannot be reached. An entry that was lost with a killed
    manager is just not there: a cache may forget.
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
        deadline: float = DEFAULT_DEADLINE,
        options: StoreOptions = DEFAULT_STORE_OPTIONS,
    ) -> None:
        BaseCache.__init__(self, default_timeout, ignore_delete_many_errors)
        self._state = url if isinstance(url, State) else open_state(url, deadline=deadline, options=options)
        self._entries = forgetful(self._state.object(name, BoundedDict, check_entries(threshold)))

    @classmethod
    def factory(cls, app: "Flask", config: dict[str, Any], args: list[Any], kwargs: dict[str, Any]) -> Self:
        """What Flask-Caching calls: a cache where the app's configuration has its shared state.

        ``CACHE_THRESHOLD`` is the most entries; ``CACHE_ARGS`` and ``CACHE_OPTIONS`` are the class's own. The name is
        ``flask-caching`` where they give none.
        """
        options = {"threshold": config["CACHE_THRESHOLD"], **kwargs}
        if not args and "url" not in options:
            options["url"] = state_of(app)
        if len(args) < 2:
            options.setdefault("name", FLASK_CACHING_NAME)
        return cls(*args, **options)

    def _seconds(self, timeout: int | timedelta | None) -> int | None:
        return self._normalize_timeout(timeout) or None

    def _pack(self, value: Any) -> Any:
        if type(value) in (int, float):
            return value
        packed = self.serializer.dumps(value)
        if packed is None:
            raise pickle.PicklingError(f"{type(value).__qualname__} cannot be serialised; the log says why")
        return packed

    def _unpack(self, packed: Any) -> Any:
        return packed if packed is None or type(packed) in (int, float) else self.serializer.loads(packed)

    def get(self, key: str) -> Any:
        found = self._entries.find(_plain(key))
        return self._unpack(found[0]) if found else None

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
        """Add to a number in one atomic step; as a `set` does, it renews the entry with the default timeout.

        :raises TypeError: if the value or `delta` is not a number.
        """
        return self._entries.incr(_plain(key), delta, self._seconds(None), renew=True)

    def dec(self, key: str, delta: int = 1) -> Any:
        """Subtract; all else is as for `inc`."""
        return self.inc(key, -delta)

    def close(self) -> None:
        """Close the connections, those of a `State` that was given too. The next call opens them again."""
        self._state.close()


def _plain(key: Any) -> Any:
    """The string itself, where a key is one of a class of its own."""
    return str.__str__(key) if isinstance(key, str) else key
