"""Plain data: what a method of a shared object may take and give, as bytes that can name no code.

None, bool, int of any size, float, str, bytes, list, tuple and dict, nested. MessagePack has no tuples, no integers
over 64 bits, and not every key that a dict may have: they travel as extension types.
"""

from typing import Any

from msgspec import MsgspecError, msgpack

from .errors import InvalidRequest

LARGEST_VALUE = 2**20  # bytes, encoded; of the arguments of one call, or of its result
_TUPLE, _INTEGER, _DICT = 1, 2, 3

_encoder = msgpack.Encoder()


def encode(value: object, what: str) -> bytes:
    """`value` as bytes.

    :param what: names it in the error.
    :raises InvalidRequest: if it is not plain data, or is too large.
    """
    try:
        data = _encoder.encode(_pack(value, what))
    except (RecursionError, UnicodeEncodeError, MsgspecError) as error:
        raise InvalidRequest(f"{what} cannot be sent: {error}") from None
    if len(data) > LARGEST_VALUE:
        raise InvalidRequest(f"{what} has {len(data)} bytes; at most {LARGEST_VALUE}")
    return data


def decode(data: bytes) -> Any:
    """What was encoded.

    :raises ValueError: if that was not done by `encode`.
    """
    return _decode(data)


def _pack(value: object, what: str) -> object:
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if isinstance(value, int) and kind is int:
        return value if -(2**63) <= value < 2**64 else msgpack.Ext(_INTEGER, f"{value:x}".encode())
    if isinstance(value, list) and kind is list:
        return [_pack(item, what) for item in value]
    if isinstance(value, tuple) and kind is tuple:
        return msgpack.Ext(_TUPLE, _encoder.encode([_pack(item, what) for item in value]))
    if isinstance(value, dict) and kind is dict:
        if all(type(key) is str for key in value):
            return {key: _pack(item, what) for key, item in value.items()}
        return msgpack.Ext(_DICT, _encoder.encode([_pack(part, what) for pair in value.items() for part in pair]))
    raise InvalidRequest(
        f"{what}: {kind.__qualname__} is not plain data (None, bool, int, float, str, bytes, list, tuple, dict)"
    )


def _unpack_extension(code: int, data: memoryview) -> object:
    if code == _TUPLE:
        return tuple(_decode(data))
    if code == _INTEGER:
        return int(bytes(data), 16)
    if code == _DICT:
        parts = _decode(data)
        return dict(zip(parts[::2], parts[1::2], strict=True))
    raise ValueError(f"an extension of type {code}")


_decode = msgpack.Decoder(ext_hook=_unpack_extension).decode
