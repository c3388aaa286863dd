"""The JSON API under `/api/v1/counters`, and its document: `openapi.json`, which the tests hold against the server."""

import json
import re
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from flask import Blueprint, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from msgspec import Meta, Struct
from werkzeug.exceptions import NotFound, UnsupportedMediaType
from werkzeug.routing import PathConverter

from ...errors import InvalidRequest
from ...extension import SharedState
from ...operations import LARGEST, LARGEST_PAGE, SMALLEST, Assignment, Get, Increment, Replayed, Step, expect
from .security import ProtectedResponse, operators_only, token_of
from .site import has_page, render_template, root, site

Form = TypeVar("Form", bound=Struct)

shared = SharedState()  # of the current app
api = Blueprint("api", __name__, url_prefix="/api/v1/counters")
documentation = Blueprint("documentation", __name__)

_DOCUMENT = msgspec.json.decode(Path(__file__).with_name("openapi.json").read_bytes())
_DOCUMENT["info"]["version"] = version("counter-server")


class PageQuery(Struct, frozen=True):
    """The query string of a page of counters."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=LARGEST_PAGE)] = 100


class CounterNameConverter(PathConverter):
    """Matches the rest of a path, slashes included; `check_name` decides later whether it is a name.

    As it matches "a//b" too, which is another name than "a/b", an app does not merge these slashes.
    """

    regex = "(?s:.*?)"
    part_isolating = False


NAMED = "/<counter_server_name:name>"
_ONE = Step()
_CONDITIONS = {
    "HTTP_" + name.upper().replace("-", "_"): name for name in ("If-Match", "If-None-Match", "If-Unmodified-Since")
}


@api.record
def _add_converter(state: BlueprintSetupState) -> None:
    state.app.url_map.converters["counter_server_name"] = CounterNameConverter  # under no name of another app's


@api.get("")
def page() -> Response:
    query = read_query(PageQuery)
    found = shared.counters(after=query.after, limit=query.limit)
    counters = [{"counter": name, "value": value} for name, value in found.counters]
    return _json({"counters": counters, "next": counters[-1]["counter"] if found.more else None})


@api.post(f"{NAMED}/increment")
def increment(name: str) -> Response:
    _refuse_conditions()
    step = _read_body(Step, default=_ONE)
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and "," in key:  # WSGI joins repeated headers with a comma
        raise InvalidRequest("an Idempotency-Key may be given once, without a comma")
    result = shared.submit(Increment(name, step.by, step.minimum, step.maximum, key))
    if isinstance(result, Replayed):
        response = _value(name, result.value)
        response.headers["Idempotent-Replayed"] = "true"
        return response
    return _value(name, expect(int, result))


@api.get(NAMED)
def get(name: str) -> Response:
    value = shared.submit(Get(name))
    if value is None:
        raise NotFound(f"there is no counter {name!r}")
    return _value(name, expect(int, value))


@api.put(NAMED)
@operators_only
def put(name: str) -> Response:
    _refuse_conditions()
    return _value(name, shared.counter(name).set(_read_body(Assignment).value))


@api.delete(NAMED)
@operators_only
def delete(name: str) -> Response:
    _refuse_conditions()
    if not shared.counter(name).delete():
        raise NotFound(f"there is no counter {name!r}")
    return Response(status=204)


def _refuse_conditions() -> None:
    """Refuse a conditional change: counters have no versions (RFC 9110, 13.1)."""
    environ = request.environ
    for variable, header in _CONDITIONS.items():
        if variable in environ:
            raise InvalidRequest(
                f"{header} is not supported, as counters have no versions; nothing was changed: leave it out"
            )


@documentation.get("/openapi.json")
def openapi() -> Response:
    return _json({**_document(), "servers": [{"url": root() or "/"}]})


@documentation.get("/docs")
def docs() -> str:
    here = request.host_url.rstrip("/") + root()
    return render_template("documentation.html", document=_document(), root=here, of=_component)


def _component(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return what `given` refers to, or itself if it is not a reference."""
    name = given.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = _DOCUMENT["components"][kind][name] if name else given
    return found


