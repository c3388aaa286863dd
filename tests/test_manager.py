"""The manager and its proxies: interrupted calls, forks, crowds, shared round trips, and peers that mean no good."""

import ctypes
import fcntl
import os
import pickle
import resource
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.managers import BaseProxy, Server
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar, cast

import pytest
from msgspec import msgpack

from counter_server import Counter, State, errors
from counter_server.manager import client as client_module
from counter_server.manager.client import StateProxy, end_manager
from counter_server.manager.directory import DataDirectory
from counter_server.manager.server import StateServer
from counter_server.manager.wire import HANDSHAKE_SECONDS, Connection, Greeting, connect, largest_frame
from counter_server.objects import Declaration
from counter_server.plain import largest_value
from tests.load import at_once, impatient, open_client
from tests.processes import PATIENCE, Manager, Program, eventually, frozen
from tests.standard_server import KEY, StandardManager
from tests.test_combiner import InterruptedAt

_Made = TypeVar("_Made")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the manager that all tests share, except those that ask for `tmp_path / "own"`."""
    return tmp_path_factory.mktemp("manager") / "data"


@pytest.fixture(scope="module")
def manager(data_dir: Path) -> Iterator[Manager]:
    with Manager(data_dir, "--durability", "process") as manager:
        yield manager
        assert manager.running


@pytest.fixture
def state(manager: Manager) -> Iterator[State]:
    with open_client(manager.url, deadline=PATIENCE) as state:
        yield state


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of the test's own counter."""
    return str(request.node.name)[:100]


@pytest.fixture
def counter(state: State, name: str) -> Counter:
    return state.counter(name)


# Interrupted calls


class Interrupted(BaseException):
    """What a signal handler raises in the middle of a call, as Ctrl-C does."""


@contextmanager
def interrupted_when_sent(descriptor: int) -> Iterator[None]:
    """Interrupt the main thread when something that it sent waits in the other end of this socket."""

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise Interrupted

    def watch() -> None:
        eventually(lambda: any(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))), "the call on its way")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGALRM, before)


def check_that_an_interrupted_call_shifts_no_reply(
    pid: int, descriptor: int, increment: Callable[[], int], value: Callable[[], int]
) -> None:
    """Interrupt a call that waits for a frozen manager. `value` has a connection of its own."""
    first = value()
    with frozen(pid), pytest.raises(Interrupted), interrupted_when_sent(descriptor):
        increment()
    eventually(lambda: value() == first + 1, "the number that the interrupted call took")
    assert [increment() for _ in range(3)] == [first + 2, first + 3, first + 4]


def test_an_interrupted_call_shifts_no_later_reply(manager: Manager, state: State, counter: Counter) -> None:
    counter.increment()
    descriptor = cast(Any, state.store)._connection.fileno()
    with open_client(manager.url, deadline=PATIENCE) as other:
        same = other.counter(counter.name)
        check_that_an_interrupted_call_shifts_no_reply(manager.pid, descriptor, counter.increment, lambda: same.value)


@pytest.mark.slow
def test_an_interrupted_call_shifts_every_later_reply_of_a_plain_proxy(tmp_path: Path) -> None:
    """What the test above would find on the standard library's proxy: the reason for ours."""
    address = str(tmp_path / "plain.sock")
    with Program("-m", "tests.standard_server", address) as server, ThreadPoolExecutor(1) as another_thread:
        server.expect("ready")
        plain = StandardManager(address, KEY)
        plain.connect()
        proxy = cast(Any, plain).shared()
        proxy.increment()  # connects
        with pytest.raises(AssertionError, match=r"\[2, 3, 4\] == \[3, 4, 5\]"):
            check_that_an_interrupted_call_shifts_no_reply(
                server.pid,
                proxy._tls.connection.fileno(),
                proxy.increment,
                lambda: int(another_thread.submit(proxy.value).result()),  # on a connection of that thread
            )


