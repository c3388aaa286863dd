"""Badges: pictures that read a counter, and count if the operator has allowed it; drawn as safe, readable SVG."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from counter_server.errors import InvalidRequest
from counter_server.operations import LARGEST
from counter_server.server.web import create_app
from counter_server.server.web.badge import PALETTE, draw
from counter_server.state import State
from tests.processes import Program, Server
from tests.test_server import ask

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_BADGES": ["visits", "a/b"]})


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314 - ours


def path_to(name: str) -> str:
    return f"/badge/{quote(name, safe='')}.svg"


def words(response: TestResponse, status: int = 200) -> list[str]:
    """Return the badge's left and right words; check that screen readers get them, and that nothing caches it."""
    assert response.status_code == status, response.text
    assert response.content_type == "image/svg+xml; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    return said(response.text)


def said(picture: str) -> list[str]:
    svg = parse(picture)
    assert svg.tag == f"{SVG}svg"
    assert svg.get("role") == "img"
    left, right = (text.text or "" for text in svg.iter(f"{SVG}text"))
    title = svg.find(f"{SVG}title")
    assert title is not None
    assert svg.get("aria-label") == title.text == f"{left}: {right}"
    return [left, right]


def fills(picture: str) -> list[str | None]:
    return [path.get("fill") for path in parse(picture).iter(f"{SVG}path")]


def test_a_badge_reads_and_counts_nothing(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(7)
    for _ in range(3):
        assert words(client.get("/badge/visits.svg")) == ["visits", "7"]
        assert words(client.get("/badge/visits.svg?count=0")) == ["visits", "7"]
    assert state.counter("visits").value == 7


def test_a_badge_counts_on_request_if_it_is_allowed(client: FlaskClient, state: State) -> None:
    assert words(client.get("/badge/visits.svg?count=1")) == ["visits", "1"]
    assert words(client.get("/badge/visits.svg?count=1")) == ["visits", "2"]
    assert words(client.get(f"{path_to('a/b')}?count=1")) == ["a/b", "1"]
    assert words(client.get("/badge/a/b.svg?count=1")) == ["a/b", "2"]
    assert state.counter("visits").value == 2


@pytest.mark.parametrize("name", ["other", "Visits", "visits.svg", "visit", "a"])
def test_a_badge_without_permission_to_count_is_refused_and_counts_nothing(
    client: FlaskClient, state: State, name: str
) -> None:
    response = client.get(f"{path_to(name)}?count=1")
    assert response.status_code == 403
    assert response.content_type == "application/problem+json"
    assert name in response.get_json()["detail"]
    assert state.counters().counters == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Purpose": "prefetch"},
        {"Sec-Purpose": "prefetch;prerender"},
        {"Purpose": "prefetch"},
        {"X-Moz": "prefetch"},
        {"X-Purpose": "preview"},
    ],
)
def test_a_prefetch_shows_the_number_and_counts_nothing(
    client: FlaskClient, state: State, headers: dict[str, str]
) -> None:
    state.counter("visits").set(7)
    assert words(client.get("/badge/visits.svg?count=1", headers=headers)) == ["visits", "7"]
    assert state.counter("visits").value == 7


