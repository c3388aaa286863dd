"""The manager process: it holds the ledger, and answers the proxies of the workers."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.managers import BaseManager, Server
from typing import Any, NamedTuple, NoReturn

from msgspec import MsgspecError, msgpack

from ..combiner import Combiner
from ..errors import BatchRefused, StartupError
from ..journal import Journal, JournalFailed
from ..ledger import Contents, Ledger, results_of
from ..objects import Declaration, HostedObject
from ..operations import Batch, Refusal, Result
from ..settings import Durability
from ..status import Status
from .directory import DataDirectory
from .wire import ACCEPT_PAUSE, FRAME_SECONDS, SERIALIZER, Call, Connection, Listener, object_ident

log = logging.getLogger(__name__)

_LARGEST_COMMIT = 1000  # batches; in truth one for each connected worker at the most
_EXIT_JOURNAL_FAILED = 74  # EX_IOERR of sysexits.h
_SECONDS_TO_STOP = 2.0

Lifeline = multiprocessing.connection.Connection  # to the supervisor: its end is closed when that stops, or ends

_decode_call = msgpack.Decoder(Call).decode
_decode_greeting = msgpack.Decoder(tuple[str, Declaration | None]).decode


class Method(NamedTuple):
    """A function that proxies may call, and how its arguments are decoded and so validated."""

    function: Callable[..., Any]
    decode: Callable[[bytes], tuple[Any, ...]]


class Hosted(NamedTuple):
    """One object that proxies can reach by its name: a counter's ledger, or a shared object."""

    methods: dict[str, Method]
    epoch: str  # of its state: another one means that what was there before is lost
    declaration: Declaration | None = None


class LedgerService:
    """What the manager offers of its ledger: the last stop of the road.

    :param in_memory: a commit costs less than to share it, so each batch has one of its own. (Alone, an increment's
        round trip is a fifth shorter for it.)
    """

    def __init__(self, ledger: Ledger, fail: Callable[[JournalFailed], NoReturn], *, in_memory: bool = False) -> None:
        self._ledger = ledger
        self._fail = fail
        self._alone = threading.Lock() if in_memory else None  # held through a commit that is not shared
        self._combiner: Combiner[Batch, list[Result] | BatchRefused] = Combiner(self._commit, limit=_LARGEST_COMMIT)
        # Of writes, since the start. Commits are made by one thread at a time, so nothing has to guard these.
        self.batches = 0
        self.operations = 0
        self.commits = 0
        self.commit_seconds = 0.0

    def apply(self, batch: Batch) -> list[Result]:
        """Apply a batch; where commits are durable, in one with those of other workers that wait at the same time."""
        if batch.sequence == 0:
            return self._ledger.read(batch)
        if self._alone is None:
            return results_of(self._combiner.submit(batch))
        with self._alone:
            (answer,) = self._commit([batch], inf)
        return results_of(answer)

    def _commit(self, batches: list[Batch], _deadline: float) -> list[list[Result] | BatchRefused]:
        began = time.monotonic()
        try:
            answers = self._ledger.apply(batches)
        except JournalFailed as error:
            self._fail(error)
        self.commit_seconds += time.monotonic() - began
        self.commits += 1
        self.batches += len(batches)
        self.operations += sum(len(batch.operations) for batch in batches)
        return answers


