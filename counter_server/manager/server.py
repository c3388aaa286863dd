"""The manager's server: it holds the ledger and the shared objects, and answers the workers' proxies.

It ends in order on a request or without clients, and at once when its state cannot be trusted.
"""

import _thread
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from math import inf
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.managers import Server
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, cast

from msgspec import MsgspecError, Struct, field, msgpack
from msgspec.structs import replace

from ..errors import BatchRefused, StartupError, StorageFull
from ..journal import Journal, JournalFailed
from ..ledger import Changes, Clients, Ledger
from ..objects import Declaration, HostedObject
from ..operations import Batch, Refusal, Result
from ..output import bound
from ..plain import largest_value
from ..settings import Durability
from ..status import ConnectedProcess, ObjectStatus, SlowCall, Status, shortened
from ..store import Applies
from .directory import DataDirectory
from .hosting import Hosting, Sources
from .snapshot import Kept
from .wire import (
    ACCEPT_PAUSE,
    FRAME_SECONDS,
    SERIALIZER,
    Call,
    Connection,
    Greeting,
    Listener,
    largest_frame,
    object_ident,
)

log = logging.getLogger(__name__)

_MOST_SEEN = 1000  # clients of one process that are forgotten at once when it has ended
_MOST_OBJECTS = 1000  # in a status
_MOST_PROCESSES = 100  # in a status
_LONGEST_REASON = 1000  # characters, why an object could not be made
_LONGEST_COMMAND = 4096  # bytes of a command line that are read
_MOST_GREETED = 100  # connections above the maximum that get an explanation; others are closed at once
_SECONDS_TO_HAND_OVER = 3.0  # in which the calls of shared objects finish when a manager ends; others wait for it
_SECONDS_TO_LEAVE = 30.0  # for which a manager on demand serves its clients after SIGTERM
_MOST_SECONDS_OF_RELEASE = 60.0  # for which a manager serves one release, if programs of several come and go
OTHER_DESCRIPTORS = 64 + _MOST_GREETED  # its own, its objects', and connections above the maximum
SLOW_SECONDS = 10.0  # after which a running call of a shared object is reported
_LOOK_SECONDS = 0.5
_SECONDS_TO_STOP = 2.0  # for which threads of others, or a commit on the disk, may hold up an end


_decode_call = msgpack.Decoder(Call).decode
_decode_batch = msgpack.Decoder(tuple[Batch]).decode
_decode_greeting = msgpack.Decoder(Greeting).decode


class _Process(Struct):
    """A process that has connections, and the clients that it was, each by the object that they called."""

    connections: int = 0
    watching: int = 0  # of these, that have asked about the manager, and call no object
    since: float = field(default_factory=time.time)  # in `time.time` seconds
    clients: set[tuple[str, bytes]] = field(default_factory=set)


class Remembers(Applies, Protocol):
    """Applies batches, and remembers the last one of each client."""

    remembered: Clients


class Hosted(NamedTuple):
    """An object that proxies reach by its name: the ledger of the counters, or a shared object."""

    applies: Remembers
    # Identifies its state: it changes when some of the state is lost. It is empty without a state. A second word is the
    # epoch of the same state when it was not durable yet.
    epoch: str
    declaration: Declaration | None = None


class NotMade:
    """Takes the place of a shared object that could not be made: it refuses every call by name."""

    def __init__(self, reason: StartupError) -> None:
        self.reason = str(reason)
        self._refusal = Refusal("not_made", str(reason))
        self.remembered = Clients({})

    def apply(self, batch: Batch, _deadline: float) -> list[Result]:
        return [self._refusal] * len(batch.operations)


_OWN: dict[str, msgpack.Decoder[Any]] = {
    "hosting": msgpack.Decoder(tuple[()]),
    "saved": msgpack.Decoder(tuple[str]),
    "status": msgpack.Decoder(tuple[()]),
    "check": msgpack.Decoder(tuple[()]),
    "back_up": msgpack.Decoder(tuple[bytes]),
    "copy": msgpack.Decoder(tuple[bytes]),
    "end": msgpack.Decoder(tuple[bool]),
}


