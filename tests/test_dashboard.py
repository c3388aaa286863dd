"""The dashboard without its script: its list, search and forms, and the figures of the processes."""

import gzip
import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from counter_server import open_state
from counter_server.operations import LARGEST
from counter_server.server.web import create_app
from counter_server.server.web.dashboard import duration, figures, find, ways
from counter_server.state import State
from counter_server.status import Process, Status
from tests.processes import Server, eventually
from tests.test_server import ask

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
SCRIPT = {"Accept": "application/json"}


@dataclass
class Form:
    """A form, as a press of its button sends it."""

    method: str
    action: str
    fields: dict[str, str]
    button: str = ""


class Page(HTMLParser):
    """The content of a page for a person: counters, forms, links and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counters: dict[str, str] = {}
        self.forms: list[Form] = []
        self.links: dict[str, str] = {}
        self.texts: dict[str, str] = {}  # of elements with an id
        self.isolated: list[str] = []  # texts in a `<bdi>`
        self.figures: dict[str, str] = {}
        self._form: Form | None = None
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self._hidden = False  # in a template or dialog
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._hidden |= tag in ("template", "dialog")
        if tag == "form":
            self._form = Form(attributes.get("method") or "get", attributes.get("action", ""), {})
        elif tag == "input" and self._form and attributes.get("name"):
            self._form.fields[attributes["name"]] = attributes.get("value", "")
        if tag not in ("input", "meta", "link", "img"):
            self._open.append((tag, attributes, []))

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, parts = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        text = "".join(parts)
        if "id" in attributes:
            self.texts[attributes["id"]] = text.strip()
        if tag in ("template", "dialog"):
            self._hidden = False
        elif tag == "bdi" and not self._hidden:
            self.isolated.append(text)
        elif tag == "td" and "data-value" in attributes and not self._hidden:
            self.counters[self.isolated[-1]] = text
        elif tag == "a" and "hidden" not in attributes and not self._hidden:
            self.links[text] = attributes["href"]
        elif tag == "button" and self._form and not self._hidden and attributes.get("type") != "button":
            form = self._form
            if "name" in attributes:
                form = Form(form.method, form.action, {**form.fields, attributes["name"]: attributes["value"]})
            form.button = text
            self.forms.append(form)
        elif tag == "form":
            self._form = None
        elif tag == "dd":
            self.figures[attributes.get("data-figure") or attributes.get("data-mean") or attributes["id"]] = text

    def form(self, action: str, name: str = "") -> Form:
        """Return the only form with this action, for a counter if it is named."""
        forms = [form for form in self.forms if form.action.partition("?")[0] == action]
        (found,) = (form for form in forms if form.fields.get("name", "") == name)
        return found


def press(client: FlaskClient, form: Form, **typed: str) -> Page:
    """Send a form like a browser without JavaScript, and follow the redirect."""
    fields = {**form.fields, **typed}
    if form.method == "get":
        response = client.get(form.action, query_string=fields, headers=BROWSER)
    else:
        response = client.post(form.action, data=fields, headers=BROWSER)
        assert response.status_code == 303
        response = client.get(response.headers["Location"], headers=BROWSER)
    assert response.status_code == 200
    return Page(response.text)


def look(client: FlaskClient, url: str = "/counters") -> Page:
    response = client.get(url, headers=BROWSER)
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    return Page(response.text)


def application(url: str, *, host: str = "127.0.0.1", token: str | None = None) -> Flask:
    config = {"STORE": url, "DURABILITY": "process", "HOST": host, "TOKEN": token}
    return create_app({f"COUNTER_SERVER_{name}": value for name, value in config.items()})


@pytest.fixture
def app() -> Flask:
    return application("memory://")


def state_of(app: Flask) -> State:
    found = app.extensions["counter_server"]
    assert isinstance(found, State)
    return found


def detail_of(client: FlaskClient, page: Page, name: str) -> Page:
    """Follow a counter's link to its own page."""
    return look(client, page.links[name])


def sentence(page: Page) -> str:
    """Return the flashed message without the marks that isolate names."""
    return page.texts["said"].replace("\N{FIRST STRONG ISOLATE}", "").replace("\N{POP DIRECTIONAL ISOLATE}", "")


