"""The commands that run until they are stopped: `run`, `dashboard` and `manager`."""

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from .. import settings
from ..errors import CounterServerError, DirectoryHeld, InvalidRequest, StartupError
from ..manager.directory import DataDirectory
from ..modules import quick_imports
from ..os_errors import can_pass
from ..output import LogFormat
from ..server.settings import ServerSettings
from ..state import declared_for
from .options import (
    CAPS,
    data_dir_option,
    directory_of,
    setting,
    store_option,
    url_of,
    web,
    with_manager_options,
    with_web_options,
)

if TYPE_CHECKING:
    from ..manager.hosting import Hosting


@click.command()
@with_web_options
@setting("workers", "Number of worker processes.", type=click.IntRange(1, 512))
@setting("threads", "Number of threads in each worker.", type=click.IntRange(1, 512))
@setting("request_timeout", "Seconds to receive a whole request.", type=click.FloatRange(0, min_open=True))
@setting("frozen_after", "Seconds without a sign of life before a worker is replaced.", type=click.FloatRange(2))
@setting("log_format", "json: one object a line, requests too.", type=click.Choice(get_args(LogFormat)))
@web("--lab/--no-lab", "LAB", "Serve /lab, which shows the race (default: only on a loopback address).", default=None)
@web("--badge", "BADGES", "A counter that /badge/NAME.svg?count=1 increments; may be repeated.", multiple=True)
@web("--rate-limit", "RATE_LIMIT", "API and badge requests from one address, such as 100/minute.", "LIMIT")
@data_dir_option
@store_option
@with_manager_options
@click.option("--attach", is_flag=True, help="Use a running manager instead of starting one.")
def run(data_dir: str | None, store: str | None, *, attach: bool, **options: Any) -> None:
    """Serve the web application: one manager process, several workers, one port.

    Anyone with the operators' token, COUNTER_SERVER_TOKEN in the environment, may set and delete counters.
    """
    with quick_imports():
        from ..server.supervisor import Supervisor

    url = url_of(store, data_dir)
    if attach or not url.startswith("manager:"):
        for name in ["durability", *(f"max_{name}" for name in CAPS)]:
            if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = f"--{name.replace('_', '-')}"
                raise InvalidRequest(f"{option} is for a manager that this command starts, and it starts none: omit it")
    served = _settings(url, attach=attach, **options)
    os.environ["PYTHONSAFEPATH"] = "1"  # or a worker of new code would run the working directory's modules first
    sys.exit(Supervisor(served).run())


def _settings(url: str, **options: Any) -> ServerSettings:
    config = {name: options.pop(name) for name in list(options) if name.isupper()}  # named as the app's configuration
    config["TRUSTED_HOSTS"] = options.pop("allow_host")
    return ServerSettings(store=url, web=config, **options)


@click.command()
@with_web_options
@data_dir_option
@store_option
def dashboard(data_dir: str | None, store: str | None, **options: Any) -> None:
    """Show what runs in a data directory or a store: dashboard, API, health and metrics.

    It counts, starts and declares nothing, and writes no file. Anyone with the operators' token, COUNTER_SERVER_TOKEN
    in the environment, may set and delete counters.
    """
    with quick_imports():
        from ..server.worker import show

    url = url_of(store, data_dir)
    if url == "memory://":
        raise InvalidRequest("memory:// is within one process: see it by shared.blueprint() in the app itself")
    show(_settings(url, **options))


@click.command()
@data_dir_option
@with_manager_options
@click.option("--idle-timeout", type=float, metavar="SECONDS", help="Exit after SECONDS without clients.")
@click.option(
    "--hosting", metavar="APP", help="Host the shared objects of an app: module, module:app or module:create_app()."
)
@click.option("--background", is_flag=True, help="Return when clients can connect, and leave the manager running.")
@click.option("--starter", nargs=2, type=int, hidden=True, help="Descriptors of the client that starts it.")
def manager(
    data_dir: str | None,
    idle_timeout: float | None,
    hosting: str | None,
    *,
    background: bool,
    starter: tuple[int, int] | None,
    **options: Any,
) -> None:
    """Run the manager alone, for any number of applications of this user."""
    with quick_imports():
        from ..manager.hosting import NOTHING, decode_hosting
        from ..manager.process import serve
        from ..manager.starter import detach
        from ..output import configure

    hosted = decode_hosting(sys.stdin.buffer.read()) if starter else NOTHING
    configure("manager", "text", logging.WARNING)
    directory = directory_of(data_dir)
    timeout = None if idle_timeout is None else settings.check_seconds(idle_timeout, "an idle timeout")
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

    from ..manager.hosting import Hosting, importing

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