class StateServer(Server):
    """The standard library's manager server, with objects by name, typed arguments and time limits.

    A client can call `apply` of the hosted objects, and seven methods of the server itself, mostly for its operator.
    It can create nothing, and reads no traceback. A peer that breaks the rules loses its connection, without a reason.
    """

    public: list[str] = ["accept_connection"]  # noqa: RUF012 - the standard class declares it so
    authkey: bytes
    listener: Listener
    mutex: threading.Lock

    def __init__(
        self,
        directory: DataDirectory,
        hosted: dict[str, Hosted],
        hosting: Hosting,
        sources: Sources,
        journal: Journal | None,
        durability: Durability,
        *,
        most_connections: int,
        idle_timeout: float | None,
        supervisor: int | None,
    ) -> None:
        self._largest_frame = largest_frame()
        super().__init__({}, str(directory.socket), directory.key("manager"), SERIALIZER)
        self._directory = directory
        self.hosted = hosted
        self._hosting = hosting
        self._sources = sources
        self._ledger = cast(Ledger, hosted["ledger"].applies)
        self._journal = journal
        self._durability: Durability = durability
        self._most_connections = most_connections
        self._idle_timeout = idle_timeout
        self._supervisor = supervisor  # pid
        self._connections: set[Connection] = set()
        self._processes: dict[int, _Process] = {}  # that have these connections, by pid
        self._welcomed = 0  # of these, after the greeting
        self._users: set[Connection] = set()  # of these, to shared objects
        self._idle_since = self._began = time.monotonic()
        self._leaving = 0.0  # since when it waits for its clients to go, in `time.monotonic` seconds; 0 if it does not
        self._keeps_place = ""  # why it refuses to end for another manager or without clients; empty if it does not
        if idle_timeout is None:
            self._keeps_place = (
                "it was started by hand: 'counter-server run --attach' with the same --data-dir uses it,"
                " 'counter-server stop' ends it"
            )
        elif journal is None:
            self._keeps_place = "its counters are in memory alone: 'counter-server stop' ends it, and they are lost"

    def _idle_for(self) -> float:
        """Return the seconds since the last client, as far as is known; 0 if there is one.

        A method that never returns keeps the connection of a client that has gone. Such a connection does not count.
        """
        with self.mutex:
            if not _is_any_there(self._connections):
                return time.monotonic() - self._idle_since
            self._idle_since = time.monotonic()
            return 0.0

    def _remove(self, connection: Connection) -> None:
        """Stop counting a connection, before it is closed: another one may reuse its descriptor."""
        with self.mutex:
            self._connections.discard(connection)
            self._idle_since = time.monotonic()
            process = self._processes[connection.pid]
            process.connections -= 1
            process.watching -= connection.is_watching
            if not process.connections:  # no batch of its clients is on the way any more
                del self._processes[connection.pid]
                for ident, client in process.clients:
                    self.hosted[ident].applies.remembered.leave(client, connection.pid)

    def accepter(self) -> None:
        """Accept connections, each for a thread of its own. If no thread can start, the next attempt may succeed."""
        while True:
            try:
                connection = self.listener.accept()
            except OSError:
                continue
            if len(self._connections) >= self._most_connections + _MOST_GREETED:
                connection.close()
                continue
            with self.mutex:
                self._connections.add(connection)
                self._processes.setdefault(connection.pid, _Process()).connections += 1
            try:
                # Not `threading.Thread`: its `start` waits for ever if the new thread dies of a lack of memory.
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
            call = _decode_call(conn.recv_bytes(self._largest_frame))
            if call.method != "accept_connection":
                raise PermissionError(f"{call.method!r} is not offered")
            greeting = _decode_greeting(call.arguments)
            wanted, hosted = greeting.declaration, self.hosted.get(greeting.ident)
            if (
                greeting.may_succeed
                and not self._keeps_place
                and self._is_outdated(hosted, wanted, greeting.largest_value)
            ):
                conn.send(("#SUCCEED", ""))
            elif hosted is None or (wanted and hosted.declaration and not hosted.declaration.means(wanted)):
                conn.send(("#ERROR", self._refusal(hosted)))
            else:
                self._welcome(conn, hosted)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            log.debug("a client has gone")
        except (OSError, AuthenticationError, AssertionError, MsgspecError, ValueError) as error:
            # The standard handshake raises AssertionError and ValueError if the peer sends nonsense.
            log.warning("a connection was closed: %s: %s", type(error).__name__, error)
        except MemoryError as error:
            fail(error)
        finally:
            self._remove(conn)
            conn.close()

    def _welcome(self, conn: Any, hosted: Hosted) -> None:
        with self.mutex:
            is_room = self._welcomed < self._most_connections
            self._welcomed += is_room
            if is_room and hosted.declaration is not None:
                self._users.add(conn)
        if not is_room:
            conn.send(("#FULL", f"it has {self._most_connections:,} connections, the maximum of --max-connections"))
            return
        try:
            conn.send(("#RETURN", hosted.epoch))
            self.serve_client(conn)
        finally:
            with self.mutex:
                self._welcomed -= 1
                self._users.discard(conn)

    def _is_outdated(self, hosted: Hosted | None, wanted: Declaration | None, largest: int) -> bool:
        """Return whether a client wants an object that this manager does not have, or not in the newest version.

        :param largest: the largest value that the client may send.
        """
        if wanted is None:
            return False
        if hosted is None or hosted.declaration is None or largest > largest_value():
            return True
        is_newer = wanted.declared > hosted.declaration.declared
        if not hosted.declaration.means(wanted):  # a new class under an old name must not end the old one's use
            is_perhaps_moved = hosted.declaration.qualname == wanted.qualname
            return is_newer and (is_perhaps_moved or not self._is_used())
        is_another = (
            isinstance(hosted.applies, NotMade)
            or (wanted.file != hosted.declaration.file and self._may_change_release())
            or wanted.strictness > hosted.declaration.strictness
        )
        return (is_newer and is_another) or self._sources.are_older(wanted.declared)

    def _may_change_release(self) -> bool:
        """Return whether another release may take over: at once after a deploy, but two in use must not take turns."""
        wait = min(self._hosting.releases**2 / 10, _MOST_SECONDS_OF_RELEASE)
        return time.monotonic() - self._began >= wait

    def _refusal(self, hosted: Hosted | None) -> str:
        who = f"the manager (pid {os.getpid()})"
        if hosted is not None:
            return f"{who} hosts {hosted.declaration} under that name, and it is in use: choose another name"
        names = [str(hosted.declaration) for hosted in self.hosted.values() if hosted.declaration]
        why = self._keeps_place or "this process may not start a manager that hosts more (COUNTER_SERVER_START)"
        return f"{who} hosts {', '.join(names) or 'counters only'}; {why}"

    def serve_client(self, conn: Any) -> None:
        """Answer calls, one after the other, until the client goes or breaks the rules."""
        connection: Connection = conn
        process = self._processes[connection.pid]
        seen = process.clients
        while True:
            connection.await_frame()
            call = _decode_call(connection.recv_bytes(self._largest_frame))
            try:
                if call.method == "apply" and call.ident in self.hosted:
                    (batch,) = _decode_batch(call.arguments)
                    if len(seen) < _MOST_SEEN:
                        seen.add((call.ident, batch.client))
                    result: Any = self.hosted[call.ident].applies.apply(batch, inf)
                elif call.method in _OWN and call.ident == "ledger":
                    if not connection.is_watching:
                        with self.mutex:
                            connection.is_watching = True
                            process.watching += 1
                    result = getattr(self, call.method)(*_OWN[call.method].decode(call.arguments))
                else:
                    raise PermissionError(f"{call.method!r} of {call.ident!r} is not offered")
                reply = ("#RETURN", result)
            except BatchRefused as error:
                reply = ("#ERROR", str(error))
            connection.set_deadline(time.monotonic() + FRAME_SECONDS)
            connection.send(reply)

    def hosting(self) -> Hosting:
        """Return what this manager hosts, for its successor; not what it could not make."""
        made = {
            hosted.declaration.name
            for hosted in self.hosted.values()
            if hosted.declaration and not isinstance(hosted.applies, NotMade)
        }
        declarations = [declaration for declaration in self._hosting.declarations if declaration.name in made]
        return replace(self._hosting, declarations=declarations, largest_value=largest_value(), is_used=self._is_used())

    def saved(self, name: str) -> bytes:
        """Return the state of a durable object, for a successor that tries whether it can load it."""
        hosted = self.hosted.get(object_ident(name))
        return hosted.applies.saved if hosted and isinstance(hosted.applies, HostedObject) else b""

    def _is_used(self) -> bool:
        with self.mutex:
            return _is_any_there(self._users)

    def hand_over(self) -> dict[str, Kept]:
        """Make no call of a shared object any more; return those that are not in the journal."""
        deadline = time.monotonic() + _SECONDS_TO_HAND_OVER
        kept = {}

        def keep(hosted: Hosted, applies: HostedObject) -> None:
            if left := applies.hand_over(deadline):
                kept[applies.declaration.name] = Kept(hosted.epoch, *left)

        # Each in a thread, as a method or a pickling that never returns must not make others be lost.
        objects = [
            (hosted, hosted.applies) for hosted in self.hosted.values() if isinstance(hosted.applies, HostedObject)
        ]
        threads = [threading.Thread(target=keep, args=each, daemon=True) for each in objects]
        for thread in threads:
            thread.start()
        for (_, applies), thread in zip(objects, threads, strict=True):
            thread.join(max(deadline + _LOOK_SECONDS - time.monotonic(), 0.0))
            if thread.is_alive():
                log.error("%s is lost: it takes too long to pickle", applies.declaration)
        return dict(kept)

    def status(self) -> Status:
        """Return the manager's figures."""
        counters, clients, keys = self._ledger.sizes
        with self.mutex:
            using = [
                (pid, process.connections - process.watching, process.since)
                for pid, process in self._processes.items()
                if process.connections > process.watching
            ]
        journal = self._journal
        return Status(
            pid=os.getpid(),
            epoch=self.hosted["ledger"].epoch,
            durability=self._durability,
            uptime=time.monotonic() - self._began,
            starts=journal.starts if journal else 1,
            counters=counters,
            objects=len(self.hosted) - 1,
            clients=clients,
            keys=keys,
            connections=len(self._connections),
            batches=self._ledger.batches,
            operations=self._ledger.operations,
            commits=self._ledger.commits,
            commit_times={"counters": journal.counters.now(), "objects": journal.objects.now()} if journal else {},
            journal_bytes=journal.size if journal else 0,
            slow_calls=list(self.slow_calls().values()),
            hosted=[_status_of(each) for each in islice(self.hosted.values(), 1, 1 + _MOST_OBJECTS)],
            processes=[
                ConnectedProcess(pid=pid, command=_command_of(pid), connections=connections, since=since)
                for pid, connections, since in using[:_MOST_PROCESSES]
            ],
            more_processes=len(using[_MOST_PROCESSES:]),
        )

    def slow_calls(self) -> dict[tuple[str, int, float], SlowCall]:
        """Return the calls that have run for long, each by its object's name, its thread and its start."""
        now = time.monotonic()
        found = {}
        for hosted in self.hosted.values():
            if isinstance(hosted.applies, HostedObject):
                declaration = hosted.applies.declaration
                for thread, (method, began) in hosted.applies.figures.running.items():
                    if now - began > SLOW_SECONDS:
                        slow = SlowCall(declaration.name, method, now - began, not declaration.concurrent)
                        found[declaration.name, thread, began] = slow
        return found

    def disconnect(self) -> None:
        """Close all connections, and make sure that the process ends, although an app's module may have threads in it.

        Then no client waits for it: another manager can begin.
        """
        with self.mutex:
            for connection in self._connections:
                connection.shutdown()
        threading.Thread(target=exit_later, args=(0,), name="exit", daemon=True).start()

    def check(self) -> tuple[int, int, int]:
        """Compare the whole journal with memory; return how many counters, clients and keys there are."""
        try:
            self._ledger.show(self._durable().check)
        except StartupError as error:
            raise BatchRefused(str(error)) from error
        return self._ledger.sizes

    def back_up(self, target: bytes) -> int:
        """Copy the journal into a new file, and return its bytes."""
        try:
            return self._durable().back_up(Path(os.fsdecode(target)))
        except (StartupError, ValueError) as error:  # ValueError: it is not a path
            raise BatchRefused(str(error)) from error

    def copy(self, target: bytes) -> int:
        """Write the counters and keys, as they are at one moment, into a new journal; return its bytes.

        :param target: its path below the data directory.
        """
        path = self._directory.path / os.fsdecode(target)
        if self._journal is not None:
            return self.back_up(os.fsencode(path))
        contents = self._ledger.copied()
        try:
            with closing(Journal(path, "process")) as journal:
                journal.commit(Changes(self._ledger.now(), dict(contents.counters), keys=dict(contents.keys)))
                return journal.size
        except (StartupError, StorageFull, JournalFailed) as error:
            raise BatchRefused(f"the counters cannot be copied: {error}; counting goes on") from error

    def _durable(self) -> Journal:
        if self._journal is None:
            raise StartupError("the counters are in memory only (durability none): there is no journal")
        return self._journal

    def end(self, for_another: bool) -> bool:  # noqa: FBT001 - the wire has no keywords for it
        """End in order; for another manager, only if this one was started on demand."""
        if self._supervisor is not None:
            raise BatchRefused(f"it runs under a supervisor (pid {self._supervisor} there): end that")
        if for_another and self._keeps_place:
            raise BatchRefused(self._keeps_place)
        end_main_thread()
        return True

    def leave(self) -> None:
        """End when the clients have gone; at once if called again.

        When a service manager stops a service, it signals all processes together. The workers still finish requests,
        and would start another manager.
        """
        if self._leaving:
            end_main_thread()
        self._leaving = time.monotonic()

    def _may_end(self) -> bool:
        if self._leaving:
            return self._idle_for() > 0 or time.monotonic() - self._leaving > _SECONDS_TO_LEAVE
        return self._idle_timeout is not None and not self._keeps_place and self._idle_for() >= self._idle_timeout

    def keep_going(self, is_held: Callable[[], bool], is_ending: threading.Event) -> None:
        """Restore the socket and the key when their files vanish, log slow calls, and end the manager when it is idle.

        End the process at once when its directory or journal was removed or replaced.
        """
        last_error = ""
        reported: set[tuple[str, int, float]] = set()
        while not is_ending.wait(_LOOK_SECONDS):
            if not is_held():  # another manager may begin with other files
                fail(StartupError(f"the data directory {self._directory} was removed, or replaced by another"))
            try:
                self._restore_files()
            except JournalFailed as error:
                fail(error)
            except (StartupError, OSError) as error:
                if str(error) != last_error:
                    log.error("no new client can connect: %s", error)
                last_error = str(error)
            bound(str(self._directory.path / "manager.log"))
            slow = self.slow_calls()
            for key in slow.keys() - reported:
                call = slow[key]
                log.warning(
                    "%s.%s has run for %.0f seconds and still runs%s",
                    *(call.object, call.method, call.seconds),
                    f"; other calls of {call.object} wait for it" if call.others_wait else "",
                )
            reported = set(slow)
            if self._may_end():
                end_main_thread()  # a client that comes just then starts another manager
                return

    def _restore_files(self) -> None:
        """Put back the key and the socket; raise `JournalFailed` if the journal is not in its place."""
        if self._journal:
            self._journal.look_after_files()
        if self._directory.restore_key("manager", self.authkey):
            log.warning("the key of %s was removed; it is in its place again", self._directory)
        if not self.listener.is_found:
            self._directory.remove_stale_socket()
            self.listener.rebind()
            log.warning("the socket %s was removed; a new one is in its place", self._directory.socket)


