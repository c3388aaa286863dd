"""Shared objects: plain Python objects, each with its own lock, whose methods are called exactly once.

A slow method delays only calls of its own object, and no call if that is concurrent. The state of a durable object is
pickled into the journal, in the same transaction as the memory of the call, before the caller gets an answer.
"""

import builtins
import io
import logging
import os
import pickle
import reprlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from operator import attrgetter
from typing import Any, NoReturn

from msgspec import Struct
from msgspec.structs import replace

from .dicts import BoundedDict
from .errors import BatchRefused, InvalidRequest, ResultLost, StartupError, Stopped, StorageFull
from .figures import CallFigures
from .ledger import Changes, ClientRecord, Clients, Commits, raise_error
from .modules import file_of, import_from, is_everywhere, name_of, place_of
from .operations import Batch, Invoke, Raised, Refusal, Result, Returned, check_name
from .plain import check_size, class_name, decode_plain, decode_sealed, encode_plain
from .settings import LONGEST_DEADLINE
from .status import ObjectStatus
from .windows import Windows

log = logging.getLogger(__name__)

LARGEST_CALL_BATCH = 15  # calls; with arguments or results of full size still below the frame limit
_LONGEST_TEXT = 10_000  # bytes of an exception's message, and of its traceback
_SHORT = reprlib.Repr()  # shortens long arguments in messages
# By identity: the class of an exception may have any name, and a metaclass that raises when it is compared.
_BUILT_IN = {id(kind): name for name, kind in vars(builtins).items() if isinstance(kind, type)}


class Declaration(Struct, frozen=True, array_like=True):
    """A shared object to host: its class, by module and qualified name, and its encoded arguments."""

    name: str
    module: str
    qualname: str
    arguments: bytes
    durable: bool = True
    file: bytes = b""  # of the module; two releases of a program have different ones
    declared: float = 0.0  # when, in `time.time` seconds: the newest declaration of a name decides
    before: tuple[tuple[str, bytes], ...] = ()  # the modules, with their files, that had the class in older versions
    concurrent: bool = False  # its methods are called by several threads at once; never together with `durable`

    def __str__(self) -> str:
        positional, keywords = decode_plain(self.arguments)
        arguments = [*map(_SHORT.repr, positional), *(f"{key}={_SHORT.repr(keywords[key])}" for key in keywords)]
        arguments += [] if self.durable else ["durable=False"]
        arguments += ["concurrent=True"] if self.concurrent else []
        return f"{self.name} = {self.place}({', '.join(arguments)})"

    @property
    def place(self) -> str:
        """The module and qualified name of the class."""
        return f"{self.module}.{self.qualname}"

    @property
    def strictness(self) -> tuple[bool, bool]:
        """How much the object promises to its callers: to be durable, and to make one call at a time."""
        return self.durable, not self.concurrent

    def means(self, other: "Declaration") -> bool:
        """Return whether both name one class. Its module may have two names, as a main program and as a module.

        A module of one name in another file is of another release.
        """
        places = (self.module, self.file), *self.before
        name = name_of(other.module, other.file)
        is_place = any(name_of(module, file) == name or file == other.file != b"" for module, file in places)
        return self.qualname == other.qualname and is_place

    def after(self, older: "Declaration") -> "Declaration":
        """Return this declaration of a class that was moved from the module of an older one."""
        return replace(self, before=(*self.before, *older.before, (older.module, older.file)))


def declare(
    name: str,
    cls: type,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    *,
    durable: bool,
    concurrent: bool = False,
) -> Declaration:
    """Declare `cls(*arguments, **keywords)`. Raise `InvalidRequest` if another process could not make it."""
    check_name(name)
    if not isinstance(cls, type):
        raise InvalidRequest(f"a shared object is declared with its class, not {cls!r}")
    if "<" in cls.__qualname__:
        raise InvalidRequest(f"the manager cannot import {cls.__qualname__}: define it at the top level of a module")
    if durable and concurrent:
        raise InvalidRequest(
            "a concurrent object cannot be durable, because a pickle that is made while its calls run is not of one"
            " moment: declare it with durable=False"
        )
    packed = encode_plain((arguments, keywords), f"the arguments of {cls.__qualname__}")
    module, file = place_of(cls.__module__)
    if not file and not is_everywhere(module):
        raise InvalidRequest(
            f"the manager cannot import {cls.__qualname__}, which is not in a file of a module, but in a notebook, an"
            " interactive session, standard input or a frozen program: put it into a module (counters and dicts work"
            " everywhere)"
        )
    return Declaration(
        name, module, cls.__qualname__, packed, durable, os.fsencode(file), time.time(), concurrent=concurrent
    )


