"""The race: one small app behind a server, asked by many clients at once.

`python -m counter_server.server.demo.runner SERVER STRATEGY DESCRIPTOR...` serves the app on inherited sockets.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from flask import Flask, flash, render_template_string
from msgspec import Struct, convert

from ...errors import InvalidRequest, StartupError
from ...extension import SharedState
from ...manager.directory import DataDirectory
from ...manager.starter import python_command
from ..guard import guarded
from ..prove.load import Client, described
from ..strategies import JOIN, RACE, RECIPE, STRATEGIES, Run, pause

OURS = "ours"
_MODULE = "counter_server.server.demo.runner"
_PATIENCE = 30.0  # seconds that a client waits, that a server takes to start, and that a request waits for a manager
_BACKLOG = 1024  # connections that may wait to be accepted; a server may lower it to its own
_PROBES = 16  # simultaneous requests that find all processes of a server
_DATA = "data"  # our manager's directory, among the files of a server

# Of gunicorn, which reads its settings here: its control socket would be in the user's home. Older versions ignore it
# here, but would refuse it as an option.
control_socket_disable = True


class Server(Struct, frozen=True):
    """A server that runs the app."""

    title: str  # its usual name
    needs: tuple[str, ...] = ()  # packages
    processes: int = 1  # that answer at the same time
    gunicorn: tuple[str, ...] = ()  # its options if it is gunicorn


class Pair(Struct, frozen=True):
    """A strategy behind a server, with the expected verdict and its reason."""

    server: str
    strategy: str
    expected: str
    why: str

    @property
    def name(self) -> str:
        return f"{self.server}/{self.strategy}"

    @property
    def title(self) -> str:
        return f"{SERVERS[self.server].title} · {STRATEGIES[self.strategy].title}"

    def missing(self) -> str:
        """Say which packages are not installed; empty if all are."""
        strategy = STRATEGIES[self.strategy]
        needed = {*strategy.needs, *SERVERS[self.server].needs}
        if absent := sorted(name for name in needed if find_spec(name) is None):
            return f"{' and '.join(absent)} not installed: pip install 'counter-server[demo]'"
        if strategy.newer and find_spec(strategy.newer) is None:
            return f"the installed {strategy.needs[0]} is too old for it: upgrade it"
        return ""


SERVERS = convert(RACE["servers"], dict[str, Server])
PAIRS = convert(RACE["pairs"], list[Pair])


def chosen(only: Sequence[str]) -> list[Pair]:
    """Select pairs by server, strategy or both, as `waitress/ours`; all without a selection.

    :raises InvalidRequest: if no pair has one of the names.
    """
    names = {pair: {pair.server, pair.strategy, pair.name} for pair in PAIRS}
    for name in {*only}.difference(*names.values()):
        known = ", ".join(dict.fromkeys([pair.server for pair in PAIRS] + [pair.strategy for pair in PAIRS]))
        raise InvalidRequest(f"{name!r} is none of {known}, nor a pair of them, as waitress/ours")
    return [pair for pair in PAIRS if not only or names[pair] & {*only}]


class Reply(NamedTuple):
    """What one client got: a number, or else an error."""

    number: int | None
    seconds: float
    error: str = ""


def visit_at_once(
    port: int,
    count: int,
    path: str = "/",
    *,
    progress: Callable[[int], None] | None = None,
    patience: float = _PATIENCE,
) -> list[Reply]:
    """Send `count` requests at the same moment, each over a connection that is open by then.

    :param progress: is called after each number with how many have arrived.
    :param patience: seconds that each client waits.
    """
    barrier = threading.Barrier(count)

    def visit() -> Reply:
        began = time.monotonic()
        try:
            with closing(Client(f"http://127.0.0.1:{port}", patience)) as client:
                client.connect()
                barrier.wait(patience)
                began = time.monotonic()
                status, content = client.request("GET", path, Connection="close")
        except (OSError, HTTPException, threading.BrokenBarrierError) as failure:
            return Reply(None, time.monotonic() - began, str(failure) or type(failure).__name__)
        number = content if status == 200 and isinstance(content, int) else None
        return Reply(number, time.monotonic() - began, described(status, content) if number is None else "")

    clients = ThreadPoolExecutor(count)
    replies: list[Reply] = []
    try:
        for done in as_completed([clients.submit(visit) for _ in range(count)]):
            replies.append(done.result())
            if progress:
                progress(sum(reply.number is not None for reply in replies))
        return replies
    finally:  # after a Ctrl-C some clients still wait for the server, which ends next
        barrier.abort()
        clients.shutdown(wait=False)


class Round(Struct, frozen=True):
    """The result of one round; `numbers` are in the order of the replies."""

    right: bool  # the clients got exactly the numbers 1, 2, 3, …, each once
    unique: int
    duplicates: int  # clients with a number that another client had got
    skipped: int  # numbers, from 1 to the number of clients, that no client got
    unanswered: int
    slowest_seconds: float
    killed_after: int | None  # numbers that had arrived when the manager was killed; None if it was not
    numbers: list[int | None]
    errors: list[str]


def judge(replies: list[Reply], killed_after: int | None = None) -> Round:
    """Count what the clients of a round got."""
    numbers = [reply.number for reply in replies]
    given = {number for number in numbers if number is not None}
    unanswered = numbers.count(None)
    skipped = len(set(range(1, len(numbers) + 1)) - given)
    return Round(
        right=skipped == 0,
        unique=len(given),
        duplicates=len(numbers) - unanswered - len(given),
        skipped=skipped,
        unanswered=unanswered,
        slowest_seconds=round(max((reply.seconds for reply in replies if reply.number is not None), default=0.0), 3),
        killed_after=killed_after,
        numbers=numbers,
        errors=sorted({reply.error for reply in replies if reply.error}),
    )


class Outcome(NamedTuple):
    """All rounds of a pair, or the reason why it was left out."""

    pair: Pair
    rounds: list[Round]
    left_out: str = ""

    @property
    def verdict(self) -> str:
        return "left out" if self.left_out else "right" if all(each.right for each in self.rounds) else "wrong"

    @property
    def failed(self) -> bool:
        """Whether counter-server was not right."""
        return self.pair.strategy == OURS and self.verdict != "right"

    @property
    def shown(self) -> Round:
        """The first wrong round, else the slowest."""
        return min(self.rounds, key=lambda each: (each.right, each.right and -each.slowest_seconds))

    @property
    def sentence(self) -> str:
        """What happened, and why."""
        shown = self.shown
        ((number, times),) = Counter(number for number in shown.numbers if number).most_common(1) or [(0, 0)]
        parts = [self.pair.why]
        if self.verdict != self.pair.expected:
            reason = f"a client without a number got {shown.errors[0]!r}" if shown.errors else "please report it"
            parts = ["Right this time, by luck." if self.verdict == "right" else f"Not expected: {reason}."]
        if times > 1:
            parts.append(f"The number {number} was given {times} times.")
        if shown.killed_after is not None:
            parts.append(f"Killed after {shown.killed_after} answers.")
        if shown.unanswered:
            parts.append(f"{shown.unanswered} clients got no number.")
        if len(self.rounds) > 1:
            parts.append(f"Right in {sum(each.right for each in self.rounds)} of {len(self.rounds)} rounds.")
        return " ".join(parts)


def listen(port: int, sockets: int = 1) -> list[socket.socket]:
    """Listen on a port of loopback; 0 is a free port.

    :param sockets: how many sockets share the port; the system spreads the connections evenly over them.
    :raises StartupError: if the port is not available.
    """
    found: list[socket.socket] = []
    try:
        for _ in range(sockets):
            found.append(socket.create_server(("127.0.0.1", port), backlog=_BACKLOG, reuse_port=sockets > 1))
            port = found[-1].getsockname()[1]
    except OSError as error:
        raise StartupError(
            f"cannot listen on 127.0.0.1 port {port}: {os.strerror(error.errno or 0)}; choose another with --port, or"
            " omit it to use free ports"
        ) from error
    return found


class Running(NamedTuple):
    """A server that runs, on a port of loopback."""

    port: int
    manager: Callable[[], int | None]  # returns the process that holds the number for all others, if there is one


@contextmanager
def run_server(server: str, strategy: str, *, port: int = 0) -> Iterator[Running]:
    """Run a server, with the process of the textbook recipe if the strategy needs it, while the block runs.

    :raises StartupError: if the port is not available, or a process does not start.
    """
    options, way = SERVERS[server].gunicorn, STRATEGIES[strategy]
    with ExitStack() as stack:
        # With one socket for all, one process may accept every connection.
        sockets = listen(port, SERVERS[server].processes if server == "waitress" else 1)
        opened = [stack.enter_context(sock).fileno() for sock in sockets]
        recipe, environment = None, {}
        if way.recipe:
            recipe = stack.enter_context(guarded(python_command("counter_server.server.strategies", way.recipe)))
            environment[RECIPE] = recipe.expect(f"{RECIPE}=")
        command = python_command(_MODULE, server, strategy, *map(str, opened))
        if options:
            settings = ("-c", f"python:{_MODULE}", "-b", f"fd://{opened[0]}", *options, *way.gunicorn)
            command = python_command("gunicorn", *settings, f"{_MODULE}:create_app({strategy!r})")
        program = stack.enter_context(guarded(command, descriptors=opened, environment=environment))
        port = sockets[0].getsockname()[1]
        for sock in sockets:  # when the server ends, its clients must get an error
            sock.close()
        processes, seen = SERVERS[server].processes, set[int | None]()
        deadline = time.monotonic() + _PATIENCE
        while len(seen) < processes:
            program.check()
            if time.monotonic() > deadline:
                raise StartupError(f"{len(seen)} of {processes} processes answered in {_PATIENCE:g} seconds")
            replies = visit_at_once(port, 1 if processes == 1 else _PROBES, "/ready", patience=1)
            seen |= {reply.number for reply in replies} - {None}
        data = DataDirectory(program.directory / _DATA)
        yield Running(port, lambda: recipe.pid if recipe else data.manager_pid())


def run(pairs: list[Pair], tell: Callable[[str], None], *, clients: int, rounds: int, port: int) -> Iterator[Outcome]:
    """Yield the outcome of each pair.

    :param tell: is called with a few words about each step.
    :param rounds: for each pair, each with a new server.
    :raises StartupError: if the port is not available.
    """
    for sock in listen(port):
        sock.close()
    for pair in pairs:
        done: list[Round] = []
        left_out = pair.missing()
        try:
            while not left_out and len(done) < rounds:
                done.append(_round(pair, tell, clients, port))
        except StartupError as error:
            left_out = f"it could not be shown: {error}"
        yield Outcome(pair, done, left_out)


def _round(pair: Pair, tell: Callable[[str], None], clients: int, port: int) -> Round:
    killed_after: int | None = None
    kill = STRATEGIES[pair.strategy].killed
    tell(f"starting: {pair.title}")
    with run_server(pair.server, pair.strategy, port=port) as running:

        def kill_manager(answered: int) -> None:
            nonlocal killed_after
            if kill and killed_after is None and answered >= clients // 4 and (manager := running.manager()):
                os.kill(manager, signal.SIGKILL)
                killed_after = answered
                tell(f"killed after {answered} answers: {pair.title}")

        tell(f"{clients} clients: {pair.title}")
        replies = visit_at_once(running.port, clients, progress=kill_manager)
    if kill and killed_after is None:
        raise StartupError("there was no manager to kill")
    return judge(replies, killed_after)


def create_app(strategy: str) -> Flask:
    """Return the app of the question, which flashes the next number and shows it; its files go into this directory."""
    app = Flask(__name__)
    app.secret_key = os.urandom(16)
    app.config["COUNTER_SERVER_STORE"] = DataDirectory(Path.cwd() / _DATA).url
    app.config["COUNTER_SERVER_DEADLINE"] = _PATIENCE
    take = JOIN[strategy](Run("demo", app, SharedState(app), Path.cwd()))

    @app.get("/")
    def home() -> str:
        flash(str(take().number))
        return render_template_string("{{ get_flashed_messages() | join }}")

    @app.get("/ready")
    def ready() -> str:
        """Return the id of this process, slowly: simultaneous requests then reach the other processes too."""
        pause()
        return str(os.getpid())

    return app


def serve(server: str, strategy: str, *descriptors: str) -> None:
    """Serve the app until this process is killed."""
    if server == "waitress":
        import waitress

        for descriptor in descriptors:
            if os.fork() == 0:
                waitress.serve(create_app(strategy), sockets=[socket.socket(fileno=int(descriptor))], _quiet=True)
        os.wait()
    else:  # as app.run(threaded=..., processes=...) does
        from werkzeug.serving import make_server

        threaded, processes = server == "threaded", 10 if server == "processes" else 1
        fd = int(descriptors[0])
        make_server("127.0.0.1", 0, create_app(strategy), threaded, processes, fd=fd).serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