class StateServer(Server):
    """The standard library's manager server, with objects by name, typed arguments and time limits.

    A client can call the methods of what is hosted, and nothing else: not create, not shut down, not read a
    traceback. A peer that breaks the rules loses its connection and is told nothing.
    """

    public: list[str] = ["accept_connection"]  # noqa: RUF012 - the standard class spells it so
    authkey: bytes
    listener: Listener
    hosted: dict[str, Hosted]
    mutex: threading.Lock

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections = 0
        self._users = 0  # connections to shared objects, among them
        self.gives_way = False
        self._idle_since = time.monotonic()

    def idle_for(self) -> float:
        """The seconds since the last client has gone; 0 while there is one."""
        with self.mutex:
            return 0.0 if self._connections else time.monotonic() - self._idle_since

    @property
    def connections(self) -> int:
        """How many clients there are, each with one."""
        return self._connections

    def _count(self, change: int) -> None:
        with self.mutex:
            self._connections += change
            self._idle_since = time.monotonic()

    def accepter(self) -> None:
        """Accept connections, each for a thread of its own. Where there can be no thread, the next try may have one."""
        while True:
            try:
                connection = self.listener.accept()
            except OSError:
                continue
            try:
                threading.Thread(target=self.handle_request, args=(connection,), daemon=True).start()
            except RuntimeError as error:
                log.warning("a connection was closed: %s", error)
                connection.close()
                time.sleep(ACCEPT_PAUSE)

    def handle_request(self, conn: Any) -> None:
        """Serve one connection, in a thread of its own, from the handshake to its end."""
        self._count(+1)
        try:
            deliver_challenge(conn, self.authkey)
            answer_challenge(conn, self.authkey)
            call = _decode_call(conn.recv_bytes())
            if call.method != "accept_connection":
                raise PermissionError(f"{call.method!r} is not offered")
            ident, declaration = _decode_greeting(call.arguments)
            hosted = self.hosted.get(ident)
            if hosted is None or hosted.declaration != declaration:
                self._turn_away(conn)
            else:
                self._welcome(conn, hosted)
        except EOFError:
            log.debug("a client has gone")
        except (OSError, AuthenticationError, AssertionError, MsgspecError, ValueError) as error:
            # AssertionError and ValueError: the standard handshake's words for a peer that talks nonsense.
            log.warning("a connection was closed: %s: %s", type(error).__name__, error)
        finally:
            self._count(-1)
            conn.close()

    def _welcome(self, conn: Any, hosted: Hosted) -> None:
        uses = hosted.declaration is not None
        with self.mutex:
            self._users += uses
        try:
            conn.send(("#RETURN", hosted.epoch))
            self.serve_client(conn)
        finally:
            with self.mutex:
                self._users -= uses

    def _turn_away(self, conn: Any) -> None:
        """Say that it hosts something else; if nobody uses any of that, make way for a one that has this."""
        with self.mutex:
            makes_way = self.gives_way and not self._users
        conn.send(("#AWAY" if makes_way else "#ERROR", self._what_is_hosted()))
        if makes_way:
            _end_main_thread()

    def _what_is_hosted(self) -> str:
        names = [str(hosted.declaration) for hosted in self.hosted.values() if hosted.declaration]
        return f"the manager (pid {os.getpid()}) hosts {', '.join(names) or 'counters only'}"

    def serve_client(self, conn: Any) -> None:
        """Answer calls, one after the other, until the client goes or breaks the rules."""
        connection: Connection = conn
        while True:
            connection.await_frame()
            call = _decode_call(connection.recv_bytes())
            hosted = self.hosted.get(call.ident or "")
            method = hosted and hosted.methods.get(call.method)
            if not method:
                raise PermissionError(f"{call.method!r} of {call.ident!r} is not offered")
            arguments = method.decode(call.arguments)
            try:
                reply = ("#RETURN", method.function(*arguments))
            except BatchRefused as error:
                reply = ("#ERROR", str(error))
            connection.set_deadline(time.monotonic() + FRAME_SECONDS)
            connection.send(reply)


@dataclass(frozen=True, kw_only=True)
class StatusService:
    """What the manager tells of itself."""

    server: StateServer
    ledger: Ledger
    service: LedgerService
    journal: Journal | None
    durability: Durability
    epoch: str
    began: float = field(default_factory=time.monotonic)

    def status(self) -> Status:
        return Status(
            pid=os.getpid(),
            epoch=self.epoch,
            durability=self.durability,
            uptime=time.monotonic() - self.began,
            starts=self.journal.starts if self.journal else 1,
            counters=len(self.ledger),
            objects=sum(hosted.declaration is not None for hosted in self.server.hosted.values()),
            clients=self.ledger.clients,
            keys=self.ledger.keys,
            connections=self.server.connections,
            batches=self.service.batches,
            operations=self.service.operations,
            commits=self.service.commits,
            commit_seconds=self.service.commit_seconds,
            journal_bytes=self.journal.size if self.journal else 0,
        )


class StateManager(BaseManager):
    """`BaseManager` with our server. The address is a socket's path; `spawn` is named, whatever the default is."""

    _Server = StateServer

    def __init__(self, address: str, authkey: bytes) -> None:
        super().__init__(address, authkey, SERIALIZER, multiprocessing.get_context("spawn"))

    def get_server(self) -> StateServer:
        # The standard method makes a `Server` by that name, whatever `_Server` says.
        return self._Server(self._registry, self.address, self._authkey, SERIALIZER)  # type: ignore[attr-defined]


