"""The command line's options that say what a manager takes at the most; they stand on more than one command."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from .settings import Caps

_SMALLEST_JOURNAL = 2**20  # bytes
_CAPS = {
    "counters": "Beyond so many counters no other one is made; those that are there count on.",
    "keys": "Beyond so many idempotency keys no other one is taken, until some are 24 hours old.",
    "clients": "Maximum number of remembered clients, one for each process that wrote in the last hour. Beyond it, the"
    " one that is idle longest is forgotten.",
    "journal_bytes": "Beyond so many bytes the journal is full: writes are refused, and reads go on.",
    "connections": "Beyond so many connections the next ones wait.",
}


def caps_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what a manager takes at the most; it is called with `caps`."""

    @wraps(command)
    def with_caps(**options: Any) -> None:
        caps = Caps(**{name: options.pop(f"max_{name}") for name in _CAPS})
        command(caps=caps, **options)

    for name, said in reversed(_CAPS.items()):
        option = click.option(
            f"--max-{name.replace('_', '-')}",
            type=click.IntRange(_SMALLEST_JOURNAL if name == "journal_bytes" else 1),
            default=getattr(Caps, name),
            show_default=True,
            envvar=f"COUNTER_SERVER_MAX_{name.upper()}",
            show_envvar=True,
            help=said,
        )
        option(with_caps)
    return with_caps


def of_the_manager() -> list[str]:
    """Those options of the current command that only a manager understands, of those that were given to it."""
    context = click.get_current_context()
    names = ["durability", *(f"max_{name}" for name in _CAPS)]
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
