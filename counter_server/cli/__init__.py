"""The command line: `counter-server run`, `manager`, and the counters without HTTP."""

from ..modules import quick_imports

with quick_imports():
    import click

    from ..commands import Group, counter_commands
    from ..server.demo import demo
    from ..server.prove import prove
    from . import moving, running, upkeep
    from .options import with_state
    from .top import top

__all__ = ["main"]

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "auto_envvar_prefix": "COUNTER_SERVER"}


@click.group(cls=Group, context_settings=_CONTEXT)
@click.version_option(package_name="counter-server")
def main() -> None:
    """Shared state for Flask workers: every increment is counted exactly once.

    Each option has an environment variable: COUNTER_SERVER_RUN_PORT is --port of run.
    """


for command in (
    *(running.run, running.dashboard, running.manager, top, demo, prove),
    *(upkeep.stop, upkeep.backup, upkeep.check, upkeep.doctor),
    *(moving.import_, moving.migrate),
    *counter_commands(with_state),
):
    main.add_command(command)
