"""The client's end: a proxy that finds its manager again, by name, within a deadline."""

import threading
import time
from contextlib import closing, suppress
from multiprocessing import AuthenticationError
from multiprocessing.managers import BaseProxy, Token
from typing import Any

from msgspec import Raw, Struct, ValidationError, msgpack

from ..errors import AccessDenied, BatchRefused, DirectoryHeld, Disconnected, NotHosted, StateLost, Unsupported
from ..objects import Declaration
from ..operations import Batch, Result
from ..status import Status
from .directory import DataDirectory
from .starter import Starter
from .wire import SERIALIZER, Connection, connect, object_ident

_LOOK_SECONDS = 0.01

_decode_results = msgpack.Decoder(list[Result]).decode
_decode_status = msgpack.Decoder(Status).decode
_decode = msgpack.Decoder().decode


class _Reply(Struct, array_like=True, frozen=True):
    kind: str
    content: Raw


_decode_reply = msgpack.Decoder(_Reply).decode


class StateProxy(BaseProxy):
    """A `BaseProxy` of the ledger, or of a shared object, in the manager of a data directory.

    One connection for the process, made when first needed and again after it broke. What differs from the standard
    proxy is what it does when something goes wrong: any exception between sending and receiving closes the
    connection, so a late reply is never read as the answer to the next call; every step has a deadline; and a
    restarted manager is found by the object's name, its state recognised by the epoch.
    """

    _id: str
    _token: Token

    def __init__(
        self, directory: DataDirectory, starter: Starter | None = None, declaration: Declaration | None = None
    ) -> None:
        self._directory = directory
        self._declaration = declaration  # of the shared object; without one it is the ledger
        self._starter = starter  # of a manager, where there is none
        self._connection: Connection | None = None  # that is ready for a call
        self._latest: Connection | None = None  # that was made, in a call or not: what a child of a fork has to close
        self._epoch: str | None = None
        self._calling = threading.Lock()  # guards the three above, through a whole call
        ident = "ledger" if declaration is None else object_ident(declaration.name)
        token = Token(ident, str(directory.socket), ident)
        # No key here: it is read from the directory at each connection, so a new one is found too.
        super().__init__(token, SERIALIZER, authkey=b"", incref=False)

    def _incref(self) -> None:
        """Nothing to count: hosted objects live as long as the manager. (The standard fork hook calls this.)"""

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        return _decode_results(self._callmethod("apply", (batch,), deadline=deadline))

    def status(self, deadline: float) -> Status:
        told = self._callmethod("status", deadline=deadline)
        try:
            return _decode_status(told)
        except ValidationError as error:  # one that was started before an upgrade serves on
            raise Unsupported(f"the manager of {self._directory} is of another version: it tells {error}") from error

    def ask(self, method: str, arguments: tuple[Any, ...], deadline: float) -> Any:
        """Call a method of the manager's own; the answer is plain data.

        :raises BatchRefused: with the manager's reason, if it could not do it.
        """
        return _decode(self._callmethod(method, arguments, deadline=deadline))

    def await_end(self, deadline: float) -> None:
        """Wait until the manager closes the connection: it has nothing to say that was not asked.

        :raises TimeoutError: if it does not by `deadline`.
        """
        with self._calling:
            if self._connection is not None:
                self._connection.set_deadline(deadline)
                with suppress(EOFError, ConnectionResetError):
                    self._connection.recv_bytes()

    def _callmethod(  # type: ignore[override]
        self, methodname: str, args: tuple[Any, ...] = (), kwds: dict[str, Any] | None = None, *, deadline: float
    ) -> Raw:
        """Call a method of the hosted object and return its result, still encoded.

        :raises Disconnected: if there is no answer by `deadline`, or no manager.
        """
        with self._calling:
            connection = self._connected(deadline)
            self._connection = None  # until the whole reply is here: whatever strikes, nobody reads it as another's
            try:
                reply = self._exchange(connection, (self._id, methodname, args, kwds or {}), deadline)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        if reply.kind == "#RETURN":
            return reply.content
        raise BatchRefused(_decode(reply.content))

    def _exchange(self, connection: Connection, call: tuple[Any, ...], deadline: float) -> _Reply:
        connection.set_deadline(deadline)
        try:
            connection.send(call)
        except (BrokenPipeError, ConnectionResetError) as error:
            # The manager is gone, and a frame that did not reach it whole is never executed. Any other error may come
            # from a signal's handler, a moment after the last byte has left.
            raise Disconnected(_explain(error, self._directory), sent=False) from error
        except OSError as error:
            raise Disconnected(_explain(error, self._directory), sent=True) from error
        try:
            return _decode_reply(connection.recv_bytes())
        except (OSError, EOFError, ValidationError) as error:
            raise Disconnected(_explain(error, self._directory), sent=True) from error

    def _connected(self, deadline: float) -> Connection:
        """The connection, made anew where there is none.

        :raises Disconnected: where there is no manager, or it does not answer.
        """
        if self._connection is not None:
            return self._connection
        try:
            return self._greeted(deadline)
        except (OSError, EOFError, ValidationError) as error:
            raise Disconnected(_explain(error, self._directory), sent=False) from error

    def _greeted(self, deadline: float) -> Connection:
        """A new connection, to the object that is meant."""
        try:
            connection = self._connect_or_start(deadline)
        except AuthenticationError as error:
            raise AccessDenied(
                f"the manager of {self._directory} does not accept this key; nothing was counted"
            ) from error
        try:
            connection.send((None, "accept_connection", (self._id, self._declaration), {}))
            kind, epoch = connection.recv()
            if kind == "#FULL":
                raise Disconnected(f"the manager of {self._directory} lets nobody else in: {epoch}", sent=False)
            if kind == "#AWAY":
                raise Disconnected(f"{epoch}, and ends for one that hosts {self._declaration}", sent=False)
            if kind != "#RETURN":
                raise NotHosted(
                    f"{epoch}, and not {self._declaration} as it is declared here: it was started by another program,"
                    f" or before that was declared or changed; 'counter-server stop --data-dir {self._directory}'"
                    " ends it, or name another data directory"
                )
            known, self._epoch = self._epoch, epoch
            if known not in (None, epoch):
                raise StateLost(
                    f"the manager of {self._directory} has started again without its memory: {self._id} begins anew"
                )
        except BaseException:
            connection.close()
            raise
        self._latest = connection
        return connection

    def _connect_or_start(self, deadline: float) -> Connection:
        try:
            return self._connect_to(self._directory, deadline)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            if self._starter is None:
                raise
        self._starter.start(self._directory, deadline)
        return self._connect_to(self._directory, deadline)

    @staticmethod
    def _connect_to(directory: DataDirectory, deadline: float) -> Connection:
        return connect(str(directory.socket), directory.existing_key("manager"), deadline=deadline)

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
    """Have the manager of a directory end in order; return its pid when it has ended, None if there was none.

    It is asked through its socket, so no other process can be meant.

    :param for_another: only if it was started on demand, for a manager that is to take its place.
    :raises DirectoryHeld: if it goes on, saying why and what to do.
    """
    deadline = time.monotonic() + seconds
    pid = directory.manager_pid()
    while pid is None and directory.is_held() and time.monotonic() < deadline:  # it is just starting, or ending
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
            raise DirectoryHeld(f"{who} goes on: {error}") from error
        except (Disconnected, TimeoutError) as error:
            if directory.is_held() and directory.manager_pid() in (pid, None):
                raise DirectoryHeld(
                    f"{who} was asked to end and has not: {error}; it may be stopped, busy or of another version:"
                    " if it stays so, 'kill -9' ends it, and nothing that is on the disk is lost"
                ) from error
    return pid


def _explain(error: BaseException, directory: DataDirectory) -> str:
    match error:
        case FileNotFoundError() | ConnectionRefusedError():
            return (
                f"no manager is running in {directory}: start one with 'counter-server manager --data-dir {directory}'"
            )
        case TimeoutError():
            return "the manager did not answer"
        case _:
            return f"the connection to the manager broke: {error}"
