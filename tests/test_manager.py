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
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import pytest
from msgspec import msgpack

from counter_server import State
from counter_server.errors import AccessDenied, DeadlineExceeded
from counter_server.ledger import Changes, Ledger
from counter_server.manager import client as client_module
from counter_server.manager.client import StateProxy
from counter_server.manager.directory import DataDirectory
from counter_server.manager.wire import HANDSHAKE_SECONDS, LARGEST_FRAME, Connection, connect
from counter_server.operations import Batch, Increment
from counter_server.status import Status
from tests.journals import Committing
from tests.load import at_once, impatient, open_client
from tests.processes import PATIENCE, Manager, Program, eventually, frozen
from tests.standard_server import KEY, StandardManager
from tests.test_combiner import InterruptedAt

_Made = TypeVar("_Made")


@pytest.fixture
def manager(start_manager: Callable[..., Manager]) -> Manager:
    return start_manager("--durability", "process")


@pytest.fixture
def state(manager: Manager) -> Iterator[State]:
    with open_client(manager.url) as state:
        yield state


def status(state: State) -> Status:
    """The manager's own figures."""
    told = state.status()
    assert told is not None
    return told


def connection_of(state: State) -> str:
    """The kernel's name for the socket that this process's state uses."""
    return os.readlink(f"/proc/self/fd/{cast(Any, state.store)._connection.fileno()}")


# Interrupted calls


class Interrupted(BaseException):
    """What a signal handler raises in the middle of a call, as Ctrl-C does."""


@contextmanager
def interrupted_when_sent(descriptor: int) -> Iterator[None]:
    """Interrupt the main thread when something that it sent waits in the other end of this socket."""

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise Interrupted

    def watch() -> None:
        main = threading.main_thread().ident
        assert main is not None
        eventually(lambda: bytes_on_the_way(descriptor) > 0, "the call on its way")
        signal.pthread_kill(main, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGALRM, before)


def bytes_on_the_way(descriptor: int) -> int:
    """How much was sent on this socket, and not read yet."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def check_that_an_interrupted_call_shifts_no_reply(
    pid: int, descriptor: int, increment: Callable[[], int], value: Callable[[], int]
) -> None:
    """Freeze the manager, interrupt a call that waits for it, and look at what the next calls are answered.

    :param value: tells the number that was given out last, by a connection of its own.
    """
    first = value()
    with frozen(pid), pytest.raises(Interrupted), interrupted_when_sent(descriptor):
        increment()
    # It has reached the manager, so it takes the number after the first.
    eventually(lambda: value() == first + 1, "the number that the interrupted call took")
    assert [increment() for _ in range(3)] == [first + 2, first + 3, first + 4]


def test_an_interrupted_call_shifts_no_later_reply(manager: Manager, state: State) -> None:
    state.counter("c").increment()
    descriptor = cast(Any, state.store)._connection.fileno()
    with open_client(manager.url) as other:
        check_that_an_interrupted_call_shifts_no_reply(
            manager.pid, descriptor, state.counter("c").increment, lambda: other.counter("c").value
        )


def test_an_interrupted_call_shifts_every_later_reply_of_a_plain_proxy(tmp_path: Path) -> None:
    """What the test above would find on the standard library's proxy: the reason for ours."""
    address = str(tmp_path / "plain.sock")
    with Program("-m", "tests.standard_server", address) as server, ThreadPoolExecutor(1) as another_thread:
        server.expect("ready")
        plain = StandardManager(address, KEY)
        plain.connect()
        proxy = cast(Any, plain).shared()
        value = proxy.value
        proxy.increment()  # connects
        with pytest.raises(AssertionError, match=r"\[2, 3, 4\] == \[3, 4, 5\]"):
            check_that_an_interrupted_call_shifts_no_reply(
                server.pid,
                proxy._tls.connection.fileno(),
                proxy.increment,
                # The standard proxy has a connection for each thread.
                lambda: int(another_thread.submit(value).result()),
            )


