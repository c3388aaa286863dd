"""Bad requests on a real server: from the bytes on the wire through waitress to the counters, which stay unchanged."""

import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from email.parser import BytesParser
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import pytest
from waitress import wasyncore
from waitress.server import create_server

from counter_server.manager.directory import DataDirectory
from counter_server.operations import Batch, Delete, Increment
from counter_server.server.worker import LARGEST_HEAD, LARGEST_REQUEST, Channel
from tests.load import open_client
from tests.processes import PATIENCE, Server, eventually, open_in
from tests.test_api import BAD, BEFORE, COUNTERS, INCREMENT, JSON, Bad, with_body
from tests.test_manager import received_until_closed
from tests.test_server import address, ask

pytestmark = pytest.mark.slow

HEAD = f"POST {INCREMENT} HTTP/1.1\r\n".encode()
HOST = b"Host: localhost\r\n"
PROBLEM = "application/problem+json"
TIMEOUT = 1.5  # seconds that the server gives a request


@pytest.fixture(scope="module")
def data_dir_of_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad") / "data"


@pytest.fixture(scope="module")
def server(data_dir_of_server: Path) -> Iterator[Server]:
    """Start one server for all tests, with the counters of `BEFORE`."""
    options = ("--workers", "1", "--threads", "2", "--request-timeout", str(TIMEOUT))
    with Server(*options, "--data-dir", data_dir_of_server) as server:
        with open_client(DataDirectory(data_dir_of_server).url) as state:
            for name, value in BEFORE.items():
                state.counter(name).set(value)
        yield server
        assert not any("Traceback" in line or "uncaptured" in line for line in server.errors), server.errors


def all_counters(server: Server) -> dict[str, int]:
    status, _, text = ask(server.url, "GET", f"{COUNTERS}?limit=1000")
    assert status == 200
    return {row["counter"]: row["value"] for row in json.loads(text)["counters"]}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(address(server), timeout=PATIENCE)


def exchange(server: Server, request: bytes) -> bytes:
    """Return everything that is answered until the server closes, even if it does not read the whole request."""
    answer = b""
    with connect(server) as connection:
        with suppress(ConnectionError):  # the server refused it and closed; what it answered can still be read
            connection.sendall(request)
        with suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return answer