def import_class(declaration: Declaration, qualname: str = "") -> Any:
    """Import the class of a declaration, or another one of its module. Raise whatever its module raises."""
    module = import_from(declaration.module, os.fsdecode(declaration.file))
    return attrgetter(qualname or declaration.qualname)(module)


def is_moved(older: Declaration, newer: Declaration) -> bool:
    """Return whether the class of an older declaration, in the sources as they are now, is that of a newer one."""
    if older.qualname != newer.qualname:
        return False
    try:
        return import_class(older) is import_class(newer)
    except (ImportError, AttributeError):  # the old place does not have it any more
        return True
    except Exception:  # noqa: BLE001 - of the module
        return False


def unpickled(state: bytes, declaration: Declaration) -> Any:
    """Return a shared object from its pickle, which was made by a manager; raise `StartupError` if it cannot be."""
    try:
        loaded = _Unpickler(state, declaration).load()
        cls = import_class(declaration)
        # A class whose `__new__` is its own may make anything.
        if not isinstance(loaded, cls) and cls.__new__ is object.__new__:
            raise TypeError(f"it is of another class, {type(loaded).__qualname__}: declare this one under a new name")
    except Stopped:
        raise
    except BaseException as error:
        raise StartupError(f"{declaration} cannot be restored from its state: {described(error)}") from error
    return loaded


class Busy(OSError):
    """An object was busy with another call until every caller had given up. Nothing was called."""


class _Unpickler(pickle.Unpickler):
    """Finds a class in its declared module if that has another name than when it was pickled, as after a move."""

    def __init__(self, state: bytes, declaration: Declaration) -> None:
        super().__init__(io.BytesIO(state))
        self._declaration = declaration

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = super().find_class(module, name)
        except (ImportError, AttributeError):
            return import_class(self._declaration, name)
        if name == self._declaration.qualname and file_of(sys.modules[module]) == os.fsdecode(self._declaration.file):
            return import_class(self._declaration)
        return found


