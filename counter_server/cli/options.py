"""What the commands share: the options of a store or a manager."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from .. import settings
from ..commands import Command, check_lasts
from ..errors import InvalidRequest
from ..manager.directory import DataDirectory
from ..server.settings import ServerSettings
from ..state import open_state

_DEFAULTS = ServerSettings()
# Of a manager that a command starts. It is longer than the 2 s after which a waiting dashboard asks again, and short
# because an app may soon want a manager that hosts its objects.
IDLE_SECONDS = 3.0
_SMALLEST_JOURNAL = 2**20  # bytes
_PROXIES = click.IntRange(0, 16)
CAPS = {
    "counters": "Maximum number of counters. Beyond it, only existing ones can be changed.",
    "keys": "Maximum number of idempotency keys, remembered for 24 hours each. Beyond it, new ones are refused.",
    "clients": "Maximum number of remembered clients, also of each object. Beyond it, the longest idle is forgotten.",
    "journal_bytes": "Maximum size of the journal. Beyond it, writes are refused, and reads continue.",
    "connections": "Maximum number of connections. Beyond it, new ones wait.",
}


def directory_of(data_dir: str | None) -> DataDirectory:
    return DataDirectory(settings.default_data_dir() if data_dir is None else data_dir)


def url_of(store: str | None, data_dir: str | None) -> str:
    if data_dir is None:
        return store or os.environ.get(settings.STORE_VARIABLE) or settings.DEFAULT_STORE
    if store not in (None, settings.DEFAULT_STORE):
        raise InvalidRequest("--data-dir names a manager's directory, and --store something else: give one of them")
    return DataDirectory(data_dir).given_url


def setting(name: str, said: str, **attributes: Any) -> Callable[[Command], Command]:
    """Make the option for a field of `ServerSettings`."""
    return click.option(f"--{name.replace('_', '-')}", default=getattr(_DEFAULTS, name), help=said, **attributes)


def web(option: str, name: str, said: str, metavar: str = "NAME", **attributes: Any) -> Callable[[Command], Command]:
    """Make the option for a name in the web application's configuration."""
    name = f"COUNTER_SERVER_{name}"
    return click.option(option, name, envvar=name, help=said, metavar=metavar, **attributes)


def with_web_options(command: Command) -> Command:
    """Add the options of everything that is served: where, under which names, and behind how many proxies."""
    said = "Another host name by which browsers may reach this server, besides localhost; may be repeated."
    shown = "Counters to show in /metrics, such as 'orders.*'; may be repeated."
    for option in (
        web("--metrics-counter", "METRICS_COUNTERS", shown, "PATTERN", multiple=True),
        web("--trusted-proxy", "TRUSTED_PROXIES", "Number of proxies in front.", "COUNT", type=_PROXIES, default=0),
        click.option("--allow-host", help=said, metavar="NAME", multiple=True),
        setting("port", "The port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535)),
        setting("host", "The address to listen on."),
    ):
        command = option(command)
    return command


data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    help=f"The manager's data directory (default: ${settings.DATA_DIR_VARIABLE}, else ./instance/counter-server).",
)
store_option = click.option(
    "--store", metavar="URL", help="The URL of the store (default: manager://, in the data directory)."
)


def with_state(command: Command) -> Command:
    """Add the options of a store to a command, which is called with its `state`."""

    @data_dir_option
    @store_option
    @click.option(
        "--start/--no-start",
        default=True,
        envvar="COUNTER_SERVER_START",
        help="Start a manager if none is running; it exits when unused.",
    )
    @wraps(command)
    def with_state(*, data_dir: str | None, store: str | None, start: bool, **arguments: Any) -> None:
        options = settings.StoreOptions(idle_timeout=IDLE_SECONDS, start=start)
        with open_state(url_of(store, data_dir), options=options) as state:
            check_lasts(state.store)
            command(state, **arguments)

    return with_state


def with_manager_options(command: Command) -> Command:
    """Add the options of a manager to a command, which is called with `durability` and `caps`."""

    @wraps(command)
    def with_caps(**arguments: Any) -> None:
        command(caps=settings.Caps(**{name: arguments.pop(f"max_{name}") for name in CAPS}), **arguments)

    for name, said in reversed(CAPS.items()):
        click.option(
            f"--max-{name.replace('_', '-')}",
            type=click.IntRange(_SMALLEST_JOURNAL if name == "journal_bytes" else 1),
            default=getattr(settings.Caps, name),
            envvar=f"COUNTER_SERVER_MAX_{name.upper()}",
            show_envvar=True,
            help=said,
        )(with_caps)
    said = "commit: on disk before the answer; process: survives kill -9, not a power cut; none: in memory only."
    choices = click.Choice(settings.DURABILITIES)
    return setting("durability", said, type=choices, envvar="COUNTER_SERVER_DURABILITY")(with_caps)
