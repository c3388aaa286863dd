"""The command line: `counter-server run`, `manager`, and the counters without HTTP."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

import click

from .errors import CounterServerError, DirectoryHeld, InvalidRequest, StartupError
from .manager.directory import DataDirectory
from .manager.starter import EXIT_HELD
from .objects import Declaration
from .options import caps_options, of_the_manager
from .server.demo.command import demo
from .server.prove.command import prove
from .settings import (
    DATA_DIR_VARIABLE,
    DEFAULT_DEADLINE,
    DEFAULT_STORE,
    DURABILITIES,
    LOG_FORMATS,
    STORE_VARIABLE,
    Caps,
    Durability,
    ServerSettings,
    StoreOptions,
    check_seconds,
    default_data_dir,
)
from .state import State, declared_for, open_state

_DEFAULTS = ServerSettings()
_IDLE_SECONDS = 1.0
_SECONDS_TO_STOP = 10.0


class _HeldException(click.ClickException):
    """Tells a starter that there is a manager already, from one that cannot start at all."""

    exit_code = EXIT_HELD


class _OneLine(click.Group):
    """A group whose commands tell our errors in one line, exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CounterServerError as error:
            raise (_HeldException if isinstance(error, DirectoryHeld) else click.ClickException)(str(error)) from error


