"""`flask counters`: the commands for counters, in the current app's own store."""

from functools import wraps
from typing import Any

import click
from flask import current_app
from flask.cli import with_appcontext

from .commands import Command, Group, counter_commands

__all__ = ["counters"]


def _with_app_state(command: Command) -> Command:
    """Call a command with the current app's state, and close that afterwards."""

    @with_appcontext
    @wraps(command)
    def with_app_state(**arguments: Any) -> None:
        from .extension import state_in

        state = state_in(current_app)
        if state is None:
            raise click.ClickException(
                "this app has no SharedState: add SharedState(app) to it, or name a store with counter-server,"
                " as in 'counter-server list --data-dir DIR'"
            )
        if str(state.store) == "memory://":
            raise click.ClickException(
                "this app's store is memory://, which each process has for itself: no command can read or change what"
                " the app counts; choose another store with COUNTER_SERVER_STORE"
            )
        with state:
            command(state, **arguments)

    return with_app_state


@click.group(cls=Group)
def counters() -> None:
    """Read and change the counters of this app."""


for _command in counter_commands(_with_app_state):
    counters.add_command(_command)
