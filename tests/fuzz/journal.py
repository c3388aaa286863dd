"""Fuzz the loading of a journal: a patched journal is refused by name, or holds the state after some commit.

    python -m tests.fuzz.journal [--runs N]

An input is a byte that chooses the file (the journal alone; its log; both), and patches of 5 bytes: an offset of 3,
the operation, and the byte for it.
"""

from contextlib import closing
from pathlib import Path

from tests.fuzz.fuzzing import fuzz, instrumented

instrumented(["counter_server.journal"])

from counter_server.errors import StartupError  # noqa: E402 - after the instrumentation
from counter_server.journal import Journal  # noqa: E402
from counter_server.ledger import Contents  # noqa: E402
from tests.journals import written  # noqa: E402

_place = Path()
_copies: dict[str, bytes] = {}
_closed = b""
_states: list[Contents] = []


def prepare(place: Path) -> None:
    """Write the good journal."""
    global _place, _closed
    _place = place
    copies, states = written(_place / "original")
    _copies.update(copies)
    _states.extend(states)
    _closed = (_place / "original" / "journal").read_bytes()
    (_place / "copy").mkdir()


def patched(content: bytes, patches: bytes) -> bytes:
    damaged = bytearray(content)
    for start in range(0, len(patches) - 4, 5):
        offset = int.from_bytes(patches[start : start + 3], "big") % len(content)
        operation, byte = patches[start + 3 : start + 5]
        if operation < 0x70:
            damaged[offset : offset + 1] = bytes([damaged[offset] ^ byte]) if offset < len(damaged) else b""
        elif operation < 0xE0:
            damaged[offset : offset + 1] = bytes([byte]) if offset < len(damaged) else b""
        else:
            del damaged[offset : offset + byte * 32]
    return bytes(damaged)


def try_one(data: bytes) -> None:
    """Load a journal with the patches of one input."""
    copy = _place / "copy"
    for path in copy.iterdir():
        path.unlink()
    choice, patches = data[:1], data[1:]
    if choice < b"\x80":
        files, expected = {"journal": patched(_closed, patches)}, _states[-1:]
    else:
        files, expected = {**_copies, "journal-wal": patched(_copies["journal-wal"], patches)}, _states
    for name, content in files.items():
        (copy / name).write_bytes(content)
    try:
        with closing(Journal(copy / "journal")) as journal:
            assert journal.load() in expected
    except StartupError as error:
        if str(copy / "journal") not in str(error):
            raise


if __name__ == "__main__":
    fuzz("journal", try_one, prepare)
