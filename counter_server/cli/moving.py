"""The commands that move counters and idempotency keys into a store: `import` and `migrate`."""

from contextlib import closing
from pathlib import Path

import click

from .. import moving, portable
from ..commands import (
    STANDARD,
    check_lasts,
    ends_in_order,
    file_argument,
    mention_objects,
    overwrite,
    progress,
    show,
    standard,
    with_format,
)
from ..errors import StartupError
from ..moving import Moved
from ..portable import Format
from ..settings import StoreOptions
from ..state import State
from ..store import Store
from ..stores import open_store
from .options import IDLE_SECONDS, with_state


@click.command("import")
@file_argument
@with_format
@overwrite("Replace other values in the store. What FILE does not have is kept there.")
@click.option("--unchecked", is_flag=True, help="Accept a FILE without a checksum, made by hand.")
@with_state
@ends_in_order
def import_(state: State, file: Path, form: Format, *, overwrite: bool, unchecked: bool) -> None:
    """Write the counters and idempotency keys in FILE, an export, into a store; - is standard input.

    FILE is verified first. A store that has other values is refused. The same command again continues an interrupted
    one. A CSV made by hand needs the columns name and value.
    """
    store = state.store
    if file == STANDARD:
        contents, digest = portable.read(standard("stdin"), form, "standard input", unchecked=unchecked)
    else:
        try:
            with file.open("rb") as opened:
                contents, digest = portable.read(opened, form, str(file), unchecked=unchecked)
        except OSError as error:
            raise StartupError(f"{file} cannot be read: {error.strerror}; nothing was changed") from error
    _report(store, moving.write(contents, store, overwrite=overwrite, bar=progress), digest)


@click.command()
@click.option("--from", "source", metavar="URL", required=True, envvar="COUNTER_SERVER_MIGRATE_FROM", show_envvar=True)
@click.option("--to", "target", metavar="URL", required=True, envvar="COUNTER_SERVER_MIGRATE_TO", show_envvar=True)
@overwrite("Replace other values in the target. What the source does not have is kept there.")
@ends_in_order
def migrate(source: str, target: str, *, overwrite: bool) -> None:
    """Copy all counters and idempotency keys from one store to another, and compare both afterwards.

    Stop what counts in the source first. A target that has other values is refused. The same command again continues an
    interrupted one. Other users of the machine see a command's options: a URL with a password belongs into the
    environment.
    """
    options = StoreOptions(idle_timeout=IDLE_SECONDS, start=True)
    with (
        closing(open_store(source, StoreOptions(start=False))) as opened,
        closing(open_store(target, options)) as receiving,
    ):
        for store in (opened, receiving):
            check_lasts(store)
        contents, moved = moving.move(opened, receiving, overwrite=overwrite, bar=progress)
        _report(receiving, moved, portable.digest_of(contents))
        mention_objects(contents, opened)


def _report(store: Store, moved: Moved, digest: str) -> None:
    show(
        f"{moved.counters:,} counters and {moved.keys:,} keys were written to {store}; {moved.counters_before:,} and"
        f" {moved.keys_before:,} were there already; SHA-256 {digest}"
    )