def test_every_form_works_and_reports_its_result(client: FlaskClient, app: Flask) -> None:
    page = look(client)
    assert page.counters == {}
    assert "There are no counters yet." in page.texts["none"]
    page = press(client, page.form("/counters/increment"), name="tickets")
    assert sentence(page) == "tickets is now 1."
    assert page.counters == {"tickets": "1"}
    page = press(client, page.form("/counters/increment", "tickets"))
    assert sentence(page) == "tickets is now 2."
    page = press(client, detail_of(client, page, "tickets").form("/counters/set", "tickets"), value="-40")
    assert sentence(page) == "tickets is -40 now."
    assert page.texts["value"] == "-40", "the form leads back to its own page"
    question = press(client, page.form("/counters/delete", "tickets"))
    assert "tickets" in question.isolated
    assert dict(state_of(app).counters().counters) == {"tickets": -40}, "asking deletes nothing"
    page = press(client, question.form("/counters/delete", "tickets"))
    assert sentence(page) == "tickets is deleted."
    assert page.counters == {}
    assert dict(state_of(app).counters().counters) == {}
    assert sentence(press(client, question.form("/counters/delete", "tickets"))) == "tickets was not there."
    response = client.get("/counters/delete?name=tickets")
    assert (response.status_code, response.content_type) == (404, "application/problem+json")


def test_a_form_leads_back_to_the_place_in_the_list(client: FlaskClient, app: Flask) -> None:
    for name in ("a1", "a2", "b"):
        state_of(app).counter(name).increment()
    page = press(client, look(client, "/counters?q=a&after=a1").form("/counters/increment", "a2"))
    assert page.counters == {"a2": "2"}
    page = detail_of(client, look(client, "/counters?q=b&limit=7"), "b")
    page = press(client, page.form("/counters/set", "b"), value="9")
    question = press(client, page.form("/counters/delete", "b"))
    kept = press(client, question.form("/counters/detail", "b"))
    for place in (page, kept):
        assert place.links["Back to the counters"] == "/counters?q=b&limit=7#row-b"
    assert look(client, kept.links["Back to the counters"]).counters == {"b": "9"}
    response = client.post(question.form("/counters/delete", "b").action, data={"name": "b"}, headers=BROWSER)
    assert response.location.startswith("/counters?q=b&limit=7")


HARD_NAMES = [
    "..",
    "a//b",
    "/",
    "-n",
    "\u202eright to left",
    "a\u200db",
    "&lt;b&gt;",
    "' onx='",
    '"quoted"',
    "<script>",
    "a/../b",
    " x ",
    "%2F",
]


def test_any_name_is_shown_unchanged_isolated_and_sent_safely(client: FlaskClient) -> None:
    for name in HARD_NAMES:
        page = press(client, look(client).form("/counters/increment"), name=name)
        assert page.counters == {name: "1"}
        detail = press(client, detail_of(client, page, name).form("/counters/set", name), value="5")
        assert detail.texts["said"] == f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE} is 5 now."
        page = press(client, page.form("/counters/increment", name))
        assert press(client, page.form("/counters"), q=name).counters == {name: "6"}
        question = press(client, detail.form("/counters/delete", name))
        assert question.isolated == [name]
        assert press(client, question.form("/counters/delete", name)).counters == {}


def test_the_script_gets_data(client: FlaskClient) -> None:
    for number in (1, 2):
        response = client.post("/counters/increment", data={"name": "a"}, headers=SCRIPT)
        assert response.status_code == 200
        assert response.get_json() == {"sentence": f"\u2068a\u2069 is now {number}."}
    assert "a is now" not in sentence(look(client)), "it says so itself: it is not said again on the next page"


def test_an_invalid_query_is_refused(client: FlaskClient) -> None:
    for query in [
        *(f"limit={limit}" for limit in ("0", "501", "x", "-1", "1.5", "9" * 30, "%D9%A1")),
        *("q=%00", "after=%00", "q=%E2%80%A8", "q=" + "x" * 256, "after=" + "x" * 256),
    ]:
        for path in ("/counters", "/counters.json"):
            response = client.get(f"{path}?{query}")
            assert (response.status_code, response.content_type) == (400, "application/problem+json"), query
            assert response.get_json()["outcome"] == "not_applied"


