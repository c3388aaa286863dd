"""What a program opens and holds: a state, and through it the counters and shared objects of one store."""

import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from math import inf
from typing import Any, Self, TypeVar, cast

from .blocks import Block
from .dicts import DEFAULT_ENTRIES, BoundedDict, SharedDict, check_entries, check_ttl
from .errors import (
    CounterServerError,
    DeadlineExceeded,
    Disconnected,
    InvalidRequest,
    NotHosted,
    RemoteError,
    ResultLost,
    StateLost,
    Unsupported,
)
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
    Replayed,
    Result,
    Returned,
    Scan,
    Set,
    check_name,
    check_step,
    expect,
)
from .plain import decode_plain, encode_plain, find_class
from .session import Session, Sessions
from .settings import DEFAULT_DEADLINE, LONGEST_DEADLINE, StoreOptions, check_seconds, from_environment
from .status import Status
from .store import HostsObjects, IsMade, ReportsStatus, Store
from .stores import open_store
from .stores.memory import MemoryStore

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")

_MOST_LOSSES = 10  # in a row for which a forgetful handle repeats a call; it raises the next one

_deadline: ContextVar[float | None] = ContextVar("counter_server_deadline", default=None)  # in a `deadline` block
_noticing = threading.Lock()  # held while a child finds out that it is one
_listing = threading.Lock()  # guards the two below
_states: "weakref.WeakSet[State]" = weakref.WeakSet()
_blocks: "list[_Stores]" = []  # of `in_memory`; every state is in the last one


class Counter:
    """A number that all workers share. Every increment is counted exactly once.

    Each method makes one call to the store, and may raise `CounterServerError`. Threads that wait at the same time
    share that call.
    """

    def __init__(self, name: str, shared: "Sharing") -> None:
        check_name(name)
        self.name = name
        self._shared = shared

    def __repr__(self) -> str:
        return f"<Counter {self.name!r}>"

    def increment(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Add `by` and return the result, which lies within `minimum` and `maximum`.

        :param key: an idempotency key: for 24 hours, the same key with the same request is counted once, and gets the
            same number.
        :raises LimitReached: if the result would be outside the bounds, or outside 64 bits; nothing is changed.
        :raises KeyReused: if the key was used for another request; nothing is changed.
        """
        result = self._shared.submit(Increment(self.name, by, minimum, maximum, key))
        if type(result) is int:  # nearly always
            return result
        return result.value if isinstance(result, Replayed) else expect(int, result)

    def decrement(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Subtract `by` and return the result; see `increment`."""
        check_step(by, minimum, maximum)  # before its sign is changed: -True is an int
        return self.increment(-by, minimum=minimum, maximum=maximum, key=key)

    @property
    def value(self) -> int:
        """The current number; 0 if nothing was counted yet."""
        return expect(int, self._shared.submit(Get(self.name)) or 0)

    def set(self, value: int) -> int:
        """Set the number to `value`, and return it."""
        return expect(int, self._shared.submit(Set(self.name, value)))

    def delete(self) -> bool:
        """Remove the counter; return whether it existed."""
        return expect(bool, self._shared.submit(Delete(self.name)))


class SharedObject:
    """A handle on a shared object: its public methods are methods of this handle."""

    _name: str
    _cls: type
    _shared: "Sharing"
    _losses: int  # of the object, in a row, after which the call is made again

    def __init__(self, name: str, cls: type, shared: "Sharing", losses: int = 0) -> None:
        vars(self).update(_name=name, _cls=cls, _shared=shared, _losses=losses)

    def __repr__(self) -> str:
        return f"<SharedObject {self._name!r}>"

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not callable(getattr(self._cls, method, None)):
            raise AttributeError(f"only public methods of {self._cls.__qualname__} are shared, not {method!r}")

        def call(*arguments: Any, **keywords: Any) -> Any:
            packed = encode_plain((arguments, keywords), f"the arguments of {self._name}.{method}")
            for _ in range(self._losses):
                try:
                    return _returned(self._shared.invoke(self._name, Invoke(method, packed)))
                except StateLost as lost:
                    log.info("%s", lost)
            return _returned(self._shared.invoke(self._name, Invoke(method, packed)))

        call.__name__ = method
        return call

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"setting {name!r} would change this handle only, not the shared object: give {self._cls.__qualname__} a"
            " method for it"
        )


