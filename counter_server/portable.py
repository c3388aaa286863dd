"""Contents in a file: JSON lines or CSV, in one order, with a checksum at the end; and back.

The checksum is the SHA-256 of the contents as JSON lines. So it is the same for the same contents, in each format and
from each store, and a program that only writes a CSV in another spelling does not break it.
"""

import csv
import io
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TypeVar

from msgspec import Meta, MsgspecError, Struct, convert, json

from .errors import InvalidRequest, StartupError
from .journal import appearing
from .ledger import Contents, KeyRecord
from .operations import FINGERPRINT_BYTES, Integer, check_key, check_name

Format = Literal["json", "csv"]
Advance = Callable[[int], object]  # called with the number of records that are done

Value = TypeVar("Value")

_VERSION = 1
_COLUMNS = ["kind", "name", "value", "fingerprint"]
_COLUMNS_BY_HAND = ["name", "value"]
_INTEGER = re.compile(r"-?[0-9]+")
_AT_ONCE = 1000  # records
_LONGEST_LINE = 2**14  # bytes; a name with each character escaped needs less


class _Row(Struct, tag_field="kind", forbid_unknown_fields=True, gc=False):
    pass


class _Start(_Row, tag="counter_server"):
    version: int


class _Counter(_Row, tag="counter"):
    name: str
    value: Integer


class _Key(_Row, tag="key"):
    name: str
    value: Integer
    fingerprint: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * FINGERPRINT_BYTES}}}$")]


class _End(_Row, tag="checksum"):
    counters: int
    keys: int
    sha256: str


_AnyRow = _Start | _Counter | _Key | _End
_encode_lines = json.Encoder().encode_lines
_decode = json.Decoder(_AnyRow).decode


def format_of(path: Path) -> Format:
    """Return the format that a file's name stands for."""
    return "csv" if path.suffix.lower() == ".csv" else "json"


def digest_of(contents: Contents) -> str:
    """Return the SHA-256 of the contents, in hexadecimal digits."""
    return _sum(_encode_lines(part) for part in _parts(contents))


def write(contents: Contents, file: BinaryIO, form: Format, advance: Advance) -> str:
    """Write the contents, and return their SHA-256."""

    def written() -> Iterator[bytes]:
        for part in _parts(contents):
            as_json = _encode_lines(part)
            file.write(as_json if form == "json" else _as_csv(part))
            yield as_json
            advance(len(part))

    digest = _sum(written())
    end = [_End(len(contents.counters), len(contents.keys), digest)]
    file.write(_encode_lines(end) if form == "json" else _as_csv(end))
    return digest


def _parts(contents: Contents) -> Iterator[list[_AnyRow]]:
    rows = _rows(contents)
    while part := list(islice(rows, _AT_ONCE)):
        yield part


def _rows(contents: Contents) -> Iterator[_AnyRow]:
    yield _Start(_VERSION)
    for name in sorted(contents.counters):  # by code points
        yield _Counter(name, contents.counters[name])
    for key in sorted(contents.keys):
        record = contents.keys[key]
        yield _Key(key, record.value, record.fingerprint.hex())