BAD_FORMS: list[tuple[str, dict[str, str]]] = [
    *(("increment", {"name": name}) for name in ("", "a\0b", "a\nb", "e\u0301", "x" * 256)),
    *(("increment", {}), ("delete", {"name": ""}), ("set", {"name": "a"}), ("set", {"name": "", "value": "1"})),
    *(("set", {"name": "a", "value": value}) for value in ("", "x", "1.5", "--1", "1_0", "٣", "9" * 5000)),
    ("set", {"name": "a", "value": str(LARGEST + 1)}),
]


def test_an_invalid_form_is_refused_in_the_form_that_the_client_reads(client: FlaskClient, app: Flask) -> None:
    state_of(app).counter("a").set(7)
    for action, fields in BAD_FORMS:
        shown = client.post(f"/counters/{action}", data=fields, headers=BROWSER)
        assert (shown.status_code, shown.mimetype) == (400, "text/html"), (action, fields)
        assert "That was not possible" in shown.text
        assert "/counters" in Page(shown.text).links.values()
        for headers in (SCRIPT, {}):
            response = client.post(f"/counters/{action}", data=fields, headers=headers)
            assert (response.status_code, response.content_type) == (400, "application/problem+json")
            assert response.get_json()["outcome"] == "not_applied"
        assert dict(state_of(app).counters().counters) == {"a": 7}


# The page of one counter


def test_the_same_addition_with_a_key_is_made_once(client: FlaskClient, app: Flask) -> None:
    state_of(app).counter("a").set(7)
    page = look(client, "/counters/detail?name=a")
    add = next(form for form in page.forms if "key" in form.fields)
    for told in ("a is now 12.", "a became 12 with this key before, so nothing was added now."):
        page = press(client, add, by="5", key="order-1")
        assert sentence(page) == told
        assert page.texts["value"] == "12"
    assert sentence(press(client, add, by="-2", key="")) == "a is now 10."
    for wrong in ({"by": "0"}, {"by": ""}, {"by": "x"}, {"by": "1", "key": "a b"}, {"by": "6", "key": "order-1"}):
        refused = client.post("/counters/increment", data={"name": "a", **wrong}, headers=SCRIPT)
        assert refused.status_code == (422 if wrong.get("key") == "order-1" else 400), wrong
    assert dict(state_of(app).counters().counters) == {"a": 10}


def test_looking_at_a_counter_changes_nothing_and_makes_none(client: FlaskClient, app: Flask) -> None:
    state_of(app).counter("a").set(LARGEST)
    for _ in range(3):
        assert look(client, "/counters/detail?name=a").texts["value"] == str(LARGEST)
        assert client.get("/counters/detail.json?name=a").get_json() == {"value": str(LARGEST)}
        assert client.get("/counters/detail.json?name=b").get_json() == {"value": None}
        assert client.get("/counters/detail?name=b").status_code == 404
    assert dict(state_of(app).counters().counters) == {"a": LARGEST}
    known = client.get("/counters/detail.json?name=a").headers["ETag"]
    assert client.get("/counters/detail.json?name=a", headers={"If-None-Match": known}).status_code == 304


def test_a_counter_that_does_not_exist_has_a_page_that_makes_it(client: FlaskClient) -> None:
    missing = client.get("/counters/detail?name=a/b", headers=BROWSER)
    assert (missing.status_code, missing.mimetype) == (404, "text/html")
    page = Page(missing.text)
    assert "/api/v1/counters/a/b/increment" in missing.text
    made = press(client, page.form("/counters/increment", "a/b"))
    assert (sentence(made), made.texts["value"]) == ("a/b is now 1.", "1")
    for query in ("name=nothing", "name=nothing&q=a"):
        problem = client.get(f"/counters/detail?{query}")
        assert (problem.status_code, problem.content_type) == (404, "application/problem+json")
        assert problem.get_json()["outcome"] == "not_applied"
    assert client.get("/counters/detail").status_code == 400


