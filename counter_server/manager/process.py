"""The life of a manager process: it imports what it hosts, succeeds another manager, serves, and hands over."""

import gc
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import NoReturn

from ..errors import DirectoryHeld, Disconnected, StartupError, Stopped
from ..journal import REFUSALS, Journal
from ..ledger import Changes, Contents, Ledger
from ..objects import Declaration, HostedObject, is_moved, unpickled
from ..os_errors import NO_SOCKETS, explain
from ..plain import allow_values
from ..settings import DEFAULT_CAPS, Caps, Durability
from ..system import room_for
from . import location, snapshot
from .client import StateProxy, end_manager
from .directory import DataDirectory, keep_from_children
from .hosting import NOTHING, Hosting, Sources, import_classes
from .server import OTHER_DESCRIPTORS, Hosted, NotMade, StateServer, end_main_thread, exit_later, fail
from .snapshot import Kept
from .wire import object_ident

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0001  # for which a method computes before another thread's turn; Python's default is 5 ms
_SECONDS_TO_SUCCEED = 10.0  # in which a manager on demand starts or ends
_STOPPING = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


def serve(
    directory: DataDirectory,
    durability: Durability,
    *,
    ready: Callable[[], None],
    lifeline: Pipe | None = None,
    idle_timeout: float | None = None,
    hosting: Hosting = NOTHING,
    caps: Caps = DEFAULT_CAPS,
) -> NoReturn:
    """Run the manager of `directory` until a signal comes, and end the process.

    :param ready: called when clients can connect.
    :param lifeline: a connection to the supervisor. With it, only its end ends the manager, and no signal: if one
        signal stops supervisor and children together, the supervisor still has requests to finish.
    :param idle_timeout: seconds without clients after which to end. With durability `none` the manager never ends this
        way, because its counters would be lost.
    :param hosting: the shared objects to host, beside the counters, and beside those of a manager that it succeeds.
    :param caps: the maximum of everything that clients can add.
    :raises StartupError: if the directory, its lock, its journal or its socket cannot be used.
    """
    _set_up(lifeline)
    if lifeline is not None:
        keep_from_children(lifeline.fileno())
        threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    location.check(directory)
    directory.make()
    sources = Sources()
    _check_durability(directory, durability)
    starting = ExitStack()  # until this manager is ready, no client starts another one
    if idle_timeout is None:
        starting.enter_context(directory.starting(_SECONDS_TO_SUCCEED))
        reasons = import_classes(hosting)
    else:
        hosting, reasons = _import_all(directory, hosting)
    _set_up(lifeline)  # again: the modules may have handlers of their own
    end_manager(directory, _SECONDS_TO_SUCCEED, for_another=True)
    with ExitStack() as last, starting, directory.hold() as is_held:
        gc.disable()
        try:
            journal = Journal(directory.journal, durability, most=caps.journal_bytes) if durability != "none" else None
            contents = journal.load() if journal else Contents()
            if journal:
                journal.count_start()  # after the check, so that a damaged journal is not changed
            ledger = Ledger(contents, journal, caps=caps, fail=fail)
        finally:
            gc.freeze()  # the contents stay: the collector never needs to examine them
            gc.enable()
        hosted = {"ledger": Hosted(ledger, journal.epoch if journal else secrets.token_hex(16))}
        kept = snapshot.read(directory)
        for declaration in hosting.declarations:
            hosted[object_ident(declaration.name)] = _host(
                declaration, reasons.get(declaration.name), ledger, journal, contents, kept, caps
            )
        sources.note()
        directory.remove_stale_socket()
        directory.remove_stale_copy()
        try:
            server = StateServer(
                directory,
                hosted,
                hosting,
                sources,
                journal,
                durability,
                most_connections=room_for(caps.connections, OTHER_DESCRIPTORS),
                idle_timeout=idle_timeout,
                supervisor=os.getppid() if lifeline is not None else None,
            )
        except OSError as error:
            advice = "" if error.errno in REFUSALS else NO_SOCKETS
            failure = f"the socket {directory.socket} cannot be made"
            raise explain(error, failure, directory.runtime, advice=advice) from error
        last.callback(server.disconnect)
        is_ending = threading.Event()
        keeping = threading.Thread(target=server.keep_going, args=(is_held, is_ending), daemon=True)
        keeping.start()
        try:
            _stop_in_order(server.leave if idle_timeout is not None else None)
            snapshot.remove(directory)
            _forget_volatile(journal, contents, hosting, ledger.now())
            ready()
            starting.close()
            server.serve_forever()
        finally:
            is_ending.set()
            keeping.join()  # otherwise it would restore the socket that is removed here
            if server.listener.is_found:
                with suppress(FileNotFoundError):
                    directory.socket.unlink()
            server.listener.close()
            kept |= server.hand_over()
            snapshot.write(directory, kept)
            ledger.stop()
            if journal:
                journal.close()
    raise AssertionError("serve_forever returned")


def _set_up(lifeline: Pipe | None) -> None:
    os.umask(0o077)
    threading.excepthook = _end_without_memory
    sys.setswitchinterval(_SWITCH_SECONDS)
    # An exception in the main thread is the server's own way to end; see Server.serve_forever.
    signal.signal(signal.SIGUSR1, _stop)  # our own threads' way to end the main one
    if lifeline is None:
        signal.signal(signal.SIGTERM, _stop)  # until it serves
        signal.signal(signal.SIGINT, _stop)


