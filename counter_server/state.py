"""What a user holds: a state, and the counters in it."""

import builtins
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from math import inf
from typing import Any, Self, TypeVar, cast

from . import plain
from .combiner import Combiner
from .dicts import DEFAULT_ENTRIES, BoundedDict, SharedDict, check_entries, check_ttl
from .errors import InvalidRequest, NotHosted, RemoteError, StateLost, Unsupported
from .objects import LARGEST_CALL_BATCH, Declaration, declare
from .operations import (
    LARGEST_BATCH,
    Delete,
    Get,
    Increment,
    Invoke,
    Operation,
    Page,
    Raised,
    Refusal,
    Replayed,
    Result,
    Returned,
    Scan,
    Set,
    check_name,
    check_step,
)
from .session import Session
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, LONGEST_DEADLINE, StoreOptions, check_seconds
from .stores import HostsObjects, Store, open_store

log = logging.getLogger(__name__)

Submit = Callable[[Operation], Result]
Kind = TypeVar("Kind")

_MOST_LOSSES = 10  # in a row that a forgetful handle forgives: a manager that is killed each time is told
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

    def add(self, name: str, cls: type, arguments: tuple[Any, ...], keywords: dict[str, Any], *, durable: bool) -> None:
        """Declare one; the same one again is the same.

        :raises InvalidRequest: if it cannot be hosted, or another one has its name.
        """
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


