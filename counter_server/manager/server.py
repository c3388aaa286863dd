"""The manager process: it holds the ledger, and answers the proxies of the workers."""

import _thread
import gc
import logging
import multiprocessing
import os
import resource
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.managers import BaseManager, Server
from typing import Any, NamedTuple, NoReturn

from msgspec import MsgspecError, msgpack

from ..errors import BatchRefused, StartupError
from ..journal import Journal
from ..ledger import Contents, Ledger, results_of
from ..objects import Declaration, HostedObject
from ..operations import Batch, Refusal, Result
from ..settings import DEFAULT_CAPS, Caps, Durability
from .client import end_manager
from .directory import DataDirectory, keep_from_children
from .ending import Lifeline, end_main_thread, end_when_idle, end_with, fail, keep_found, stop
from .services import LedgerService, StatusService, UpkeepService, report_slow_calls
from .wire import ACCEPT_PAUSE, FRAME_SECONDS, SERIALIZER, Call, Connection, Listener, object_ident

log = logging.getLogger(__name__)

_MOST_GREETED = 100  # connections over the cap that are told so; those beyond are closed without a word, or a thread
_SWITCH_SECONDS = 0.0001  # a method computes for this long before another thread has its turn; Python's own is 5 ms
_SECONDS_TO_SUCCEED = 10.0  # that one on demand may take to start or to end
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
        self._connections: set[Connection] = set()
        self._welcomed = 0  # among them, those that were let in
        self._users: set[Connection] = set()  # connections to shared objects, among these
        self.most_connections = Caps.connections
        self.gives_way = False
        self.is_supervised = False
        self.keeps_place = ""  # why it does not end for another manager
        self._idle_since = time.monotonic()

    def idle_for(self) -> float:
        """Return the seconds since there was a client, as far as is known.

        A method that never returns keeps the connection of a client that has gone: that one is not counted.
        """
        with self.mutex:
            if _is_any_there(self._connections):
                self._idle_since = time.monotonic()
            return time.monotonic() - self._idle_since

    @property
    def connections(self) -> int:
        """Return how many connections there are."""
        return len(self._connections)

    def _add(self, connection: Connection) -> None:
        with self.mutex:
            self._connections.add(connection)

    def _remove(self, connection: Connection) -> None:
        """Count a connection no longer, before it is closed: a closed one's descriptor may be another's."""
        with self.mutex:
            self._connections.discard(connection)
            self._idle_since = time.monotonic()

    def accepter(self) -> None:
        """Accept connections, each for a thread of its own. Where there can be no thread, the next try may have one."""
        while True:
            try:
                connection = self.listener.accept()
            except OSError:
                continue
            if len(self._connections) >= self.most_connections + _MOST_GREETED:
                connection.close()
                continue
            self._add(connection)
            try:
                # Not `threading.Thread`: its `start` waits for ever if the new thread dies without memory.
                _thread.start_new_thread(self.handle_request, (connection,))
            except RuntimeError as error:
                log.warning("a connection was closed: %s", error)
                self._remove(connection)
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
        except MemoryError as error:
            fail(error)
        finally:
            self._remove(conn)
            conn.close()

    def _welcome(self, conn: Any, hosted: Hosted) -> None:
        uses = hosted.declaration is not None
        with self.mutex:
            is_room = self._welcomed < self.most_connections
            self._welcomed += is_room
            if is_room and uses:
                self._users.add(conn)
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
                self._users.discard(conn)

    def _turn_away(self, conn: Any) -> None:
        """Say that it hosts something else; if nobody uses any of that, make way for a one that has this."""
        with self.mutex:
            makes_way = self.gives_way and not _is_any_there(self._users)
        conn.send(("#AWAY" if makes_way else "#ERROR", self._what_is_hosted()))
        if makes_way:
            end_main_thread()

    def _what_is_hosted(self) -> str:
        names = [str(hosted.declaration) for hosted in self.hosted.values() if hosted.declaration]
        return f"the manager (pid {os.getpid()}) hosts {', '.join(names) or 'counters only'}"

    def end(self, for_another: bool) -> bool:  # noqa: FBT001 - as it comes over the wire
        """End in order, for whoever asks; for another manager, only where this one was started on demand.

        :raises BatchRefused: with the reason, if it goes on.
        """
        if self.is_supervised:
            raise BatchRefused(f"it runs under a supervisor (pid {os.getppid()} there): end that")
        if for_another and self.keeps_place:
            raise BatchRefused(self.keeps_place)
        end_main_thread()
        return True

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