def _import_all(directory: DataDirectory, hosting: Hosting) -> tuple[Hosting, dict[str, str]]:
    """Import what this manager is to host, and what the manager that it succeeds hosts.

    Return both, and the reasons of what cannot be imported, by object.

    :raises StartupError: if it cannot import or load what the other manager could; that one goes on.
    :raises DirectoryHeld: if the other manager does not answer.
    """
    reasons = import_classes(hosting)
    if directory.manager_pid() is None:
        return hosting, reasons
    deadline = time.monotonic() + _SECONDS_TO_SUCCEED
    with closing(StateProxy(directory)) as proxy:
        try:
            other = proxy.hosting(deadline)
            saved = {each.name: proxy.ask("saved", (each.name,), deadline) for each in other.declarations}
        except Disconnected as error:
            raise DirectoryHeld(f"the manager of {directory} ({directory.holder}) does not answer: {error}") from error
    worse = [reasons[declaration.name] for declaration in other.declarations if declaration.name in reasons]
    if worse:
        raise StartupError("; ".join(worse))
    hosting = hosting.joined(other)
    reasons = import_classes(hosting)  # what only the other one could import is refused by name
    hosted = {declaration.name: declaration for declaration in hosting.declarations}
    for older in other.declarations:
        newer = hosted[older.name]
        if newer.means(older):
            continue
        if is_moved(older, newer):
            hosted[older.name] = newer.after(older)
        elif other.is_used:
            raise StartupError(f"{older} is hosted under that name, and it is in use: choose another name")
    hosting.declarations[:] = hosted.values()
    allow_values(hosting.largest_value)
    for declaration in hosting.declarations:
        if saved.get(declaration.name) and declaration.name not in reasons:
            unpickled(saved[declaration.name], declaration)
    return hosting, reasons


def _host(
    declaration: Declaration,
    reason: str | None,
    ledger: Ledger,
    journal: Journal | None,
    contents: Contents,
    kept: dict[str, Kept],
    caps: Caps,
) -> Hosted:
    """Make a shared object, from its content in the journal if it is durable, or from what the last manager left.

    :param reason: why its class cannot be imported.
    """
    name = declaration.name
    is_durable = declaration.durable and journal is not None
    state, clients = contents.objects.get(name), {}
    epoch = secrets.token_hex(16)
    if journal and (is_durable or state is not None):  # or it was durable before
        epoch = journal.epoch
        clients = {client: record for client, record in contents.clients.items() if record.object == name}
    if left := kept.get(name):
        state, clients = left.state, left.clients
        epoch = f"{epoch} {left.epoch}" if is_durable else left.epoch
        if journal and is_durable:  # it was not durable before
            journal.commit(Changes(ledger.now(), clients=dict(clients), objects={name: state}))
    make = partial(HostedObject, declaration, ledger.now, journal=journal, most_clients=caps.clients, fail=fail)
    try:
        if reason is not None:
            raise StartupError(reason)
        try:
            hosted = make(state=state, clients=clients)
        except StartupError as error:
            if state is None or is_durable:
                raise
            log.warning("%s begins again: %s", name, error)
            hosted, epoch = make(), secrets.token_hex(16)
    except StartupError as error:  # counters and other objects go on
        log.error("%s", error)
        return Hosted(NotMade(error), "", declaration)
    kept.pop(name, None)
    return Hosted(hosted, epoch, declaration)


def _forget_volatile(journal: Journal | None, contents: Contents, hosting: Hosting, now: float) -> None:
    """Remove objects from the journal that were durable before: their states are in memory alone from now on."""
    names = [each.name for each in hosting.declarations if not each.durable and each.name in contents.objects]
    if journal and names:
        journal.commit(Changes(now, objects=dict.fromkeys(names)))


def _check_durability(directory: DataDirectory, durability: Durability) -> None:
    if durability == "none" and directory.journal.exists():
        raise StartupError(
            f"{directory} holds durable counters: durability 'none' would start again at 1; name another data directory"
        )


def _end_without_memory(uncaught: threading.ExceptHookArgs) -> None:
    """Report the error that ended a thread. Without memory, end the process, which could serve no client."""
    threading.__excepthook__(uncaught)
    if issubclass(uncaught.exc_type, MemoryError):
        fail(uncaught.exc_value or MemoryError())


def _stop(_number: int, _frame: object) -> NoReturn:
    raise Stopped(0)


def _stop_in_order(leave: Callable[[], None] | None) -> None:
    """Let the first signal end the main thread, and no other one interrupt that.

    :param leave: called for SIGTERM instead.
    """

    def stop(number: int, frame: object) -> None:
        if leave is not None and number == signal.SIGTERM:
            return leave()
        for each in _STOPPING:
            signal.signal(each, signal.SIG_IGN)
        _stop(number, frame)

    for number in _STOPPING:
        if signal.getsignal(number) is _stop:
            signal.signal(number, stop)


def _end_with(lifeline: Pipe) -> None:
    """End the main thread in order when the lifeline ends, and the process if that hangs on the disk."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    end_main_thread()
    exit_later(1)  # a commit that hangs is on the disk or is not, and no client waits for it
