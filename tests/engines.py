"""Real engines for tests: each in a directory of its own, on a socket file, and all of one shape."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psycopg
import pymysql
import pytest

from tests.processes import PATIENCE, Manager, Program, eventually

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")  # of Redis: on disk before it is answered


def find(program: str, package: str) -> str:
    """Return the path of a program; skip the test, and name the Debian package, if it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return found


def _user() -> str:
    """Return the name of this process's user, which root has to tell some engines."""
    return pwd.getpwuid(os.geteuid()).pw_name


class Engine:
    """A server, which after a kill can start again. A place on it is a database, or a prefix of keys."""

    arguments: list[str]  # the program and its arguments
    program: Program
    socket: Path
    url: str
    urls: tuple[str, str]  # of a place, on the socket file, and on a port

    def launch(self) -> Program:
        program, *arguments = self.arguments
        return Program(*arguments, program=program, cwd=Path("/"))

    def answers(self) -> bool:
        """Return whether it serves; an OSError also means that it does not."""
        return True

    def url_of(self, place: str, through: int | None = None) -> str:
        """Return the URL of a place, on the socket or through a proxy on a port."""
        return self.urls[bool(through)].format(place=place, socket=self.socket, port=through)

    def make(self, place: str) -> str:
        """Make an empty place, and return its URL."""
        return self.url_of(place)

    def start(self) -> None:
        self.program = self.launch()

        def is_ready() -> bool:
            assert self.program.running, (self.program.output, self.program.errors)
            with suppress(OSError):
                return self.answers()
            return False

        try:
            eventually(is_ready, f"an answer of {type(self).__name__}")
        except BaseException:
            self.__exit__()
            raise

    @property
    def pid(self) -> int:
        return self.program.pid

    def serving(self) -> list[int]:
        """Return the processes that answer clients."""
        return [self.pid]

    def kill(self) -> None:
        self.program.__exit__(None, None, None)

    def restart(self) -> None:
        self.kill()
        self.start()

    @property
    def harms(self) -> list[Callable[[], object]]:
        """Return what may happen to it under load: it or one of its connections is killed."""
        return [self.restart]

    def command(self, *words: str) -> bytes:
        """Send a line over a connection of its own, and return the beginning of the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(os.fspath(self.socket))
            connection.sendall(" ".join(words).encode() + b"\r\n")
            return connection.recv(65536)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.program.__exit__(None, None, None)


class RedisServer(Engine):
    urls = ("unix://{socket}?prefix={place}", "redis://localhost:{port}?prefix={place}")

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        where = ("--port", "0", "--unixsocket", str(self.socket), "--dir", str(directory), "--save", "")
        self.arguments = [find("redis-server", "redis-server"), *where, *options]
        self.start()

    def answers(self) -> bool:
        return self.command("PING")[:5] in (b"+PONG", b"-NOAU")


class MemcachedServer(Engine):
    """A restart empties it."""

    urls = ("memcached://{socket}?prefix={place}", "memcached://localhost:{port}?prefix={place}")

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "memcached.sock"
        self.url = f"memcached://{self.socket}"
        self.arguments = [find("memcached", "memcached"), "-u", _user(), "-s", str(self.socket), *options]
        self.start()

    def answers(self) -> bool:
        return self.command("mn")[:2] in (b"MN", b"CL")


class _SqlServer(Engine, ABC):
    """A place is a database. The directory is temporary, because its name has to be short for the socket."""

    first: str  # the name of its first database

    def __init__(self, *options: str) -> None:
        self.options = options
        self.directory = Path(tempfile.mkdtemp(prefix="counter-server-"))
        try:
            self.install()
            self.start()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self.url = self.url_of(self.first)

    @abstractmethod
    def install(self) -> None:
        """Write the files of an empty database server to `directory`."""

    @abstractmethod
    def connect(self, database: str) -> Any:
        """Return a connection that commits by itself."""

    def query(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Execute a statement over a connection of its own, and return its rows."""
        with closing(self.connect(database or self.first)) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def make(self, place: str) -> str:
        self.query(f"CREATE DATABASE {place}")
        return self.url_of(place)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        shutil.rmtree(self.directory)


