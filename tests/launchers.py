"""The launchers that people use, each of which serves the app of `app.py` in a directory, and a client for them."""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from http.cookiejar import Cookie, CookieJar
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.processes import PATIENCE, ROOT, Program, eventually

SYNC = "gunicorn, 4 sync workers"


@dataclass(frozen=True)
class Launcher:
    """A command that runs in the directory of `app.py`."""

    command: str
    program: str = sys.executable
    processes: int = 4  # that answer requests


_UWSGI = str(Path(sys.prefix) / "bin" / "uwsgi")
_UWSGI_OPTIONS = "--http-socket 127.0.0.1:0 --master --processes 4 --die-on-term"

LAUNCHERS = {
    SYNC: Launcher("-m gunicorn -w 4 -b 127.0.0.1:0 app:app"),
    "gunicorn, gthread, preloaded": Launcher(
        "-m gunicorn -w 4 -k gthread --threads 8 --preload -b 127.0.0.1:0 app:app"
    ),
    "flask run": Launcher("-m flask run --with-threads --port 0", processes=1),
    "waitress": Launcher("app.py", processes=1),
    "uWSGI, preforked": Launcher(f"{_UWSGI_OPTIONS} -w app:app", _UWSGI),
    "uWSGI, by file": Launcher(
        f"{_UWSGI_OPTIONS} --enable-threads --threads 4 --wsgi-file app.py --callable app", _UWSGI
    ),
}


def launch(stack: ExitStack, name: str, directory: Path) -> tuple[Program, str]:
    """Start a launcher in a directory; return the program and its URL."""
    launcher = LAUNCHERS[name]
    if not Path(launcher.program).exists():
        pytest.skip(f"{launcher.program} is not installed: pip install pyuwsgi")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    program = Program(*launcher.command.split(), program=launcher.program, cwd=directory, environment=environment)
    stack.enter_context(program)
    eventually(lambda: listening_port(program.pid) or not program.running, f"{name} listens")
    assert program.running, program.errors
    return program, f"http://127.0.0.1:{listening_port(program.pid)}"


def listening_port(group: int) -> int | None:
    """Return the port on which the first process of a group listens."""
    listening = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            listening[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    try:
        for link in Path(f"/proc/{group}/fd").iterdir():
            name = os.readlink(link)
            if name.startswith("socket:[") and name[8:-1] in listening:
                return listening[name[8:-1]]
    except OSError:
        return None
    return None


@dataclass(frozen=True)
class Answer:
    """A response to a browser."""

    status: int
    content: Any
    worker: str  # the pid of its process, if the app sends it


class Browser:
    """A client with cookies that opens a new connection for each request, to each server in turn."""

    def __init__(self, *urls: str, cookies: Iterable[Cookie] = ()) -> None:
        self._urls = urls
        self._turns = cycle(urls)
        self._cookies = CookieJar()
        for cookie in cookies:
            self._cookies.set_cookie(cookie)
        # No proxy: the environment may name one.
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self._cookies)
        self._opener = urllib.request.build_opener(*handlers)

    def tab(self) -> "Browser":
        """Return another browser with the cookies of this moment."""
        return Browser(*self._urls, cookies=self._cookies)

    def visit(self, path: str = "/", method: str = "GET") -> Answer:
        request = urllib.request.Request(next(self._turns) + path, method=method)  # noqa: S310 - http, to ourselves
        try:
            response = self._opener.open(request, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            status, headers, body = response.status or 0, response.headers, response.read()
        content = json.loads(body) if body[:1] in b"{0123456789" else body
        return Answer(status, content, headers.get("X-Worker", ""))
