"""The commands for counters, of `counter-server` and of `flask counters`.

The `flask` command imports this file in every project: what takes long to import is imported when a command runs.
"""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, cast

import click

from .errors import CounterServerError, DirectoryHeld, InvalidRequest, Stopped

if TYPE_CHECKING:
    from .ledger import Contents
    from .portable import Advance, Format
    from .state import State
    from .store import Store

Command = Callable[..., None]
WithState = Callable[[Command], Command]


STANDARD = Path("-")  # standard input or output
_STOPPED = 143  # the exit status after SIGTERM, as a shell reports it


def check_file(_context: click.Context, _argument: click.Parameter, file: Path | None) -> Path | None:
    if file == Path():
        raise click.BadParameter("the name of a file must not be empty")
    return file


file_argument = click.argument(
    "file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path), callback=check_file
)


def with_format(command: Command) -> Command:
    """Add the option of a file's format to a command, which is called with its `file` and that file's `form`."""

    @click.option(
        "--format",
        type=click.Choice(["json", "csv"]),
        default=None,
        help="json: one object a line; csv: for spreadsheets (default: csv if FILE ends with .csv, else json).",
    )
    @wraps(command)
    def with_format(*, file: Path, **arguments: Any) -> None:
        from .portable import format_of

        command(file=file, form=arguments.pop("format") or format_of(file), **arguments)

    return with_format


def overwrite(said: str) -> Callable[[Command], Command]:
    return click.option("--overwrite", is_flag=True, help=said)


def standard(name: Literal["stdin", "stdout"]) -> BinaryIO:
    """Return a standard stream of bytes, or raise `click.ClickException` if it is closed."""
    stream = getattr(sys, name)
    if stream is None:
        raise click.ClickException(f"{name} is closed: open it, or name a file")
    return cast(BinaryIO, stream.buffer)


def ends_in_order(command: Command) -> Command:
    """Let SIGTERM end a command as Ctrl-C does, so that it removes its unfinished files."""

    @wraps(command)
    def ends_in_order(*arguments: object, **options: object) -> None:
        def stop(_number: int, _frame: object) -> NoReturn:
            raise Stopped(_STOPPED)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            command(*arguments, **options)
        finally:
            signal.signal(signal.SIGTERM, before)

    return ends_in_order


@contextmanager
def progress(what: str, records: int) -> Iterator["Advance"]:
    """Show progress on standard error, if that is a terminal."""
    if sys.stderr.isatty():
        with click.progressbar(length=records, label=what, file=sys.stderr) as bar:
            yield bar.update
    else:
        yield lambda _records: None


class Group(click.Group):
    """Reports the errors of this package in one line. The exit status is 1, or 75 if there is another manager."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CounterServerError as error:
            from .manager.starter import EXIT_HELD

            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_HELD if isinstance(error, DirectoryHeld) else 1)
        except BrokenPipeError:  # click ends in silence
            raise
        except OSError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)


def show(what: object) -> None:
    """Print a line on standard output."""
    try:
        click.echo(what)
    except BrokenPipeError:
        raise
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError):  # otherwise the interpreter writes the rest at its exit, and fails again
            sys.stdout.close()
        raise click.ClickException(f"standard output fails, but what the command did is done: {error}") from error


class _TakesNegative(click.Command):
    """Takes -5 for an argument, and knows which arguments stand after ``--``: these may begin with hyphens."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["after hyphens"] = args[args.index("--") + 1 :] if "--" in args else []
        return super().parse_args(ctx, args)


def counter_commands(with_state: WithState) -> list[click.Command]:
    """Return the commands.

    :param with_state: calls each command with its `state`, and may add options to it.
    """
    return [*_reading(with_state), *_changing(with_state)]


