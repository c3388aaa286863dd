"""The client's end of `manager://`: a proxy that is a `Store`, and finds its manager again by name."""

import os
import threading
import time
from contextlib import closing, suppress
from multiprocessing import AuthenticationError
from multiprocessing.managers import BaseProxy, Token
from typing import Any

from msgspec import Raw, ValidationError, msgpack

from ..errors import (
    AccessDenied,
    BatchRefused,
    CounterServerError,
    DirectoryHeld,
    Disconnected,
    NotHosted,
    StartupError,
    StateLost,
    Unsupported,
)
from ..journal import read_checked
from ..ledger import Contents
from ..objects import Declaration
from ..operations import Batch, Result
from ..os_errors import can_pass, explain, is_absent
from ..plain import largest_value
from ..status import Status
from ..store import Finding, RoundTrip
from . import location
from .directory import DataDirectory
from .hosting import Hosting, decode_hosting
from .starter import Starter
from .wire import SERIALIZER, Connection, Greeting, connect, object_ident

_LOOK_SECONDS = 0.01

_DURABILITY = {
    "commit": Finding("ok", "durability commit: a number is on the disk before it is answered"),
    "process": Finding("may lose", "durability process: survives kill -9; a power cut may lose the last moments"),
    "none": Finding("may lose", "durability none: in memory only; a restart of the manager begins at 0"),
}

_decode_results = msgpack.Decoder(list[Result]).decode
_decode_status = msgpack.Decoder(Status).decode
_decode = msgpack.Decoder().decode
_decode_reply = msgpack.Decoder(tuple[str, Raw]).decode