def test_a_missed_deadline_shifts_no_later_reply(manager: Manager, state: State, name: str) -> None:
    with open_client(manager.url, deadline=PATIENCE) as late_one:
        counter = late_one.counter(name)
        assert counter.increment() == 1
        with frozen(manager.pid), impatient(late_one, 0.2), pytest.raises(errors.DeadlineExceeded) as late:
            counter.increment()
        assert late.value.outcome == "unknown"
        eventually(lambda: state.counter(name).value == 2, "the late increment")
        assert [counter.increment() for _ in range(3)] == [3, 4, 5]


@pytest.mark.slow
def test_every_thread_keeps_its_deadline_while_the_manager_is_frozen(
    manager: Manager, state: State, counter: Counter
) -> None:
    counter.increment()

    def outcome() -> str:
        with pytest.raises(errors.DeadlineExceeded) as late:
            counter.increment()
        return late.value.outcome

    with frozen(manager.pid), impatient(state):
        outcomes = at_once(16, outcome)
    assert outcomes.count("not_applied") >= 1
    assert 2 <= counter.increment() <= 2 + outcomes.count("unknown")


# Restarts, forks and crowds


def test_without_a_manager_the_error_says_what_to_do(tmp_path: Path) -> None:
    with (
        open_client(f"manager://{tmp_path}/own", deadline=0.1) as state,
        pytest.raises(errors.DeadlineExceeded) as late,
    ):
        state.counter("c").increment()
    assert late.value.outcome == "not_applied"
    assert f"'counter-server manager --data-dir {tmp_path}/own'); nothing was counted" in str(late.value)


def in_a_child(fork: Callable[[], int], work: Callable[[], Any]) -> Callable[[], Any]:
    """Work in a child that `fork` makes; return a function that waits for its end and returns its answer."""
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        try:
            os.write(writer, msgpack.encode(work()))
        finally:
            os._exit(0)
    os.close(writer)

    def answer() -> Any:
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return msgpack.decode(said)

    return answer


@pytest.mark.parametrize("fork", [os.fork, ctypes.PyDLL(None).fork], ids=["noticed", "as uWSGI forks, unnoticed"])
def test_a_child_of_a_fork_has_its_own_client_and_connection(
    state: State, counter: Counter, fork: Callable[[], int]
) -> None:
    def work() -> list[Any]:
        values = [counter.increment() for _ in range(50)]
        return [values, os.readlink(f"/proc/self/fd/{cast(Any, state.store)._connection.fileno()}")]

    assert counter.increment() == 1
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)  # a child with a request for the interpreter's lock waits for a thread it has not
    answers = [in_a_child(fork, work) for _ in range(3)]
    sys.setswitchinterval(before)
    done = [work(), *(answer() for answer in answers)]
    assert sorted(value for values, _ in done for value in values) == list(range(2, 202))
    assert len({connection for _, connection in done}) == 4


def test_100_fresh_clients_connect_at_once(manager: Manager, name: str) -> None:
    def increment() -> int:
        with open_client(manager.url, deadline=PATIENCE) as fresh:
            return fresh.counter(name).increment()

    assert sorted(at_once(100, increment)) == list(range(1, 101))


@pytest.mark.slow
def test_many_pages_at_once_disturb_no_increment(state: State, counter: Counter) -> None:
    """Their answers together are larger than a frame may be."""
    todo = iter([f"{number:04}" + "x" * 251 for number in range(1000)])
    at_once(20, lambda: [state.counter(name).set(1) for name in todo])
    turns = iter(range(70))

    def work() -> int:
        return len(state.counters(limit=1000).counters) if next(turns) % 14 else counter.increment()

    assert sorted(at_once(70, work)) == [1, 2, 3, 4, 5] + [1000] * 65


# Peers that mean no good


