"""Plain data: the arguments of a call, and its result, as bytes that can name no code.

Plain are None, bool, int of any size, float, str, bytes, list, tuple, dict, set, frozenset, `datetime`, `date`, `time`,
`timedelta`, `Decimal` and `UUID`, the members of an `Enum` and the instances of a dataclass, nested. MessagePack has
only the first of these; the others are its extension types, whose numbers never change, because journals hold them.

An `Enum` and a dataclass are named by module and qualified name. The reader looks only into modules that it has already
imported, and calls neither a constructor nor a descriptor of the class.
"""

import builtins
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from functools import partial
from types import ModuleType
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

from msgspec import Struct, msgpack

from .errors import InvalidRequest
from .modules import imported, place_of
from .settings import LARGEST_VALUE, from_environment

_ENUM, _DATACLASS = 14, 15
_INTEGER, _DICT = 2, 3
_BUILT_IN = tuple(kind for kind in vars(builtins).values() if isinstance(kind, type) and kind is not object)
_encoder = msgpack.Encoder()


class Sealed(Struct, frozen=True):
    """A member of an `Enum` or an instance of a dataclass, kept as it came: a dict's manager needs no class of it."""

    code: int
    data: bytes


def find_class(module: str, qualname: str) -> Any:
    """Return what a module that is already imported has under this name, else None. Nothing is imported or called."""
    found: Any = imported(module)
    for name in qualname.split("."):
        if isinstance(found, ModuleType):
            found = object.__getattribute__(found, "__dict__").get(name)  # a lazy module would import itself
        else:
            found = vars(found).get(name) if isinstance(found, type) else None
    return found


def class_name(kind: type) -> tuple[str, str]:
    """Return the module and the qualified name of a class, such that another process finds it."""
    return place_of(kind.__module__)[0], kind.__qualname__


def encode_plain(value: object, what: str) -> bytes:
    """Encode plain data. Raise `InvalidRequest` about `what` if `value` is something else, or too large."""
    try:
        data = _encoder.encode(_pack(value))
    except Exception as error:  # noqa: BLE001 - a class may have any attributes
        raise InvalidRequest(f"{what} cannot be sent: {error}") from None
    check_size(what, data)
    return data


_VARIABLE = "COUNTER_SERVER_LARGEST_VALUE"
_largest_value: int | None = None  # bytes, in this process; None before it was read


def largest_value() -> int:
    """Return the most bytes of one value: as an app of this process is configured, or the environment says."""
    global _largest_value
    if _largest_value is None:
        _largest_value = cast(int, from_environment("LARGEST_VALUE"))
    return _largest_value


def allow_values(size: int) -> None:
    """Let values in this process have `size` bytes, and in managers that it starts: they have its environment."""
    global _largest_value
    _largest_value = max(size, _largest_value or 0)
    if _largest_value != LARGEST_VALUE or _VARIABLE in os.environ:
        os.environ[_VARIABLE] = str(_largest_value)


def check_size(what: str, data: bytes) -> None:
    if len(data) > LARGEST_VALUE and len(data) > largest_value():
        raise InvalidRequest(f"{what} has {len(data)} bytes; at most {largest_value()} are allowed, by {_VARIABLE}")


def _pack(value: object) -> object:
    kind = type(value)  # a subclass of a plain type is not plain data
    if value is None or kind in (bool, float, str, bytes):
        return value
    if isinstance(value, int) and kind is int:
        return value if -(2**63) <= value < 2**64 else msgpack.Ext(_INTEGER, f"{value:x}".encode())
    if isinstance(value, list) and kind is list:
        return [_pack(item) for item in value]
    if isinstance(value, dict) and kind is dict:
        if all(type(key) is str for key in value):
            return {key: _pack(item) for key, item in value.items()}
        return _extension(_DICT, [_pack(part) for pair in value.items() for part in pair])
    if kind in _TAKEN_APART:
        code, take_apart = _TAKEN_APART[kind]
        return _extension(code, take_apart(value))
    if isinstance(value, Sealed):
        return msgpack.Ext(value.code, value.data)
    if isinstance(value, Enum):
        # A combination of flags has a value, but not always a name.
        return _extension(_ENUM, [*_named(kind), value.value if isinstance(value, Flag) else value.name])
    if is_dataclass(kind) and not isinstance(value, _BUILT_IN):
        content = {field.name: _pack(getattr(value, field.name)) for field in fields(kind)}
        return _extension(_DATACLASS, [*_named(kind), content])
    raise TypeError(
        f"{kind.__qualname__} is not plain data (None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset,"
        " datetime, date, time, timedelta, Decimal, UUID, a member of an Enum or an instance of a dataclass)"
    )


