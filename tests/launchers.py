"""The launchers that people use, for tests: each serves the app of `app.py` in a directory."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT, Program, eventually

_UWSGI = Path(sys.prefix) / "bin" / "uwsgi"


@dataclass(frozen=True)
class Launcher:
    """A command that runs in the directory of `app.py`."""

    arguments: tuple[str, ...]
    program: str = sys.executable
    processes: int = 4  # that answer requests


LAUNCHERS = {
    "gunicorn, 4 sync workers": Launcher(("-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:0", "app:app")),
    "gunicorn, gthread, preloaded": Launcher(
        (
            *("-m", "gunicorn", "-w", "4", "-k", "gthread", "--threads", "8", "--preload"),
            *("-b", "127.0.0.1:0", "app:app"),
        )
    ),
    "flask run": Launcher(("-m", "flask", "run", "--with-threads", "--port", "0"), processes=1),
    "waitress": Launcher(("app.py",), processes=1),
    "uWSGI, preforked": Launcher(
        ("--http-socket", "127.0.0.1:0", "--master", "--processes", "4", "--die-on-term", "-w", "app:app"), str(_UWSGI)
    ),
    "uWSGI, by file": Launcher(
        (
            *("--http-socket", "127.0.0.1:0", "--master", "--processes", "4", "--die-on-term"),
            *("--enable-threads", "--threads", "4", "--wsgi-file", "app.py", "--callable", "app"),
        ),
        str(_UWSGI),
    ),
}


def launch(stack: ExitStack, name: str, directory: Path) -> tuple[Program, str]:
    """Start a launcher in a directory; return the program and its URL."""
    launcher = LAUNCHERS[name]
    if not Path(launcher.program).exists():
        pytest.skip(f"{launcher.program} is not installed: pip install uwsgi (needs a C compiler)")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    program = Program(*launcher.arguments, program=launcher.program, cwd=directory, environment=environment)
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