def _is_any_there(connections: Iterable[Connection]) -> bool:
    """Return whether the client of any of these open connections is still there."""
    there = select.poll()  # asked for no event, it tells of the ends of connections alone
    count = 0
    for count, connection in enumerate(connections, 1):  # noqa: B007 - how many there were
        there.register(connection, 0)
    return len(there.poll(0)) < count


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
    threading.excepthook = _end_without_memory
    sys.setswitchinterval(_SWITCH_SECONDS)
    # An exception in the main thread is the server's own way to end; see Server.serve_forever.
    signal.signal(signal.SIGUSR1, stop)  # our own threads' way to end the main one
    if lifeline is None:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
    else:
        keep_from_children(lifeline.fileno())
        threading.Thread(target=end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    directory.make()
    starting = ExitStack()  # until this one is ready, nobody starts another on demand
    if idle_timeout is None:
        starting.enter_context(directory.starting(_SECONDS_TO_SUCCEED))
        end_manager(directory, _SECONDS_TO_SUCCEED, for_another=True)
    with starting, directory.hold() as is_held:
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
        shared: list[HostedObject] = []
        told = StatusService(
            ledger=ledger,
            service=service,
            journal=journal,
            durability=durability,
            epoch=epoch,
            objects=len(declarations),
            hosted=shared,
            connections=lambda: server.connections,
        )
        upkeep = UpkeepService(ledger, journal)
        nothing = msgpack.Decoder(tuple[()]).decode
        methods = {
            "apply": Method(service.apply, msgpack.Decoder(tuple[Batch]).decode),
            "end": Method(server.end, msgpack.Decoder(tuple[bool]).decode),
            "status": Method(told.status, nothing),
            "check": Method(upkeep.check, nothing),
            "back_up": Method(upkeep.back_up, msgpack.Decoder(tuple[bytes]).decode),
        }
        server.hosted = {"ledger": Hosted(methods, epoch)}
        for declaration in declarations:
            server.hosted[object_ident(declaration.name)] = _host(declaration, ledger, journal, contents, caps, shared)
        server.is_supervised = lifeline is not None
        server.keeps_place = _why_it_keeps_its_place(idle_timeout, journal)
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
        threading.Thread(target=report_slow_calls, args=(shared, is_ending), name="slow calls", daemon=True).start()
        try:
            ready()
            starting.close()
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


def _end_without_memory(uncaught: threading.ExceptHookArgs) -> None:
    """Report what ended a thread; without memory, end the process: it would be there, and serve nobody."""
    threading.__excepthook__(uncaught)
    if issubclass(uncaught.exc_type, MemoryError):
        fail(uncaught.exc_value or MemoryError())


def _why_it_keeps_its_place(idle_timeout: float | None, journal: Journal | None) -> str:
    """Return why it does not end for another manager; nothing where it does."""
    if idle_timeout is None:
        return (
            "it was started by hand: 'counter-server run --attach' with the same --data-dir uses it,"
            " 'counter-server stop' ends it"
        )
    if journal is None:
        return "its counters are in memory alone: 'counter-server stop' ends it, and they are lost"
    return ""


def _host(
    declaration: Declaration,
    ledger: Ledger,
    journal: Journal | None,
    contents: Contents,
    caps: Caps,
    shared: list[HostedObject],
) -> Hosted:
    """Make a shared object, from what the journal holds of it where it is durable, and add it to `shared`."""
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
            fail=fail,
        )
    except StartupError as error:
        # What cannot be made is refused by name; counters and other objects go on.
        log.error("%s", error)
        refusal = Refusal("not_made", str(error))
        refuse = Method(lambda batch: [refusal] * len(batch.operations), decode)
        return Hosted({"apply": refuse}, epoch, declaration)

    shared.append(hosted)

    def apply(batch: Batch) -> list[Result]:
        return results_of(hosted.apply(batch))

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