def test_head_counts_nothing(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(7)
    head = client.head("/badge/visits.svg?count=1")
    assert (head.status_code, head.get_data()) == (200, b"")
    assert state.counter("visits").value == 7


def test_the_badge_of_a_missing_counter_says_so(client: FlaskClient, state: State) -> None:
    assert words(client.get("/badge/visits.svg"), 404) == ["visits", "none"]
    assert words(client.get("/badge/x.svg?label=y&color=red"), 404) == ["y", "none"]
    assert state.counters().counters == []


def test_a_counter_at_its_end_is_refused_and_still_read(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(LARGEST)
    assert client.get("/badge/visits.svg?count=1").status_code == 409
    assert words(client.get("/badge/visits.svg")) == ["visits", str(LARGEST)]


def test_a_badge_has_the_requested_label_and_colour(client: FlaskClient, state: State) -> None:
    state.counter("visits").set(-7)
    label = '<b>&"Besucher'
    response = client.get(f"/badge/visits.svg?label={quote(label)}&color=fe7d37")
    assert words(response) == [label, "-7"]
    assert fills(response.text)[1] == "#fe7d37"
    for colour, fill in [*PALETTE.items(), ("ABC", "ABC"), ("0a1B2c", "0a1B2c")]:
        assert fills(client.get(f"/badge/visits.svg?color={colour}").text)[1] == f"#{fill}"
    assert words(client.get("/badge/visits.svg?label=&utm_source=elsewhere")) == ["visits", "-7"]


@pytest.mark.parametrize(
    "query",
    [
        "color=",
        "color=purple",
        "color=%23fff",
        "color=ff",
        "color=fffff",
        "color=ggg",
        "color=blue%0a",
        "color=fff%0a",
        "color=blue&color=red",
        'color=fff"/><script/>',
        "label=" + "x" * 65,
        "label=a%0ab",
        "label=a%0a",
        "label=%00",
        "label=%1b[2J",
        "count=2",
        "count=-1",
        "count=true",
        "count=",
        "count=1.0",
        "count=01",
        "count=1&count=1",
    ],
)
def test_a_bad_query_is_refused_and_counts_nothing(client: FlaskClient, state: State, query: str) -> None:
    state.counter("visits").set(7)
    for count in ("", "&count=1") if "count" not in query else ("",):
        response = client.get(f"/badge/visits.svg?{query}{count}")
        assert response.status_code == 400
        assert response.content_type == "application/problem+json"
        assert response.get_json()["outcome"] == "not_applied"
    assert state.counter("visits").value == 7


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "e\u0301", "x" * 256])
def test_a_bad_name_is_refused(client: FlaskClient, name: str) -> None:
    assert client.get(path_to(name)).status_code == 400


def test_other_sites_may_show_a_badge(client: FlaskClient, state: State) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}
    assert words(client.get("/badge/visits.svg?count=1", headers=headers)) == ["visits", "1"]


@pytest.mark.parametrize("query", ["", "?count=1"])
def test_without_the_store_a_badge_says_that_it_is_unavailable(stack: ExitStack, tmp_path: Path, query: str) -> None:
    app = create_app(
        {
            "COUNTER_SERVER_STORE": f"manager://{tmp_path}",
            "COUNTER_SERVER_DEADLINE": 0.2,
            "COUNTER_SERVER_START": False,
            "COUNTER_SERVER_BADGES": ["visits"],
            "SECRET_KEY": "k",
        }
    )
    stack.callback(app.extensions["counter_server"].close)
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
def test_any_words_make_a_well_formed_picture_with_these_words(label: str, message: str) -> None:
    message = "".join(character for character in message if character.isprintable())
    expected = [label.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd"), message]
    assert said(drawn(label, message, "fff")) == expected


def width(text: str) -> int:
    texts = list(parse(drawn(text, "", "fff")).iter(f"{SVG}text"))
    return int(texts[0].get("textLength", ""))


def test_the_background_is_as_wide_as_the_words() -> None:
    assert width("visits") == 3 * width("vi")
    assert width("計数器") == 3 * width("計") > 4 * width("v")
    assert width("e\u0301") == width("e")
    svg = parse(drawn("visits", "42", "fff"))
    assert int(svg.get("width", "")) == width("visits") + width("42") + 24


@pytest.mark.parametrize("colour", [*PALETTE.values(), "fff", "000", "777", "f00", "00f"])
def test_the_words_contrast_with_any_background(colour: str) -> None:
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    ink = list(parse(drawn("a", "b", colour)).iter(f"{SVG}text"))[1].get("fill")
    assert contrast(digits, str(ink).removeprefix("#")) >= 4.5


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours by WCAG 2.2."""

    def luminance(digits: str) -> float:
        channels = (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# As an operator runs it


def test_the_operator_names_the_badges_that_count(start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "2", "--badge", "visits", "--badge", "two words")
    for expected in (1, 2, 3):
        status, _, text = ask(server.url, "GET", "/badge/two%20words.svg?count=1")
        assert status == 200
        assert said(text) == ["two words", str(expected)]
    assert ask(server.url, "GET", "/badge/other.svg?count=1")[0] == 403


def test_a_badge_of_an_invalid_name_is_refused_at_start(stack: ExitStack, data_dir: Path) -> None:
    program = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir, "--badge", "a\nb"))
    assert program.wait() == 1
    assert program.errors[-1].startswith("Error: ")
    assert "name" in program.errors[-1]