def _reading(with_state: WithState) -> list[click.Command]:
    """Return the commands that make nothing: neither a directory nor a file nor a manager of an empty directory."""

    @click.command("list")
    @click.option("--prefix", default="", metavar="TEXT", help="Only the counters whose names begin with TEXT.")
    @click.option("--sort", type=click.Choice(["name", "value"]), default="name", help="value: the smallest first.")
    @click.option("--json", is_flag=True, help='Print one JSON object a line: {"counter":"x","value":1}')
    @with_state
    def list_(state: "State", prefix: str, sort: str, *, json: bool) -> None:
        """Print every counter and its value, one a line, separated by a tab."""
        from .scan import beginning_with

        check_exists(state)
        found: Iterable[tuple[str, int]] = beginning_with(prefix, state.submit)
        if sort == "value":
            found = sorted(found, key=lambda counter: (counter[1], counter[0]))
        for name, value in found:
            show(_as_json(name, value) if json else f"{name}\t{value}")

    @click.command()
    @click.argument("name")
    @with_state
    def get(state: "State", name: str) -> None:
        """Print a counter's value."""
        from .operations import Get

        operation = Get(name)
        check_exists(state)
        value = state.submit(operation)
        if value is None:
            raise click.ClickException(f"there is no counter {name!r}")
        show(value)

    @click.command()
    @file_argument
    @with_format
    @overwrite("Replace FILE if it is there.")
    @with_state
    @ends_in_order
    def export(state: "State", file: Path, form: "Format", *, overwrite: bool) -> None:
        """Write all counters and idempotency keys of a store to FILE, as they are at one moment; - is standard output.

        Counting goes on meanwhile. No manager is started.
        """
        from . import moving, portable

        store = state.store
        contents = moving.contents_of(store)
        write = partial(portable.write, contents, form=form)
        with progress("Exporting", len(contents.counters) + len(contents.keys)) as advance:
            if file == STANDARD:
                digest = write(standard("stdout"), advance=advance)
                sys.stdout.flush()
            else:
                with portable.new_file(file, overwrite=overwrite) as opened:
                    digest = write(opened, advance=advance)
        counted = f"{len(contents.counters):,} counters and {len(contents.keys):,} keys"
        said = f"{counted} of {store} are in {file}; SHA-256 {digest}"
        if file == STANDARD:
            click.echo(said, err=True)
        else:
            show(said)
        mention_objects(contents, store)

    return [list_, get, export]


def _changing(with_state: WithState) -> list[click.Command]:
    @click.command()
    @click.argument("name")
    @click.option("--by", type=int, default=1, help="Amount to add; negative to subtract.")
    @click.option("--minimum", type=int, help="The smallest allowed result.")
    @click.option("--maximum", type=int, help="The largest allowed result.")
    @click.option("--key", help="An idempotency key: repeated requests with the same key are counted once.")
    @with_state
    def increment(state: "State", name: str, **arguments: Any) -> None:
        """Add to a counter and print the result."""
        show(state.counter(name).increment(**arguments))

    @click.command("set", cls=_TakesNegative, context_settings={"ignore_unknown_options": True})
    @click.argument("name")
    @click.argument("value", type=int)
    @with_state
    def set_(state: "State", name: str, value: int) -> None:
        """Set a counter to VALUE and print it."""
        if name.startswith("--") and name not in click.get_current_context().meta["after hyphens"]:
            raise click.NoSuchOption(name)
        show(state.counter(name).set(value))

    @click.command()
    @click.argument("name")
    @with_state
    def delete(state: "State", name: str) -> None:
        """Remove a counter."""
        counter = state.counter(name)
        check_exists(state)
        if not counter.delete():
            raise click.ClickException(f"there is no counter {name!r}")

    return [increment, set_, delete]


def check_exists(state: "State") -> None:
    """Raise `click.ClickException` if the first use would make the store's directory, file or tables."""
    if not state.exists():
        place = str(state.store).removeprefix("manager://")
        raise click.ClickException(
            f"there is no state in {place}: nothing was counted there yet; the first increment makes it, if that is the"
            " right place"
        )


def _as_json(name: str, value: int) -> bytes:
    from msgspec import json

    return json.encode({"counter": name, "value": value})


def check_lasts(store: "Store") -> None:
    """Raise `InvalidRequest` if the store ends with this process."""
    if str(store) == "memory://":
        raise InvalidRequest("memory:// ends with this command: name a store that other processes share")


def mention_objects(contents: "Contents", store: "Store") -> None:
    if contents.objects:
        click.echo(
            f"{len(contents.objects):,} shared objects stay in {store}: to use them elsewhere, restore a"
            " 'counter-server backup' there before you move the counters",
            err=True,
        )