def _document() -> dict[str, Any]:
    """Return the document with the operations that this site has."""

    def is_here(item: dict[str, Any]) -> bool:
        return all(has_page(operation["operationId"].replace("_", ".", 1)) for operation in item.values())

    here = {path: item for path, item in _DOCUMENT["paths"].items() if is_here(item)}
    if site().is_closed:
        here = {
            path: {method: _guarded(operation) for method, operation in item.items()} for path, item in here.items()
        }
    return {**_DOCUMENT, "paths": here}


def _guarded(operation: dict[str, Any]) -> dict[str, Any]:
    """Return an operation as a closed site has it."""
    has_token = token_of(current_app.config) is not None
    codes = ("401", "429") if has_token else ("403",)
    refusals = {code: {"$ref": f"#/components/responses/Problem{code}"} for code in codes}
    responses = {**refusals, **operation["responses"]}
    guarded = {**operation, "security": [{"token": []}] if has_token else [], "responses": responses}
    if has_token and "security" not in operation:
        (sample,) = operation["x-codeSamples"]
        source = f'{sample["source"]} --header "Authorization: Bearer $COUNTER_SERVER_TOKEN"'
        guarded["x-codeSamples"] = [{**sample, "source": source}]
    return guarded


def _json(content: object) -> Response:
    return ProtectedResponse(msgspec.json.encode(content), content_type="application/json")


def _value(name: str, value: int) -> Response:
    return _json({"counter": name, "value": value})


def read_query(form: type[Form]) -> Form:
    """Read the query string as a `form` with fields of str and int. Parameters of other names are ignored.

    :raises InvalidRequest: if it does not fit.
    """
    given = {}
    for name, values in request.args.lists():
        if name in form.__struct_fields__:
            given[name], *others = values
            if others:
                raise InvalidRequest(f"{name} is given more than once")
    try:
        query = msgspec.convert(given, form, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the query is not acceptable: {error}") from None
    for name, value in given.items():
        if str(getattr(query, name)) != value:  # msgspec takes 1e2 and 1.0 for integers
            raise InvalidRequest(f"the query is not acceptable: {name} is an integer in digits")
    return query


def _number(text: str) -> int | float:
    """Read a JSON number with a point or an exponent: to JSON Schema, 5.0 and 5e0 are the integer 5, exactly."""
    with suppress(InvalidOperation):  # more digits, or a larger exponent, than any integer within 64 bits needs
        number = Decimal(text)
        if SMALLEST <= number <= LARGEST and number == number.to_integral_value():
            return int(number)
    return float(text)


_decode = msgspec.json.Decoder(dict[str, Any], float_hook=_number).decode


def read_integer(name: str, text: str, least: int, most: int) -> int:
    """Read the field `name` of a form, or raise `InvalidRequest`."""
    if not re.fullmatch(r"\s*-?[0-9]{1,19}\s*", text) or not least <= int(text) <= most:
        raise InvalidRequest(f"{name} must be an integer from {least} to {most}")
    return int(text)


def _read_body(form: type[Form], *, default: Form | None = None) -> Form:
    """Read the JSON body as a `form`; without a body return `default`, if there is one."""
    environ = request.environ
    is_empty = environ.get("CONTENT_LENGTH", "") in ("", "0") and "HTTP_TRANSFER_ENCODING" not in environ
    data = b"" if is_empty else request.get_data(cache=False)
    if not data and default is not None:
        return default
    if not data:
        raise InvalidRequest(f"a body is required: a JSON object with {', '.join(form.__struct_fields__)}")
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    try:
        body = msgspec.convert(_decode(data), form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not acceptable: {error}") from None
    # msgspec takes the last of two members of the same name. By now the body is a flat object of numbers.
    names = [name for name, _ in json.loads(data, object_pairs_hook=list)]
    if len(set(names)) < len(names):
        raise InvalidRequest("the body is not acceptable: it has two members of the same name")
    return body
