"""Badges: pictures that read a counter, and count if the operator has allowed it; drawn as safe, readable SVG."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from counter_server.errors import InvalidRequest
from counter_server.server.web import create_app
from counter_server.server.web.badge import PALETTE, draw
from counter_server.state import State
from tests.processes import Server
from tests.test_server import ask

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_BADGES": ["visits", "a/b"]})


def path_to(name: str) -> str:
    return f"/badge/{quote(name, safe='')}.svg"


def words(response: TestResponse, status: int = 200) -> list[str]:
    """Return the badge's left and right words; check that screen readers get them, and that nothing caches it."""
    assert response.status_code == status, response.text
    assert response.content_type == "image/svg+xml; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers.getlist("Cross-Origin-Resource-Policy") == ["cross-origin"]
    return said(response.text)


def said(picture: str) -> list[str]:
    svg = ElementTree.fromstring(picture)  # noqa: S314 - ours
    assert svg.tag == f"{SVG}svg"
    assert svg.get("role") == "img"
    left, right = (text.text or "" for text in svg.iter(f"{SVG}text"))
    title = svg.find(f"{SVG}title")
    assert title is not None
    assert svg.get("aria-label") == title.text == f"{left}: {right}"
    return [left, right]


def fills(picture: str, kind: str = "path") -> str | None:
    """Return the colour of the right half: of its background, or of its text."""
    return list(ElementTree.fromstring(picture).iter(f"{SVG}{kind}"))[1].get("fill")  # noqa: S314 - ours


def test_a_badge_reads_and_counts_nothing(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(7)
    for _ in range(3):
        assert words(client.get("/badge/visits.svg")) == ["visits", "7"]
        assert words(client.get("/badge/visits.svg?count=0")) == ["visits", "7"]
    for name, value in [
        *(("Sec-Purpose", "prefetch"), ("Sec-Purpose", "prefetch;prerender"), ("Purpose", "prefetch")),
        *(("X-Moz", "prefetch"), ("X-Purpose", "preview")),
    ]:
        assert words(client.get("/badge/visits.svg?count=1", headers={name: value})) == ["visits", "7"]
    head = client.head("/badge/visits.svg?count=1")
    assert (head.status_code, head.get_data()) == (200, b"")
    assert state.counter("visits").value == 7


def test_a_badge_counts_on_request_if_it_is_allowed(client: FlaskClient, state: State) -> None:
    for number, site in enumerate(("none", "cross-site"), 1):  # other sites may show it
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": "image"}
        assert words(client.get("/badge/visits.svg?count=1", headers=headers)) == ["visits", str(number)]
    assert words(client.get(f"{path_to('a/b')}?count=1")) == ["a/b", "1"]
    assert words(client.get("/badge/a/b.svg?count=1")) == ["a/b", "2"]
    for name in ("other", "Visits", "visits.svg", "visit", "a"):
        response = client.get(f"{path_to(name)}?count=1")
        assert (response.status_code, response.content_type) == (403, "application/problem+json")
        assert name in response.get_json()["detail"]
    assert dict(state.counters().counters) == {"a/b": 2, "visits": 2}


def test_the_badge_of_a_missing_counter_says_so(client: FlaskClient, state: State) -> None:
    assert words(client.get("/badge/visits.svg"), 404) == ["visits", "none"]
    assert words(client.get("/badge/x.svg?label=y&color=red"), 404) == ["y", "none"]
    for name in ("", "a\nb", "a\0", "e\u0301", "x" * 256):
        assert client.get(path_to(name)).status_code == 400
    assert state.counters().counters == []


def test_a_badge_has_the_requested_label_and_colour(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(-7)
    label = '<b>&"Besucher'
    response = client.get(f"/badge/visits.svg?label={quote(label)}&color=fe7d37")
    assert words(response) == [label, "-7"]
    assert fills(response.text) == "#fe7d37"
    for colour, fill in [*PALETTE.items(), ("ABC", "ABC"), ("0a1B2c", "0a1B2c")]:
        assert fills(client.get(f"/badge/visits.svg?color={colour}").text) == f"#{fill}"
    assert words(client.get("/badge/visits.svg?label=&utm_source=elsewhere")) == ["visits", "-7"]


def test_a_bad_query_is_refused_and_counts_nothing(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(7)
    colours = ["", "purple", "%23fff", "ff", "fffff", "ggg", "blue%0a", "fff%0a", "blue&color=red", 'fff"/><script/>']
    labels = ["x" * 65, "a%0ab", "a%0a", "%00", "%1b[2J"]
    for query in [
        *(f"color={colour}{count}" for colour in colours for count in ("", "&count=1")),
        *(f"label={label}{count}" for label in labels for count in ("", "&count=1")),
        *(f"count={count}" for count in ("2", "-1", "true", "", "1.0", "01", "1&count=1")),
    ]:
        response = client.get(f"/badge/visits.svg?{query}")
        assert (response.status_code, response.content_type) == (400, "application/problem+json"), query
        assert response.get_json()["outcome"] == "not_applied"
    assert state.counter("visits").value == 7


def test_without_the_store_a_badge_says_that_it_is_unavailable(stack: ExitStack, tmp_path: Path) -> None:
    config = {"STORE": f"manager://{tmp_path}", "DEADLINE": 0.05, "START": False, "BADGES": ["visits"]}
    app = create_app({"SECRET_KEY": "k", **{f"COUNTER_SERVER_{name}": value for name, value in config.items()}})
    stack.callback(app.extensions["counter_server"].close)
    for query in ("", "?count=1"):
        response = app.test_client().get(f"/badge/visits.svg{query}")
        assert words(response, 503) == ["visits", "unavailable"]
        assert int(response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("names", ["visits", ["ok", "not\nok"], [""]])
def test_invalid_names_of_badges_are_refused_when_the_app_is_made(names: object) -> None:
    with pytest.raises(InvalidRequest, match=r"COUNTER_SERVER_BADGES|name"):
        create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_BADGES": names})


# The picture

DRAWING = create_app({"COUNTER_SERVER_STORE": "memory://"})


def drawn(label: str, message: str, colour: str) -> str:
    with DRAWING.app_context():
        return draw(label, message, colour)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), st.text(st.characters(codec="ascii")))
@example("a\ufffeb\uffff", "1")  # allowed in names, but not in XML
@settings(max_examples=25)
def test_any_words_make_a_well_formed_picture_with_these_words(label: str, message: str) -> None:
    message = "".join(character for character in message if character.isprintable())
    expected = [label.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd"), message]
    assert said(drawn(label, message, "fff")) == expected


def test_the_words_contrast_with_the_background() -> None:
    dark, light = (fills(drawn("a", "b", colour), "text") for colour in ("fff", "000"))
    assert dark != light
    for colours, ink in ((("ABC", "0f0", "fe7d37"), dark), (("00f", "333"), light)):
        for colour in colours:
            assert fills(drawn("a", "b", colour), "text") == ink


@pytest.mark.slow
def test_the_operator_names_the_badges_that_count(start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "2", "--badge", "visits", "--badge", "two words")
    for expected in (1, 2, 3):
        status, _, text = ask(server.url, "GET", "/badge/two%20words.svg?count=1")
        assert status == 200
        assert said(text) == ["two words", str(expected)]
    assert ask(server.url, "GET", "/badge/other.svg?count=1")[0] == 403
