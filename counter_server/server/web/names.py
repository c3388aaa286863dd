"""A counter's name in a path: how it is routed, and how the API's document describes it."""

from typing import Annotated

from msgspec import Meta
from werkzeug.routing import PathConverter

from ...operations import LONGEST_NAME

# What `operations.check_name` asks for, as far as a JSON Schema can tell it; the format stands for the rest.
_SHAPE = {
    "format": "counter-name",
    "maxLength": LONGEST_NAME,
    "pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$",
}
_RULES = f"1 to {LONGEST_NAME} bytes of UTF-8 in Unicode normal form C, without control characters"

CounterName = Annotated[
    str,
    Meta(
        description=f"{_RULES}; in a path percent-encoded, a slash as %2F",
        examples=["visits"],
        extra_json_schema={**_SHAPE, "minLength": 1},
    ),
]

AfterName = Annotated[
    str, Meta(description="The last name of the page before; empty for the first page", extra_json_schema=_SHAPE)
]


class CounterNameConverter(PathConverter):
    """The rest of the path, slashes and all; whether it is a good name is the counter's to say."""

    regex = "(?s:.*?)"
    part_isolating = False
    described_as = CounterName