def test_a_deadline_while_the_manager_is_frozen_shifts_no_later_reply(manager: Manager) -> None:
    with open_client(manager.url) as late_one, open_client(manager.url) as patient:
        assert late_one.counter("c").increment() == 1
        with frozen(manager.pid), impatient(late_one, 0.3):
            before = time.monotonic()
            with pytest.raises(DeadlineExceeded) as late:
                late_one.counter("c").increment()
            assert time.monotonic() - before >= 0.3
        assert late.value.outcome == "unknown"
        # The late one reached the manager, and is counted once, whenever it is read.
        eventually(lambda: patient.counter("c").value == 2, "the late increment")
        assert [late_one.counter("c").increment() for _ in range(3)] == [3, 4, 5]
        assert patient.counter("c").value == 5


def test_every_thread_keeps_its_deadline_while_the_manager_is_frozen(manager: Manager) -> None:
    outcomes = []
    with open_client(manager.url) as state:
        state.counter("c").increment()

        def work() -> None:
            with pytest.raises(DeadlineExceeded) as late:
                state.counter("c").increment()
            outcomes.append(late.value.outcome)

        threads = [threading.Thread(target=work) for _ in range(16)]
        with frozen(manager.pid), impatient(state):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
        possible = 1 + outcomes.count("unknown")
        assert len(outcomes) == 16
        assert outcomes.count("not_applied") >= 1
        last = state.counter("c").increment()
        assert 2 <= last <= possible + 1


# Restarts, forks and crowds


