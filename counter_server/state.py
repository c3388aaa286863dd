"""What a user opens: a state, and through it the counters and shared objects of one store."""

import logging
import os
import threading
import time
import weakref
from math import inf
from typing import Any, Self, cast

from .combiner import Combiner
from .dicts import DEFAULT_ENTRIES, BoundedDict, SharedDict, check_entries, check_ttl
from .errors import DeadlineExceeded, Disconnected, InvalidRequest, NotHosted, Unsupported
from .handles import Counter, Kind, SharedObject, expect
from .objects import LARGEST_CALL_BATCH, Declaration, declare
from .operations import LARGEST_BATCH, Invoke, Operation, Page, Refusal, Result, Scan
from .session import Session
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, LONGEST_DEADLINE, StoreOptions, check_seconds
from .status import Status
from .stores import HostsObjects, Store, TellsStatus, open_store

log = logging.getLogger(__name__)

_noticing = threading.Lock()  # held while a child finds out that it is one
_listing = threading.Lock()  # guards the set below
_states: "weakref.WeakSet[State]" = weakref.WeakSet()


def open_state(
    url: str,
    *,
    deadline: float = DEFAULT_DEADLINE,
    options: StoreOptions = DEFAULT_STORE_OPTIONS,
    declarations: "Declarations | None" = None,
) -> "State":
    """The shared state at `url`, for any program; in a Flask app, `SharedState` does this.

    :param url: `manager:///absolute/data/directory`, or `memory://` for this process only.
    :param deadline: seconds that each call may take, at most 60.
    :param options: whether and how a manager is started where there is none.
    :param declarations: the shared objects, where several states are to have the same ones.
    :raises InvalidRequest: if there is no such store or the deadline is not acceptable.

    It connects at the first call, is safe from any thread, and after a fork.
    """
    declarations = Declarations() if declarations is None else declarations
    return State(open_store(url, options, declared_for), deadline=deadline, declarations=declarations)


class Declarations(dict[str, Declaration]):
    """The shared objects that a program has declared, by name."""

    _unable: Store | None = None  # one that they are for, and that hosts none

    def use(self, store: Store) -> None:
        """They are for `store`, those too that are declared from now on.

        :raises Unsupported: if something is declared and it hosts nothing; later that is told to who declares.
        """
        if self:
            hosting(store)
        if not isinstance(store, HostsObjects):
            self._unable = store

    def add(self, name: str, cls: type, arguments: tuple[Any, ...], keywords: dict[str, Any], *, durable: bool) -> None:
        """Declare one; the same one again is the same.

        :raises InvalidRequest: if it cannot be hosted, or another one has its name.
        :raises Unsupported: if a store that they are for hosts none.
        """
        if self._unable is not None:
            hosting(self._unable)
        declaration = declare(name, cls, arguments, keywords, durable=durable)
        if self.setdefault(name, declaration) != declaration:
            raise InvalidRequest(f"{declaration} is declared, but {self[name]} has that name already")


def declared_for(url: str) -> list[Declaration]:
    """What this process declares for one store: a manager that it starts is for all its states, caches and limits."""
    found = Declarations()
    with _listing:
        states = list(_states)
    for state in states:
        if str(state.store) == url:
            for name, declaration in dict(state.declarations).items():
                if found.setdefault(name, declaration) != declaration:
                    log.warning("two declarations of one name: %s is hosted, and %s is not", found[name], declaration)
    return list(found.values())


def hosting(store: Store) -> HostsObjects:
    """`store`, if it hosts shared objects.

    :raises Unsupported: if it does not.
    """
    if isinstance(store, HostsObjects):
        return store
    scheme = str(store).partition("://")[0]  # no more: pages tell this, and the URL is for operators
    raise Unsupported(f"{scheme}:// hosts no shared objects, only counters")


class _Channel:
    """One client of one store: its threads share calls, each call is made exactly once."""

    def __init__(self, store: Store, limit: int) -> None:
        self.store = store
        self._session = Session(store)
        self._combiner: Combiner[Operation, Result] = Combiner(
            self._session.apply, limit=limit, together=store.together
        )

    def submit(self, operation: Operation, deadline: float) -> Result:
        result = self._combiner.submit(operation, deadline)
        if isinstance(result, Refusal):
            raise result.error()
        return result

    def begin_again(self) -> None:
        self._combiner.reset()
        self._session.renew()
        self.store.after_fork()


def _close(counters: _Channel, objects: dict[str, _Channel]) -> None:
    for channel in (counters, *list(objects.values())):
        channel.store.close()