class _WithNumber(click.Command):
    """A command whose last argument is a number, which may be negative: -5 is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" not in args:
            negative = [arg for arg in args if arg[:1] == "-" and arg[1:].isdigit()]
            args = [arg for arg in args if arg not in negative] + (["--", *negative] if negative else [])
        return super().parse_args(ctx, args)


def _store_url(store: str | None, data_dir: str | None) -> str:
    """The URL that the two options, or their environment variables, name together."""
    if data_dir is not None:
        if store is not None and store != DEFAULT_STORE:
            raise InvalidRequest("--data-dir names a manager's directory, and --store something else: give one of them")
        return DataDirectory(data_dir).url
    return store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


store_option = click.option(
    "--store", metavar="URL", help="Where the counters are (default: manager://, a data directory)."
)
data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    help=f"The manager's data directory (default: ${DATA_DIR_VARIABLE}, else instance/counter-server here).",
)
start_option = click.option(
    "--start/--no-start",
    default=True,
    show_default=True,
    help="Whether to start a manager where there is none; it ends when nobody uses it.",
)
durability_option = click.option(
    "--durability",
    type=click.Choice(DURABILITIES),
    default=_DEFAULTS.durability,
    show_default=True,
    help="commit: on disk before it is answered; process: survives kill -9, not a power cut; none: memory only.",
)


@click.group(cls=_OneLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="counter-server")
def main() -> None:
    """Shared state for Flask workers: every increment is counted exactly once."""


main.add_command(demo)
main.add_command(prove)


@main.command()
@click.option("--host", default=_DEFAULTS.host, show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=_DEFAULTS.port, show_default=True, help="0: a free one.")
@click.option("--workers", type=click.IntRange(1, 512), default=_DEFAULTS.workers, show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 512), default=_DEFAULTS.threads, show_default=True, help="In each worker."
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(0, min_open=True),
    default=_DEFAULTS.request_timeout,
    show_default=True,
    help="Seconds in which a request has to be here whole; then its connection is closed.",
)
@click.option(
    "--frozen-after",
    type=click.FloatRange(2),
    default=_DEFAULTS.frozen_after,
    show_default=True,
    help="Seconds without a sign of life after which a worker is replaced.",
)
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default=_DEFAULTS.log_format,
    show_default=True,
    help="json: an object a line, one for each request too.",
)
@click.option(
    "--allow-host",
    "COUNTER_SERVER_ALLOWED_HOSTS",
    multiple=True,
    metavar="NAME",
    help="A name besides localhost by which browsers may ask; may be given again. On loopback others are refused.",
)
@click.option(
    "--trusted-proxy",
    "COUNTER_SERVER_TRUSTED_PROXIES",
    type=click.IntRange(0, 16),
    default=0,
    show_default=True,
    metavar="COUNT",
    help="How many proxies stand before it, and set X-Forwarded-For, -Proto and -Host.",
)
@click.option(
    "--lab/--no-lab",
    "COUNTER_SERVER_LAB",
    default=None,
    help="Whether /lab shows what goes wrong without this (default: if only this machine can connect).",
)
@click.option(
    "--badge",
    "COUNTER_SERVER_BADGES",
    multiple=True,
    metavar="NAME",
    help="A counter that /badge/NAME.svg?count=1 counts; may be given again. Badges of others only read.",
)
@click.option(
    "--rate-limit",
    "COUNTER_SERVER_RATE_LIMIT",
    metavar="LIMIT",
    help="How often each address may ask the API and the badges, such as 100/minute.",
)
@data_dir_option
@durability_option
@caps_options
@store_option
@click.option("--attach", is_flag=True, help="Use the manager that runs already, and start none.")
def run(data_dir: str | None, store: str | None, durability: str, *, attach: bool, **options: Any) -> None:
    """Serve the web application: one manager process, several workers, one port.

    COUNTER_SERVER_TOKEN in the environment is the operators' token: who has it may set and delete counters.
    """
    from .server.supervisor import Supervisor

    url = _store_url(store, data_dir)
    for option in of_the_manager() if attach or not url.startswith("manager:") else []:
        raise InvalidRequest(f"{option} is for a manager that this command starts; it starts none")
    web = {name: options.pop(name) for name in list(options) if name.isupper()}  # named as the app's configuration is
    settings = ServerSettings(store=url, durability=cast(Durability, durability), web=web, attach=attach, **options)
    os.environ["PYTHONSAFEPATH"] = "1"  # else a worker of new code would run the working directory's modules first
    sys.exit(Supervisor(settings).run())


@main.command()
@data_dir_option
@durability_option
@click.option("--idle-timeout", type=float, metavar="SECONDS", help="End when there was no client for so long.")
@click.option(
    "--hosting",
    metavar="APP",
    help="Host the shared objects that APP declares: module, module:app or module:create_app().",
)
@click.option(
    "--host-objects", is_flag=True, hidden=True, help="Declarations of shared objects come on standard input."
)
@click.option("--background", is_flag=True, help="Return when clients can connect, and leave it running.")
@caps_options
def manager(
    data_dir: str | None,
    durability: str,
    idle_timeout: float | None,
    hosting: str | None,
    *,
    caps: Caps,
    background: bool,
    host_objects: bool,
) -> None:
    """Run the manager alone, for any number of applications of this user."""
    from .manager.server import serve
    from .manager.starter import detach, prepare_to_host
    from .output import configure

    configure("manager", "text", logging.WARNING)
    directory = DataDirectory(default_data_dir() if data_dir is None else data_dir)
    timeout = None if idle_timeout is None else check_seconds(idle_timeout, "an idle timeout")
    declarations = _declared_by(hosting, directory) if hosting else []
    detached = detach(directory) if background else None

    def ready() -> None:
        click.echo(f"Manager ready: {directory.url}")
        if detached:
            detached()

    if host_objects:
        declarations = prepare_to_host(sys.stdin.buffer.read())
    serve(
        directory,
        cast(Durability, durability),
        ready=ready,
        idle_timeout=timeout,
        declarations=declarations,
        caps=caps,
    )


def _declared_by(module: str, directory: DataDirectory) -> list[Declaration]:
    """What a module declares for a directory when it is imported, from here or from wherever else Python looks."""
    from flask.cli import ScriptInfo

    from .manager.starter import begin_to_host

    begin_to_host()
    sys.path.insert(0, os.getcwd())
    try:
        ScriptInfo(app_import_path=module).load_app()
    except (Exception, click.ClickException) as error:
        message = error.message if isinstance(error, click.ClickException) else f"{type(error).__name__}: {error}"
        raise StartupError(f"no app can be had from {module}: {message.strip()}") from error
    declarations = declared_for(directory.url)
    if not declarations:
        raise StartupError(f"{module} declares no shared objects for {directory}: does its app use that directory?")
    return declarations


@main.command()
@data_dir_option
def stop(data_dir: str | None) -> None:
    """End the manager of a directory in order: what is durable stays, and the next use starts another."""
    from .manager.client import end_manager

    directory = DataDirectory(default_data_dir() if data_dir is None else data_dir)
    try:
        pid = end_manager(directory, _SECONDS_TO_STOP)
    except DirectoryHeld as error:
        raise click.ClickException(str(error)) from error
    if pid is None:
        raise click.ClickException(f"no manager is running in {directory}")
    click.echo(f"The manager (pid {pid}) has ended." if pid else "The manager has ended.")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@data_dir_option
def backup(file: Path, data_dir: str | None) -> None:
    """Copy all that is durable into a new FILE, while a manager goes on, or without one.

    To put it back, copy it to journal.sqlite3 in the data directory while no manager runs; no journal.sqlite3-wal may
    stand beside it. Numbers that were given out since the backup are given out again.
    """
    from .upkeep import back_up

    click.echo(back_up(DataDirectory(default_data_dir() if data_dir is None else data_dir), file))


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@data_dir_option
def check(file: Path | None, data_dir: str | None) -> None:
    """Look whether the journal is whole, or the backup FILE. Exit status 0 if it is, else 1."""
    from . import upkeep

    directory = DataDirectory(default_data_dir() if data_dir is None else data_dir)
    click.echo(upkeep.check(directory) if file is None else upkeep.check_file(file))


@main.command()
@click.argument("name")
@click.option("--by", type=int, default=1, show_default=True)
@click.option("--minimum", type=int, help="The result may not be less.")
@click.option("--maximum", type=int, help="The result may not be more.")
@click.option("--key", help="An idempotency key: the same again is counted once.")
@data_dir_option
@store_option
@start_option
def increment(name: str, by: int, minimum: int | None, maximum: int | None, key: str | None, **where: Any) -> None:
    """Add to a counter and print the result."""
    click.echo(_state(**where).counter(name).increment(by, minimum=minimum, maximum=maximum, key=key))


@main.command()
@click.argument("name")
@data_dir_option
@store_option
@start_option
def get(name: str, **where: Any) -> None:
    """Print a counter's value."""
    from .operations import Get

    value = _state(**where).submit(Get(name))
    if value is None:
        raise click.ClickException(f"there is no counter {name!r}")
    click.echo(value)


