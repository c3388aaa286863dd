"""Bad requests on a real server: from the bytes on the wire through waitress to the counters, which stay unchanged."""

import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
from tests.test_api import BAD, BEFORE, COUNTERS, INCREMENT, JSON, Bad
from tests.test_manager import received_until_closed
from tests.test_server import address, ask

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
        for name, value in BEFORE.items():
            put(server, name, value)
        yield server
        assert not any("Traceback" in line or "uncaptured" in line for line in server.errors), server.errors


def put(server: Server, name: str, value: int) -> None:
    body = json.dumps({"value": value}).encode()
    path = f"{COUNTERS}/{quote(name, safe='')}"
    assert ask(server.url, "PUT", path, body, {"Content-Type": JSON})[0] == 200


def all_counters(server: Server) -> dict[str, int]:
    status, _, text = ask(server.url, "GET", f"{COUNTERS}?limit=1000")
    assert status == 200
    return {row["counter"]: row["value"] for row in json.loads(text)["counters"]}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(address(server), timeout=PATIENCE)


def exchange(server: Server, request: bytes) -> bytes:
    """Return everything that is answered until the server closes, even if it does not read the whole request."""
    with connect(server) as connection:
        answer = b""
        try:
            connection.sendall(request)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
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
    assert (reported, content_type) == (status, PROBLEM), body
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


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_refused_by_the_whole_server_and_changes_nothing(server: Server, bad: Bad) -> None:
    assert_refused(server, on_the_wire(bad), bad.status)


# Invalid HTTP, which the test client cannot send.

CHUNKED = b"Transfer-Encoding: chunked\r\n"
EXPECT = b"Expect: 100-continue\r\n"