def test_a_proxy_finds_a_restarted_manager_within_the_deadline(
    start_manager: Callable[..., Manager], stack: ExitStack
) -> None:
    manager = start_manager()
    state = stack.enter_context(open_client(manager.url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    manager.kill()
    answers: list[int] = []
    caller = threading.Thread(target=lambda: answers.append(state.counter("c").increment()))
    caller.start()
    start_manager()
    caller.join(PATIENCE)
    assert answers == [2]


def test_without_a_manager_the_error_says_what_to_do_and_that_nothing_was_counted(data_dir: Path) -> None:
    with open_client(f"manager://{data_dir}", deadline=0.1) as state, pytest.raises(DeadlineExceeded) as error:
        state.counter("c").increment()
    assert error.value.outcome == "not_applied"
    assert "counter-server manager --data-dir" in str(error.value)
    assert "nothing was counted" in str(error.value)


def test_a_fork_after_use_gives_the_child_its_own_client_and_connection(state: State) -> None:
    parent_values = [state.counter("c").increment()]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            values = [state.counter("c").increment() for _ in range(200)]
            os.write(writer, msgpack.encode((values, connection_of(state))))
        finally:
            os._exit(0)
    os.close(writer)
    parent_values += [state.counter("c").increment() for _ in range(200)]
    with os.fdopen(reader, "rb") as pipe:
        child_values, childs_connection = msgpack.decode(pipe.read())
    os.waitpid(child, 0)
    assert sorted(parent_values + child_values) == list(range(1, 402))
    assert childs_connection != connection_of(state)


def test_100_fresh_clients_connect_at_once(manager: Manager) -> None:
    def increment() -> int:
        with open_client(manager.url, deadline=PATIENCE) as fresh:
            return fresh.counter("c").increment()

    assert sorted(at_once(100, increment)) == list(range(1, 101))


def test_32_waiting_threads_share_round_trips(manager: Manager, state: State) -> None:
    state.counter("c").increment()
    before = status(state)
    values: list[int] = []
    threads = [threading.Thread(target=lambda: values.append(state.counter("c").increment())) for _ in range(32)]
    waiting = cast(Any, state)._counters._combiner._waiting
    with frozen(manager.pid):  # while it is away all but the first have to wait
        for thread in threads:
            thread.start()
        eventually(lambda: len(waiting) == 31, "31 threads waiting behind one")
    for thread in threads:
        thread.join()
    assert sorted(values) == list(range(2, 34))
    after = status(state)
    assert after.operations - before.operations == 32
    assert after.batches - before.batches == 2


def test_batches_of_workers_that_wait_at_the_same_time_share_a_commit() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def commit(_changes: Changes) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    ledger = Ledger(journal=Committing(commit))
    answers: list[object] = []

    def send() -> None:
        answers.extend(ledger.apply(Batch(os.urandom(16), 1, [Increment("c")])))

    threads = [threading.Thread(target=send) for _ in range(64)]
    threads[0].start()
    assert begun.wait(PATIENCE)  # its commit is under way
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: len(ledger._combiner._waiting) == 63, "63 batches waiting behind one")
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(cast(list[int], answers)) == list(range(1, 65))
    assert (ledger.operations, ledger.batches, ledger.commits) == (64, 64, 2)


def test_in_memory_each_batch_has_a_commit_of_its_own_and_none_is_lost() -> None:
    ledger = Ledger()
    answers: list[object] = []

    def send() -> None:
        client = os.urandom(16)
        for sequence in range(1, 101):
            answers.extend(ledger.apply(Batch(client, sequence, [Increment("c")])))

    at_once(8, send)
    assert sorted(cast(list[int], answers)) == list(range(1, 801))
    assert (ledger.operations, ledger.batches, ledger.commits) == (800, 800, 800)


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


def authenticated(data_dir: Path, first: object) -> Connection:
    """A connection that has shown the key and said `first`, with a test's time for all that follows."""
    directory = DataDirectory(data_dir)

    def begun() -> Connection:
        connection = connect(str(directory.socket), directory.existing_key("manager"))
        connection.set_deadline(time.monotonic() + PATIENCE)
        try:
            connection.send(first)
        except BaseException:
            connection.close()
            raise
        return connection

    return within_the_handshake(begun)


def greeted(data_dir: Path) -> tuple[Connection, str, str]:
    """A connection to the counters, and the kind and the words of the manager's greeting."""

    def begun() -> tuple[Connection, str, str]:
        connection = authenticated(data_dir, (None, "accept_connection", ("ledger", None), {}))
        try:
            kind, words = connection.recv()
        except BaseException:
            connection.close()
            raise
        return connection, kind, words

    return within_the_handshake(begun)


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        os.urandom(300),
        b"\x80\x00\x00\x00",  # a frame of 2 GiB
        b"\xff\xff\xff\xff",  # negative, for who reads it so
        frame(b"#WELCOME#"),
        frame(pickle.dumps(os.getcwd)),
    ],
    ids=["http", "noise", "2 GiB", "negative length", "no digest", "a pickle"],
)
def test_a_peer_that_does_not_know_the_key_is_closed_and_told_nothing(
    manager: Manager, state: State, data_dir: Path, words: bytes
) -> None:
    state.counter("c").increment()
    with raw(data_dir) as peer:
        peer.sendall(words)
        said = received_until_closed(peer)
    # Its own challenge, and at the most that the answer was wrong.
    assert b"Traceback" not in said
    assert str(data_dir).encode() not in said
    assert len(said) < 200
    assert state.counter("c").increment() == 2
    assert manager.running


def test_a_silent_peer_is_closed(manager: Manager, data_dir: Path) -> None:
    with raw(data_dir) as peer:
        assert b"Traceback" not in received_until_closed(peer)
    assert manager.running


def test_a_peer_that_drips_is_closed_by_the_total_time(manager: Manager, data_dir: Path) -> None:
    def drip() -> None:
        peer.sendall((200).to_bytes(4, "big"))
        for _ in range(199):
            peer.sendall(b"x")
            time.sleep(0.1)  # each in time, all of them not

    with raw(data_dir) as peer, pytest.raises((BrokenPipeError, ConnectionResetError)):
        drip()
    assert manager.running


def test_a_wrong_key_is_refused_with_a_clear_error(manager: Manager, data_dir: Path) -> None:
    (data_dir / "manager.key").write_text("0" * 64)
    with open_client(manager.url) as state, pytest.raises(AccessDenied, match="does not accept this key") as error:
        state.counter("c").increment()
    assert error.value.outcome == "not_applied"


