"""A view describes itself: what it takes and answers, beside the code that does so.

::

    @api.get("/<counter:name>")
    @described("Read a counter", answers={200: Answer("Its value", CounterValue("visits", 42))}, refusals=[404])
    def get(name): ...

The API's document is gathered from these, and the types in them are those that validate and answer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

View = TypeVar("View", bound=Callable[..., Any])

_NAME = "__described__"

JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    """One way that a request can be answered well.

    :param what: what it is, for people.
    :param example: a value of the type that is answered; None where there is no content.
    :param media_type: of the content. What is not JSON is text, and its example is a str.
    :param headers: those that matter, and what they say.
    """

    what: str
    example: object = None
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `described` was given."""

    summary: str
    text: str
    answers: Mapping[int, Answer]
    refusals: frozenset[int]
    query: type[msgspec.Struct] | None
    headers: Mapping[str, object]
    body: msgspec.Struct | None
    body_required: bool
    stored: bool
    operators: bool


def described(
    summary: str,
    *,
    answers: Mapping[int, Answer],
    refusals: Iterable[int] = (),
    query: type[msgspec.Struct] | None = None,
    headers: Mapping[str, object] | None = None,
    body: msgspec.Struct | None = None,
    body_required: bool = True,
    stored: bool = True,
    operators: bool = False,
) -> Callable[[View], View]:
    """Put a view into the API's document. The view's docstring is the longer text there.

    :param answers: by status, those that are no problem documents.
    :param refusals: the statuses of its own problem documents. What follows from the rest is added there: 400 of
        parameters, 413 and 415 of a body, 403 of a change, 401 of what is for operators, 503 of the store, 500 of all.
    :param query: what its query string is read by.
    :param headers: the request headers that it reads, and the types of their values.
    :param body: an example of what its body is read by.
    :param stored: whether it asks the store.
    :param operators: whether it is for operators only, who have the token.
    """

    def describe(view: View) -> View:
        text = " ".join((view.__doc__ or "").split())
        description = Description(
            summary=summary,
            text=text,
            answers=answers,
            refusals=frozenset(refusals),
            query=query,
            headers=headers or {},
            body=body,
            body_required=body_required,
            stored=stored,
            operators=operators,
        )
        setattr(view, _NAME, description)
        return view

    return describe


def description_of(view: Callable[..., Any]) -> Description | None:
    """What a view says of itself, if anything; decorators that use `functools.wraps` keep it."""
    return getattr(view, _NAME, None)