FRAMES = {
    "no-host": (HEAD + b"\r\n", 400),
    "two-hosts": (HEAD + HOST + b"Host: evil.example\r\n\r\n", 400),
    "the-same-host-twice": (HEAD + HOST + HOST + b"\r\n", 400),
    "two-hosts-before-a-body": (HEAD + HOST + HOST + EXPECT + b"Content-Length: 2\r\n\r\n", 400),
    "two-lengths-before-a-body": (HEAD + HOST + EXPECT + CHUNKED + b"Content-Length: 2\r\n\r\n", 400),
    "body-too-large-before-it-comes": (HEAD + HOST + EXPECT + b"Content-Length: %d\r\n\r\n" % LARGEST_REQUEST, 413),
    "no-host-in-HTTP/1.0": (HEAD.replace(b"1.1", b"1.0") + b"\r\n", 421),
    "no-version": (HEAD.replace(b" HTTP/1.1", b"") + b"\r\n", 421),
    "length-and-chunks": (HEAD + HOST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "chunks-and-length": (HEAD + HOST + CHUNKED + b"Content-Length: 5\r\n" + b"\r\n0\r\n\r\n", 400),
    "length-and-no-encoding": (HEAD + HOST + b"Content-Length: 2\r\nTransfer-Encoding:\r\n\r\n{}", 400),
    "chunks-in-HTTP/1.0": (HEAD.replace(b"1.1", b"1.0") + HOST + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "chunked-twice": (HEAD + HOST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "chunked-and-nothing": (HEAD + HOST + b"Transfer-Encoding: ,chunked,\r\n\r\n0\r\n\r\n", 400),
    "two-encodings": (HEAD + HOST + b"Transfer-Encoding: gzip\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "chunked-is-not-the-last": (HEAD + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "not-chunked": (HEAD + HOST + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", 400),
    "folded-encoding": (HEAD + HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "space-before-the-colon-of-an-encoding": (HEAD + HOST + CHUNKED.replace(b":", b" :") + b"\r\n0\r\n\r\n", 400),
    "another-encoding": (HEAD + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    **{
        f"chunks-{name}": (HEAD + HOST + CHUNKED + b"\r\n" + chunks, 400)
        for name, chunks in {
            "without-size": b"xyz\r\n",
            "size-empty": b"\r\n2\r\n{}\r\n0\r\n\r\n",
            "size-in-C": b"0x2\r\n{}\r\n0\r\n\r\n",
            "size-with-sign": b"+2\r\n{}\r\n0\r\n\r\n",
            "size-with-space": b"2 \r\n{}\r\n0\r\n\r\n",
            "size-beyond-64-bits": b"10000000000000002\r\n{}\r\n0\r\n\r\n",
            "line-feed-after-size": b"2\n\r\n{}\r\n0\r\n\r\n",
            "line-feeds-alone": b"2\n{}\n0\n\n",
            "return-after-size": b"2\r{}\r\n0\r\n\r\n",
            "extension": b"2;a=b\r\n{}\r\n0\r\n\r\n",
            "extension-with-line-feed": b"2;a\n\r\n{}\r\n0\r\n\r\n",
            "longer-than-size": b"2\r\n{} \r\n0\r\n\r\n",
            "line-feed-after-data": b"2\r\n{}\n0\r\n\r\n",
            "two-ends-after-data": b"2\r\n{}\r\n\r\n0\r\n\r\n",
            "trailer": b"2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n",
            "line-feed-at-the-end": b"2\r\n{}\r\n0\r\n\n",
        }.items()
    },
    "size-of-a-chunk-too-large": (HEAD + HOST + CHUNKED + b"\r\n%x\r\n{}" % LARGEST_REQUEST, 413),
    "two-lengths": (HEAD + HOST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "negative-length": (HEAD + HOST + b"Content-Length: -1\r\n\r\n", 400),
    "length-of-5000-digits": (HEAD + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "body-too-large": (HEAD + HOST + b"Content-Length: %d\r\n\r\n" % LARGEST_REQUEST, 413),
    "chunks-too-large": (
        HEAD + HOST + CHUNKED + b"\r\n%x\r\n" % LARGEST_REQUEST + b" " * (LARGEST_REQUEST - 2),
        413,
    ),
    "head-too-large": ((HEAD + HOST + b"X: ").ljust(LARGEST_HEAD, b"x"), 431),
    "path-too-long": (b"GET /" + b"x" * LARGEST_HEAD, 431),
    "many-headers": (HEAD + HOST + b"X: 1\r\n" * (LARGEST_HEAD // 6), 431),
    "NUL-in-a-header": (HEAD + HOST + b"X: a\0b\r\n\r\n", 400),
    "line-feed-alone": (HEAD + HOST + b"X: a\nIdempotency-Key: b\r\n\r\n", 400),
    "first-line-feed-alone": (HEAD[:-2] + b"\n" + HOST + b"\r\n", 400),
    "line-feeds-only": (HEAD.replace(b"\r", b"") + b"Host: localhost\n\n", 400),
    "line-feed-first": (b"\n" + HEAD + HOST + b"\r\n", 400),
    "line-feed-at-the-end": (HEAD + HOST + b"X: a\r\n\n", 400),
    "return-alone": (HEAD + HOST + b"X: a\rIdempotency-Key: b\r\n\r\n", 400),
    "return-twice": (HEAD + b"Host: localhost\r\r\n\r\n", 400),
    "first-return-twice": (HEAD[:-2] + b"\r\r\n" + HOST + b"\r\n", 400),
    "space-first": (b" " + HEAD + HOST + b"\r\n", 400),
    "space-after-the-version": (HEAD[:-2] + b" \r\n" + HOST + b"\r\n", 400),
    "tab-in-the-path": (HEAD.replace(b"/api", b"/a\tpi") + HOST + b"\r\n", 400),
    "path-without-slash": (HEAD.replace(b" /", b" ") + HOST + b"\r\n", 400),
    "fragment": (HEAD.replace(b" HTTP", b"#a HTTP") + HOST + b"\r\n", 400),
    "another-version": (HEAD.replace(b"1.1", b"2.0") + HOST + b"\r\n", 400),
    "another-host-in-the-address": (HEAD.replace(b" /", b" http://evil.example/") + HOST + b"\r\n", 400),
    "another-host-beside-the-address": (
        HEAD.replace(b" /", b" http://localhost/") + b"Host: evil.example\r\n\r\n",
        400,
    ),
    "another-port-in-the-address": (HEAD.replace(b" /", b" http://localhost:1/") + HOST + b"\r\n", 400),
    "user-in-the-address": (HEAD.replace(b" /", b" http://evil@localhost/") + HOST + b"\r\n", 400),
    "no-host-in-the-address": (HEAD.replace(b" /", b" http:///") + HOST + b"\r\n", 400),
    "address-without-slashes": (HEAD.replace(b" /", b" http:/") + HOST + b"\r\n", 400),
    "another-scheme": (HEAD.replace(b" /", b" ftp://localhost/") + HOST + b"\r\n", 400),
    "only-an-address-of-another-host": (
        HEAD.replace(b" /", b" http://evil.example/").replace(b"1.1", b"1.0") + b"\r\n",
        421,
    ),
    "folded": (HEAD + HOST + b"X: a\r\n b\r\n\r\n", 400),
    "folded-with-tab": (HEAD + HOST + b"X: a\r\n\tb\r\n\r\n", 400),
    "space-before-the-colon": (HEAD + b"Host : localhost\r\n\r\n", 400),
    "folded-before-any": (HEAD + b" " + HOST + b"\r\n", 400),
    "no-name": (HEAD + HOST + b": x\r\n\r\n", 400),
    "method-in-small-letters": (HEAD.replace(b"POST", b"post") + HOST + b"\r\n", 400),
    "address-that-is-none": (b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "nothing-known": (b"\x00\xff\xfe\r\n\r\n", 400),
}


@pytest.mark.parametrize(("request_", "status"), FRAMES.values(), ids=FRAMES.keys())
def test_invalid_http_is_refused_with_a_problem_document_and_changes_nothing(
    server: Server, request_: bytes, status: int
) -> None:
    assert_refused(server, request_, status)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_bytes_after_a_refused_request_are_not_read(server: Server, version: str) -> None:
    """Another reader may take these bytes for a part of the first request: this is how requests are smuggled."""
    first = HEAD.replace(b"1.1", version.encode()) + HOST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n"
    assert_refused(server, first + HEAD + HOST + b"\r\n", 400)


SOUND = {
    "chunks": (HEAD + HOST + CHUNKED + b'Connection: close\r\n\r\n8\r\n{"by": 1\r\n01\r\n}\r\n0\r\n\r\n'),
    "address": (HEAD.replace(b" /", b" http://LOCALHOST/") + HOST + b"Connection: close\r\n\r\n"),
    "only-an-address": (HEAD.replace(b" /", b" http://localhost/").replace(b"1.1", b"1.0") + b"\r\n"),
    "expectation-without-body": HEAD + HOST + EXPECT + b"Connection: close\r\n\r\n",
    "empty-line-first": (b"\r\n" + HEAD + HOST + b"Connection: close\r\n\r\n"),
}


@pytest.mark.parametrize("request_", SOUND.values(), ids=SOUND.keys())
def test_unusual_but_valid_requests_are_answered(server: Server, request_: bytes) -> None:
    """Send it at once, and byte by byte."""
    request_ = request_.replace(INCREMENT.encode(), f"{COUNTERS}/sound/increment".encode())
    if b"chunked" in request_:
        request_ = request_.replace(b"\r\nTransfer", f"\r\nContent-Type: {JSON}\r\nTransfer".encode())
    for step in (len(request_), 1):
        with connect(server) as connection:
            for start in range(0, len(request_), step):
                connection.sendall(request_[start : start + step])
            answer = received_until_closed(connection)
        assert parsed(answer)[0] == 200, answer
    assert ask(server.url, "DELETE", f"{COUNTERS}/sound")[0] == 204


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_after_a_body_in_chunks_the_next_request_begins(server: Server, step: int) -> None:
    head = f"POST {COUNTERS}/behind/increment HTTP/1.1\r\nHost: localhost\r\n".encode()
    body = CHUNKED + b'Content-Type: application/json\r\n\r\n7\r\n{"by": \r\n02\r\n1}\r\n0\r\n\r\n'
    requests = head + body + head + body + head + b"Connection: close\r\n\r\n"
    with connect(server) as connection:
        for start in range(0, len(requests), step):
            connection.sendall(requests[start : start + step])
        answer = received_until_closed(connection)
    assert re.findall(rb'"value":(\d+)', answer) == [b"1", b"2", b"3"]
    assert ask(server.url, "DELETE", f"{COUNTERS}/behind")[0] == 204


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


# Clients that disconnect, wait, or do not read


def test_a_client_that_disconnects_after_the_body_is_counted_once_and_its_retry_gets_the_number(server: Server) -> None:
    numbers = []
    for turn in range(20):
        key = f"gone-{turn}"
        body = b'{"by": 1}'
        request = f"POST {COUNTERS}/gone/increment HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: {key}\r\n"
        with connect(server) as connection:
            # This way of closing resets the connection.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(f"{request}Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        headers = {"Idempotency-Key": key, "Content-Type": JSON}
        status, _, text = ask(server.url, "POST", f"{COUNTERS}/gone/increment", body, headers)
        assert status == 200
        numbers.append(json.loads(text)["value"])
    assert numbers == list(range(1, 21))
    assert ask(server.url, "DELETE", f"{COUNTERS}/gone")[0] == 204


SLOW = {"head": HEAD + HOST, "body": HEAD + HOST + b"Content-Length: 1000\r\n\r\n", "first-line": HEAD[:9]}


@pytest.mark.parametrize("begun", SLOW.values(), ids=SLOW.keys())
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

        eventually(cut_off, "the end of the connection", seconds=TIMEOUT + 5)
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
            there = sockets_of(worker) - before
            if len(there) >= 4:
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
        eventually(lambda: not theirs & sockets_of(worker), "their end", seconds=TIMEOUT + 10)


def test_of_many_pipelined_requests_the_first_are_answered_and_the_others_not_applied(server: Server) -> None:
    path = f"{COUNTERS}/many/increment"
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    answer = exchange(server, request * 100)
    values = [int(value) for value in re.findall(rb'"value":(\d+)', answer)]
    assert values == list(range(1, 17))
    assert answer.count(b"Connection: close") == 1
    assert all_counters(server) == {**BEFORE, "many": 16}
    assert ask(server.url, "DELETE", f"{COUNTERS}/many")[0] == 204
