"""The client's end: a proxy that finds its manager again, by name, within a deadline."""

import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.managers import BaseProxy, Token
from typing import Any, cast

from msgspec import Raw, Struct, ValidationError, msgpack

from ..errors import AccessDenied, BatchRefused, Disconnected, StateLost
from ..operations import Batch, Result
from .directory import DataDirectory
from .starter import Starter
from .wire import SERIALIZER, Connection, connect

_decode_results = msgpack.Decoder(list[Result]).decode
_decode = msgpack.Decoder().decode


class _Reply(Struct, array_like=True, frozen=True):
    kind: str
    content: Raw


_decode_reply = msgpack.Decoder(_Reply).decode


class LedgerProxy(BaseProxy):
    """A `BaseProxy` of the ledger in the manager of a data directory.

    One connection for the process, made when first needed and again after it broke. What differs from the standard
    proxy is what it does when something goes wrong: any exception between sending and receiving closes the
    connection, so a late reply is never read as the answer to the next call; every step has a deadline; and a
    restarted manager is found by the object's name, its state recognised by the epoch.
    """

    _id: str
    _token: Token

    def __init__(self, directory: DataDirectory, starter: Starter | None = None) -> None:
        self._directory = directory
        self._starter = starter  # of a manager, where there is none
        self._connection: Connection | None = None
        self._epoch: str | None = None
        self._calling = threading.Lock()  # guards the two above, through a whole call
        token = Token("ledger", str(directory.socket), "ledger")
        # No key here: it is read from the directory at each connection, so a new one is found too.
        super().__init__(token, SERIALIZER, authkey=b"", incref=False)

    def _incref(self) -> None:
        """Nothing to count: hosted objects live as long as the manager. (The standard fork hook calls this.)"""

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        return _decode_results(self._callmethod("apply", (batch,), deadline=deadline))

    def status(self, deadline: float) -> dict[str, Any]:
        return cast(dict[str, Any], _decode(self._callmethod("status", deadline=deadline)))

    def _callmethod(  # type: ignore[override]
        self, methodname: str, args: tuple[Any, ...] = (), kwds: dict[str, Any] | None = None, *, deadline: float
    ) -> Raw:
        """Call a method of the hosted object and return its result, still encoded.

        :raises Disconnected: if there is no answer by `deadline`, or no manager.
        """
        if not self._calling.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise Disconnected("another call was still under way", sent=False)
        sent = False
        try:
            connection = self._connected(deadline)
            connection.set_deadline(deadline)
            connection.send((self._id, methodname, args, kwds or {}))
            sent = True  # only now: a frame that did not leave whole is never executed
            reply = _decode_reply(connection.recv_bytes())
        except BaseException as error:
            self._drop()
            if isinstance(error, (OSError, EOFError, ValidationError)):
                raise Disconnected(_explain(error, self._directory), sent=sent) from error
            raise
        finally:
            self._calling.release()
        if reply.kind == "#RETURN":
            return reply.content
        raise BatchRefused(_decode(reply.content))

    def _connected(self, deadline: float) -> Connection:
        """The connection, made anew where there is none."""
        if self._connection is not None:
            return self._connection
        try:
            connection = self._connect_or_start(deadline)
        except AuthenticationError as error:
            raise AccessDenied(
                f"the manager of {self._directory} does not accept this key; nothing was counted"
            ) from error
        try:
            connection.send((None, "accept_connection", (), {}))
            _, epoch = connection.recv()
        except BaseException:
            connection.close()
            raise
        known, self._epoch = self._epoch, epoch
        self._connection = connection
        if known not in (None, epoch):
            raise StateLost(
                f"the manager of {self._directory} has started again without its memory: counters begin anew"
            )
        return connection

    def _connect_or_start(self, deadline: float) -> Connection:
        try:
            return self._connect_to(self._directory, deadline)
        except (FileNotFoundError, ConnectionRefusedError):
            if self._starter is None:
                raise
        self._starter.start(self._directory, deadline)
        return self._connect_to(self._directory, deadline)

    @staticmethod
    def _connect_to(directory: DataDirectory, deadline: float) -> Connection:
        return connect(str(directory.socket), directory.existing_key("manager"), deadline=deadline)

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None

    def after_fork(self) -> None:
        """Close this process's copy of the descriptor; the parent's connection goes on."""
        self._calling = threading.Lock()
        self._drop()

    def close(self) -> None:
        with self._calling:
            self._drop()


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
