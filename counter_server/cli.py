"""The command line: `counter-server run`, `manager`, and the counters without HTTP."""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from . import settings
from .errors import BatchRefused, CounterServerError, DirectoryHeld, Disconnected, InvalidRequest, StartupError
from .manager.directory import DataDirectory
from .manager.starter import EXIT_HELD
from .operations import LARGEST_PAGE, Get
from .os_errors import can_pass
from .output import LogFormat
from .server.demo import demo
from .server.prove import prove
from .server.settings import ServerSettings
from .state import State, declared_for, open_state
from .stores import Finding, open_store

if TYPE_CHECKING:
    from .manager.hosting import Hosting

Command = Callable[..., None]

_DEFAULTS = ServerSettings()
_IDLE_SECONDS = 1.0  # of a manager that a command starts; an app may soon want one that hosts its objects
_SECONDS_TO_STOP = 10.0
_SECONDS_OF_UPKEEP = 3600.0  # for the manager to read or copy all its data
_SMALLEST_JOURNAL = 2**20  # bytes
_CAPS = {
    "counters": "Maximum number of counters. Beyond it, only existing ones can be changed.",
    "keys": "Maximum number of idempotency keys, remembered for 24 hours each. Beyond it, new ones are refused.",
    "clients": "Maximum number of remembered client processes. Beyond it, the longest idle is forgotten.",
    "journal_bytes": "Maximum size of the journal. Beyond it, writes are refused, and reads continue.",
    "connections": "Maximum number of connections. Beyond it, new ones wait.",
}


class _Group(click.Group):
    """Reports the errors of this package in one line. The exit status is 1, or 75 if there is another manager."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CounterServerError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_HELD if isinstance(error, DirectoryHeld) else 1)


def _directory(data_dir: str | None) -> DataDirectory:
    return DataDirectory(settings.default_data_dir() if data_dir is None else data_dir)


def _url(store: str | None, data_dir: str | None) -> str:
    if data_dir is None:
        return store or os.environ.get(settings.STORE_VARIABLE) or settings.DEFAULT_STORE
    if store not in (None, settings.DEFAULT_STORE):
        raise InvalidRequest("--data-dir names a manager's directory, and --store something else: give one of them")
    return DataDirectory(data_dir).given_url


def _setting(name: str, said: str, **attributes: Any) -> Callable[[Command], Command]:
    """Make the option for a field of `ServerSettings`."""
    return click.option(f"--{name.replace('_', '-')}", default=getattr(_DEFAULTS, name), help=said, **attributes)


def _web(option: str, name: str, said: str, metavar: str = "NAME", **attributes: Any) -> Callable[[Command], Command]:
    """Make the option for a name in the web application's configuration."""
    name = f"COUNTER_SERVER_{name}"
    return click.option(option, name, envvar=name, help=said, metavar=metavar, **attributes)


_data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    help=f"The manager's data directory (default: ${settings.DATA_DIR_VARIABLE}, else ./instance/counter-server).",
)
_store_option = click.option(
    "--store", metavar="URL", help="The URL of the store (default: manager://, in the data directory)."
)


def _with_state(command: Command) -> Command:
    """Add the options of a store to a command, which is called with its `state`."""

    @_data_dir_option
    @_store_option
    @click.option(
        "--start/--no-start",
        default=True,
        envvar="COUNTER_SERVER_START",
        help="Start a manager if none is running; it exits when unused.",
    )
    @wraps(command)
    def with_state(*, data_dir: str | None, store: str | None, start: bool, **arguments: Any) -> None:
        options = settings.StoreOptions(idle_timeout=_IDLE_SECONDS, start=start)
        command(open_state(_url(store, data_dir), options=options), **arguments)

    return with_state


def _with_manager_options(command: Command) -> Command:
    """Add the options of a manager to a command, which is called with `durability` and `caps`."""

    @wraps(command)
    def with_caps(**arguments: Any) -> None:
        command(caps=settings.Caps(**{name: arguments.pop(f"max_{name}") for name in _CAPS}), **arguments)

    for name, said in reversed(_CAPS.items()):
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
    return _setting("durability", said, type=choices, envvar="COUNTER_SERVER_DURABILITY")(with_caps)


_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "auto_envvar_prefix": "COUNTER_SERVER"}


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(package_name="counter-server")
def main() -> None:
    """Shared state for Flask workers: every increment is counted exactly once.

    Each option has an environment variable: COUNTER_SERVER_RUN_PORT is --port of run.
    """


main.add_command(demo)
main.add_command(prove)