def raw(data_dir: Path) -> socket.socket:
    """A connection that has said nothing yet."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(PATIENCE)
    peer.connect(str(DataDirectory(data_dir).socket))
    return peer


def received_until_closed(peer: socket.socket) -> bytes:
    """All that the manager says before it closes the connection, which it must."""
    received = b""
    try:
        while chunk := peer.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def within_the_handshake(make: Callable[[], _Made]) -> _Made:
    """What `make` gives, tried again, as a session would, if the machine was too busy for the handshake's time."""
    end = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        try:
            return make()
        except (TimeoutError, EOFError, BrokenPipeError, ConnectionResetError):
            if time.monotonic() < began + HANDSHAKE_SECONDS or time.monotonic() > end:
                raise


def begun(data_dir: Path, first: object, answers: int = 0) -> tuple[Connection, list[Any]]:
    """A connection that has shown the key and said `first`, and its answers. It has a test's time for what follows."""
    directory = DataDirectory(data_dir)

    def begin() -> tuple[Connection, list[Any]]:
        with ExitStack() as after_an_error:
            connection = connect(str(directory.socket), directory.existing_key("manager"))
            after_an_error.callback(connection.close)
            connection.set_deadline(time.monotonic() + PATIENCE)
            connection.send(first)
            answered = [connection.recv() for _ in range(answers)]
            after_an_error.pop_all()
        return connection, answered

    return within_the_handshake(begin)


def greeted(data_dir: Path) -> tuple[Connection, str, str]:
    """A connection to the counters, and the kind and the words of the manager's greeting."""
    connection, [(kind, words)] = begun(data_dir, (None, "accept_connection", ("ledger", None), {}), 1)
    return connection, kind, words


PICKLE = pickle.dumps(os.getcwd)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x80\x00\x00\x00",  # a frame of 2 GiB
        b"\xff\xff\xff\xff",  # negative, for a peer that reads it so
        b"\x00\x00\x00\x09#WELCOME#",
        len(PICKLE).to_bytes(4, "big") + PICKLE,
    ],
)
def test_a_peer_that_does_not_know_the_key_is_closed_and_told_nothing(
    counter: Counter, data_dir: Path, words: bytes
) -> None:
    with raw(data_dir) as peer:
        peer.sendall(words)
        said = received_until_closed(peer)
    assert (b"Traceback" in said, str(data_dir).encode() in said) == (False, False)
    assert len(said) < 200  # its own challenge, and at the most that the answer was wrong
    assert counter.increment() == 1


@pytest.mark.slow
def test_a_peer_that_drips_is_closed(manager: Manager, data_dir: Path) -> None:
    with raw(data_dir) as dripping:
        dripping.sendall((200).to_bytes(4, "big"))

        def is_closed() -> bool:  # each byte comes in time, all of them do not
            with suppress(BrokenPipeError, ConnectionResetError):
                return dripping.send(b"x") == 0
            return True

        eventually(is_closed, "the end of the connection")


def test_a_wrong_key_is_refused_with_a_clear_error(manager: Manager, data_dir: Path) -> None:
    right = (data_dir / "manager.key").read_text()
    (data_dir / "manager.key").write_text("0" * 64)
    try:
        with open_client(manager.url) as state, pytest.raises(errors.AccessDenied, match="this key") as error:
            state.counter("c").increment()
    finally:
        (data_dir / "manager.key").write_text(right)
    assert error.value.outcome == "not_applied"


def assert_closes(peer: Connection) -> None:
    with closing(peer), pytest.raises((EOFError, ConnectionResetError)):
        peer.recv()