def parsed(answer: bytes) -> tuple[int, str, bytes]:
    """Return the status, the content's type and the content of one answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, _, lines = head.partition(b"\r\n")
    headers = BytesParser().parsebytes(lines)
    assert len(body) == int(headers["Content-Length"])
    return int(first.split()[1]), str(headers["Content-Type"]), body


def assert_refused(server: Server, request: bytes, status: int) -> None:
    reported, content_type, body = parsed(exchange(server, request))
    assert (reported, content_type) == (status, PROBLEM), (request[:300], body)
    problem = json.loads(body)
    assert (problem["status"], problem["outcome"]) == (status, "not_applied")
    assert "Traceback" not in body.decode()
    assert ".py" not in body.decode()
    assert all_counters(server) == BEFORE


def on_the_wire(bad: Bad) -> bytes:
    """Return the bytes of a request of `test_api`, which sends it to the application without a server."""
    raw = bad.options.get("environ_overrides", {}).get("PATH_INFO")
    path = bad.path if raw is None else quote(raw, encoding="latin-1")
    headers = [*bad.options.get("headers", []), ("Host", "localhost"), ("Connection", "close")]
    if bad.options.get("content_type") is not None:
        headers.append(("Content-Type", bad.options["content_type"]))
    body: bytes = bad.options.get("data", b"")
    headers.append(("Content-Length", str(len(body))))
    lines = [f"{bad.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_refused_by_the_whole_server_and_changes_nothing(server: Server, kind: str) -> None:
    for bad in BAD[kind]:
        assert_refused(server, on_the_wire(bad), bad.status)


# Invalid HTTP, which the test client cannot send.

OLD_HEAD = HEAD.replace(b"1.1", b"1.0")
CHUNKED = b"Transfer-Encoding: chunked\r\n"
EXPECT = b"Expect: 100-continue\r\n"
END = b"\r\n0\r\n\r\n"


def head(*lines: bytes, first: bytes = HEAD) -> bytes:
    """Return the head of a request to localhost, with these further lines."""
    return first + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def sent_to(target: bytes) -> bytes:
    """Return the first line of a request with `target` instead of the slash that begins the path."""
    return HEAD.replace(b" /", b" " + target)


BAD_HOSTS = [
    (HEAD + b"\r\n", 400),
    (HEAD + HOST + b"Host: evil.example\r\n\r\n", 400),
    (HEAD + HOST + HOST + b"\r\n", 400),
    (HEAD + HOST + HOST + EXPECT + b"Content-Length: 2\r\n\r\n", 400),
    (OLD_HEAD + b"\r\n", 421),
    (HEAD.replace(b" HTTP/1.1", b"") + b"\r\n", 421),
    (head(first=sent_to(b"http://evil.example/")), 400),
    (sent_to(b"http://localhost/") + b"Host: evil.example\r\n\r\n", 400),
    (sent_to(b"http://evil.example/").replace(b"1.1", b"1.0") + b"\r\n", 421),
    *(
        (head(first=sent_to(target)), 400)
        for target in (b"http://localhost:1/", b"http://evil@localhost/", b"http:///")
    ),
    *((head(first=sent_to(target)), 400) for target in (b"http:/", b"ftp://localhost/", b"")),
    (b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
]
BAD_LENGTHS = [
    (head(b"Content-Length: 2", b"Content-Length: 2") + b"{}", 400),
    (head(b"Content-Length: -1"), 400),
    (head(b"Content-Length: " + b"9" * 5000), 400),
    (head(b"Content-Length: %d" % LARGEST_REQUEST), 413),
    (head(EXPECT.strip(), b"Content-Length: %d" % LARGEST_REQUEST), 413),
    (head(EXPECT.strip(), CHUNKED.strip(), b"Content-Length: 2"), 400),
    (HEAD + HOST + b"Content-Length: 5\r\n" + CHUNKED + END, 400),
    (HEAD + HOST + CHUNKED + b"Content-Length: 5\r\n" + END, 400),
    (head(b"Content-Length: 2", b"Transfer-Encoding:") + b"{}", 400),
    (head(b"Transfer-Encoding: identity", b"Content-Length: 2") + b"{}", 400),
    ((HEAD + HOST + b"X: ").ljust(LARGEST_HEAD, b"x"), 431),
    (b"GET /" + b"x" * LARGEST_HEAD, 431),
    (HEAD + HOST + b"X: 1\r\n" * (LARGEST_HEAD // 6), 431),
]
BAD_CHUNKS = [
    (OLD_HEAD + HOST + CHUNKED + END, 400),
    *(
        (HEAD + HOST + encoding + END, 501 if encoding.endswith(b"gzip, chunked\r\n") else 400)
        for encoding in [
            *(CHUNKED + CHUNKED, b"Transfer-Encoding: gzip\r\n" + CHUNKED, CHUNKED.replace(b":", b" :")),
            *(b"Transfer-Encoding: ,chunked,\r\n", b"Transfer-Encoding: chunked, identity\r\n"),
            *(b"Transfer-Encoding:\r\n chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
        ]
    ),
    *(
        (HEAD + HOST + CHUNKED + b"\r\n" + chunks, 400)
        for chunks in [
            *(b"xyz\r\n", b"\r\n2\r\n{}" + END, b"0x2\r\n{}" + END, b"+2\r\n{}" + END, b"2 \r\n{}" + END),
            *(b"10000000000000002\r\n{}" + END, b"2\n\r\n{}" + END, b"2\n{}\n0\n\n", b"2\r{}" + END),
            *(b"2;a=b\r\n{}" + END, b"2;a\n\r\n{}" + END, b"2\r\n{} " + END, b"2\r\n{}\n0\r\n\r\n"),
            *(b"2\r\n{}\r\n" + END, b"2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n", b"2\r\n{}\r\n0\r\n\n"),
        ]
    ),
    (HEAD + HOST + CHUNKED + b"\r\n%x\r\n{}" % LARGEST_REQUEST, 413),
    (HEAD + HOST + CHUNKED + b"\r\n%x\r\n" % LARGEST_REQUEST + b" " * (LARGEST_REQUEST - 2), 413),
]
BAD_LINES = [
    *((head(line), 400) for line in (b"X: a\0b", b"X: a\nIdempotency-Key: b", b"X: a\rIdempotency-Key: b", b": x")),
    *((head(line), 400) for line in (b"X: a\r\n b", b"X: a\r\n\tb")),
    *((head(first=HEAD[:-2] + end), 400) for end in (b"\n", b"\r\r\n", b" \r\n")),
    (HEAD.replace(b"\r", b"") + b"Host: localhost\n\n", 400),
    (b"\n" + head(), 400),
    (HEAD + HOST + b"X: a\r\n\n", 400),
    (HEAD + b"Host: localhost\r\r\n\r\n", 400),
    (b" " + head(), 400),
    (HEAD + b"Host : localhost\r\n\r\n", 400),
    (HEAD + b" " + HOST + b"\r\n", 400),
    *(
        (head(first=HEAD.replace(old, new)), 400)
        for old, new in ((b"/api", b"/a\tpi"), (b" HTTP", b"#a HTTP"), (b"1.1", b"2.0"), (b"POST", b"post"))
    ),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    (b"\x00\xff\xfe\r\n\r\n", 400),
]
# Another reader may take the bytes after a refused request for a part of it: this is how requests are smuggled.
SMUGGLED = [(first + HOST + b"Content-Length: 5\r\n" + CHUNKED + END + head(), 400) for first in (OLD_HEAD, HEAD)]


@pytest.mark.parametrize("frames", [BAD_HOSTS, BAD_LENGTHS, BAD_CHUNKS, BAD_LINES, SMUGGLED])
def test_invalid_http_is_refused_with_a_problem_document_and_changes_nothing(
    server: Server, frames: list[tuple[bytes, int]]
) -> None:
    for request, status in frames:
        assert_refused(server, request, status)


def test_unusual_but_valid_requests_are_answered(server: Server) -> None:
    """Send them at once, in parts, and byte by byte. After a body in chunks, the next request begins."""
    close = b"Connection: close\r\n"
    body = CHUNKED + b'Content-Type: application/json\r\n\r\n8\r\n{"by": 1\r\n01\r\n}' + END
    for requests, count in [
        ((HEAD + HOST + body) * 2 + HEAD + HOST + close + b"\r\n", 3),
        (sent_to(b"http://LOCALHOST/") + HOST + close + b"\r\n", 1),
        (sent_to(b"http://localhost/").replace(b"1.1", b"1.0") + b"\r\n", 1),
        (HEAD + HOST + EXPECT + close + b"\r\n", 1),
        (b"\r\n" + HEAD + HOST + close + b"\r\n", 1),
    ]:
        sound = requests.replace(b"/visits/", b"/sound/")
        for step in (len(sound), 7, 1):
            with connect(server) as connection:
                for start in range(0, len(sound), step):
                    connection.sendall(sound[start : start + step])
                answer = received_until_closed(connection)
            assert re.findall(rb'"value":(\d+)', answer) == [b"%d" % number for number in range(1, count + 1)], sound
            assert ask(server.url, "DELETE", f"{COUNTERS}/sound")[0] == 204


def test_a_failing_application_gives_a_problem_document_too() -> None:
    """Our application handles its own errors; these come from beyond it, so the test takes another application."""

    def fails(environ: object, start_response: object) -> NoReturn:
        raise ZeroDivisionError("in detail")

    everything: dict[int, Any] = {}
    waitress: Any = create_server(fails, map=everything, host="127.0.0.1", port=0, clear_untrusted_proxy_headers=True)
    waitress.channel_class = Channel
    waitress.ending = False
    with (
        ThreadPoolExecutor(1) as client,
        socket.create_connection(("127.0.0.1", waitress.effective_port), timeout=PATIENCE) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = client.submit(received_until_closed, connection)
        while not answer.done():
            wasyncore.loop(timeout=0.1, map=everything, count=1)
    waitress.task_dispatcher.shutdown()
    waitress.close()
    status, content_type, body = parsed(answer.result())
    assert (status, content_type) == (500, PROBLEM)
    assert json.loads(body)["outcome"] == "unknown"
    assert b"in detail" not in body


def test_a_client_that_disconnects_after_the_body_is_counted_once_and_its_retry_gets_the_number(server: Server) -> None:
    path, body = f"{COUNTERS}/gone/increment", b'{"by": 1}'
    for turn in range(1, 21):
        headers = {"Idempotency-Key": f"gone-{turn}", "Content-Type": JSON}
        with connect(server) as connection:
            # This way of closing resets the connection.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            options = {"headers": [("Idempotency-Key", f"gone-{turn}")], **with_body(body)}
            connection.sendall(on_the_wire(Bad("POST", path, 200, options)))
        status, _, text = ask(server.url, "POST", path, body, headers)
        assert (status, json.loads(text)["value"]) == (200, turn)
    assert ask(server.url, "DELETE", f"{COUNTERS}/gone")[0] == 204


@pytest.mark.parametrize("begun", [HEAD + HOST, head(b"Content-Length: 1000"), HEAD[:9]])
def test_a_request_that_arrives_byte_by_byte_is_cut_off(server: Server, begun: bytes) -> None:
    with connect(server) as slow:
        slow.sendall(begun)
        slow.settimeout(0.2)

        def cut_off() -> bool:
            try:
                slow.sendall(b"x")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(cut_off, "the end of the connection", seconds=10 * TIMEOUT)
    assert all_counters(server) == BEFORE


@pytest.fixture
def large_page(server: Server, data_dir_of_server: Path) -> Iterator[bytes]:
    """Return a request for a page of half a megabyte."""
    names = [f"{number:03}" + "\\" * 252 for number in range(1000)]
    with open_client(DataDirectory(data_dir_of_server).url) as state:
        for operation in (Increment, Delete):
            batch = Batch(os.urandom(16), 1, [operation(name) for name in names])
            state.store.apply(batch, time.monotonic() + PATIENCE)
            if operation is Increment:
                yield f"GET {COUNTERS}?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def sockets_of(pid: int) -> set[str]:
    """Return the kernel's names of the sockets that a process has open."""
    return {name for name in open_in(pid) if name.startswith("socket:")}