def _extension(code: int, parts: object) -> msgpack.Ext:
    return msgpack.Ext(code, _encoder.encode(parts))


def _packed(parts: Iterable[object]) -> list[object]:
    return [_pack(part) for part in parts]


def _sorted(parts: Iterable[object]) -> list[object]:
    return sorted(_packed(parts), key=_encoder.encode)  # equal sets give equal bytes


def _reduced(value: Any) -> list[object]:
    return _packed(value.__reduce_ex__(4)[1])  # as for pickle, from protocol 4 on with `fold`


_TAKEN_APART: dict[type, tuple[int, Callable[[Any], list[object]]]] = {
    tuple: (1, _packed),
    set: (4, _sorted),
    frozenset: (5, _sorted),
    datetime: (6, _reduced),
    date: (7, _reduced),
    time: (8, _reduced),
    timedelta: (9, _reduced),
    timezone: (10, _reduced),
    Decimal: (11, _reduced),
    UUID: (12, lambda value: [value.bytes]),
    ZoneInfo: (13, lambda value: [value.key]),
}


def _named(kind: type) -> tuple[str, str]:
    if find_class(kind.__module__, kind.__qualname__) is not kind:
        raise TypeError(f"{kind.__qualname__} is not found by its name: define it at the top level of a module")
    return class_name(kind)


def _put_together(kind: Callable[..., object], parts: list[Any]) -> object:
    return kind(*parts)


_PUT_TOGETHER: dict[int, Callable[[list[Any]], object]] = {
    1: tuple,
    4: set,
    5: frozenset,
    12: lambda parts: UUID(bytes=parts[0]),
    **{
        code: partial(_put_together, kind)
        for kind, (code, _) in _TAKEN_APART.items()
        if kind not in (tuple, set, frozenset, UUID)
    },
}


def _decoder(open_named: Callable[[int, memoryview], object]) -> Callable[[bytes | memoryview], Any]:
    """Return a function that decodes plain data, or raises `ValueError`. An `Enum` or dataclass is for `open_named`."""

    def unpack(code: int, data: memoryview) -> object:
        if code == _INTEGER:
            return int(bytes(data), 16)
        if code in (_ENUM, _DATACLASS):
            return open_named(code, data)
        parts = decode(data)
        if code == _DICT:
            return dict(zip(parts[::2], parts[1::2], strict=True))
        return _PUT_TOGETHER[code](parts)

    decode = msgpack.Decoder(ext_hook=unpack).decode

    def decoded(data: bytes | memoryview) -> Any:
        try:
            return decode(data)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"not plain data: {type(error).__name__}: {error}") from error

    return decoded


def _open(code: int, data: memoryview) -> object:
    module, qualname, content = decode_plain(data)
    kind = find_class(module, qualname)
    if not (isinstance(kind, type) and (issubclass(kind, Enum) if code == _ENUM else is_dataclass(kind))):
        sort = "Enum" if code == _ENUM else "dataclass"
        raise ValueError(f"the {sort} {module}.{qualname} is not found here: import its module in every process first")
    if code == _DATACLASS:
        return _filled(kind, content)
    if issubclass(kind, Flag):
        return kind(content)
    return kind.__members__[content]  # type: ignore[attr-defined] # of an Enum


def _filled(kind: type, content: dict[str, object]) -> object:
    """Return an instance of a dataclass with these fields.

    Its constructor is not called, as by `copy` and `pickle`: `__post_init__` would change what it has changed already,
    fields and parameters that are not each other would be lost, and bytes of another process would run it. A field that
    only one end's version of the class has is left out, or gets its default.
    """
    made: object = object.__new__(kind)
    for field in fields(kind):
        if field.name in content:
            value = content[field.name]
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        elif field.default is not MISSING:
            value = field.default
        else:
            raise ValueError(f"{kind.__qualname__} has a field {field.name!r} here, which was not sent")
        object.__setattr__(made, field.name, value)
    return made


decode_plain = _decoder(_open)
decode_sealed = _decoder(lambda code, data: Sealed(code, bytes(data)))
