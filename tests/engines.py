"""Real servers of other people's, for tests: each in a directory of its own, on sockets that the system chose."""

import os
import pwd
import shutil
import socket
from pathlib import Path
from typing import Self

import pytest

from tests.processes import PATIENCE, Program, eventually


def find(program: str, package: str) -> str:
    """Where it is. Where it is not, the test is skipped, and says which Debian package has it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return found


class RedisServer:
    """`redis-server` on a socket file; started again after a kill, it reads what it had written."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._command = find("redis-server", "redis-server")
        self._directory = directory
        self._options = options
        directory.mkdir(exist_ok=True)
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        where = ("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._directory), "--save", "")
        self._program = Program(*where, *self._options, program=self._command)
        try:
            eventually(self._answers, "an answer of redis-server")
        except BaseException:
            self.__exit__()
            raise

    def _answers(self) -> bool:
        assert self._program.running, self._program.output
        try:
            return self.command("PING")[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False

    def command(self, *words: str) -> bytes:
        """What it answers, as it comes: for short answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(os.fspath(self.socket))
            connection.sendall(" ".join(words).encode() + b"\r\n")
            return connection.recv(65536)

    @property
    def pid(self) -> int:
        return self._program.pid

    def kill(self) -> None:
        """`kill -9`."""
        self._program.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._program.__exit__(None, None, None)


class MemcachedServer:
    """`memcached` on a socket file, or on a port that the system chose; started again, it has forgotten everything."""

    def __init__(self, directory: Path, *options: str, tcp: bool = False) -> None:
        self._command = find("memcached", "memcached")
        self._options = options
        self._tcp = tcp
        directory.mkdir(exist_ok=True)
        self.socket = directory / "memcached.sock"
        self._port_file = directory / "port"
        self.start()

    def start(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name  # root has to say that it means it
        where = ("-p", "-1", "-l", "127.0.0.1") if self._tcp else ("-s", str(self.socket))
        self._program = Program(
            *("-u", user, *where, *self._options),
            program=self._command,
            environment={"MEMCACHED_PORT_FILENAME": str(self._port_file)},
        )
        try:
            eventually(self._answers, "an answer of memcached")
        except BaseException:
            self.__exit__()
            raise

    @property
    def pid(self) -> int:
        return self._program.pid

    @property
    def port(self) -> int:
        return int(self._port_file.read_text().rpartition(": ")[2])

    @property
    def url(self) -> str:
        return f"memcached://127.0.0.1:{self.port}" if self._tcp else f"memcached://{self.socket}"

    def _answers(self) -> bool:
        assert self._program.running, self._program.errors
        try:
            return self.command("mn")[:2] in (b"MN", b"CL")
        except (OSError, ValueError):
            return False

    def command(self, line: str) -> bytes:
        """What it answers, as it comes: for short answers."""
        address: tuple[str, int] | str = ("127.0.0.1", self.port) if self._tcp else os.fspath(self.socket)
        with socket.socket(socket.AF_INET if self._tcp else socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(address)
            connection.sendall(line.encode() + b"\r\n")
            return connection.recv(65536)

    def kill(self) -> None:
        """`kill -9`."""
        self._program.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._program.__exit__(None, None, None)