class _Channel:
    """One client of one store: its threads share calls, each call is made exactly once."""

    def __init__(self, store: Store, limit: int) -> None:
        self.store = store
        self._session = Session(store)
        self._combiner: Combiner[Operation, Result] = Combiner(self._session.apply, limit=limit)

    def submit(self, operation: Operation, deadline: float) -> Result:
        result = self._combiner.submit(operation, deadline)
        if isinstance(result, Refusal):
            raise result.error()
        return result

    def after_fork(self) -> None:
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
        self._process = os.getpid()
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

    def counter(self, name: str) -> "Counter":
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
        self._notice_fork()
        channel = self._pages if isinstance(operation, Scan) else self._counters
        return channel.submit(operation, self._until(within))

    def object(self, name: str, cls: type[Kind], *arguments: Any, durable: bool = False, **keywords: Any) -> Kind:
        """Declare a shared object, and return a handle that calls its public methods, for all processes the same one.

        To be declared before the first use of the state in any process: what starts the manager tells it what to host.

        :param name: what it is known by; all who use it declare the same.
        :param cls: its class, found by module and qualified name; made as `cls(*arguments, **keywords)`.
        :param durable: keep its pickled state in the journal, in the same commit as each call.
        :raises InvalidRequest: if it cannot be hosted.

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
        self._notice_fork()
        deadline = self._until(within)
        with self._opening:
            channel = self._objects.get(name)
            if channel is None:
                if not isinstance(self.store, HostsObjects):
                    raise Unsupported(f"{self.store} hosts no shared objects, only counters")
                declaration = self.declarations.get(name)
                if declaration is None:
                    raise NotHosted(f"{name!r} is declared with a SharedState that was not given this app: init_app it")
                channel = _Channel(self.store.object(declaration), LARGEST_CALL_BATCH)
                self._objects[name] = channel
        return channel.submit(operation, deadline)

    def _until(self, within: float) -> float:
        return time.monotonic() + min(within, self._deadline)

    def close(self) -> None:
        """Close the connections to the store. The next call opens them again."""
        self._notice_fork()
        _close(self._counters, self._objects)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def _notice_fork(self) -> None:
        if self._process != os.getpid():
            with _noticing:
                if self._process != os.getpid():
                    self._after_fork()

    def _after_fork(self) -> None:
        self._opening = threading.Lock()
        for channel in (self._counters, self._pages, *self._objects.values()):
            channel.after_fork()
        self._process = os.getpid()  # last: until then other threads wait


class SharedObject:
    """A handle on a shared object: a public method of it is a method of this."""

    _name: str
    _cls: type
    _invoke: Callable[[str, Invoke], Result]

    def __init__(self, name: str, cls: type, invoke: Callable[[str, Invoke], Result]) -> None:
        vars(self).update(_name=name, _cls=cls, _invoke=invoke)

    def __repr__(self) -> str:
        return f"<SharedObject {self._name!r}>"

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not callable(getattr(self._cls, method, None)):
            raise AttributeError(f"only public methods of {self._cls.__qualname__} are shared, not {method!r}")

        def call(*arguments: Any, **keywords: Any) -> Any:
            packed = plain.encode((arguments, keywords), f"the arguments of {self._name}.{method}")
            return _answer(self._invoke(self._name, Invoke(method, packed)))

        call.__name__ = method
        return call

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{name!r} would be set here and nowhere else: {self._cls.__qualname__} needs a method for it"
        )


def forgetful(handle: Kind) -> Kind:
    """A handle on the same shared object that forgives its loss: for a cache, one lost with its manager is empty."""
    if not isinstance(handle, SharedObject):
        raise TypeError(f"{handle!r} is no shared object")
    invoke = handle._invoke

    def invoke_again(name: str, operation: Invoke) -> Result:
        for _ in range(_MOST_LOSSES):
            try:
                return invoke(name, operation)
            except StateLost as lost:
                log.info("%s", lost)
        return invoke(name, operation)

    return cast(Kind, SharedObject(handle._name, handle._cls, invoke_again))


def _answer(result: Result) -> Any:
    """What a method returned; or its exception, in its own type where that is built in."""
    if isinstance(result, Returned):
        return plain.decode(result.value)
    raised = expect(Raised, result)
    if raised.arguments is None:
        raise RemoteError(raised.name, raised.text, raised.traceback)
    kind = getattr(builtins, raised.name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise RemoteError(raised.name, raised.text, raised.traceback)
    try:
        error = kind(*plain.decode(raised.arguments))
    except TypeError:  # one that wants other arguments than it has itself
        raise RemoteError(raised.name, raised.text, raised.traceback) from None
    error.add_note(f"Raised in the manager process:\n{raised.traceback}")
    raise error


class Counter:
    """A number that all workers share. Every increment is counted exactly once.

    Each method makes one call to the store, shared with the other threads that wait at the same time, and raises
    `CounterServerError` where it cannot be done.
    """

    def __init__(self, name: str, submit: Submit) -> None:
        check_name(name)
        self.name = name
        self._submit = submit

    def __repr__(self) -> str:
        return f"<Counter {self.name!r}>"

    def increment(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Add `by` and return the result.

        :param by: not 0; negative to count down.
        :param minimum: the result may not be less.
        :param maximum: the result may not be more.
        :param key: an idempotency key: the same key with the same request is answered with the same number
            for 24 hours, and counted once.
        :raises LimitReached: if the result would lie outside the bounds, or outside 64 bits; nothing is changed.
        :raises KeyReused: if the key was used for another request; nothing is changed.
        """
        result = self._submit(Increment(self.name, by, minimum, maximum, key))
        return result.value if isinstance(result, Replayed) else expect(int, result)

    def decrement(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Subtract `by` and return the result; all else is as for `increment`."""
        check_step(by, minimum, maximum)  # before its sign is changed: -True is an int
        return self.increment(-by, minimum=minimum, maximum=maximum, key=key)

    @property
    def value(self) -> int:
        """The number as it is now; 0 where nothing was counted yet."""
        return expect(int, self._submit(Get(self.name)) or 0)

    def set(self, value: int) -> int:
        """Make it `value`, and return that."""
        return expect(int, self._submit(Set(self.name, value)))

    def delete(self) -> bool:
        """Remove it; whether there was one."""
        return expect(bool, self._submit(Delete(self.name)))


def expect(kind: type[Kind], result: object) -> Kind:
    """`result`, which the store owes as a `kind`."""
    if not isinstance(result, kind):
        raise TypeError(f"the store answered {result!r} where {kind.__name__} was due")
    return result


def _after_fork_in_child() -> None:
    global _listing
    _listing = threading.Lock()
    for state in list(_states):
        state._after_fork()


# For `os.fork`, `multiprocessing` and gunicorn. A server that forks without telling the interpreter, as uWSGI does, is
# found out by the process id, at the next call.
os.register_at_fork(after_in_child=_after_fork_in_child)
