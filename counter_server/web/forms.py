"""What a request says, read as the types that the API's document shows."""

import json
from typing import TypeVar

import msgspec
from flask import request
from werkzeug.exceptions import UnsupportedMediaType

from ..errors import InvalidRequest

Form = TypeVar("Form", bound=msgspec.Struct)


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
        body = msgspec.json.decode(data, type=form)
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
