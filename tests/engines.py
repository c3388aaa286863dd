"""Real database servers for tests, each in a directory of its own, on sockets that the system chose."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
import pymysql
import pytest

from tests.processes import PATIENCE, Program, eventually

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")  # of Redis: on disk before it is answered


def find(program: str, package: str) -> str:
    """Return the path of a program; skip the test, and name the Debian package, if it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return found


class RedisServer:
    """`redis-server` on a socket file. After a kill it can start again, and reads its own files."""

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
        """Send a command and return the beginning of the answer."""
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
    """`memcached` on a socket file, or on a port that the system chose. A restart empties it."""

    def __init__(self, directory: Path, *options: str, tcp: bool = False) -> None:
        self._command = find("memcached", "memcached")
        self._options = options
        self._tcp = tcp
        directory.mkdir(exist_ok=True)
        self.socket = directory / "memcached.sock"
        self._port_file = directory / "port"
        self.start()

    def start(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name  # root has to name itself
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
        """Send a command and return the beginning of the answer."""
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


class PostgresServer:
    """`postgres` on a socket file, with one database. After a kill it can start again, and reads its own files.

    It refuses to run as root, so root runs it as the user `postgres`.
    """

    def __init__(self, *options: str) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
        self._programs = str(programs[-1]) if programs else os.path.dirname(find("postgres", "postgresql"))
        self.as_user: list[str] = []  # the beginning of a command that runs as that user
        self._options = options
        self.directory = Path(tempfile.mkdtemp(prefix="counter-server-"))  # a short name, for the socket
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
            self.as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self.url = self.url_of("postgres")
        self.socket = self.directory / ".s.PGSQL.5432"
        self._program: Program | None = None
        try:
            how = ("-U", "counter", "-A", "trust", "-E", "UTF8", "--locale", "C.UTF-8", "--no-sync")
            command = [*self.as_user, f"{self._programs}/initdb", "-D", f"{self.directory}/data", *how]
            subprocess.run(command, check=True, capture_output=True, cwd="/")
            access = self.directory / "data" / "pg_hba.conf"
            access.write_text(f"local all stranger scram-sha-256\n{access.read_text()}")
            self.start()
        except BaseException:
            self.__exit__()
            raise

    def start(self) -> None:
        where = ("-D", f"{self.directory}/data", "-k", str(self.directory), "-c", "listen_addresses=", *self._options)
        command = [*self.as_user, f"{self._programs}/postgres", *where]
        self._program = Program(*command[1:], program=command[0], cwd=Path("/"))
        eventually(self._answers, "an answer of postgres")

    def _answers(self) -> bool:
        assert self._program is not None
        assert self._program.running, self._program.errors
        try:
            return self.query("SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    def query(self, statement: LiteralString, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Execute a statement over a connection of its own, and return its rows."""
        with psycopg.connect(self.url_of(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @property
    def pid(self) -> int:
        assert self._program is not None
        return self._program.pid

    def url_of(self, database: str) -> str:
        return f"postgresql://counter@/{database}?host={self.directory}"

    @property
    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def backends(self) -> list[int]:
        """Return the pids of the processes that serve clients."""
        return [pid for (pid,) in self.query("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'")]

    def kill(self) -> None:
        """`kill -9` all its processes, as each has a session of its own."""
        assert self._program is not None
        self._program.send_signal(signal.SIGSTOP)  # so that it starts no others
        eventually(lambda: "T (stopped)" in Path(f"/proc/{self.pid}/status").read_text(), "the stop of postgres")
        children = self.children
        self._program.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the end of postgres")
        self._program.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._program is not None:
            if self._program.running:
                self._program.send_signal(signal.SIGQUIT)  # at once, and nothing of it is left in shared memory
                self._program.wait()
            self._program.__exit__(None, None, None)
        shutil.rmtree(self.directory)


class MariaDbServer:
    """`mariadbd` on a socket file, with one database. After a kill it can start again, and reads its own files."""

    def __init__(self, *options: str) -> None:
        self._command = find("mariadbd", "mariadb-server")
        self._options = options
        self.directory = Path(tempfile.mkdtemp(prefix="counter-server-"))  # a short name, for the socket
        self.socket = self.directory / "mysqld.sock"
        self.url = self.url_of("counters")
        self._user = f"--user={pwd.getpwuid(os.geteuid()).pw_name}"  # root has to say so
        self._program: Program | None = None
        try:
            install = [
                find("mariadb-install-db", "mariadb-server"),
                "--no-defaults",
                f"--datadir={self.directory}/data",
            ]
            how = (self._user, "--auth-root-authentication-method=normal", "--skip-test-db")
            subprocess.run([*install, *how], check=True, capture_output=True, cwd="/")
            self.start()
            self.query("CREATE DATABASE counters", "mysql")
        except BaseException:
            self.__exit__()
            raise

    def start(self) -> None:
        where = (f"--datadir={self.directory}/data", f"--socket={self.socket}", "--skip-networking", self._user)
        self._program = Program("--no-defaults", *where, *self._options, program=self._command, cwd=Path("/"))
        eventually(self._answers, "an answer of mariadbd")

    def _answers(self) -> bool:
        assert self._program is not None
        assert self._program.running, self._program.errors
        try:  # PyMySQL leaves the socket of a refused connection to the garbage collector
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(os.fspath(self.socket))
        except OSError:
            return False
        return True

    def query(self, statement: str, database: str = "counters") -> list[tuple[Any, ...]]:
        """Execute a statement over a connection of its own, with ANSI quotes, and return its rows."""
        connection = self.connect(database)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def connect(self, database: str = "counters") -> "pymysql.Connection[Any]":
        ansi = "SET SESSION sql_mode = CONCAT(@@sql_mode, ',ANSI_QUOTES')"
        where = os.fspath(self.socket)
        return pymysql.connect(unix_socket=where, user="root", database=database, init_command=ansi, autocommit=True)

    def url_of(self, database: str) -> str:
        return f"mariadb://root@/{database}?unix_socket={self.socket}"

    @property
    def pid(self) -> int:
        assert self._program is not None
        return self._program.pid

    def kill(self) -> None:
        """`kill -9`."""
        assert self._program is not None
        self._program.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._program is not None:
            self._program.__exit__(None, None, None)
        shutil.rmtree(self.directory)


class PgBouncer:
    """`pgbouncer` in transaction mode on a socket file, with two sessions of a server for all clients."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        directory = server.directory  # which is the user's that both run as
        settings = directory / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={directory} user=counter\n[pgbouncer]\npool_mode = transaction\n"
            f"default_pool_size = 2\nauth_type = any\nlisten_port = 6432\nunix_socket_dir = {directory}\n"
        )
        settings.chmod(0o644)
        command = [*server.as_user, find("pgbouncer", "pgbouncer"), str(settings)]
        self._program = Program(*command[1:], program=command[0], cwd=Path("/"))
        self.url = f"{server.url}&port=6432"
        eventually((directory / ".s.PGSQL.6432").exists, "pgbouncer listens")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._program.__exit__(None, None, None)
