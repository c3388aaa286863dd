"""The manager process: it holds the ledger, and answers the proxies of the workers."""

import gc
import logging
import multiprocessing
import os
import resource
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.managers import BaseManager, Server
from typing import Any, NamedTuple, NoReturn

from msgspec import MsgspecError, msgpack

from ..errors import BatchRefused, StartupError
from ..journal import Journal, JournalFailed
from ..ledger import Contents, Ledger, results_of
from ..objects import Declaration, HostedObject
from ..operations import Batch, Refusal, Result
from ..settings import DEFAULT_CAPS, Caps, Durability
from .directory import DataDirectory
from .ending import Lifeline, end_main_thread, end_when_idle, end_with, fail, keep_found, stop
from .services import LedgerService, StatusService, UpkeepService
from .wire import ACCEPT_PAUSE, FRAME_SECONDS, SERIALIZER, Call, Connection, Listener, object_ident

log = logging.getLogger(__name__)

_MOST_GREETED = 100  # connections over the cap that are told so; those beyond are closed without a word, or a thread
_OTHER_DESCRIPTORS = 64  # that a manager has open beside its connections, and what its shared objects may open

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
        self._welcomed = 0  # among them, those that were let in
        self._users = 0  # connections to shared objects, among these
        self.most_connections = Caps.connections
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
            if self._connections >= self.most_connections + _MOST_GREETED:
                connection.close()
                continue
            self._count(+1)
            try:
                threading.Thread(target=self.handle_request, args=(connection,), daemon=True).start()
            except RuntimeError as error:
                log.warning("a connection was closed: %s", error)
                self._count(-1)
                connection.close()
                time.sleep(ACCEPT_PAUSE)

    def handle_request(self, conn: Any) -> None:
        """Serve one connection, in a thread of its own, from the handshake to its end."""
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
            is_room = self._welcomed < self.most_connections
            self._welcomed += is_room
            self._users += is_room and uses
        if not is_room:
            conn.send(
                ("#FULL", f"it has {self.most_connections:,} connections, the most that --max-connections allows")
            )
            return
        try:
            conn.send(("#RETURN", hosted.epoch))
            self.serve_client(conn)
        finally:
            with self.mutex:
                self._welcomed -= 1
                self._users -= uses

    def _turn_away(self, conn: Any) -> None:
        """Say that it hosts something else; if nobody uses any of that, make way for a one that has this."""
        with self.mutex:
            makes_way = self.gives_way and not self._users
        conn.send(("#AWAY" if makes_way else "#ERROR", self._what_is_hosted()))
        if makes_way:
            end_main_thread()

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
    caps: Caps = DEFAULT_CAPS,
) -> NoReturn:
    """Be the manager of `directory` until a signal comes. Ends the process.

    :param ready: called when clients can connect.
    :param lifeline: if it is given, only its end ends the manager, and no signal: a supervisor that was told to stop
        together with its children still has requests to finish first.
    :param idle_timeout: seconds without any client after which to end. A manager whose counters are in its memory alone
        (durability `none`) never ends so: they would be lost.
    :param declarations: the shared objects to host, beside the counters. No client can add any.
    :param caps: what it takes at the most.
    :raises StartupError: if the directory, its lock, journal or socket cannot be had.
    """
    os.umask(0o077)
    # An exception in the main thread is the server's own way to end; see Server.serve_forever.
    signal.signal(signal.SIGUSR1, stop)  # our own threads' way to end the main one
    if lifeline is None:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
    else:
        threading.Thread(target=end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    directory.make()
    with directory.hold() as is_held:
        with _nothing_collected():
            journal = _open_journal(directory, durability, caps)
            contents = journal.load() if journal else Contents()
            if journal:
                journal.count_start()  # not before it was found whole: a damaged one is left as it is
            ledger = Ledger(contents, journal.commit, caps=caps) if journal else Ledger(contents, caps=caps)
        epoch = journal.epoch if journal else secrets.token_hex(16)
        directory.remove_stale_socket()
        try:
            server = StateManager(str(directory.socket), directory.key("manager")).get_server()
        except OSError as error:
            raise StartupError(f"the socket {directory.socket} cannot be made: {error.strerror or error}") from error
        server.most_connections = _room_for(caps.connections)
        service = LedgerService(ledger, fail, in_memory=journal is None)
        told = StatusService(
            ledger=ledger,
            service=service,
            journal=journal,
            durability=durability,
            epoch=epoch,
            objects=len(declarations),
            connections=lambda: server.connections,
        )
        upkeep = UpkeepService(ledger, journal)
        nothing = msgpack.Decoder(tuple[()]).decode
        methods = {
            "apply": Method(service.apply, msgpack.Decoder(tuple[Batch]).decode),
            "status": Method(told.status, nothing),
            "check": Method(upkeep.check, nothing),
            "back_up": Method(upkeep.back_up, msgpack.Decoder(tuple[bytes]).decode),
        }
        server.hosted = {"ledger": Hosted(methods, epoch)}
        for declaration in declarations:
            server.hosted[object_ident(declaration.name)] = _host(declaration, ledger, journal, contents, caps)
        if idle_timeout is not None and journal is not None:
            server.gives_way = True
            threading.Thread(
                target=end_when_idle, args=(server.idle_for, idle_timeout), name="idle", daemon=True
            ).start()
        is_ending = threading.Event()
        keeping = threading.Thread(
            target=keep_found, args=(directory, server.listener, is_held, journal, is_ending), daemon=True
        )
        keeping.start()
        try:
            ready()
            server.serve_forever()
        finally:
            is_ending.set()
            keeping.join()  # it would have what is taken away here found again
            if server.listener.is_found:
                with suppress(FileNotFoundError):
                    directory.socket.unlink()
            server.listener.close()
            ledger.stop()
            if journal:
                journal.close()
    raise AssertionError("serve_forever returned")


def _host(declaration: Declaration, ledger: Ledger, journal: Journal | None, contents: Contents, caps: Caps) -> Hosted:
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
            most_clients=caps.clients,
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
            fail(error)

    return Hosted({"apply": Method(apply, decode)}, epoch, declaration)


def _room_for(connections: int) -> int:
    """So many connections, or those that this process may have descriptors for; it asks for as many as it needs."""
    wanted = connections + _MOST_GREETED + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - _MOST_GREETED - _OTHER_DESCRIPTORS, 1)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is made in the block stays: it is not looked through for garbage, neither as it grows nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _open_journal(directory: DataDirectory, durability: Durability, caps: Caps) -> Journal | None:
    if durability != "none":
        return Journal(directory.journal, durability, most=caps.journal_bytes)
    if directory.journal.exists():
        raise StartupError(
            f"{directory} holds durable counters: durability 'none' would start again at 1; name another data directory"
        )
    return None