@pytest.mark.parametrize(
    "function",
    [
        "shutdown",
        "create",
        "get_methods",
        "debug_info",
        "number_of_objects",
        "dummy",
        "incref",
        "decref",
        "__init__",
        "",
    ],
)
@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["plain", "python -O"])
def test_none_of_the_standard_servers_functions_can_be_called(
    stack: ExitStack, data_dir: Path, function: str, flags: tuple[str, ...]
) -> None:
    manager = shared_manager(stack, data_dir, flags)
    peer = authenticated(data_dir, (None, function, (), {}))
    try:
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.recv()
    finally:
        peer.close()
    assert manager.running


def shared_manager(stack: ExitStack, data_dir: Path, flags: tuple[str, ...]) -> Manager:
    class Optimised(Manager):
        def __init__(self) -> None:
            super(Manager, self).__init__(*flags, "manager_process.py", "--data-dir", data_dir)
            self.url = self.expect("Manager ready:")

    return stack.enter_context(Optimised())


@pytest.mark.parametrize(
    "call",
    [
        ("ledger", "__init__", (), {}),
        ("ledger", "#GETVALUE", (), {}),
        ("ledger", "_commit", ([],), {}),
        ("ledger", "methods", (), {}),
        ("0", "apply", (), {}),
        (None, "apply", (), {}),
        ("7f0000000000", "apply", (), {}),
        ("ledger", "apply", (), {}),
        ("ledger", "apply", ("no batch",), {}),
        ("ledger", "apply", ((b"short", 1, [("increment", "c")]),), {}),
        ("ledger", "apply", ((b"x" * 16, 1, []),), {}),
        ("ledger", "apply", ((b"x" * 16, 1, [("increment", "c", 0)]),), {}),
        ("ledger", "apply", ((b"x" * 16, 1, [("increment", "c", 2**63)]),), {}),
        ("ledger", "apply", ((b"x" * 16, 1, [("increment", "c\x00")]),), {}),
        ("ledger", "apply", ((b"x" * 16, 1, [("exec", "import os")]),), {}),
        ("ledger", "apply", ((b"x" * 16, 0, [("increment", "c")]),), {}),
        ("ledger", "apply", ((b"x" * 16, -1, [("increment", "c")]),), {}),
        "not a call",
        17,
    ],
    ids=repr,
)
def test_a_call_that_is_not_offered_or_not_valid_closes_the_connection_and_changes_nothing(
    manager: Manager, state: State, data_dir: Path, call: object
) -> None:
    state.counter("c").increment()
    peer, kind, _ = greeted(data_dir)
    try:
        assert kind == "#RETURN"
        peer.send(call)
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.recv()
    finally:
        peer.close()
    assert state.counters().counters == [("c", 1)]
    assert manager.running


def test_a_frame_over_the_limit_closes_the_connection(manager: Manager, data_dir: Path) -> None:
    peer, kind, _ = greeted(data_dir)
    try:
        assert kind == "#RETURN"
        with suppress(BrokenPipeError, ConnectionResetError):
            peer.send_bytes(bytes(LARGEST_FRAME + 1))
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.recv()
    finally:
        peer.close()
    assert manager.running