def _status_of(hosted: Hosted) -> ObjectStatus:
    applies, declaration = hosted.applies, hosted.declaration
    if isinstance(applies, HostedObject):
        return applies.status()
    assert isinstance(applies, NotMade)
    assert declaration is not None
    return ObjectStatus(
        name=declaration.name,
        cls=declaration.place,
        durable=declaration.durable,
        not_made=shortened(applies.reason, _LONGEST_REASON),
    )


def _command_of(pid: int) -> str:
    """Return the command line of a process of this user; an empty text if it cannot be seen, or has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read(_LONGEST_COMMAND)
    except OSError:
        return ""
    return shortened(line.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace"))


def _is_any_there(connections: set[Connection]) -> bool:
    """Return whether the client of any of these open connections is still there."""
    there = select.poll()  # without an event, it reports only closed connections
    for connection in connections:
        there.register(connection, 0)
    return len(there.poll(0)) < len(connections)


def fail(error: BaseException) -> NoReturn:
    """End the process at once, without an answer: the next start reads from the disk what happened."""
    try:
        reason = str(error) or type(error).__name__
        sys.stderr.write(f"manager: {reason}; the last write is unknown; stopping to start again from the disk\n")
        sys.stderr.flush()
    finally:  # even without memory for a message, or with a log on a full disk
        os._exit(74)  # EX_IOERR of sysexits.h


def end_main_thread() -> None:
    """End the main thread in order, as a signal from outside does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def exit_later(status: int) -> None:
    time.sleep(_SECONDS_TO_STOP)
    os._exit(status)
