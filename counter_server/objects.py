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
from typing import Any

from msgspec import Struct

from . import plain
from .errors import BatchRefused, InvalidRequest, StartupError, StorageFull
from .ledger import CLIENT_LIFETIME, Changes, ClientRecord, Commit, Door, judge
from .operations import Batch, Invoke, Raised, Refusal, Result, Returned, check_name
from .settings import LONGEST_DEADLINE

LARGEST_CALL_BATCH = 15  # calls; with arguments or results of full size still under the frame limit
LARGEST_STATE = 2**20  # bytes, of a durable object's pickle
_TELL = reprlib.Repr()  # of an object's arguments in a message: not all of a long one
_LONGEST_TEXT = 10_000  # bytes of an error's message, and of its traceback
_PARSING = threading.Lock()


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

    :param commit: makes `Changes` durable, for a durable object.
    :param state: its pickle, where it was there before.
    :param clients: what is remembered of its clients, in the order of their last use.
    :param clock: the time that `clients` are remembered by.
    :param most_clients: that are remembered.
    :raises StartupError: if it cannot be made; with the reason.
    """

    def __init__(
        self,
        declaration: Declaration,
        clock: Callable[[], float],
        *,
        commit: Commit | None = None,
        state: bytes | None = None,
        clients: Mapping[bytes, ClientRecord] | None = None,
        most_clients: float = inf,
    ) -> None:
        self.declaration = declaration
        self._clock = clock
        self._commit = commit if declaration.durable else None
        self._clients = dict(clients or {})
        self._door = Door(most_clients)
        self._state = b""
        self.running: tuple[str, float] | None = None  # the method that is being called, and since when
        try:
            if state is not None and self._commit is not None:
                self._object = self._unpickled(state)
            else:
                arguments, keywords = plain.decode(declaration.arguments)
                self._object = _find(declaration.module, declaration.qualname)(*arguments, **keywords)
            if self._commit is not None:
                self._state = state or self._pickled()
                self._unpickled(self._state)
        except Exception as error:
            raise StartupError(
                f"the shared object {declaration} cannot be made: {type(error).__name__}: {error}"
            ) from error
        self.after_fork()

    def after_fork(self) -> None:
        """A new lock: in the child of a fork nobody is left to release the old one."""
        self._lock = threading.Lock()  # held through a batch of calls and its commit

    def apply(self, batch: Batch) -> list[Result] | BatchRefused:
        """Make a batch's calls, in order, unless it was made before."""
        if not self._lock.acquire(timeout=LONGEST_DEADLINE):  # nobody waits longer for the answer
            raise TimeoutError(f"{self.declaration.name} is still busy with another call; this one was not made")
        try:
            record = self._clients.get(batch.client)
            answered = judge(record, batch.sequence)
            if answered is not None:
                return answered
            turned_away = self._door.refusal(batch.client, len(self._clients)) if record is None else None
            if turned_away is not None:
                return list[Result](turned_away for _ in batch.operations)
            changes = Changes(self._clock())
            results = self._call_all(batch, changes)
            self._remember(batch, results, changes)
            try:
                if self._commit is not None:
                    self._commit(changes)
            except StorageFull as error:
                self._object = self._unpickled(self._state)
                results = list[Result](Refusal("storage_full", str(error)) for _ in batch.operations)
                self._remember(batch, results, changes)
            else:
                self._state = changes.objects.get(self.declaration.name, self._state)
            for client, known_or_none in changes.clients.items():
                self._clients.pop(client, None)
                if known_or_none is not None:
                    self._clients[client] = known_or_none
            return results
        finally:
            self.running = None
            self._lock.release()

    def _call_all(self, batch: Batch, changes: Changes) -> list[Result]:
        """Make the calls. One that leaves a durable object in a state that cannot be kept is undone, it alone."""
        if self._commit is None:
            return [self._call(operation) for operation in batch.operations]
        results: list[Result] = []
        state = self._state
        for operation in batch.operations:
            result = self._call(operation)
            try:
                state = self._pickled()
            except InvalidRequest as error:
                self._object = self._unpickled(state)
                result = Refusal("invalid", str(error))
            results.append(result)
        changes.objects[self.declaration.name] = state
        return results

    def _remember(self, batch: Batch, results: list[Result], changes: Changes) -> None:
        """Note the answer for when the batch is sent again, and forget those that never will be."""
        changes.clients[batch.client] = ClientRecord(batch.sequence, results, changes.now, self.declaration.name)
        for client, known in self._clients.items():
            if known.used > changes.now - CLIENT_LIFETIME:
                break
            changes.clients.setdefault(client, None)

    def _unpickled(self, state: bytes) -> Any:
        """What was pickled here, or by an earlier manager into a file of this user alone.

        :raises StartupError: if its class refuses to be made of it.
        """
        try:
            return _Unpickler(state, self.declaration).load()
        except Exception as error:
            raise StartupError(f"{self.declaration} cannot be made of what was kept of it: {error!r}") from error

    def _pickled(self) -> bytes:
        try:
            state = pickle.dumps(self._object, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise InvalidRequest(f"{self.declaration} cannot be pickled, and so not be durable: {error}") from error
        if len(state) > LARGEST_STATE:
            raise InvalidRequest(f"{self.declaration} has a state of {len(state)} bytes; at most {LARGEST_STATE}")
        return state

    def _call(self, operation: object) -> Result:
        if not isinstance(operation, Invoke):
            return Refusal("unsupported", f"{self.declaration.name} is a shared object, not a counter")
        self.running = (operation.method, time.monotonic())
        if not callable(getattr(type(self._object), operation.method, None)):
            return Refusal("unsupported", f"{self.declaration} has no public method {operation.method!r}")
        try:
            arguments, keywords = plain.decode(operation.arguments)
            value = getattr(self._object, operation.method)(*arguments, **keywords)
            return Returned(plain.encode(value, f"the result of {self.declaration.qualname}.{operation.method}"))
        except BaseException as error:  # noqa: BLE001 - it is for the method's caller, whatever it is
            return _raised(error)


def _raised(error: BaseException) -> Raised:
    """What is told of a method's error. Nothing may fail here: the call was made, and has to be remembered."""
    name, arguments = type(error).__qualname__, None
    try:
        text = str(error)
    except Exception as untold:  # noqa: BLE001 - its class is somebody else's
        text = f"({type(untold).__name__} in telling it)"
    text = _told(text, slice(_LONGEST_TEXT))
    if isinstance(error, Exception) and getattr(builtins, name, None) is type(error):
        try:
            arguments = plain.encode(error.args, "an error")
        except InvalidRequest:
            arguments = plain.encode((text,), "an error")
    elif type(error).__module__ != "builtins":
        name = f"{type(error).__module__}.{name}"
    trace = _told("".join(traceback.format_exception(error)), slice(-_LONGEST_TEXT, None))
    return Raised(_told(name, slice(_LONGEST_TEXT)), text, trace, arguments)


def _told(text: str, part: slice) -> str:
    """Text that can be sent, as not all that Python has in a `str` can be."""
    return text.encode(errors="backslashreplace")[part].decode(errors="ignore")