@main.command()
@_setting("host", "The address to listen on.")
@_setting("port", "The port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535))
@_setting("workers", "Number of worker processes.", type=click.IntRange(1, 512))
@_setting("threads", "Number of threads in each worker.", type=click.IntRange(1, 512))
@_setting("request_timeout", "Seconds to receive a whole request.", type=click.FloatRange(0, min_open=True))
@_setting("frozen_after", "Seconds without a sign of life before a worker is replaced.", type=click.FloatRange(2))
@_setting("log_format", "json: one object a line, requests too.", type=click.Choice(get_args(LogFormat)))
@click.option(
    "--allow-host",
    "TRUSTED_HOSTS",
    help="A host name for browsers besides localhost; may be repeated.",
    metavar="NAME",
    multiple=True,
)
@_web(
    "--trusted-proxy", "TRUSTED_PROXIES", "Number of proxies in front.", "COUNT", type=click.IntRange(0, 16), default=0
)
@_web("--lab/--no-lab", "LAB", "Serve /lab, which shows the race (default: only on a loopback address).", default=None)
@_web("--badge", "BADGES", "A counter that /badge/NAME.svg?count=1 increments; may be repeated.", multiple=True)
@_web("--rate-limit", "RATE_LIMIT", "API and badge requests from one address, such as 100/minute.", "LIMIT")
@_data_dir_option
@_store_option
@_with_manager_options
@click.option("--attach", is_flag=True, help="Use a running manager instead of starting one.")
def run(data_dir: str | None, store: str | None, *, attach: bool, **options: Any) -> None:
    """Serve the web application: one manager process, several workers, one port.

    Anyone with the operators' token, COUNTER_SERVER_TOKEN in the environment, may set and delete counters.
    """
    from .server.supervisor import Supervisor

    url = _url(store, data_dir)
    if attach or not url.startswith("manager:"):
        for name in ["durability", *(f"max_{name}" for name in _CAPS)]:
            if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = f"--{name.replace('_', '-')}"
                raise InvalidRequest(f"{option} is for a manager that this command starts, and it starts none: omit it")
    web = {name: options.pop(name) for name in list(options) if name.isupper()}  # named as the app's configuration
    served = ServerSettings(store=url, web=web, attach=attach, **options)
    os.environ["PYTHONSAFEPATH"] = "1"  # or a worker of new code would run the working directory's modules first
    sys.exit(Supervisor(served).run())


@main.command()
@_data_dir_option
@_with_manager_options
@click.option("--idle-timeout", "idle", type=float, metavar="SECONDS", help="Exit after SECONDS without clients.")
@click.option(
    "--hosting", metavar="APP", help="Host the shared objects of an app: module, module:app or module:create_app()."
)
@click.option("--background", is_flag=True, help="Return when clients can connect, and leave the manager running.")
@click.option("--starter", nargs=2, type=int, hidden=True, help="Descriptors of the client that starts it.")
def manager(
    data_dir: str | None,
    idle: float | None,
    hosting: str | None,
    *,
    background: bool,
    starter: tuple[int, int] | None,
    **options: Any,
) -> None:
    """Run the manager alone, for any number of applications of this user."""
    from .manager.hosting import NOTHING, decode_hosting
    from .manager.process import serve
    from .manager.starter import detach
    from .output import configure

    hosted = decode_hosting(sys.stdin.buffer.read()) if starter else NOTHING
    configure("manager", "text", logging.WARNING)
    directory = _directory(data_dir)
    timeout = None if idle is None else settings.check_seconds(idle, "an idle timeout")
    if hosting:
        hosted = _declared_by(hosting, directory)
    report = detach(directory, starter) if background else None
    if report:
        configure("manager", "text", logging.WARNING)  # again, as this is another process now
        if not hosted.declarations:
            os.chdir("/")  # the file system of the client's directory can be unmounted

    def ready() -> None:
        if report:
            report.end("ready")
        else:
            click.echo(f"Manager ready: {directory.url}")

    try:
        serve(directory, ready=ready, idle_timeout=timeout, hosting=hosted, **options)
    except CounterServerError as error:
        if report:
            is_passing = isinstance(error, DirectoryHeld) or can_pass(error.__cause__)
            report.end("later" if is_passing else "error", str(error))
        raise


def _declared_by(module: str, directory: DataDirectory) -> "Hosting":
    """Import an app, from the working directory first, and return its declarations for a directory."""
    from flask.cli import ScriptInfo

    from .manager.hosting import Hosting, importing

    sys.path.insert(0, os.getcwd())
    try:
        with importing():
            ScriptInfo(app_import_path=module).load_app()
    except (Exception, click.ClickException) as error:
        message = error.message if isinstance(error, click.ClickException) else f"{type(error).__name__}: {error}"
        raise StartupError(f"the app {module} cannot be loaded: {message.strip()}") from error
    declarations = declared_for(directory.url)
    if not declarations:
        raise StartupError(f"{module} declares no shared objects for {directory}: does its app use that directory?")
    return Hosting.of_this_process(declarations)


@main.command()
@_data_dir_option
def stop(data_dir: str | None) -> None:
    """Stop a directory's manager cleanly. All its data is kept, and the next use starts another manager."""
    from .manager.client import end_manager

    directory = _directory(data_dir)
    try:
        pid = end_manager(directory, _SECONDS_TO_STOP)
    except DirectoryHeld as error:
        raise click.ClickException(str(error)) from error
    if pid is None:
        raise click.ClickException(f"no manager is running in {directory}")
    click.echo(f"The manager (pid {pid}) has ended." if pid else "The manager has ended.")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@_data_dir_option
def backup(file: Path, data_dir: str | None) -> None:
    """Copy all durable data into a new FILE, whether or not a manager is running.

    To restore it, copy FILE to journal.sqlite3 in the data directory while no manager is running, and remove
    journal.sqlite3-wal if it exists. Numbers that were returned after the backup will be returned again.
    """
    from .journal import Journal

    directory, target = _directory(data_dir), Path(os.path.abspath(file))
    if directory.is_held():
        size = _ask_manager(directory, "back_up", os.fsencode(target))
    else:
        with _unused(directory), closing(Journal(directory.journal)) as journal:
            size = journal.back_up(target)
    click.echo(f"{target}: {size:,} bytes, of {directory.journal}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_data_dir_option
def check(file: Path | None, data_dir: str | None) -> None:
    """Check the journal, or the backup FILE, for damage. Exit status 0 if there is none, else 1.

    If a manager is running, its memory is compared with the journal.
    """
    from .journal import examine as examine_file

    directory = _directory(data_dir)
    path = file or directory.journal
    memory = ""
    if file is None and directory.is_held():
        counters, clients, keys = _ask_manager(directory, "check")
        memory = "; the manager's memory is the same"
    else:
        with nullcontext() if file else _unused(directory):
            found = examine_file(path)
        counters, clients, keys = len(found.counters), len(found.clients), len(found.keys)
    click.echo(f"{path} is whole: {counters:,} counters, {keys:,} idempotency keys, {clients:,} clients{memory}")


def _unused(directory: DataDirectory) -> AbstractContextManager[object]:
    if not directory.journal.exists():
        raise StartupError(f"{directory} contains no journal")
    return directory.hold()


def _ask_manager(directory: DataDirectory, method: str, *arguments: bytes) -> Any:
    from .manager.client import StateProxy

    with closing(StateProxy(directory)) as proxy:
        try:
            return proxy.ask(method, arguments, time.monotonic() + _SECONDS_OF_UPKEEP)
        except BatchRefused as error:
            raise StartupError(str(error)) from error
        except Disconnected as error:
            raise StartupError(f"the manager of {directory} did not answer: {error}") from error


@main.command()
@click.argument("name")
@click.option("--by", type=int, default=1, help="Amount to add; negative to subtract.")
@click.option("--minimum", type=int, help="The smallest allowed result.")
@click.option("--maximum", type=int, help="The largest allowed result.")
@click.option("--key", help="An idempotency key: repeated requests with the same key are counted once.")
@_with_state
def increment(state: State, name: str, **arguments: Any) -> None:
    """Add to a counter and print the result."""
    click.echo(state.counter(name).increment(**arguments))


@main.command()
@click.argument("name")
@_with_state
def get(state: State, name: str) -> None:
    """Print a counter's value."""
    value = state.submit(Get(name))
    if value is None:
        raise click.ClickException(f"there is no counter {name!r}")
    click.echo(value)


@main.command("set", context_settings={"ignore_unknown_options": True})  # -5 is a VALUE
@click.argument("name")
@click.argument("value", type=int)
@_with_state
def set_(state: State, name: str, value: int) -> None:
    """Set a counter to VALUE and print it."""
    if name.startswith("--"):
        raise click.NoSuchOption(name)
    click.echo(state.counter(name).set(value))


@main.command()
@click.argument("name")
@_with_state
def delete(state: State, name: str) -> None:
    """Remove a counter."""
    if not state.counter(name).delete():
        raise click.ClickException(f"there is no counter {name!r}")


@main.command("list")
@_with_state
def list_(state: State) -> None:
    """Print every counter and its value, one a line, separated by a tab."""
    page = state.counters(limit=LARGEST_PAGE)
    while page.counters:
        for name, value in page.counters:
            click.echo(f"{name}\t{value}")
        page = state.counters(after=page.counters[-1][0], limit=LARGEST_PAGE)


@main.command()
@_data_dir_option
@_store_option
def doctor(data_dir: str | None, store: str | None) -> None:
    """Ask the store's server whether it can lose numbers. Exit status 0 if no risk was found."""
    name, findings = examine(_url(store, data_dir), settings.DEFAULT_DEADLINE)
    click.echo(name)
    for finding in findings:
        click.echo(f"{finding.level:<8}  {finding.sentence}")
    sys.exit(1 if any(finding.level != "ok" for finding in findings) else 0)


def examine(url: str, seconds: float) -> tuple[str, list[Finding]]:
    """Return the store's name and the findings about its server. No manager is started.

    :param seconds: the time limit.
    :raises InvalidRequest: if there is no such store.
    """
    store = open_store(url, settings.StoreOptions(start=False))
    try:
        return str(store), store.findings(time.monotonic() + seconds)
    except (CounterServerError, Disconnected) as error:
        return str(store), [Finding("problem", str(error))]
    finally:
        store.close()
