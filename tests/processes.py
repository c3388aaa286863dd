"""Real programs for tests: started, observed through their output, and always gone afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from counter_server.server.prove.proof import group_members

_Found = TypeVar("_Found")

ROOT = Path(__file__).parent.parent
PATIENCE = 30.0  # seconds that any event may take on a busy machine before the test fails


def eventually(condition: Callable[[], _Found], what: str, seconds: float = PATIENCE) -> _Found:
    """Wait until `condition` returns a true value, and return it.

    :param what: names the awaited event in the error.
    :raises AssertionError: if the event does not occur within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not after {seconds} s: {what}")
        time.sleep(0.01)
    return found


def holder(data_dir: Path) -> int | None:
    """Return the pid of the manager that holds the lock of a data directory, according to the kernel."""
    try:
        inode = (data_dir / "manager.lock").stat().st_ino
    except FileNotFoundError:
        return None
    for _ in range(3):  # the kernel lists locks page by page: a reader may miss one while others are released
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, place, *_ = line.replace("-> ", "").split()
            if kind == "FLOCK" and place.rpartition(":")[2] == str(inode):
                return int(pid)
    return None


def end_manager(lock: Path) -> None:
    """Kill the manager that holds this lock, if any, and wait until it has ended."""
    while (pid := holder(lock.parent)) is not None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        eventually(lambda pid=pid: holder(lock.parent) != pid, "the end of a manager")  # type: ignore[misc]


def in_child(work: Callable[[], bytes]) -> bytes:
    """Fork, and return what `work` returns in the child; fail if it does not in time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writing, work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        with ExitStack() as stack:
            stack.callback(os.waitpid, pid, 0)
            stack.callback(os.kill, pid, signal.SIGKILL)
            eventually(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "the end of the child")
            stack.pop_all()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed"
        return pipe.read()


def children(supervisor: int, kind: str) -> list[int]:
    """Return the "worker" or "manager" processes of a supervisor, which leads its process group.

    They are known by their open files: a manager has the lock, a worker shares one listening socket with the
    supervisor. (A process that shares more sockets was forked just now, and has yet to close them.)
    """
    sockets = {name for name in _opened(supervisor) if name.startswith("socket:")}
    found = []
    for pid in group_members(supervisor):
        opened = _opened(pid)
        manager = any(name.endswith("manager.lock") for name in opened)
        if pid != supervisor and (manager if kind == "manager" else not manager and len(opened & sockets) == 1):
            found.append(pid)
    return found


def _opened(pid: int) -> set[str]:
    opened = set()
    with suppress(FileNotFoundError):  # the process has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # the file was closed
                if int(link.name) > 2:
                    opened.add(os.readlink(link))
    return opened


def open_in(pid: int) -> set[str]:
    """Return the pipes and sockets that a process has open, except its standard streams."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(link) if int(link.name) > 2 else "")
    return {name for name in found if name.startswith(("pipe:", "socket:"))}


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop all threads of a process while the block runs."""

    def stopped() -> bool:
        try:
            threads = list(Path(f"/proc/{pid}/task").iterdir())
            return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile, or the process
            os.kill(pid, 0)
            return False

    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(stopped, f"the stop of process {pid}")
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed
            os.kill(pid, signal.SIGCONT)


def fill(file: Path) -> None:
    """Fill the file system of `file`."""
    with file.open("wb", buffering=0) as whole, suppress(OSError):
        while whole.write(b"\0" * 4096):
            pass
    assert shutil.disk_usage(file.parent).free == 0


class Program:
    """A program in its own process group. By default it is Python, with a script of the checkout and its options.

    :param arguments: of the program.
    :param descriptors: open files that it inherits.
    """

    def __init__(
        self,
        *arguments: str | Path,
        program: str = sys.executable,
        environment: dict[str, str] | None = None,
        cwd: Path = ROOT,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [program, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",  # a path may hold any bytes
            start_new_session=True,
            pass_fds=descriptors,
        )
        self.pid = self._process.pid
        self.output: list[str] = []
        self.errors: list[str] = []
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self.output)),
            threading.Thread(target=self._read, args=(self._process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: object, lines: list[str]) -> None:
        for line in stream:  # type: ignore[attr-defined]
            lines.append(line.rstrip("\n"))
            if lines is self.output:
                self._lines.put(line.rstrip("\n"))

    def expect(self, start: str) -> str:
        """Wait for a printed line that begins with `start`, and return the rest of it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                line = self._lines.get(timeout=0.05)
            except Empty:
                if not any(reader.is_alive() for reader in self._readers) and self._lines.empty():
                    break
                if not self.running:  # its last words are on their way
                    for reader in self._readers:
                        reader.join(1)
                continue
            if line.startswith(start):
                return line[len(start) :].strip()
        raise AssertionError(f"{start!r} was not printed; output {self.output}, errors {self.errors}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the program and return its exit status."""
        status = self._process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status

    def stop(self) -> int:
        """Send SIGTERM, as an operator would, and return the exit status."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill this process only, with `kill -9`."""
        self._process.kill()
        self._process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill every remaining process of the group."""
        if self.running:
            self.kill()
        for pid in group_members(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        eventually(lambda: not group_members(self.pid), f"the end of all processes of group {self.pid}")
        for reader in self._readers:
            reader.join(PATIENCE)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


class Manager(Program):
    """`manager_process.py` on a data directory, ready for clients."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        super().__init__("manager_process.py", "--data-dir", data_dir, *options)
        try:
            self.url = self.expect("Manager ready:")
        except AssertionError:
            self.__exit__(None, None, None)
            raise


class Server(Program):
    """`run.py` on a free port, ready for requests."""

    def __init__(self, *options: str | Path, environment: dict[str, str] | None = None) -> None:
        super().__init__("run.py", "--port", "0", *options, environment=environment)
        try:
            self.url = self.expect("Serving on ")
        except AssertionError:
            self.__exit__(None, None, None)
            raise

    def children(self, kind: str) -> list[int]:
        """Return the pids of its children of one kind, `"worker"` or `"manager"`, recognised by their open files."""
        return children(self.pid, kind)
