"""The servers: with which command each is started, on a listening socket that all its processes inherit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...manager.starter import python_command
from .strategies import STRATEGIES

Command = Callable[[int, str, Path], list[str]]


@dataclass(frozen=True)
class Server:
    """One server.

    :param title: what people call it.
    :param command: for a listening socket's descriptor, a strategy and a directory.
    :param processes: that answer, and keep answering.
    :param sockets: on which the command is run, once on each; all have one port.
    :param needs: the packages that it takes, beyond what is always there.
    """

    title: str
    command: Command
    processes: int = 1
    sockets: int = 1
    needs: tuple[str, ...] = ()


def _python(name: str) -> Command:
    def command(descriptor: int, strategy: str, directory: Path) -> list[str]:
        return python_command("counter_server.server.demo.serving", name, str(descriptor), strategy, str(directory))

    return command


def _gunicorn(*options: str) -> Command:
    def command(descriptor: int, strategy: str, directory: Path) -> list[str]:
        settings = ["-c", "python:counter_server.server.demo.gunicorn_conf", "-b", f"fd://{descriptor}"]
        app = f"counter_server.server.demo.app:create_app({strategy!r}, {str(directory)!r})"
        return python_command("gunicorn", *settings, *options, *STRATEGIES[strategy].gunicorn, app)

    return command


_GEVENT = ("gunicorn", "gevent")

SERVERS = {
    "development": Server("development server, one thread", _python("development")),
    "threaded": Server("development server, threaded", _python("threaded")),
    "processes": Server("development server, processes=10", _python("processes")),
    # One process accepts as many connections as it can: with one socket for all, it may be that one gets every client.
    "waitress": Server("waitress, 4 processes", _python("waitress"), 4, sockets=4, needs=("waitress",)),
    "gunicorn": Server("gunicorn, 4 workers", _gunicorn("-w", "4"), 4, needs=("gunicorn",)),
    "preload": Server("gunicorn, 4 workers, preloaded", _gunicorn("-w", "4", "--preload"), 4, needs=("gunicorn",)),
    "gevent": Server("gunicorn, 1 gevent worker", _gunicorn("-k", "gevent"), needs=_GEVENT),
    "gevent-4": Server("gunicorn, 4 gevent workers", _gunicorn("-k", "gevent", "-w", "4"), 4, needs=_GEVENT),
}