class StateProxy(BaseProxy):
    """A `Store` in the manager process of a data directory: its ledger, or one shared object.

    It has one connection for the process, made when it is first needed, and again after it broke. Every step has a
    deadline. Any exception between sending and receiving closes the connection, so that no later call reads a late
    reply. It finds a restarted manager by the object's name, and recognises the state by its epoch.

    :param starter: starts a manager if there is none.
    :param declaration: of the shared object; without it, the proxy is for the ledger.
    """

    round_trip: RoundTrip = "short"
    _id: str
    _token: Token

    def __init__(
        self, directory: DataDirectory, starter: Starter | None = None, declaration: Declaration | None = None
    ) -> None:
        self.directory = directory
        self._declaration = declaration
        self._starter = starter
        self._connection: Connection | None = None  # ready for a call
        self._latest: Connection | None = None  # ready or in a call; the child of a fork must close it
        self._epoch: str | None = None
        self._calling = threading.Lock()  # guards the three above, through a whole call
        self._latest_epoch = [""]  # that this proxy, or `another` one of the same object, has seen
        ident = "ledger" if declaration is None else object_ident(declaration.name)
        token = Token(ident, str(directory.socket), ident)
        # No key here: each connection reads it from the directory, so a new one is found too.
        super().__init__(token, SERIALIZER, authkey=b"", incref=False)

    def __str__(self) -> str:
        return self.directory.url

    def _incref(self) -> None:
        """Do nothing: hosted objects live as long as the manager. The standard fork hook calls this."""

    def object(self, declaration: Declaration) -> "StateProxy":
        """See `HostsObjects`."""
        return StateProxy(self.directory, self._starter, declaration)

    def another(self) -> "StateProxy":
        """See `ObjectStore`. The new one begins with the epoch of this one, so it reports only later losses."""
        proxy = StateProxy(self.directory, self._starter, self._declaration)
        proxy._latest_epoch = self._latest_epoch
        return proxy

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        """See `Store`."""
        return _decode_results(self._callmethod("apply", (batch,), deadline=deadline))

    def exists(self, deadline: float) -> bool:  # noqa: ARG002 - it never waits
        """See `IsMade`. A manager without a journal has its state in memory."""
        for file in (self.directory.journal, self.directory.snapshot):
            try:
                os.stat(file)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise explain(error, f"{file} cannot be found", self.directory.path, file.name) from error
            return True
        return self.directory.manager_pid() is not None

    def status(self, deadline: float) -> Status:
        """See `ReportsStatus`."""
        # On a connection of its own: the other one may be waiting for a commit.
        with closing(StateProxy(self.directory)) as proxy:
            figures = proxy._callmethod("status", deadline=deadline)
        try:
            return _decode_status(figures)
        except ValidationError as error:  # the manager was started before an upgrade
            raise Unsupported(f"the manager of {self.directory} is of another version: {error}") from error

    def contents(self, deadline: float) -> Contents | None:
        """See `ShowsContents`. Without a manager, the journal is read, and no manager can start meanwhile.

        :raises StartupError: if the contents cannot be copied, or the journal is damaged.
        """
        directory = self.directory
        while True:
            if directory.is_held():
                with directory.place_for_copy(deadline) as place, closing(StateProxy(directory)) as proxy:
                    copy = place / directory.journal.name
                    try:
                        proxy.ask("copy", (os.fsencode(copy.relative_to(directory.path)),), deadline)
                    except BatchRefused as error:
                        raise StartupError(str(error)) from error
                    except Disconnected:  # it starts or ends just now
                        is_there = directory.is_held() and directory.manager_pid() is not None
                        if is_there or time.monotonic() > deadline:
                            raise
                    else:
                        return read_checked(copy).without_expired()
            elif not directory.journal.exists():
                return None
            else:
                with suppress(DirectoryHeld), directory.hold():  # a manager came first
                    return read_checked(directory.journal).without_expired()
            time.sleep(_LOOK_SECONDS)

    def findings(self, deadline: float) -> list[Finding]:
        """See `Store`."""
        places = location.findings(self.directory)
        try:
            status = self.status(deadline)
        except (CounterServerError, Disconnected) as error:
            return [Finding("problem", str(error)), *places]
        manager = (
            f"the manager, pid {status.pid}, epoch {status.epoch}, has {status.counters} counters in {self.directory}"
        )
        slow = [
            f"{call.object}.{call.method} has run for {call.seconds:.0f} s"
            f"{', and its other callers wait' if call.others_wait else ''}: end it, or the manager"
            for call in status.slow_calls
        ]
        missing = [each.not_made for each in status.hosted if each.not_made]
        problems = (Finding("problem", text) for text in (*slow, *missing))
        return [Finding("ok", manager), _DURABILITY[status.durability], *places, *problems]

    def hosting(self, deadline: float) -> Hosting:
        """Return what the manager hosts."""
        return decode_hosting(self._callmethod("hosting", deadline=deadline))

    def ask(self, method: str, arguments: tuple[Any, ...], deadline: float) -> Any:
        """Call one of the manager's own methods, and return its answer as plain data.

        :raises BatchRefused: with the manager's reason, if it could not do it.
        """
        return _decode(self._callmethod(method, arguments, deadline=deadline))

    def await_end(self, deadline: float) -> None:
        """Wait until the manager closes the connection.

        :raises TimeoutError: if it does not by `deadline`.
        """
        with self._calling:
            if self._connection is not None:
                self._connection.set_deadline(deadline)
                with suppress(EOFError, ConnectionResetError):
                    self._connection.recv_bytes()

    def _callmethod(  # type: ignore[override] # the standard one knows no deadline
        self, methodname: str, args: tuple[Any, ...] = (), *, deadline: float
    ) -> Raw:
        """Call a method of the hosted object and return its result, still encoded.

        :raises Disconnected: if there is no answer by `deadline`, or no manager.
        """
        with self._calling:
            connection = self._connection or self._connect(deadline)
            self._connection = None  # until the whole reply is here, so that no other call can read it
            sent = True  # until proven otherwise: a signal's handler may raise just after the last byte has left
            try:
                connection.set_deadline(deadline)
                try:
                    connection.send((self._id, methodname, args))
                except (BrokenPipeError, ConnectionResetError):
                    sent = False  # the manager is gone, and never executes a frame that it did not receive whole
                    raise
                kind, content = _decode_reply(connection.recv_bytes())
            except (OSError, EOFError, ValidationError) as error:
                connection.close()
                raise self._disconnected(error, sent=sent) from error
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        if kind != "#RETURN":
            raise BatchRefused(_decode(content))
        return content

    def _connect(self, deadline: float) -> Connection:
        """Return a new connection to the object. Start a manager, or its successor, if needed and allowed.

        :raises Disconnected: if there is no manager, or it does not answer.
        :raises StartupError: for a reason that stays.
        :raises AccessDenied: if the manager is another user's, or does not accept the key.
        """
        try:
            try:
                connection = self._open(deadline)
            except OSError as error:
                if self._starter is None or not is_absent(error):
                    raise
                location.check(self.directory)
                self._starter.start(self.directory, None, deadline)
                connection = self._open(deadline)
            may_succeed = self._starter is not None
            while self._greet(connection, may_succeed=may_succeed):
                assert self._starter is not None
                # One that another program has started meanwhile may lack the object too.
                may_succeed = not self._starter.start(self.directory, connection.pid, deadline)
                connection = self._open(deadline)
        except AuthenticationError as error:
            raise AccessDenied(
                f"the manager of {self.directory} does not accept this key; nothing was counted"
            ) from error
        except StartupError as error:
            if not can_pass(error.__cause__):
                raise
            raise Disconnected(str(error), sent=False) from error
        except (OSError, EOFError, ValidationError) as error:
            if isinstance(error, OSError) and not can_pass(error):
                failure = f"the manager of {self.directory} cannot be reached"
                raise explain(error, failure, self.directory.path, "manager.key") from error
            raise self._disconnected(error, sent=False) from error
        self._latest = connection
        is_durable = self._declaration is None or self._declaration.durable
        self.round_trip = "long" if is_durable and os.path.exists(self.directory.journal) else "short"
        return connection

    def _open(self, deadline: float) -> Connection:
        try:
            key = self.directory.existing_key("manager")
        except FileNotFoundError as error:
            if self.directory.manager_pid() is None:
                raise
            reason = f"the key of {self.directory} was removed, and its manager puts it back"
            raise Disconnected(reason, sent=False) from error
        return connect(str(self.directory.socket), key, deadline=deadline)

    def _disconnected(self, error: BaseException, *, sent: bool) -> Disconnected:
        match error:
            case FileNotFoundError() | ConnectionRefusedError():
                text = (
                    f"no manager is running in {self.directory}: start one with"
                    f" 'counter-server manager --data-dir {self.directory}'"
                )
            case TimeoutError():
                text = "the manager did not answer"
            case _:
                text = f"the connection to the manager broke: {error}"
        return Disconnected(text, sent=sent)

    def _greet(self, connection: Connection, *, may_succeed: bool) -> bool:
        """Ask for the object on a new connection; return whether another manager must succeed the one there first.

        :param may_succeed: whether this process would start that.
        """
        try:
            greeting = Greeting(self._id, self._declaration, may_succeed, largest_value())
            connection.send((None, "accept_connection", greeting))
            kind, text = connection.recv()
            match kind:
                case "#RETURN":
                    epochs = text.split()
                    known = self._epoch or self._latest_epoch[0]
                    if epochs:
                        self._epoch = self._latest_epoch[0] = epochs[0]
                    if epochs and known and known not in epochs:
                        raise StateLost(
                            f"the manager of {self.directory} has started again without its memory: {self._id} begins"
                            " again"
                        )
                    return False
                case "#SUCCEED":
                    connection.close()
                    return True
                case "#FULL":
                    raise Disconnected(f"the manager of {self.directory} accepts no more clients: {text}", sent=False)
                case _:
                    raise NotHosted(f"{self._declaration} is not hosted in {self.directory}: {text}")
        except BaseException:
            connection.close()
            raise

    def _drop(self) -> None:
        if self._latest is not None:
            with suppress(OSError):
                self._latest.close()
        self._connection = self._latest = None

    def after_fork(self) -> None:
        """Close this process's copy of the descriptor; the parent's connection goes on."""
        self._calling = threading.Lock()
        self._drop()

    def close(self) -> None:
        with self._calling:
            self._drop()