@pytest.mark.slow
def test_every_line_to_copy_counts_this_counter(start_server: Callable[..., Server], data_dir: Path) -> None:
    server = start_server("--workers", "1")
    shell = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open_state(f"manager://{data_dir}") as state:
        for name in ("visits", "..", "a//b", "/", "-n", "' onx='", "\u202eright to left"):
            state.counter(name).set(0)
            url = f"/counters/detail?{urlencode({'name': name})}"
            command, curl, python, *_ = Lines(ask(server.url, "GET", url, headers=BROWSER)[2]).found
            for program in (["bash", "-c", command], ["bash", "-c", curl], [sys.executable, "-c", python]):
                subprocess.run(program, env=shell, capture_output=True, check=True, timeout=60)
            assert state.counter(name).value == 3, name


class Lines(HTMLParser):
    """The lines to copy of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_code = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "code":
            self.found.append("")
        self._is_code = tag == "code"

    def handle_data(self, data: str) -> None:
        if self._is_code:
            self.found[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._is_code &= tag != "code"


def test_a_directory_is_shown_to_operators_only(tmp_path: Path) -> None:
    for host, is_operator in (("127.0.0.1", True), ("0.0.0.0", False)):
        app = application(f"manager://{tmp_path}/data", host=host)
        with app.test_request_context("/counters"):
            app.preprocess_request()
            shown = " ".join(ways("x"))
        assert (str(tmp_path) in shown) is is_operator
        assert "/api/v1/counters/x/increment" in shown


def test_a_full_page_and_all_that_it_loads_are_at_most_60_kb(
    client: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(State, "status", lambda _state: STATUS)
    for number in range(50):
        state_of(app).counter(f"orders/2026/{number:03}").set(LARGEST - number)
    assert len(look(client).counters) == 25
    sizes = {"/counters": len(client.get("/counters").data)}
    for name in ("style.css", "favicon.svg", "dashboard.js", "live.js", "chart.js"):
        with client.get(f"/static/{name}", headers={"Accept-Encoding": "gzip"}) as answer:
            sizes[name] = len(answer.data)
    assert sum(sizes.values()) <= 60_000, sizes


def test_files_are_compressed_for_browsers_and_asked_for_once(client: FlaskClient) -> None:
    with client.get("/static/style.css") as plain:
        content = plain.data
    with client.get("/static/style.css", headers={"Accept-Encoding": "gzip, br"}) as packed:
        assert gzip.decompress(packed.data) == content
        assert len(packed.data) < len(content) / 2
        assert (packed.headers["Content-Encoding"], packed.headers["Vary"]) == ("gzip", "Accept-Encoding")
        again = {"Accept-Encoding": "gzip", "If-None-Match": packed.headers["ETag"]}
    with client.get("/static/style.css", headers=again) as known:
        assert (known.status_code, known.data) == (304, b"")
    with client.get("/static/style.css", headers={"Accept-Encoding": "gzip;q=0"}) as refused:
        assert refused.data == content


# Permissions

TOKEN = "a-token-of-sixteen-characters-or-more"


@pytest.mark.parametrize("token", [None, TOKEN])
def test_without_permission_a_visitor_may_only_count_and_learns_why(token: str | None) -> None:
    app = application("memory://", host="0.0.0.0", token=token)
    state_of(app).counter("a").set(7)
    client = app.test_client()
    page = press(client, look(client).form("/counters/increment", "a"))
    assert page.counters == {"a": "8"}
    assert {form.action for form in page.forms} == {"/counters", "/counters/increment"}
    text = client.get("/counters").text
    assert f"You may count; set and delete are {'for operators' if token else 'off'}" in text
    assert "<dialog" not in text
    for method, action in [("post", "set"), ("post", "delete"), ("get", "delete")]:
        fields = {"name": "a", "value": "1"}
        response = client.open(f"/counters/{action}?name=a", method=method, data=fields, headers=SCRIPT)
        assert response.status_code == (401 if token else 403)
        assert response.content_type == "application/problem+json"
    assert dict(state_of(app).counters().counters) == {"a": 8}
    if token:
        sign_in = look(client, look(client, "/counters?q=a").links["Sign in"])
        page = press(client, sign_in.form("/sign-in"), token=TOKEN)
        assert page.form("/counters").fields["q"] == "a"  # the same place
        page = press(client, detail_of(client, page, "a").form("/counters/set", "a"), value="1")
        assert page.texts["value"] == "1"


def test_a_search_finds_names_by_their_beginning_page_by_page(client: FlaskClient, app: Flask) -> None:
    for name in ("a", "a/1", "a/2", "a/3", "ab", "A", "b a", "größe"):
        state_of(app).counter(name).increment()
    page = press(client, look(client).form("/counters"), q="a")
    assert list(page.counters) == ["a", "a/1", "a/2", "a/3", "ab"]
    assert "Next page" not in page.links
    page = look(client, "/counters?q=a%2F&limit=2")
    assert list(page.counters) == ["a/1", "a/2"]
    page = look(client, page.links["Next page"])
    assert list(page.counters) == ["a/3"]
    assert "Next page" not in page.links
    assert page.form("/counters").fields["q"] == "a/"
    everything = list(look(client, page.links["All counters"]).counters)
    assert everything == ["A", "a", "a/1", "a/2", "a/3", "ab", "b a", "größe"]
    page = look(client, "/counters?q=nothing")
    assert page.counters == {}
    assert "No counter has such a name. Show all counters, or make this one:" in page.texts["none"]
    assert "increment" in page.texts["none"]
    assert "/api/v1/counters/nothing/increment" in page.texts["none"]
    typed = unicodedata.normalize("NFD", "grö")  # in another normal form
    assert len(typed) == 4
    assert press(client, look(client).form("/counters"), q=typed).counters == {"größe": "1"}


LETTERS = st.text(st.sampled_from("ab/é名\U0001f426"), max_size=4)
EXAMPLES = create_app({"COUNTER_SERVER_STORE": "memory://"})


@given(names=st.sets(LETTERS.filter(bool), max_size=12), beginning=LETTERS, after=LETTERS, limit=st.integers(1, 5))
@settings(max_examples=25)
def test_a_listing_equals_a_search_through_all_names(names: set[str], beginning: str, after: str, limit: int) -> None:
    state = state_of(EXAMPLES)
    for name, _ in state.counters().counters:
        state.counter(name).delete()
    for name in names:
        state.counter(name).increment()
    wanted = [name for name in sorted(names) if name.startswith(beginning) and name > after]
    with EXAMPLES.app_context():
        listing = find(beginning=beginning, after=after, limit=limit)
    assert [name for name, _ in listing.counters] == wanted[:limit]
    assert listing.next == (wanted[limit - 1] if len(wanted) > limit else None)


@pytest.mark.slow
def test_a_store_that_cannot_list_says_so_and_the_rest_works(tmp_path: Path, stack: ExitStack) -> None:
    from tests.engines import MemcachedServer

    app = application(stack.enter_context(MemcachedServer(tmp_path / "memcached")).url)
    stack.callback(state_of(app).close)
    client = app.test_client()
    text = client.get("/counters").text
    assert "memcached cannot list its counters; use another store for it. Search for a whole name" in text
    assert "The store memcached:// reports no figures" in text
    page = press(client, look(client).form("/counters/increment"), name="a b")
    assert sentence(page) == "a b is now 1."
    page = press(client, page.form("/counters"), q="a b")
    page = press(client, detail_of(client, page, "a b").form("/counters/set", "a b"), value="41")
    assert page.texts["value"] == "41"
    assert client.get("/counters.json?q=a").get_json()["counters"] == []


def test_unchanged_content_is_not_sent_again(client: FlaskClient, app: Flask) -> None:
    state_of(app).counter("a").increment()
    first = client.get("/counters.json")
    assert first.status_code == 200
    same = client.get("/counters.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", first.headers["ETag"])
    state_of(app).counter("a").increment()
    other = client.get("/counters.json", headers={"If-None-Match": first.headers["ETag"]})
    assert other.status_code == 200
    assert other.headers["ETag"] != first.headers["ETag"]
    assert other.get_json()["counters"] == [{"name": "a", "value": "2"}]
    elsewhere = client.get("/counters.json?q=b", headers={"If-None-Match": other.headers["ETag"]})
    assert elsewhere.status_code == 200


@pytest.mark.slow
def test_workers_agree_on_the_page_and_show_restarts(start_server: Callable[..., Server]) -> None:
    """Requests change nothing on the page; only uptimes change, in ever longer steps."""
    server = start_server("--workers", "2")
    tag, rows = "", []

    def unchanged() -> bool:
        nonlocal tag, rows
        with suppress(OSError, HTTPException):  # a killed worker may have been about to answer
            status, headers, text = ask(server.url, "GET", "/counters.json", headers={"If-None-Match": tag})
            if status == 200:
                tag, rows = headers["ETag"], json.loads(text)["processes"]
            return status == 304
        return False

    eventually(lambda: all(unchanged() for _ in range(6)), "six answers that nothing has changed")
    assert [(row["name"], row["restarts"]) for row in rows] == [("manager", "0"), ("worker-1", "0"), ("worker-2", "0")]
    pids = [int(row["pid"]) for row in rows]
    assert (pids[:1], {*pids[1:]}) == (server.children("manager"), {*server.children("worker")})
    os.kill(pids[1], signal.SIGKILL)
    eventually(lambda: unchanged() and rows[1]["restarts"] == "1" and rows[1]["pid"].isdigit(), "the next worker")
    assert int(rows[1]["pid"]) != pids[1]


STATUS = msgspec.json.decode(
    b'{"pid": 7, "epoch": "e", "durability": "commit", "uptime": 10.0, "starts": 3, "counters": 100000, "objects": 1,'
    b'"clients": 2, "keys": 3, "connections": 4, "batches": 500, "operations": 2000, "commits": 250,'
    b'"journal_bytes": 12345678, "commit_times": {"counters": {"counts": [200, 40], "seconds": 0.4},'
    b'"objects": {"counts": [10], "seconds": 0.1}}, "hosted": [], "processes": [], "more_processes": 0}',
    type=Status,
)


def test_means_need_at_least_one_event(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(status: Status) -> dict[str, str]:
        monkeypatch.setattr(State, "status", lambda _state: status)
        figures = look(client).figures
        return {name: figures[name] for name in ("operations", "batches", "batch", "commit")}

    means = {"operations": "200.0/s", "batches": "50.0/s", "batch": "4.00 operations", "commit": "2.00 ms"}
    assert shown(STATUS) == means
    idle = structs.replace(STATUS, batches=0, operations=0, commit_times={})
    none = {"operations": "0.0/s", "batches": "0.0/s", "batch": "none yet", "commit": "none yet"}
    assert shown(idle) == none


def test_figures_are_for_people_and_stay_the_same_while_nothing_happens() -> None:
    reported = figures(STATUS)
    assert reported["now"]["Counters"] == "100,000"
    assert reported["now"]["Journal"] == "12.3 MB"
    assert reported["now"]["Starts on its data"] == "3"
    for seconds, text in [
        *((59.9, "under a minute"), (60, "1 minute"), (3599, "59 minutes"), (3600, "1 hour"), (86399, "23 hours")),
        *((86400, "1 day"), (10**8, "1157 days")),
    ]:
        assert duration(seconds) == text
    hour = structs.replace(STATUS, uptime=3600.0)
    assert figures(hour) == figures(structs.replace(hour, uptime=7199.0)) != figures(structs.replace(hour, uptime=7200))


def test_a_process_that_is_not_started_again_yet_is_shown_as_such(client: FlaskClient, app: Flask) -> None:
    found = [Process(name="worker-1", pid=None, uptime=0.0, restarts=4)]
    app.config["COUNTER_SERVER_PROCESSES"] = lambda: found
    (row,) = client.get("/counters.json").get_json()["processes"]
    assert row == {"name": "worker-1", "pid": "being started", "uptime": "", "restarts": "4"}
