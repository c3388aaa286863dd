"""Shared objects: plain Python objects, each behind a lock of its own, whose methods are called exactly once.

A slow method holds up its own object only. What a durable one has done is in the journal, as a pickle of the object
in the same transaction as the memory of the call, before anybody is told.
"""

import builtins
import importlib
import inspect
import io
import pickle
import reprlib
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from hashlib import blake2b
from math import inf
from typing import Any, NoReturn

from msgspec import Struct

from . import plain
from .errors import BatchRefused, InvalidRequest, StartupError, Stopped, StorageFull
from .ledger import Changes, ClientRecord, Clients, Commits, raise_error
from .operations import Batch, Invoke, Raised, Refusal, Result, Returned, check_name
from .settings import LONGEST_DEADLINE

LARGEST_CALL_BATCH = 15  # calls; with arguments or results of full size still under the frame limit
LARGEST_STATE = 2**20  # bytes, of a durable object's pickle
_TELL = reprlib.Repr()  # of an object's arguments in a message: not all of a long one
_LONGEST_TEXT = 10_000  # bytes of an error's message, and of its traceback
_PARSING = threading.Lock()
# By identity: a class that is not built in may have any name, and a metaclass that raises when it is compared.
_BUILT_IN = {
    id(kind): name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


class Declaration(Struct, frozen=True, array_like=True):
    """What is to be hosted: which class, by module and qualified name, made with which arguments (encoded)."""

    name: str
    module: str
    qualname: str
    arguments: bytes
    durable: bool = False
    source: bytes = b""  # digest of the class's source: an object of what the class was before is another one

    def __str__(self) -> str:
        positional, by_keyword = plain.decode(self.arguments)
        arguments = ", ".join(
            [*map(_TELL.repr, positional), *(f"{name}={_TELL.repr(value)}" for name, value in by_keyword.items())]
        )
        made = f"{self.module}.{self.qualname}({arguments})"
        return f"{self.name} = {made}{', durable' if self.durable else ''}"


def declare(
    name: str, cls: type, arguments: tuple[Any, ...], keywords: dict[str, Any], *, durable: bool
) -> Declaration:
    """The declaration of an object that `cls(*arguments, **keywords)` makes.

    :raises InvalidRequest: if another process could not find the class, or the arguments are not plain data.
    """
    check_name(name)
    if not isinstance(cls, type):
        raise InvalidRequest(f"a shared object is declared with its class, not {cls!r}")
    if "<" in cls.__qualname__:
        raise InvalidRequest(
            f"{cls.__qualname__} cannot be imported by the manager: define the class at the top of a module"
        )
    packed = plain.encode((arguments, keywords), f"the arguments of {cls.__qualname__}")
    return Declaration(name, cls.__module__, cls.__qualname__, packed, durable, _digest(cls))


def _digest(cls: type) -> bytes:
    try:
        return blake2b(_source(cls).encode(errors="surrogatepass"), digest_size=16).digest()
    except (OSError, TypeError):  # there is no source
        return b""


def _source(cls: type) -> str:
    """The source of a class, which `inspect` finds by parsing its module: in Python 3.11 (to 3.11.7) that fails when
    a collection of garbage lets another thread parse meanwhile (CPython's issue gh-106905)."""
    with _PARSING:
        try:
            return inspect.getsource(cls)
        except SystemError:  # a thread of the app's was parsing
            return inspect.getsource(cls)


def _find(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


class Busy(OSError):
    """An object was busy with another call for longer than any caller waits. Nothing was called."""


class _Unpickler(pickle.Unpickler):
    """Finds a class of the declared module also where its name was another one: `__main__`, or before it was moved."""

    def __init__(self, state: bytes, declaration: Declaration) -> None:
        super().__init__(io.BytesIO(state))
        self._module = declaration.module

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return _find(self._module, name)


class HostedObject:
    """One shared object, in the process that holds it.

    :param journal: makes `Changes` durable, for a durable object.
    :param state: its pickle, where it was there before.
    :param clients: what is remembered of its clients, in the order of their last use.
    :param clock: the time that `clients` are remembered by.
    :param most_clients: that are remembered.
    :param fail: ends the process, with an error after which memory may differ from what was committed. Called before
        another call can begin.
    :raises StartupError: if it cannot be made; with the reason.
    """

    def __init__(
        self,
        declaration: Declaration,
        clock: Callable[[], float],
        *,
        journal: Commits | None = None,
        state: bytes | None = None,
        clients: Mapping[bytes, ClientRecord] | None = None,
        most_clients: float = inf,
        fail: Callable[[BaseException], NoReturn] = raise_error,
    ) -> None:
        self.declaration = declaration
        self._clock = clock
        self._journal = journal if declaration.durable else None
        self._clients = Clients(dict(clients or {}), most_clients, declaration.name)
        self._fail = fail
        self._state = b""
        self.running: tuple[str, float] | None = None  # the method that is being called, and since when
        try:
            if state is not None and self._journal is not None:
                self._object = self._unpickled(state)
            else:
                arguments, keywords = plain.decode(declaration.arguments)
                self._object = _find(declaration.module, declaration.qualname)(*arguments, **keywords)
            if self._journal is not None:
                self._state = state or self._pickled()
                self._unpickled(self._state)
        except Stopped:
            raise
        except BaseException as error:
            raise StartupError(f"the shared object {declaration} cannot be made: {_described(error)}") from error
        self.after_fork()

    def after_fork(self) -> None:
        """A new lock: in the child of a fork nobody is left to release the old one."""
        self._lock = threading.Lock()  # held through a batch of calls and its commit

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:  # noqa: ARG002 - its caller waits no longer
        """Make a batch's calls, in order, or repeat its answer; see `Store.apply`."""
        if not self._lock.acquire(timeout=LONGEST_DEADLINE):  # nobody waits longer for the answer
            raise Busy(f"{self.declaration.name} is still busy with another call; this one was not made")
        try:
            changes = Changes(self._clock())
            answered = self._clients.answer(batch, changes)
            if isinstance(answered, BatchRefused):
                raise answered
            if answered is not None:
                return answered
            turned_away = self._clients.admit(batch.client, changes) if batch.sequence == 1 else None
            if turned_away is not None:
                return list[Result](turned_away for _ in batch.operations)
            self._clients.forget(changes)
            results = self._call_all(batch, changes)
            self._clients.remember(batch, results, changes)
            try:
                if self._journal is not None:
                    self._journal.commit(changes)
            except StorageFull as error:
                self._object = self._unpickled(self._state)
                results = list[Result](Refusal("storage_full", str(error)) for _ in batch.operations)
                self._clients.remember(batch, results, changes)
            else:
                self._state = changes.objects.get(self.declaration.name, self._state)
            self._clients.merge(changes)
            self.running = None
            return results
        except BatchRefused:
            raise
        except BaseException as error:  # noqa: BLE001 - what is refused is returned; after all else memory may differ
            self._fail(error)
        finally:
            self._lock.release()

    def _call_all(self, batch: Batch, changes: Changes) -> list[Result]:
        """Make the calls. One that leaves a durable object in a state that cannot be kept is undone, it alone."""
        if self._journal is None:
            return [self._call(operation) for operation in batch.operations]
        results: list[Result] = []
        state = self._state
        for operation in batch.operations:
            result = self._call(operation)
            try:
                new = self._pickled()
                if new != state:
                    self._unpickled(new)  # what cannot be loaded again is not kept
                    state = new
            except (InvalidRequest, StartupError) as error:
                self._object = self._unpickled(state)
                result = Refusal("invalid", f"{error}; the call was undone")
            results.append(result)
        changes.objects[self.declaration.name] = state
        return results

    def _unpickled(self, state: bytes) -> Any:
        """What was pickled here, or by an earlier manager into a file of this user alone.

        :raises StartupError: if its class refuses to be made of it.
        """
        try:
            return _Unpickler(state, self.declaration).load()
        except BaseException as error:
            raise StartupError(
                f"{self.declaration} cannot be made of what was kept of it: {_described(error)}"
            ) from error

    def _pickled(self) -> bytes:
        try:
            state = pickle.dumps(self._object, pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            raise InvalidRequest(
                f"{self.declaration} cannot be pickled, and so not be durable: {_described(error)}"
            ) from error
        if len(state) > LARGEST_STATE:
            raise InvalidRequest(f"{self.declaration} has a state of {len(state)} bytes; at most {LARGEST_STATE}")
        return state

    def _call(self, operation: object) -> Result:
        if not isinstance(operation, Invoke):
            return Refusal("unsupported", f"{self.declaration.name} is a shared object, not a counter")
        self.running = (operation.method, time.monotonic())
        try:
            if not callable(getattr(type(self._object), operation.method, None)):
                return Refusal("unsupported", f"{self.declaration} has no public method {operation.method!r}")
            arguments, keywords = plain.decode(operation.arguments)
            value = getattr(self._object, operation.method)(*arguments, **keywords)
            try:
                return Returned(plain.encode(value, f"the result of {self.declaration.qualname}.{operation.method}"))
            except InvalidRequest as error:
                raise InvalidRequest(f"{error}; the call was made, and its result is lost") from None
        except BaseException as error:  # noqa: BLE001 - it is for the method's caller, whatever it is
            return _raised(error)


def _raised(error: BaseException) -> Raised:
    """Describe a method's error. Nothing may fail here: the call was made, and has to be remembered."""
    kind = type(error)
    built_in = _BUILT_IN.get(id(kind))
    name = built_in or _text(lambda: f"{kind.__module__}.{kind.__qualname__}")
    text = _text(lambda: str(error))
    trace = _text(lambda: "".join(traceback.format_exception(error)), slice(-_LONGEST_TEXT, None))
    arguments = None
    if built_in and isinstance(error, Exception):
        try:
            arguments = plain.encode(error.args, "an error")
        except InvalidRequest:
            arguments = plain.encode((text,), "an error")
    return Raised(name, text, trace, arguments)


def _described(error: BaseException) -> str:
    return f"{_text(lambda: type(error).__name__)}: {_text(lambda: str(error))}"


def _text(describe: Callable[[], str], part: slice = slice(_LONGEST_TEXT)) -> str:
    """Return what `describe` says, as text that can be sent: not all that Python has in a `str` can be.

    An error is of somebody else's class, each method of which may raise anything or return something strange.
    """
    try:
        return str.encode(describe(), errors="backslashreplace")[part].decode(errors="ignore")
    except BaseException:  # noqa: BLE001 - the class's own code
        return "(it cannot be described)"
