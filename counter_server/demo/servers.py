"""The servers: with which commands each is started, on a listening socket that all its processes inherit."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .strategies import STRATEGIES

Command = list[str]


@dataclass(frozen=True)
class Server:
    """One server.

    :param title: what people call it.
    :param commands: for a listening socket's descriptor, a strategy and a directory; each is a process.
    :param processes: that answer, and keep answering.
    :param needs: the packages that it takes, beyond what is always there.
    """

    title: str
    commands: Callable[[int, str, Path], list[Command]]
    processes: int = 1
    needs: tuple[str, ...] = ()


def _python(name: str, times: int = 1) -> Callable[[int, str, Path], list[Command]]:
    def commands(descriptor: int, strategy: str, directory: Path) -> list[Command]:
        arguments = [name, str(descriptor), strategy, str(directory)]
        return [[sys.executable, "-m", "counter_server.demo.serving", *arguments]] * times

    return commands


def _gunicorn(*options: str) -> Callable[[int, str, Path], list[Command]]:
    def commands(descriptor: int, strategy: str, directory: Path) -> list[Command]:
        settings = ["-c", "python:counter_server.demo.gunicorn_conf", "-b", f"fd://{descriptor}"]
        app = f"counter_server.demo.app:create_app({strategy!r}, {str(directory)!r})"
        return [[sys.executable, "-m", "gunicorn", *settings, *options, *STRATEGIES[strategy].gunicorn, app]]

    return commands


SERVERS = {
    "development": Server("development server, one thread", _python("development")),
    "threaded": Server("development server, threaded", _python("threaded")),
    "processes": Server("development server, processes=10", _python("processes")),
    "waitress": Server("waitress, 4 processes", _python("waitress", 4), processes=4),
    "gunicorn": Server("gunicorn, 4 workers", _gunicorn("-w", "4"), processes=4, needs=("gunicorn",)),
    "preload": Server(
        "gunicorn, 4 workers, preloaded", _gunicorn("-w", "4", "--preload"), processes=4, needs=("gunicorn",)
    ),
    "gevent": Server("gunicorn, 1 gevent worker", _gunicorn("-k", "gevent"), needs=("gunicorn", "gevent")),
    "gevent-4": Server(
        "gunicorn, 4 gevent workers",
        _gunicorn("-k", "gevent", "-w", "4"),
        processes=4,
        needs=("gunicorn", "gevent"),
    ),
}