class HostedObject:
    """One shared object, in the process that hosts it.

    :param clock: the time of `clients`, in seconds.
    :param journal: makes the changes of a durable object durable.
    :param state: its pickle, if it existed before. A volatile object has one only from a manager that ended in order.
    :param fail: ends the process, before the next call, after an error that may have separated memory from disk.
    :raises StartupError: if the object cannot be made.
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
        self.remembered = Clients(dict(clients or {}), most_clients, declaration.name)
        self._fail = fail
        self._state = b""
        self.figures = CallFigures()
        try:
            if state is not None:
                self._object = self._unpickled(state)
            else:
                arguments, keywords = decode_plain(declaration.arguments)
                self._object = import_class(declaration)(*arguments, **keywords)
            if self._journal is not None:
                self._state = state or self._pickled()
                self._unpickled(self._state)
        except Stopped:
            raise
        except BaseException as error:
            raise StartupError(f"the shared object {declaration} cannot be made: {described(error)}") from error
        self.after_fork()

    def after_fork(self) -> None:
        # Held through a batch of calls and its commit; of a concurrent object only before and after the calls.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # of the two below
        self._in_flight: dict[bytes, bool] = {}  # clients whose calls run beside others; whether they are new
        self._is_ending = False  # so that no other call begins beside others
        self.figures.after_fork()

    @property
    def saved(self) -> bytes:
        """The pickle that is in the journal; empty for a volatile object."""
        return self._state

    def status(self) -> ObjectStatus:
        """Return what is known about the calls. This waits neither for a call nor for a lock."""
        figures, hosted = self.figures, self._object
        seconds, method = figures.slowest
        return ObjectStatus(
            name=self.declaration.name,
            cls=self.declaration.place,
            durable=self._journal is not None,
            calls=figures.calls,
            errors=figures.errors,
            running=len(figures.running),
            slowest_seconds=seconds,
            slowest_method=method,
            last_error=figures.last_error,
            entries=hosted.entries if isinstance(hosted, (BoundedDict, Windows)) else None,
        )

    def hand_over(self, deadline: float) -> tuple[bytes, dict[bytes, ClientRecord]] | None:
        """Make no call any more. Return the pickle of a volatile object and its clients, if it can be pickled.

        :param deadline: for the current calls, in `time.monotonic` seconds. An object that is still busy is lost.
        """
        is_free = self._lock.acquire(timeout=max(deadline - time.monotonic(), 0.0))
        if is_free:
            self._is_ending = True
            is_free = self._changed.wait_for(lambda: not self._in_flight, max(deadline - time.monotonic(), 0.0))
            if not is_free:
                self._lock.release()  # those calls are still answered
        if not is_free:
            if self._journal is None:
                log.error("%s is lost: a call is still busy with it", self.declaration)
            return None
        if self._journal is not None:
            return None
        try:
            return self._pickled(is_bounded=False), self.remembered.records
        except InvalidRequest as error:
            log.warning("%s begins again: %s", self.declaration.name, error)
            return None

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:  # noqa: ARG002 - its caller waits no longer
        """Make a batch's calls, in order, or repeat its answer; see `Store.apply`."""
        if self.declaration.concurrent:
            return self._apply_beside_others(batch)
        if not self._lock.acquire(timeout=LONGEST_DEADLINE):  # no caller waits longer
            raise Busy(f"{self.declaration.name} is still busy with another call; this call was not made")
        try:
            changes = Changes(self._clock())
            answered = self._answer(batch, changes)
            if answered is not None:
                return answered
            self.remembered.forget(changes)
            results = self._call_all(batch, changes)
            self.remembered.remember(batch, results, changes)
            try:
                if self._journal is not None:
                    self._journal.commit(changes)
            except StorageFull as error:
                self._object = self._unpickled(self._state)
                results = list[Result](Refusal("storage_full", str(error)) for _ in batch.operations)
                self.remembered.remember(batch, results, changes)
            else:
                self._state = changes.objects.get(self.declaration.name) or self._state
            self.remembered.merge(changes)
            self.figures.count(results)
            return results
        except BatchRefused:
            raise
        except BaseException as error:  # noqa: BLE001 - refusals are returned; memory may differ after any other error
            self._fail(error)
        finally:
            self._lock.release()

    def _apply_beside_others(self, batch: Batch) -> list[Result]:
        """Make a batch's calls while other clients' calls run.

        The same batch again, after its connection broke, waits for the answer to the first one.
        """
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._may_begin(batch.client), LONGEST_DEADLINE):
                    raise Busy(f"{self.declaration.name} is still busy with this call; it was not made again")
                changes = Changes(self._clock(), more_clients=sum(self._in_flight.values()))
                answered = self._answer(batch, changes)
                self.remembered.merge(changes)
                if answered is not None:
                    return answered
                self._in_flight[batch.client] = batch.sequence == 1
            results = [self._call(operation) for operation in batch.operations]
            with self._changed:
                changes = Changes(self._clock())
                self.remembered.forget(changes)
                self.remembered.remember(batch, results, changes)
                self.remembered.merge(changes)
                self._in_flight.pop(batch.client, None)
                self.figures.count(results)
                self._changed.notify_all()
            return results
        except (BatchRefused, Busy):
            raise
        except BaseException as error:  # noqa: BLE001 - as in `apply`
            self._fail(error)

    def _may_begin(self, client: bytes) -> bool:
        return not self._is_ending and client not in self._in_flight

    def _answer(self, batch: Batch, changes: Changes) -> list[Result] | None:
        """Return the answer to a batch that is not to be executed; None if it is. Raise `BatchRefused`."""
        answered = self.remembered.answer(batch, changes)
        if isinstance(answered, BatchRefused):
            raise answered
        if answered is None and batch.sequence == 1 and (refusal := self.remembered.admit(batch.client, changes)):
            return list[Result](refusal for _ in batch.operations)
        return answered

    def _call_all(self, batch: Batch, changes: Changes) -> list[Result]:
        if self._journal is None:
            return [self._call(operation) for operation in batch.operations]
        results: list[Result] = []
        state = self._state
        for operation in batch.operations:
            result = self._call(operation)
            try:
                new = self._pickled()
                if new != state:
                    self._unpickled(new)  # a state that cannot be loaded again is not kept
                    state = new
            except (InvalidRequest, StartupError) as error:
                self._object = self._unpickled(state)
                result = Refusal("invalid", f"{error}; the call was undone")
            results.append(result)
        changes.objects[self.declaration.name] = state
        return results

    def _unpickled(self, state: bytes) -> Any:
        return unpickled(state, self.declaration)

    def _pickled(self, *, is_bounded: bool = True) -> bytes:
        try:
            state = pickle.dumps(self._object, pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            what = ", and so not be durable" if self.declaration.durable else ""
            advice = "; declare it with durable=False" if self.declaration.durable else ""
            raise InvalidRequest(f"{self.declaration} cannot be pickled{what}: {described(error)}{advice}") from error
        if is_bounded:
            check_size(f"the state of {self.declaration}", state)
        return state

    def _call(self, operation: object) -> Result:
        if not isinstance(operation, Invoke):
            return Refusal("unsupported", f"{self.declaration.name} is a shared object, not a counter")
        began = self.figures.begin(operation.method)
        try:
            if not callable(getattr(type(self._object), operation.method, None)):
                return Refusal("unsupported", f"{self.declaration} has no public method {operation.method!r}")
            decode = decode_sealed if getattr(type(self._object), "keeps_values_sealed", False) else decode_plain
            what = f"the arguments of {self.declaration.name}.{operation.method}"
            try:
                check_size(what, operation.arguments)  # the limit of its process may be another one
                arguments, keywords = decode(operation.arguments)
            except ValueError as error:
                return Refusal("invalid", f"{what} are not accepted: {error}; the call was not made")
            value = getattr(self._object, operation.method)(*arguments, **keywords)
            try:
                return Returned(encode_plain(value, f"the result of {self.declaration.qualname}.{operation.method}"))
            except InvalidRequest as error:
                raise ResultLost("ResultLost", f"{error}; the call was made, and its result is lost", "") from None
        except BaseException as error:  # noqa: BLE001 - any error belongs to the method's caller
            return _raised(error)
        finally:
            self.figures.end(operation.method, began)


def _raised(error: BaseException) -> Raised:
    # Nothing may fail here: the call was made, and has to be remembered.
    kind = type(error)
    built_in = _BUILT_IN.get(id(kind))
    module = "builtins" if built_in else _text(lambda: class_name(kind)[0])
    name = built_in or _text(lambda: ".".join(class_name(kind)))
    text = _text(lambda: str(error))
    trace = _text(lambda: "".join(traceback.format_exception(error)), slice(-_LONGEST_TEXT, None))
    if issubclass(kind, Exception):
        with suppress(BaseException):  # from the class's own code
            arguments = error.args if _is_plain(error.args) else (text,)
            attributes = {key: value for key, value in vars(error).items() if key != "__notes__" and _is_plain(value)}
            if not _is_plain((arguments, attributes)):  # together they are too large
                arguments, attributes = (text,), {}
            return Raised(name, text, trace, module, encode_plain((arguments, attributes), "an error"))
    return Raised(name, text, trace)


def _is_plain(value: object) -> bool:
    try:
        encode_plain(value, "a part of an error")
    except InvalidRequest:
        return False
    return True


def described(error: BaseException) -> str:
    """Return the class and the message of an error of code that is not ours."""
    return f"{_text(lambda: type(error).__name__)}: {_text(lambda: str(error))}"


def _text(describe: Callable[[], str], part: slice = slice(_LONGEST_TEXT)) -> str:
    # The class is a stranger's: each of its methods may raise anything, or return text that cannot be sent.
    try:
        return str.encode(describe(), errors="backslashreplace")[part].decode(errors="ignore")
    except BaseException:  # noqa: BLE001 - from the class's own code
        return "(it cannot be described)"