class PostgresServer(_SqlServer):
    """It refuses to run as root, so root runs it as the user `postgres`."""

    first = "postgres"
    urls = (
        "postgresql://counter@/{place}?host={socket.parent}",
        "postgresql://counter@127.0.0.1:{port}/{place}?sslmode=disable&gssencmode=disable",
    )
    _clients = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"

    def install(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
        place = str(programs[-1]) if programs else os.path.dirname(find("postgres", "postgresql"))
        self.as_user: list[str] = []  # the beginning of a command that runs as that user
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
            self.as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self.socket = self.directory / ".s.PGSQL.5432"
        how = ("-U", "counter", "-A", "trust", "-E", "UTF8", "--locale", "C.UTF-8", "--no-sync")
        command = [*self.as_user, f"{place}/initdb", "-D", f"{self.directory}/data", *how]
        subprocess.run(command, check=True, capture_output=True, cwd="/")
        where = ("-D", f"{self.directory}/data", "-k", str(self.directory), "-c", "listen_addresses=")
        self.arguments = [*self.as_user, f"{place}/postgres", *where, *self.options]
        access = self.directory / "data" / "pg_hba.conf"
        access.write_text(f"local all stranger scram-sha-256\n{access.read_text()}")

    def answers(self) -> bool:
        try:
            return self.query("SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    def connect(self, database: str) -> Any:
        return psycopg.connect(self.url_of(database), autocommit=True)

    def serving(self) -> list[int]:
        return [*(pid for (pid,) in self.query(f"SELECT pid {self._clients}")), self.pid]

    def end_sessions(self) -> None:
        self.query(f"SELECT pg_terminate_backend(pid) {self._clients}")

    def kill_backend(self) -> None:
        """Kill the process of one client; the server then ends all others."""
        with suppress(ProcessLookupError):
            os.kill(eventually(lambda: self.serving()[:-1], "a session")[0], signal.SIGKILL)

    @property
    def harms(self) -> list[Callable[[], object]]:
        return [self.end_sessions, self.kill_backend, self.restart]

    def kill(self) -> None:
        """`kill -9` all its processes, as each has a session of its own."""
        self.program.send_signal(signal.SIGSTOP)  # so that it starts no others
        eventually(lambda: "T (stopped)" in Path(f"/proc/{self.pid}/status").read_text(), "the stop of postgres")
        children = [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        self.program.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the end of postgres")
        super().kill()

    def __exit__(self, *exception: object) -> None:
        if self.program.running:
            self.program.send_signal(signal.SIGQUIT)  # at once, and nothing of it is left in shared memory
            self.program.wait()
        super().__exit__(*exception)


class MariaDbServer(_SqlServer):
    first = "mysql"
    urls = ("mariadb://root@/{place}?unix_socket={socket}", "mariadb://root@127.0.0.1:{port}/{place}")

    def install(self) -> None:
        self.socket = self.directory / "mysqld.sock"
        where = ("--no-defaults", f"--datadir={self.directory}/data")
        user = f"--user={_user()}"
        how = (user, "--auth-root-authentication-method=normal", "--skip-test-db")
        install = [find("mariadb-install-db", "mariadb-server"), *where, *how]
        subprocess.run(install, check=True, capture_output=True, cwd="/")
        options = (f"--socket={self.socket}", "--skip-networking", user, *self.options)
        self.arguments = [find("mariadbd", "mariadb-server"), *where, *options]

    def start(self) -> None:
        super().start()
        self.query("CREATE DATABASE IF NOT EXISTS counters", "mysql")
        self.first = "counters"

    def answers(self) -> bool:
        # Not PyMySQL, which leaves the socket of a refused connection to the garbage collector.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(self.socket))
        return True

    def connect(self, database: str) -> Any:
        ansi = "SET SESSION sql_mode = CONCAT(@@sql_mode, ',ANSI_QUOTES')"
        where = os.fspath(self.socket)
        return pymysql.connect(unix_socket=where, user="root", database=database, init_command=ansi, autocommit=True)

    def end_sessions(self) -> None:
        own = "SELECT id FROM information_schema.processlist WHERE command <> 'Daemon' AND id <> connection_id()"
        for (connection,) in self.query(own):
            with suppress(pymysql.Error):  # it is gone already
                self.query(f"KILL {connection}")

    @property
    def harms(self) -> list[Callable[[], object]]:
        return [self.end_sessions, self.restart]


class ManagerServer(Engine):
    """Our own manager. It has one place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()

    def launch(self) -> Manager:
        manager = Manager(self.directory)
        self.url = manager.url
        return manager

    def make(self, place: str) -> str:  # noqa: ARG002
        return self.url


def start(kind: str, directory: Path) -> Engine:
    """Start an engine that keeps each number on its disk, if it can."""
    match kind:
        case "manager":
            return ManagerServer(directory / "data")
        case "redis":
            return RedisServer(directory, *DURABLE)
        case "memcached":
            return MemcachedServer(directory)
        case "postgresql":
            return PostgresServer()
        case _:
            return MariaDbServer()


@contextmanager
def pgbouncer(server: PostgresServer) -> Iterator[str]:
    """Run `pgbouncer` in transaction mode on a socket file, with two sessions for all clients, and return its URL."""
    directory = server.directory  # which is the user's that both run as
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={directory} user=counter\n[pgbouncer]\npool_mode = transaction\n"
        f"default_pool_size = 2\nauth_type = any\nlisten_port = 6432\nunix_socket_dir = {directory}\n"
    )
    settings.chmod(0o644)
    command = [*server.as_user, find("pgbouncer", "pgbouncer"), str(settings)]
    with Program(*command[1:], program=command[0], cwd=Path("/")):
        eventually((directory / ".s.PGSQL.6432").exists, "pgbouncer listens")
        yield f"{server.url}&port=6432"
