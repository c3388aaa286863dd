"""What a manager that ends in order leaves to the next one: the shared objects that are not in the journal."""

import logging
import os
from contextlib import suppress

from msgspec import MsgspecError, Struct, msgpack

from ..ledger import ClientRecord
from ..os_errors import explain
from .directory import DataDirectory, boot_id

log = logging.getLogger(__name__)


class Kept(Struct, array_like=True):
    """One shared object: its pickle, and its memory of calls that may be sent again."""

    epoch: str
    state: bytes
    clients: dict[bytes, ClientRecord]


class _Snapshot(Struct, array_like=True):
    boot: str  # of the machine: objects may hold times of its monotonic clock
    objects: dict[str, Kept]


def write(directory: DataDirectory, objects: dict[str, Kept]) -> None:
    """Leave objects to the next manager. If that fails, say so: then they begin again."""
    if not objects:
        return
    draft = directory.snapshot.with_suffix(".new")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgpack.encode(_Snapshot(boot_id(), objects)))  # no fsync: it serves this boot only
        draft.rename(directory.snapshot)
    except OSError as error:
        log.error("shared objects that are not durable are lost: %s: %s", directory.snapshot, error.strerror)
        with suppress(OSError):
            draft.unlink()


def read(directory: DataDirectory) -> dict[str, Kept]:
    """Return what the last manager left."""
    try:
        snapshot = msgpack.decode(directory.snapshot.read_bytes(), type=_Snapshot)
    except FileNotFoundError:
        return {}
    except (OSError, MsgspecError) as error:
        log.error("shared objects that are not durable begin again: %s: %s", directory.snapshot, error)
        return {}
    if not snapshot.boot:
        log.error("shared objects that are not durable begin again: whether the machine has restarted is not known")
    return snapshot.objects if snapshot.boot and snapshot.boot == boot_id() else {}


def remove(directory: DataDirectory) -> None:
    """Remove what the last manager left, before anybody uses it: it must never be read again afterwards.

    :raises StartupError: if that fails.
    """
    try:
        directory.snapshot.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, f"{directory.snapshot} cannot be removed", directory.path) from error