@pytest.mark.parametrize("flags", [(), pytest.param(("-O",), marks=pytest.mark.slow)])
def test_none_of_the_standard_servers_functions_can_be_called(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with Program(*flags, "manager_process.py", "--data-dir", tmp_path / "own") as manager:
        manager.expect("Manager ready:")
        for function in (*Server.public, "__init__", ""):
            assert_closes(begun(tmp_path / "own", (None, function, (), {}))[0])
        assert manager.running


BATCHES: list[Any] = [(b"short", 1, [("increment", "c")]), (b"x" * 16, 0, [("increment", "c")]), (b"x" * 16, 1, [])]
BATCHES += [(b"x" * 16, 1, [operation]) for operation in (("increment", "c", 0), ("increment", "c\x00"), ("exec", "x"))]


@pytest.mark.parametrize(
    "call",
    [
        *(("ledger", method, (), {}) for method in ("__init__", "#GETVALUE", "apply")),
        *((ident, "apply", (), {}) for ident in (None, "7f0000000000")),
        *(("ledger", "_commit", ([],), {}), ("ledger", "apply", ("no batch",), {})),
        *(("ledger", "apply", (batch,), {}) for batch in BATCHES),
        *("not a call", 17, bytes(largest_frame() + 1)),
    ],
    ids=lambda call: repr(call)[:60],
)
def test_an_invalid_call_closes_the_connection_and_changes_nothing(
    state: State, counter: Counter, data_dir: Path, call: object
) -> None:
    counter.increment()
    before = state.counters(limit=1000)
    peer, *_ = greeted(data_dir)
    with suppress(BrokenPipeError, ConnectionResetError):  # of the frame that is too large
        peer.send(call)
    assert_closes(peer)
    assert state.counters(limit=1000) == before


def test_the_connection_of_another_user_is_refused(manager: Manager, data_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for path in (data_dir, *data_dir.parents):
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o011)
    (data_dir / "manager.sock").chmod(0o666)

    def said() -> bytes:
        os.setuid(65534)
        with raw(data_dir) as peer:
            return received_until_closed(peer)

    refusal = b"#REFUSED: this manager serves uid 0 alone, and not uid 65534"
    assert in_a_child(os.fork, said)()[4:] == refusal


def test_the_standard_handshake_is_the_one_that_is_spoken(manager: Manager, data_dir: Path) -> None:
    """Challenge and response of the standard library itself, step by step: no home-made cryptography."""
    directory = DataDirectory(data_dir)
    assert isinstance(StateProxy(directory), BaseProxy)
    assert issubclass(StateServer, Server)

    def greeting() -> str:
        with closing(connect(str(directory.socket))) as connection:
            key = directory.existing_key("manager")
            answer_challenge(cast(Any, connection), key)
            deliver_challenge(cast(Any, connection), key)
            connection.send((None, "accept_connection", ("ledger", None), {}))
            return str(connection.recv()[0])

    assert within_the_handshake(greeting) == "#RETURN"


@pytest.mark.slow
@pytest.mark.traces_opcodes
def test_an_exception_at_any_moment_leaves_the_store_usable(counter: Counter) -> None:
    """At every moment at which a signal's handler could run in the proxy, also while it takes the lock."""
    assert counter.increment() == 1
    moment, struck = 1, True
    while struck:
        before = counter.value
        interrupt = InterruptedAt(client_module, moment)
        with suppress(KeyboardInterrupt), interrupt:
            counter.increment()
        struck = interrupt.place is not None
        following = counter.increment()
        assert following in (before + 1, before + 2), interrupt.place
        assert counter.value == following, interrupt.place
        moment += 1
    assert moment > 10


@pytest.mark.slow
def test_a_manager_that_cannot_start_a_thread_goes_on_when_it_can(tmp_path: Path) -> None:
    """Its memory is limited to what it has, so there is none for the stack of another thread."""
    with Manager(tmp_path / "own") as manager, open_client(manager.url) as state:
        state.counter("c").increment()
        unlimited = resource.prlimit(manager.pid, resource.RLIMIT_AS)
        size = int(Path(f"/proc/{manager.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(manager.pid, resource.RLIMIT_AS, (size + 2**20, unlimited[1]))  # less than a thread's stack
        try:
            with raw(tmp_path / "own") as peer:
                assert received_until_closed(peer) == b""
        finally:
            resource.prlimit(manager.pid, resource.RLIMIT_AS, unlimited)
        with open_client(manager.url, deadline=PATIENCE) as fresh:
            assert fresh.counter("c").increment() == 2


# The proxy alone, on a connection that a test scripts


class Scripted:
    """A connection that receives what a test gives it, an answer or an error to raise, while its lock is held."""

    def __init__(self, *received: object, sending: Exception | None = None, closing: Exception | None = None) -> None:
        self.received, self.sending, self.closing = list(received), sending, closing
        self.sent: list[Any] = []
        self.deadline, self.is_closed = 0.0, False
        self.lock = threading.Lock()

    def set_deadline(self, deadline: float) -> None:
        self.deadline = deadline

    def send(self, message: object) -> None:
        assert self.lock.locked()
        if self.sending:
            raise self.sending
        self.sent.append(message)

    def recv(self) -> Any:
        assert self.lock.locked()
        found = self.received.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    def recv_bytes(self) -> bytes:
        found = self.recv()
        return found if isinstance(found, bytes) else msgpack.encode(found)

    def close(self) -> None:
        self.is_closed = True
        if self.closing:
            assert self.lock.locked()
            raise self.closing


def proxy_on(connection: Scripted | None, **options: Any) -> Any:
    proxy: Any = StateProxy(DataDirectory("/nowhere"), **options)
    proxy._connection = proxy._latest = connection
    if connection is not None:
        connection.lock = proxy._calling
    return proxy


def test_a_call_keeps_its_connection_only_if_the_whole_reply_came() -> None:
    good = Scripted(("#RETURN", 7), ("#ERROR", "no"))
    proxy = proxy_on(good)
    assert proxy.ask("check", (), 5.0) == 7
    with pytest.raises(errors.BatchRefused, match="no"):
        proxy.ask("check", (), 6.0)
    assert (good.sent, good.deadline, proxy._connection) == ([("ledger", "check", ())] * 2, 6.0, good)
    for broken, sent in (
        (Scripted(("#RETURN", 1), sending=BrokenPipeError()), False),
        (Scripted(("#RETURN", 1), sending=ConnectionResetError()), False),
        (Scripted(sending=TimeoutError()), True),
        (Scripted(EOFError()), True),
        (Scripted(5), True),
        (Scripted(Interrupted()), None),
    ):
        proxy = proxy_on(broken)
        with pytest.raises(Interrupted if sent is None else errors.Disconnected) as error:
            proxy.ask("check", (), 5.0)
        assert (getattr(error.value, "sent", None), broken.is_closed, proxy._connection) == (sent, True, None)


def test_a_proxy_waits_for_the_end_and_closes_its_copy_of_the_connection() -> None:
    for end in (EOFError(), ConnectionResetError(), b""):
        proxy_on(last := Scripted(end)).await_end(9.0)
        assert (last.received, last.deadline) == ([], 9.0)
    with pytest.raises(TimeoutError):
        proxy_on(Scripted(TimeoutError())).await_end(9.0)
    proxy_on(None).await_end(9.0)
    proxy = proxy_on(last := Scripted(closing=OSError("closed already")))
    proxy.close()
    proxy.close()
    assert (last.is_closed, proxy._connection, proxy._latest) == (True, None, None)
    proxy = proxy_on(last := Scripted())
    with proxy._calling:  # of a call of the parent
        proxy.after_fork()
        assert not proxy._calling.locked()
        proxy._calling.acquire()
    assert (last.is_closed, proxy._connection, proxy._latest) == (True, None, None)


def test_a_greeting_says_why_a_client_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    declaration = Declaration("obj", "module", "Class", msgpack.encode(((), {})))
    made: list[Any] = []

    def make(*_: object, deadline: float) -> Any:
        if isinstance(made[-1], FileNotFoundError):
            raise made[-1]
        made[-1].lock.acquire()
        return made[-1]

    monkeypatch.setattr(client_module, "connect", make)
    monkeypatch.setattr(DataDirectory, "existing_key", lambda *_: b"key")
    proxy = proxy_on(None, declaration=declaration)
    for answer, kind, reason in (
        (("#FULL", "it has 5"), errors.Disconnected, "accepts no more clients: it has 5"),
        (("#ERROR", "it hosts others"), errors.NotHosted, "obj = .* is not hosted in .*: it hosts others"),
        (EOFError(), errors.Disconnected, "the connection to the manager broke"),
    ):
        made.append(Scripted(answer))
        with pytest.raises(kind, match=reason) as error:
            proxy.ask("check", (), 5.0)
        assert getattr(error.value, "sent", False) is False
        assert (made[-1].is_closed, proxy._connection) == (True, None)
        assert made[-1].sent == [
            (None, "accept_connection", Greeting("object:obj", declaration, largest_value=largest_value()))
        ]
    for epoch, is_lost in (("one", False), ("one", False), ("two", True), ("two", False)):
        made.append(Scripted(("#RETURN", epoch), ("#RETURN", None)))
        with pytest.raises(errors.StateLost, match="object:obj begins again") if is_lost else nullcontext():
            proxy.ask("check", (), 5.0)
        assert made[-1].is_closed == is_lost
        assert proxy._connection is (None if is_lost else proxy._latest)
        proxy.close()

    def start(_directory: DataDirectory, before: int | None, deadline: float) -> None:
        assert (before, deadline) == (None, 5.0)
        made.append(Scripted(("#RETURN", "one"), ("#RETURN", None)))

    made.append(FileNotFoundError())
    with pytest.raises(errors.Disconnected, match="no manager is running in /nowhere"):
        proxy_on(None).ask("check", (), 5.0)
    proxy_on(None, starter=SimpleNamespace(start=start)).ask("check", (), 5.0)
    monkeypatch.setattr(StateProxy, "_callmethod", lambda *_, **__: msgpack.encode("another version"))
    with pytest.raises(errors.Unsupported, match="is of another version"):
        proxy.status(5.0)


class Held:
    """A directory whose manager has these pids, at one look after the other."""

    holder = "pid 7"

    def __init__(self, *pids: int | None, is_held: bool = True) -> None:
        self.pids, self.held = list(pids), is_held

    def is_held(self) -> bool:
        return self.held

    def manager_pid(self) -> int | None:
        return self.pids.pop(0) if len(self.pids) > 1 else self.pids[0]


@pytest.mark.parametrize(
    ("directory", "error", "expected"),
    [
        (Held(None, is_held=False), None, None),
        (Held(7, is_held=False), None, None),
        (Held(7), None, 7),
        (Held(None, None, 7), None, 7),
        (Held(None), None, None),
        (Held(7), errors.BatchRefused("it is mine"), "continues: it is mine"),
        (Held(7), errors.Disconnected("late", sent=True), "was asked to end and has not: late"),
        (Held(7, None), TimeoutError("late"), "was asked to end and has not: late"),
        (Held(7, 8), TimeoutError("late"), 7),
    ],
)
def test_the_end_of_a_manager_is_asked_for_and_awaited(
    monkeypatch: pytest.MonkeyPatch, directory: Held, error: Exception | None, expected: int | str | None
) -> None:
    clock = SimpleNamespace(now=0.0)
    asked: list[object] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds

    class Asking:
        def __init__(self, _directory: Held) -> None:
            pass

        def ask(self, *request: object) -> None:
            asked.append(request)

        def await_end(self, deadline: float) -> None:
            asked.append(deadline)
            if error is not None:
                raise error

        def close(self) -> None:
            asked.append("closed")

    monkeypatch.setattr(client_module, "StateProxy", Asking)
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    for options in ({}, {"for_another": True})[: 1 + (directory.pids == [7])]:
        asked.clear()
        with pytest.raises(errors.DirectoryHeld, match=expected) if isinstance(expected, str) else nullcontext():
            assert end_manager(cast(Any, directory), 0.1, **options) == expected
        assert asked == ([("end", (bool(options),), 0.1), 0.1, "closed"] if directory.held else [])