class State:
    """Counters and shared objects in one store. All threads of a process share one, and with it their round trips."""

    def __init__(
        self, store: Store, *, deadline: float = DEFAULT_DEADLINE, declarations: Declarations | None = None
    ) -> None:
        self._deadline = check_seconds(deadline, "a deadline", LONGEST_DEADLINE)
        self._counters = _Channel(store, LARGEST_BATCH)
        # A page is large: it shares a round trip with nothing, and nobody has to remember it.
        self._pages = _Channel(store, 1)
        self.declarations = Declarations() if declarations is None else declarations
        self.declarations.use(store)
        self._process = os.getpid()
        self._lock_type = threading.Lock
        self._opening = threading.Lock()  # guards the making of the channels below
        self._objects: dict[str, _Channel] = {}
        with _listing:
            _states.add(self)
        # One that nobody holds any more lets its connections go, as the standard library's do.
        weakref.finalize(self, _close, self._counters, self._objects).atexit = False

    @property
    def store(self) -> Store:
        """Where the counters are."""
        return self._counters.store

    def counter(self, name: str) -> Counter:
        """The counter of that name. It exists from its first increment on.

        :raises InvalidRequest: if that cannot be a name.
        """
        return Counter(name, self.submit)

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """A page of counters in the order of their names.

        :param after: the last name of the page before.
        :param limit: how many, at most 1000.
        """
        return expect(Page, self.submit(Scan(after, limit)))

    def submit(self, operation: Operation, *, within: float = inf) -> Result:
        """Have one operation on the counters applied, exactly once, and return its result.

        :param within: seconds that it may take, where that is less than the state's deadline.
        :raises CounterServerError: any of its tree; its `outcome` says whether something may have been counted.
        """
        self._notice_change()
        channel = self._pages if isinstance(operation, Scan) else self._counters
        return channel.submit(operation, self._until(within))

    def status(self, *, within: float = inf) -> Status | None:
        """The figures that the store's server tells of itself; None from a store that tells none.

        No manager is started for it, and nobody's call waits for it.

        :param within: seconds that it may take, where that is less than the state's deadline.
        :raises DeadlineExceeded: if there is no answer, or no manager.
        :raises AccessDenied: if the store does not let this process in.
        """
        self._notice_change()
        if not isinstance(self.store, TellsStatus):
            return None
        try:
            return self.store.status(self._until(within))
        except Disconnected as error:
            raise DeadlineExceeded(f"{self.store} tells nothing of itself: {error}", "not_applied") from error

    def object(self, name: str, cls: type[Kind], *arguments: Any, durable: bool = False, **keywords: Any) -> Kind:
        """Declare a shared object, and return a handle that calls its public methods, for all processes the same one.

        To be declared before the first use of the state in any process: what starts the manager tells it what to host.

        :param name: what it is known by; all who use it declare the same.
        :param cls: its class, found by module and qualified name; made as `cls(*arguments, **keywords)`.
        :param durable: keep its pickled state in the journal, in the same commit as each call.
        :raises InvalidRequest: if it cannot be hosted.
        :raises Unsupported: if this store hosts none.

        Each call is atomic, made exactly once, and has the state's deadline. Arguments and results are plain data.
        """
        self.declarations.add(name, cls, arguments, keywords, durable=durable)
        return cast(Kind, SharedObject(name, cls, self.invoke))

    def dict(self, name: str, *, max_entries: int = DEFAULT_ENTRIES, ttl: float | None = None) -> SharedDict:
        """Declare a shared dict that is bounded, and return a handle on it, for all processes the same one.

        Declared as an `object` is, and kept as one in the manager's memory, not on the disk.

        :param max_entries: the most; when there is no room, the one used least recently goes.
        :param ttl: seconds that an entry lives after it was set; None for ever.
        :raises InvalidRequest: if that cannot be.
        """
        check_ttl(ttl)  # what cannot be is not declared
        return SharedDict(self.object(name, BoundedDict, check_entries(max_entries)), ttl)

    def invoke(self, name: str, operation: Invoke, *, within: float = inf) -> Result:
        """Have a method of a declared object called, exactly once; see `object` and `submit`."""
        self._notice_change()
        deadline = self._until(within)
        with self._opening:
            channel = self._objects.get(name)
            if channel is None:
                declaration = self.declarations.get(name)
                if declaration is None:
                    raise NotHosted(f"{name!r} is declared with a SharedState that was not given this app: init_app it")
                channel = _Channel(hosting(self.store).object(declaration), LARGEST_CALL_BATCH)
                self._objects[name] = channel
        return channel.submit(operation, deadline)

    def _until(self, within: float) -> float:
        return time.monotonic() + min(within, self._deadline)

    def close(self) -> None:
        """Close the connections to the store. The next call opens them again."""
        self._notice_change()
        _close(self._counters, self._objects)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def _notice_change(self) -> None:
        """Begin again after a fork, or after gevent or eventlet has patched locks and sockets.

        A lock or a socket made before the patch stops all greenlets of its thread when one of them waits for it.
        """
        if self._process != os.getpid() or self._lock_type is not threading.Lock:
            with _noticing:
                if self._process != os.getpid() or self._lock_type is not threading.Lock:
                    self._begin_again()

    def _begin_again(self) -> None:
        self._opening = threading.Lock()
        for channel in (self._counters, self._pages, *self._objects.values()):
            channel.begin_again()
        self._process, self._lock_type = os.getpid(), threading.Lock  # last: until then other threads wait


def _after_fork_in_child() -> None:
    global _listing
    _listing = threading.Lock()
    for state in list(_states):
        state._begin_again()


# For `os.fork`, `multiprocessing` and gunicorn. A server that forks without telling the interpreter, as uWSGI does, is
# found out by the process id, at the next call.
os.register_at_fork(after_in_child=_after_fork_in_child)