def serve(
    directory: DataDirectory,
    durability: Durability,
    *,
    ready: Callable[[], None],
    lifeline: Lifeline | None = None,
    idle_timeout: float | None = None,
    declarations: Sequence[Declaration] = (),
) -> NoReturn:
    """Be the manager of `directory` until a signal comes. Ends the process.

    :param ready: called when clients can connect.
    :param lifeline: if it is given, only its end ends the manager, and no signal: a supervisor that was told to stop
        together with its children still has requests to finish first.
    :param idle_timeout: seconds without any client after which to end. A manager whose counters are in its memory alone
        (durability `none`) never ends so: they would be lost.
    :param declarations: the shared objects to host, beside the counters. No client can add any.
    :raises StartupError: if the directory, its lock, journal or socket cannot be had.
    """
    os.umask(0o077)
    # An exception in the main thread is the server's own way to end; see Server.serve_forever.
    signal.signal(signal.SIGUSR1, _stop)  # our own threads' way to end the main one
    if lifeline is None:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
    else:
        threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    directory.make()
    with directory.hold():
        journal = _open_journal(directory, durability)
        contents = journal.load() if journal else Contents()
        if journal:
            journal.count_start()  # not before it was found whole: a damaged one is left as it is
        ledger = Ledger(contents, journal.commit) if journal else Ledger(contents)
        epoch = journal.epoch if journal else secrets.token_hex(16)
        directory.remove_stale_socket()
        server = StateManager(str(directory.socket), directory.key("manager")).get_server()
        service = LedgerService(ledger, _fail, in_memory=journal is None)
        told = StatusService(
            server=server, ledger=ledger, service=service, journal=journal, durability=durability, epoch=epoch
        )
        methods = {
            "apply": Method(service.apply, msgpack.Decoder(tuple[Batch]).decode),
            "status": Method(told.status, msgpack.Decoder(tuple[()]).decode),
        }
        server.hosted = {"ledger": Hosted(methods, epoch)}
        for declaration in declarations:
            server.hosted[object_ident(declaration.name)] = _host(declaration, ledger, journal, contents)
        if idle_timeout is not None and journal is not None:
            server.gives_way = True
            threading.Thread(target=_end_when_idle, args=(server, idle_timeout), name="idle", daemon=True).start()
        try:
            ready()
            server.serve_forever()
        finally:
            server.listener.close()
            with suppress(FileNotFoundError):
                directory.socket.unlink()
            ledger.stop()
            if journal:
                journal.close()
    raise AssertionError("serve_forever returned")


def _host(declaration: Declaration, ledger: Ledger, journal: Journal | None, contents: Contents) -> Hosted:
    """Make a shared object, from what the journal holds of it where it is durable."""
    epoch = journal.epoch if declaration.durable and journal else secrets.token_hex(16)
    decode = msgpack.Decoder(tuple[Batch]).decode
    try:
        if declaration.durable and journal is None:
            raise StartupError(f"the shared object {declaration} cannot be kept with durability 'none'")
        hosted = HostedObject(
            declaration,
            ledger.now,
            commit=journal.commit if journal else None,
            state=contents.objects.get(declaration.name),
            clients={
                client: record for client, record in contents.clients.items() if record.object == declaration.name
            },
        )
    except StartupError as error:
        # What cannot be made is refused by name; counters and other objects go on.
        log.error("%s", error)
        refusal = Refusal("not_made", str(error))
        refuse = Method(lambda batch: [refusal] * len(batch.operations), decode)
        return Hosted({"apply": refuse}, epoch, declaration)

    def apply(batch: Batch) -> list[Result]:
        try:
            return results_of(hosted.apply(batch))
        except (JournalFailed, StartupError) as error:  # or it could not be put back to what it was
            _fail(error)

    return Hosted({"apply": Method(apply, decode)}, epoch, declaration)


def _open_journal(directory: DataDirectory, durability: Durability) -> Journal | None:
    if durability != "none":
        return Journal(directory.journal, durability)
    if directory.journal.exists():
        raise StartupError(
            f"{directory} holds durable counters: durability 'none' would start again at 1; name another data directory"
        )
    return None


def _stop(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def _fail(error: Exception) -> NoReturn:
    """Stop at once, with nothing answered: what the disk says at the next start is what happened."""
    print(
        f"manager: {error}; what was being written is unknown; stopping to start again from the disk", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(_EXIT_JOURNAL_FAILED)


def _end_with(lifeline: Lifeline) -> None:
    """Have the main thread end in order when the lifeline does; if it hangs on the disk, end without."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    _end_main_thread()
    time.sleep(_SECONDS_TO_STOP)
    os._exit(1)  # a commit that hangs on the disk; it is there or it is not, and nobody waits


def _end_when_idle(server: StateServer, seconds: float) -> None:
    """Have the main thread end when there was no client for so long. Who comes just then starts another manager."""
    while (idle := server.idle_for()) < seconds:
        time.sleep(seconds - idle)
    _end_main_thread()


def _end_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