def end_manager(directory: DataDirectory, seconds: float, *, for_another: bool = False) -> int | None:
    """End the manager of a directory in order; return its pid when it has ended, None if there was none.

    The request goes through its socket, so it cannot reach another process.

    :param for_another: only if it was started on demand, so that another manager can take its place.
    :raises DirectoryHeld: if it continues, with the reason and the remedy.
    """
    deadline = time.monotonic() + seconds
    pid = directory.manager_pid()
    while pid is None and directory.is_held() and time.monotonic() < deadline:  # it is starting, or ending
        time.sleep(_LOOK_SECONDS)
        pid = directory.manager_pid()
    if not directory.is_held():
        return None
    who = f"the manager of {directory} ({directory.holder})"
    with closing(StateProxy(directory)) as proxy:
        try:
            proxy.ask("end", (for_another,), deadline)
            proxy.await_end(deadline)
        except BatchRefused as error:
            raise DirectoryHeld(f"{who} continues: {error}") from error
        except (Disconnected, TimeoutError) as error:
            if directory.is_held() and directory.manager_pid() in (pid, None):
                raise DirectoryHeld(
                    f"{who} was asked to end and has not: {error}; it may be stopped, busy or of another version;"
                    " if it does not end, 'kill -9' ends it, and loses nothing that is on the disk"
                ) from error
    return pid