def forgetful(handle: Kind) -> Kind:
    """Return a handle on the same shared object that tolerates its loss: a cache lost with its manager is empty."""
    if not isinstance(handle, SharedObject):
        raise TypeError(f"{handle!r} is not a shared object")
    return cast(Kind, SharedObject(handle._name, handle._cls, handle._shared, _MOST_LOSSES))


def _returned(result: Result) -> Any:
    """Return what a method returned, or raise its exception, in its own class if this process has that."""
    if isinstance(result, Returned):
        try:
            return decode_plain(result.value)
        except ValueError as error:
            raise ResultLost("ResultLost", f"{error}; the call was made, and its result is lost", "") from error
    raise _made_again(expect(Raised, result))


def _made_again(raised: Raised) -> Exception:
    """Return a method's exception, without a call of the class's constructor, which may take other arguments."""
    kind = find_class(raised.module, raised.name.removeprefix(f"{raised.module}."))
    # An error of ours would say what happened to another call.
    is_known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, CounterServerError)
    if is_known and raised.content is not None:
        with suppress(Exception):  # the class here differs from the class there
            arguments, attributes = decode_plain(raised.content)
            base = next(base for base in kind.__mro__ if base.__module__ == "builtins")
            error = cast(Exception, base.__new__(kind, *arguments))
            base.__init__(error, *arguments)
            vars(error).update(attributes)
            error.add_note(f"Raised in the manager process:\n{raised.traceback}")
            return error
    return RemoteError(raised.name, raised.text, raised.traceback)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    token = _deadline.set(seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


class Declarations(dict[str, Declaration]):
    """The shared objects that a program has declared, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._unable: weakref.WeakSet[State] = weakref.WeakSet()  # use them, and have a store that hosts none

    def use(self, state: "State", store: Store) -> None:
        """Note that `state` uses them. Raise `Unsupported` if `store` hosts none, now or at the first declaration."""
        if self:
            hosting(store, self.values())
        if isinstance(store, HostsObjects):
            self._unable.discard(state)
        else:
            self._unable.add(state)

    def add(self, declaration: Declaration) -> None:
        """Add one object. Repeating a declaration has no effect."""
        for state in list(self._unable):
            hosting(state.home(), [declaration])
        first = self.setdefault(declaration.name, declaration)
        if not first.means(declaration) or str(first) != str(declaration):
            raise InvalidRequest(
                f"{declaration} cannot be declared, because {first} already has that name: use another one"
            )


def declared_for(url: str) -> list[Declaration]:
    """Return everything that this process declares for one store, in any of its states: one manager hosts all of it."""
    found = Declarations()
    with _listing:
        states = list(_states)
    for state in states:
        if str(state.home(late=False)) == url:
            for name, declaration in dict(state.declarations).items():
                if not found.setdefault(name, declaration).means(declaration):
                    log.warning("two declarations of one name: %s is hosted, and %s is not", found[name], declaration)
                elif declaration.strictness > found[name].strictness:
                    found[name] = declaration
    return list(found.values())


def hosting(store: Store, declared: Iterable[Declaration] = ()) -> HostsObjects:
    """Return `store`, or raise `Unsupported` if it hosts no shared objects, naming those that are declared."""
    if isinstance(store, HostsObjects):
        return store
    scheme = str(store).partition("://")[0]  # only this: pages show the message, and the URL is for operators
    names = "; ".join(map(str, declared))
    declares = f", and this app declares {names}" if names else ""
    raise Unsupported(f"{scheme}:// hosts no shared objects, only counters{declares}: use manager:// for them")


class Sharing(ABC):
    """Makes handles on counters and shared objects. `State` and `SharedState` differ only in how calls are made."""

    declarations: Declarations

    @abstractmethod
    def submit(self, operation: Operation) -> Result:
        """Apply one operation on the counters, exactly once, and return its result, or raise `CounterServerError`."""

    @abstractmethod
    def invoke(self, name: str, operation: Invoke) -> Result:
        """Call a method of the declared object `name`; see `submit`."""

    @staticmethod
    def deadline(seconds: float) -> Block:
        """Give each call in a block another deadline, at most 60 seconds; also a decorator.

        ::

            with shared.deadline(0.5):
                global_obj.query()

        It is for all calls of this thread (or greenlet, or task) in the block, through whichever handle, and instead of
        their state's deadline. A request's deadline holds as well.
        """
        return Block(partial(_within, check_seconds(seconds, "a deadline", LONGEST_DEADLINE)))

    def counter(self, name: str) -> Counter:
        """Return the counter `name`, which exists from its first increment on, or raise `InvalidRequest`."""
        return Counter(name, self)

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """Return at most `limit` counters (at most 1000), in the order of their names, that follow `after`."""
        return expect(Page, self.submit(Scan(after, limit)))

    def object(
        self,
        name: str,
        cls: type[Kind],
        *arguments: Any,
        durable: bool = True,
        concurrent: bool = False,
        **keywords: Any,
    ) -> Kind:
        """Declare a shared object, and return a handle that calls its public methods.

        ::

            global_obj = shared.object("global_obj", SomeObj, 0)
            global_obj.query()        # in a view: 1, 2, 3, … across all workers

        Declare it at import time, so that every process knows it before its first call. Each call is atomic, made
        exactly once, and has the state's deadline. Arguments and results are plain data.

        :param cls: the class, at the top level of a module, which the manager imports; called there as
            `cls(*arguments, **keywords)`.
        :param durable: keep the pickled state on the disk, in the same commit as each call. Without that, calls are
            faster, and the object need not be picklable. It is kept when the manager ends in order, and lost if the
            manager is killed or the machine restarts: each process that used it then gets `StateLost` once.
        :param concurrent: call the methods by several threads of the manager at once, without the object's lock. The
            class must be thread-safe by itself, and the object cannot be durable. Each call is still made exactly once.
        :raises InvalidRequest: if it cannot be hosted, or another object has its name.
        :raises Unsupported: if the store hosts none; for an app that comes later, `init_app` raises this.
        """
        self.declarations.add(declare(name, cls, arguments, keywords, durable=durable, concurrent=concurrent))
        return cast(Kind, SharedObject(name, cls, self))

    def dict(self, name: str, *, max_entries: int = DEFAULT_ENTRIES, ttl: float | None = None) -> SharedDict:
        """Declare a bounded shared dict with expiry, as an `object`, and return a handle on it.

        ::

            carts = shared.dict("carts", max_entries=10_000, ttl=3600)
            carts.set("anna", ["tea"])

        The manager keeps it in memory, as an `object` with ``durable=False``.

        :param max_entries: beyond this number, a new entry replaces the least recently used one.
        :param ttl: seconds that an entry lives after it was set; None for no expiry.
        """
        check_ttl(ttl)  # before anything is declared
        return SharedDict(self.object(name, BoundedDict, check_entries(max_entries), durable=False), ttl)


def open_state(
    url: str,
    *,
    deadline: float | None = None,
    options: StoreOptions | None = None,
) -> "State":
    """Return the shared state at `url`, for any program. In a Flask app, use `SharedState`.

    It connects at the first call, and may be used by any thread, and after a fork.

    :param deadline: seconds that each call may take, at most 60; by default from the environment, else 5.
    :param options: whether and how to start a manager if there is none.
    :raises InvalidRequest: if there is no such store or the deadline is not valid.
    """
    seconds = from_environment("DEADLINE") if deadline is None else deadline
    return State(open_store(url, options, declared_for), deadline=seconds)


class _Client:
    """This process as a client of one store."""

    def __init__(self, store: Store) -> None:
        self.counters = Session(store, LARGEST_BATCH)
        self.pages = Session(store, 1)  # a page is large, so it shares no round trip
        self.objects: dict[str, Session | Sessions] = {}

    def begin_again(self) -> None:
        for session in (self.counters, self.pages, *self.objects.values()):
            session.begin_again()

    def close(self) -> None:
        for session in (self.counters, *list(self.objects.values())):
            session.close()


class State(Sharing):
    """Counters and shared objects in one store. All threads of a process share one, and with it their round trips."""

    def __init__(
        self,
        store: Store,
        *,
        deadline: float = DEFAULT_DEADLINE,
        declarations: Declarations | None = None,
        late: Callable[["State"], None] | None = None,
    ) -> None:
        """Make a state, which connects at its first use.

        :param late: is called before the first use, when it may still `take` another store.
        """
        self.declarations = Declarations() if declarations is None else declarations
        self._late = late
        self._process = os.getpid() if late is None else 0  # the process that uses it
        self._lock_type = threading.Lock
        self._opening = threading.Lock()  # guards the sessions of objects
        self._closing: weakref.finalize[[], State] | None = None
        self.take(store, deadline)
        with _listing:
            _states.add(self)
            self._move()  # a block may have begun or ended meanwhile

    def take(self, store: Store, deadline: float) -> None:
        """Go on in another store, or raise `InvalidRequest` or `Unsupported` and change nothing."""
        seconds = check_seconds(deadline, "a deadline", LONGEST_DEADLINE)
        self.declarations.use(self, store)
        if self._closing is not None:
            self._closing()
        with _listing:
            self._deadline = seconds
            self._at_home = _Client(store)  # also within an `in_memory` block
            self._move()
        # A state without references closes its connections, as the standard library's objects do.
        self._closing = weakref.finalize(self, self._at_home.close)
        self._closing.atexit = False

    def _move(self) -> None:
        """Go on in the last `in_memory` block, or at home if there is none. Call with `_listing` held."""
        home = self._at_home.counters.store
        self._client = _Client(_blocks[-1].store(home)) if _blocks else self._at_home

    def begin(self) -> None:
        """If this is the first use, take the configuration as it is now."""
        if self._late is not None:
            self._until(0)

    @property
    def store(self) -> Store:
        self.begin()
        return self._client.counters.store

    def home(self, *, late: bool = True) -> Store:
        """Return its own store, also within an `in_memory` block.

        :param late: before the first use, take the configuration as it is now.
        """
        if late and self._late is not None:
            with _noticing:
                if self._late is not None:
                    self._late(self)
        return self._at_home.counters.store

    def reset(self) -> None:
        """Begin again with an empty state, for tests: only on ``memory://``, and within `in_memory`.

        :raises InvalidRequest: on any other store; nothing is deleted.
        """
        if not isinstance(self.store, MemoryStore):
            raise InvalidRequest(
                f"{self.store} is not reset, and nothing was deleted: only a state in memory can be; in tests, set"
                " COUNTER_SERVER_STORE to memory:// before the first use, or use counter_server.testing.in_memory()"
            )
        with _listing:
            if _blocks:
                _blocks[-1].forget(self._at_home.counters.store)
                for state in list(_states):
                    state._move()
                return
        self.take(MemoryStore(), self._deadline)

    def submit(self, operation: Operation, *, within: float = inf) -> Result:
        """See `Sharing`. `within` are seconds that it may take, if less than the state's deadline."""
        deadline = self._until(within)  # first: it may take another store
        session = self._client.pages if isinstance(operation, Scan) else self._client.counters
        return session.request(operation, deadline)

    def invoke(self, name: str, operation: Invoke, *, within: float = inf) -> Result:
        deadline = self._until(within)
        client = self._client
        with self._opening:
            session = client.objects.get(name)
            if session is None:
                if name not in self.declarations:
                    raise NotHosted(
                        f"{name!r} is declared with a SharedState that was never initialised with this app; call"
                        " init_app(app)"
                    )
                declaration = self.declarations[name]
                store = hosting(client.counters.store).object(declaration)
                session = Sessions(store) if declaration.concurrent else Session(store, LARGEST_CALL_BATCH)
                client.objects[name] = session
        return session.request(operation, deadline)

    def status(self, *, within: float = inf) -> Status | None:
        """Return the figures of the store's server, if it has any. This starts no manager, and delays no other call.

        :param within: seconds that it may take, if less than the state's deadline.
        :raises DeadlineExceeded: if there is no answer, or no manager.
        :raises AccessDenied: if the store does not let this process in.
        """
        deadline = self._until(within)
        if not isinstance(self.store, ReportsStatus):
            return None
        try:
            return self.store.status(deadline)
        except Disconnected as error:
            raise DeadlineExceeded(f"{self.store} does not answer: {error}", "not_applied") from error

    def exists(self, *, within: float = inf) -> bool:
        """Return whether the store was made: whether a first use would make no directory, file or tables.

        This makes and starts nothing. It is True for a store that makes nothing. See `status` for the errors.
        """
        deadline = self._until(within)
        try:
            return not isinstance(self.store, IsMade) or self.store.exists(deadline)
        except Disconnected as error:
            raise DeadlineExceeded(f"{self.store} does not answer: {error}", "not_applied") from error

    def close(self) -> None:
        """Close the connections to the store. The next call opens them again."""
        self._until(0)
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _until(self, within: float) -> float:
        """Return the deadline of a call that begins now.

        First begin again after a fork, or after gevent or eventlet has patched locks and sockets: one that was made
        before the patch would stop all greenlets of a thread when one of them waits for it. The first use of a state
        that is made `late` comes here too.
        """
        if self._process != os.getpid() or self._lock_type is not threading.Lock:
            with _noticing:
                if self._late is not None:
                    self._late(self)
                    self._late = None
                if self._process != os.getpid() or self._lock_type is not threading.Lock:
                    self._begin_again()
        seconds = _deadline.get() or self._deadline
        return time.monotonic() + (within if within < seconds else seconds)

    def _begin_again(self) -> None:
        self._opening = threading.Lock()
        self._at_home.begin_again()
        if self._client is not self._at_home:
            with _listing:
                self._move()
        # Last: until then other threads wait.
        self._process, self._lock_type = os.getpid() if self._late is None else 0, threading.Lock


class _Stores:
    """The stores of one `in_memory` block. States that share a store elsewhere share one here."""

    def __init__(self) -> None:
        self._stores: dict[object, MemoryStore] = {}

    @staticmethod
    def _key(home: Store) -> object:
        return home if isinstance(home, MemoryStore) else str(home)

    def store(self, home: Store) -> MemoryStore:
        return self._stores.setdefault(self._key(home), MemoryStore())

    def forget(self, home: Store) -> None:
        self._stores.pop(self._key(home), None)

    def after_fork(self) -> None:
        for store in self._stores.values():
            store.after_fork()


def in_memory() -> Block:
    """Keep every state of this process in new, empty stores in memory while a block runs; also a decorator.

    ::

        with in_memory():
            visits.increment()        # 1

    It is for tests of an app. It holds for all threads, and for states that were opened before or are opened in the
    block. Each is in its own store again after it, and that was neither connected to nor started. A configuration that
    an app's store would refuse is refused here too. Blocks may be nested: an inner one begins empty.
    """
    return Block(_in_memory)


@contextmanager
def _in_memory() -> Iterator[None]:
    block = _Stores()
    with _listing:
        _blocks.append(block)
        for state in list(_states):
            state._move()
    try:
        yield
    finally:
        with _listing:
            _blocks.remove(block)
            for state in list(_states):
                state._move()


def _after_fork_in_child() -> None:
    global _listing, _noticing
    _listing, _noticing = threading.Lock(), threading.Lock()
    for block in _blocks:
        block.after_fork()
    for state in list(_states):
        state._begin_again()


# For `os.fork`, `multiprocessing` and gunicorn. uWSGI forks without informing the interpreter, so the next call notices
# the new process id.
os.register_at_fork(after_in_child=_after_fork_in_child)
