"""The load, and its history: clients over HTTP that ask for each increment until it is answered, under one key."""

import http.client
import json
import os
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from ...errors import InvalidRequest, StartupError
from .history import Operation

PATIENCE = 30.0  # seconds that a client asks for one increment, however often it has to
_FIRST_PAUSE = 0.02  # seconds before it asks for the second time; doubles
_LONGEST_PAUSE = 0.5
_ASK_AGAIN = {429, 502, 503, 504}  # the answers that leave it open: too many, or not now, here or behind a proxy


def path_of(counter: str) -> str:
    """Where a counter is, below the address of its server."""
    return f"/api/v1/counters/{quote(counter)}"


class Client:
    """One client of one server, on one connection that it keeps as long as that works.

    :param url: of the server: `http://` or `https://`, perhaps with a path below which it is.
    :raises InvalidRequest: if it is none.
    """

    def __init__(self, url: str) -> None:
        self.given_up = False  # set from outside: an increment that is not answered is asked for no more
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidRequest(f"{url!r} is no server's address: {error}") from None
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise InvalidRequest(f"a server's address is like http://127.0.0.1:8000, not {url!r}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=PATIENCE)
        self._base = parts.path.rstrip("/")

    def request(self, method: str, path: str, **headers: str) -> tuple[int, Any]:
        """Status and content, JSON or else text, of one answer; the connection is closed if there is none.

        :raises OSError: if there is none; or `HTTPException`, if it is none of HTTP.
        """
        try:
            self._connection.request(method, self._base + path, headers=headers)
            response = self._connection.getresponse()
            body = response.read()
        except BaseException:
            self._connection.close()
            raise
        try:
            return response.status, json.loads(body) if body else None
        except ValueError:
            return response.status, body.decode(errors="replace")

    def increment_once(self, counter: str, key: str) -> int | None:
        """The number that one sending is answered with; none if it is to be asked again.

        :raises StartupError: if this is no answer of a server that counts.
        """
        status, content = self.request("POST", f"{path_of(counter)}/increment", **{"Idempotency-Key": key})
        value = content.get("value") if isinstance(content, dict) else None
        if status == 200 and type(value) is int:
            return value
        if status in _ASK_AGAIN:
            return None
        raise StartupError(f"an increment was answered {described(status, content)}")

    def increment(self, counter: str, key: str, deadline: float) -> Operation:
        """One operation, sent again after every failure that leaves it open, until `deadline`."""
        invoked = time.monotonic()
        pause = _FIRST_PAUSE
        while time.monotonic() < deadline and not self.given_up:
            with suppress(OSError, http.client.HTTPException):
                value = self.increment_once(counter, key)
                if value is not None:
                    return Operation(key, invoked, time.monotonic(), (value,))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return Operation(key, invoked)

    def close(self) -> None:
        self._connection.close()


def described(status: int, content: Any) -> str:
    """An answer that was not expected, in a few words of its own."""
    title = http.client.responses.get(status, "")
    said = content.get("detail") if isinstance(content, dict) else content
    text = " ".join(str(said).split()) if said else ""
    return f"{status} {title}".strip() + (f": {text[:100]}" if text else "")


class Load:
    """`clients` threads that begin together and increment a counter until they are stopped, or `each` times."""

    def __init__(self, url: str, counter: str, clients: int, *, each: int | None = None) -> None:
        self.history: list[Operation] = []  # of operations that ended; append is atomic
        self.failures: list[BaseException] = []  # each ended a client
        self._open: dict[int, Operation] = {}  # of each client, the operation that it is at
        self._counter = counter
        self._each = each
        self._keys = os.urandom(8).hex()  # of this load and no other
        self._stop = threading.Event()
        self._barrier = threading.Barrier(clients + 1)
        self._clients = [Client(url) for _ in range(clients)]
        # Daemons: who gives up waiting for them can end.
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(clients)]
        for thread in self._threads:
            thread.start()
        self._barrier.wait(PATIENCE)
        self.began = time.monotonic()

    def _run(self, number: int) -> None:
        client = self._clients[number]
        try:
            self._barrier.wait(PATIENCE)
            count = 0
            while not self._stop.is_set() and count != self._each:
                key = f"{self._keys}-{number}-{count}"
                self._open[number] = Operation(key, time.monotonic())
                self.history.append(client.increment(self._counter, key, time.monotonic() + PATIENCE))
                del self._open[number]
                count += 1
        except Exception as error:  # noqa: BLE001 - told by who looks at the load
            self.failures.append(error)
        finally:
            client.close()

    def stop(self, grace: float = PATIENCE) -> None:
        """Let every client end the operation that it is at. After `grace` seconds what is unanswered is given up."""
        self._stop.set()
        self.join(grace)
        for client in self._clients:
            client.given_up = True

    def join(self, seconds: float = PATIENCE) -> None:
        """Wait until every client has ended, but at most so long."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def operations(self) -> list[Operation]:
        """All that was begun until now: in the order in which it ended, and what is still open."""
        begun = list(self._open.values())  # first: what ends meanwhile is in both, and not in none
        ended = list(self.history)
        keys = {operation.key for operation in ended}
        return ended + [operation for operation in begun if operation.key not in keys]