def test_the_connection_of_another_user_is_refused(manager: Manager, data_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for path in (data_dir, *data_dir.parents):
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o011)
    (data_dir / "manager.sock").chmod(0o666)
    child = os.fork()
    if child == 0:
        said = b"?"
        try:
            os.setuid(65534)
            with raw(data_dir) as peer:
                said = received_until_closed(peer)
        finally:
            os._exit(0 if said == b"" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert manager.running


def test_200_half_open_peers_do_not_stop_the_service(manager: Manager, state: State, data_dir: Path) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(raw(data_dir))
        assert [state.counter("c").increment() for _ in range(10)] == list(range(1, 11))
        assert manager.running


def test_batches_resent_over_another_connection_are_answered_from_memory(manager: Manager, data_dir: Path) -> None:
    batch = Batch(os.urandom(16), 1, [Increment("c"), Increment("c")])
    directory = DataDirectory(data_dir)
    answers = []
    for _ in range(3):
        proxy = StateProxy(directory)
        answers.append(proxy.apply(batch, time.monotonic() + PATIENCE))
        proxy.close()
    assert answers == [[1, 2]] * 3


def test_the_standard_handshake_is_the_one_that_is_spoken(manager: Manager, data_dir: Path) -> None:
    """Challenge and response of the standard library itself, step by step: no home-made cryptography."""
    directory = DataDirectory(data_dir)

    def greeting() -> str:
        with closing(connect(str(directory.socket))) as connection:
            key = directory.existing_key("manager")
            answer_challenge(cast(Any, connection), key)
            deliver_challenge(cast(Any, connection), key)
            connection.send((None, "accept_connection", ("ledger", None), {}))
            return str(connection.recv()[0])

    assert within_the_handshake(greeting) == "#RETURN"


# What a review found


def test_a_fork_that_the_interpreter_is_not_told_of_is_noticed(state: State) -> None:
    """As uWSGI forks: the state is made, and here even used, before; no hook is called."""
    assert state.counter("c").increment() == 1
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)  # a child with a request for the interpreter's lock waits for a thread it has not
    reader, writer = os.pipe()
    children = []
    for _ in range(3):
        child = ctypes.PyDLL(None).fork()
        if child == 0:
            try:
                os.write(writer, msgpack.encode([state.counter("c").increment() for _ in range(50)]))
            finally:
                os._exit(0)
        children.append(child)
    sys.setswitchinterval(before)
    os.close(writer)
    values = [state.counter("c").increment() for _ in range(50)]
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    for child in children:
        os.waitpid(child, 0)
    unpacker = [msgpack.decode(part) for part in split_messages(data)]
    assert sorted([1, *values, *(value for part in unpacker for value in part)]) == list(range(1, 202))


def split_messages(data: bytes) -> list[bytes]:
    """The arrays of 50 small integers that follow one another in `data`."""
    starts = [place for place in range(len(data)) if data[place : place + 3] == b"\xdc\x00\x32"]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def test_many_pages_at_once_disturb_no_increment(state: State) -> None:
    """Their answers together are larger than a frame may be."""
    names = [f"{number:04}" + "x" * 251 for number in range(1000)]
    todo = iter(names)
    at_once(20, lambda: [state.counter(name).set(1) for name in todo])
    turns = iter(range(70))

    def work() -> tuple[str, int]:
        if next(turns) % 14 == 0:
            return "increment", state.counter("c").increment()
        return "page", len(state.counters(limit=1000).counters)

    answers = at_once(70, work)
    assert sorted(value for kind, value in answers if kind == "increment") == [1, 2, 3, 4, 5]
    assert [size for kind, size in answers if kind == "page"] == [1000] * 65


@pytest.mark.traces_opcodes
def test_an_exception_of_a_handler_while_it_sends_or_takes_the_lock_leaves_the_store_usable(state: State) -> None:
    """At every moment at which a signal's handler could run in the proxy."""
    assert state.counter("c").increment() == 1
    moment, struck = 1, True
    while struck:
        before = state.counter("c").value
        interrupt = InterruptedAt(client_module, moment)
        with suppress(KeyboardInterrupt), interrupt:
            state.counter("c").increment()
        struck = interrupt.place is not None
        following = state.counter("c").increment()
        assert following in (before + 1, before + 2), interrupt.place
        assert state.counter("c").value == following, interrupt.place
        moment += 1
    assert moment > 10


def test_a_manager_that_cannot_start_a_thread_goes_on_when_it_can(
    manager: Manager, state: State, data_dir: Path
) -> None:
    """Its memory is limited to what it has, so there is none for the stack of another thread."""
    state.counter("c").increment()
    unlimited = resource.prlimit(manager.pid, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{manager.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(manager.pid, resource.RLIMIT_AS, (size + 2**20, unlimited[1]))  # less than a thread's stack
    try:
        with raw(data_dir) as peer:
            assert received_until_closed(peer) == b""
    finally:
        resource.prlimit(manager.pid, resource.RLIMIT_AS, unlimited)
    with open_client(manager.url) as fresh:
        assert fresh.counter("c").increment() == 2