@main.command("set", cls=_WithNumber)
@click.argument("name")
@click.argument("value", type=int)
@data_dir_option
@store_option
@start_option
def set_(name: str, value: int, **where: Any) -> None:
    """Give a counter a value and print it."""
    click.echo(_state(**where).counter(name).set(value))


@main.command()
@click.argument("name")
@data_dir_option
@store_option
@start_option
def delete(name: str, **where: Any) -> None:
    """Remove a counter."""
    if not _state(**where).counter(name).delete():
        raise click.ClickException(f"there is no counter {name!r}")


@main.command("list")
@data_dir_option
@store_option
@start_option
def list_(**where: Any) -> None:
    """Print every counter and its value, a line each, separated by a tab."""
    state = _state(**where)
    page = state.counters(limit=1000)
    while True:
        for name, value in page.counters:
            click.echo(f"{name}\t{value}")
        if not page.more:
            return
        page = state.counters(after=page.counters[-1][0], limit=1000)


@main.command()
@data_dir_option
@store_option
def doctor(store: str | None, data_dir: str | None) -> None:
    """Ask the store's server what decides whether numbers can be lost. Exit status 0 if nothing of that kind is so."""
    from .doctor import examine

    name, findings = examine(_store_url(store, data_dir), DEFAULT_DEADLINE)
    click.echo(name)
    for finding in findings:
        click.echo(f"{finding.level:<8}  {finding.sentence}")
    sys.exit(1 if any(finding.level != "ok" for finding in findings) else 0)


def _state(*, store: str | None, data_dir: str | None, start: bool) -> State:
    # A manager for one command hosts nobody's objects: it is to be gone before an app that declares some comes along.
    return open_state(_store_url(store, data_dir), options=StoreOptions(start=start, idle_timeout=_IDLE_SECONDS))