def _sum(parts: Iterable[bytes]) -> str:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _as_csv(rows: Iterable[_AnyRow]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        match row:
            case _Start():
                writer.writerow(_COLUMNS)
            case _Counter(name, value):
                writer.writerow(["counter", name, value, ""])
            case _Key(name, value, fingerprint):
                writer.writerow(["key", name, value, fingerprint])
            case _End(counters, keys, digest):
                writer.writerow(["checksum", digest, counters, keys])
    return text.getvalue().encode()


def read(file: BinaryIO, form: Format, name: str, *, unchecked: bool = False) -> tuple[Contents, str]:
    """Read and verify a whole file; return its contents and their SHA-256.

    :param name: of the file, for messages.
    :param unchecked: accept a file without a checksum, made by hand. A CSV may have only the columns name and value.
    :raises InvalidRequest: naming the line, if anything in it is not right.
    """
    number = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        while line := file.readline(_LONGEST_LINE):
            number += 1
            line = line.removeprefix(BOM_UTF8) if number == 1 else line  # some spreadsheets begin so
            if line.strip():
                yield line

    try:
        contents, end = _collected(_read_csv(lines()) if form == "csv" else map(_decode, lines()))
        digest = digest_of(contents)
        if end is None and not unchecked:
            raise ValueError("the checksum is missing: the file was cut off, or made by hand (then use --unchecked)")
        if end not in (None, _End(len(contents.counters), len(contents.keys), digest)):
            raise ValueError("the checksum does not match: the file was damaged or changed")
    except (MsgspecError, ValueError, csv.Error) as error:
        raise InvalidRequest(f"{name}, line {max(number, 1)}: {error}; nothing was changed") from error
    return contents, digest


def _collected(rows: Iterator[_AnyRow]) -> tuple[Contents, _End | None]:
    contents, end = Contents(), None
    _check_start(next(rows, None))
    for row in rows:
        if end is not None:
            raise ValueError("something follows the checksum")
        match row:
            case _Counter(counter, value):
                check_name(counter)
                _add(contents.counters, counter, value)
            case _Key(key, value, fingerprint):
                check_key(key)
                _add(contents.keys, key, KeyRecord(bytes.fromhex(fingerprint), value, 0.0))
            case _End():
                end = row
            case _:
                raise ValueError("it begins a second time")
    return contents, end


def _check_start(row: _AnyRow | None) -> None:
    if not isinstance(row, _Start):
        raise ValueError("this is not an export of counter-server")
    if row.version != _VERSION:
        raise ValueError(f"the format has version {row.version}, and this version of the program reads {_VERSION}")


def _add(found: dict[str, Value], name: str, value: Value) -> None:
    if name in found:
        raise ValueError(f"{name!r} is there twice")
    found[name] = value


def _read_csv(lines: Iterator[bytes]) -> Iterator[_AnyRow]:
    rows = csv.reader(map(bytes.decode, lines), strict=True)
    columns = next(rows, [])
    if columns not in (_COLUMNS, _COLUMNS_BY_HAND):
        raise ValueError(f"the columns are not {','.join(_COLUMNS)} or {','.join(_COLUMNS_BY_HAND)}")
    yield _Start(_VERSION)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} columns instead of {len(columns)}")
        match row if columns == _COLUMNS else ["counter", *row, ""]:
            case ["counter", name, value, ""]:
                yield convert({"kind": "counter", "name": name, "value": _integer(value)}, _AnyRow)
            case ["key", name, value, fingerprint]:
                cells = {"kind": "key", "name": name, "value": _integer(value), "fingerprint": fingerprint}
                yield convert(cells, _AnyRow)
            case ["checksum", digest, counters, keys]:
                yield _End(_integer(counters), _integer(keys), digest)
            case [kind, *_]:
                raise ValueError(
                    f"{kind!r} is not counter, key or checksum, or it has a fingerprint that it cannot have"
                )


def _integer(text: str) -> int:
    """Return a number of a CSV; refuse other spellings, as a spreadsheet may have rounded it."""
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not an integer, written with digits alone")
    return int(text)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Lend a new file, which gets its name when the block has ended: nobody sees a part of it.

    A link is followed. A device or a pipe is written to: nothing is there that could be replaced.

    :param overwrite: replace a file that has this name.
    :raises StartupError: if there is such a file, or it cannot be written; nothing is left then.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
        else:
            with appearing(Path(os.path.realpath(path)), replace=overwrite) as part, part.open("wb") as file:
                yield file
    except FileExistsError as error:
        raise StartupError(f"{path} is there already and was not changed: name another file, or --overwrite") from error
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}; no part of it is left") from error
