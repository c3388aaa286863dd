"""What a request says, read as the types that the API's document shows."""

import json
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import msgspec
from flask import request
from werkzeug.exceptions import UnsupportedMediaType

from ...errors import InvalidRequest
from ...operations import LARGEST, SMALLEST

Form = TypeVar("Form", bound=msgspec.Struct)


def _number(text: str) -> int | float:
    """Read a JSON number with a point or an exponent: to JSON Schema, 5.0 and 5e0 are the integer 5.

    It is exact beyond 2**53 too, where a float is not, and does not write out 1e999999999.
    """
    with suppress(InvalidOperation):  # more digits, or a larger exponent, than any integer within 64 bits needs
        number = Decimal(text)
        if SMALLEST <= number <= LARGEST and number == number.to_integral_value():
            return int(number)
    return float(text)


_decode = msgspec.json.Decoder(dict[str, Any], float_hook=_number).decode


def read_body(form: type[Form], *, default: Form | None = None) -> Form:
    """The request's JSON body as a `form`.

    :param default: for a request without a body; without a default that is an error.
    :raises InvalidRequest: if it is none.
    """
    data = request.get_data(cache=False)
    if not data and default is not None:
        return default
    if data and request.mimetype != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    try:
        body = msgspec.convert(_decode(data), form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not acceptable: {error}") from None
    # msgspec takes the last of two members of the same name. What it has passed is a flat object of numbers.
    names = [name for name, _ in json.loads(data, object_pairs_hook=list)]
    if len(set(names)) < len(names):
        raise InvalidRequest("the body is not acceptable: it has two members of the same name")
    return body


def read_query(form: type[Form]) -> Form:
    """The request's query string as a `form`, whose fields are strings and integers. Others' parameters are let be.

    :raises InvalidRequest: if it is none.
    """
    given = {name: values for name, values in request.args.lists() if name in form.__struct_fields__}
    for name, values in given.items():
        if len(values) > 1:
            raise InvalidRequest(f"{name} is given more than once")
    single = {name: values[0] for name, values in given.items()}
    try:
        query = msgspec.convert(single, form, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the query is not acceptable: {error}") from None
    for name, value in single.items():
        if str(getattr(query, name)) != value:  # 1e2 and 1.0 are no ways to write an integer here
            raise InvalidRequest(f"the query is not acceptable: {name} is an integer in digits")
    return query


def is_prefetch() -> bool:
    """Whether a browser asks ahead for what may be shown later, or never: that counts nothing."""
    purposes = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"))
    return any("prefetch" in purpose.lower() or "preview" in purpose.lower() for purpose in purposes)
