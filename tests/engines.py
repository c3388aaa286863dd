"""Real servers of other people's, for tests: each in a directory of its own, on sockets that the system chose."""

import os
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