def test_clients_that_never_read_hold_no_thread_and_are_cut_off(server: Server, large_page: bytes) -> None:
    """With plain waitress each such client holds a thread until it reads: a few of them stop the service."""
    (worker,) = server.children("worker")
    before = sockets_of(worker)
    with ExitStack() as deaf:

        def connections() -> set[str]:
            """Return at least four of these sockets in the worker; else add a client, as some may be cut off by now."""
            if len(there := sockets_of(worker) - before) >= 4:
                return there
            connection = deaf.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE)
            connection.connect(address(server))
            connection.sendall(f"GET {COUNTERS}/visits HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")  # so the worker has accepted it
            connection.sendall(large_page * (8000 // len(large_page)))
            return set()

        theirs = eventually(connections, "their connections")
        assert ask(server.url, "GET", f"{COUNTERS}/visits")[0] == 200
        eventually(lambda: not theirs & sockets_of(worker), "their end", seconds=10 * TIMEOUT)


def test_of_many_pipelined_requests_the_first_are_answered_and_the_others_not_applied(server: Server) -> None:
    path = f"{COUNTERS}/many/increment"
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    answer = exchange(server, request * 100)
    values = [int(value) for value in re.findall(rb'"value":(\d+)', answer)]
    assert values == list(range(1, 17))
    assert answer.count(b"Connection: close") == 1
    assert all_counters(server) == {**BEFORE, "many": 16}
    assert ask(server.url, "DELETE", f"{COUNTERS}/many")[0] == 204
