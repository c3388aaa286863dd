"""The load: HTTP clients that send each increment, under one key, until it is answered; and their history."""

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

PATIENCE = 30.0  # seconds that a client tries one increment, however often
_FIRST_PAUSE = 0.02  # seconds before the second attempt; doubles
_LONGEST_PAUSE = 0.5
_ASK_AGAIN = {429, 502, 503, 504}  # too many requests, or not now: from the server or a proxy before it


def path_of(counter: str) -> str:
    """Return the path of a counter below the URL of its server."""
    return f"/api/v1/counters/{quote(counter)}"


class Client:
    """A client of one server, on one connection that it keeps while it works.

    :param url: of the server: `http://` or `https://`, with or without a path.
    :param patience: seconds that it waits for the server.
    :raises InvalidRequest: if the URL is not one of these.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.given_up = False  # set from outside: an open increment is not sent again
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidRequest(f"{url!r} is not a server's address: {error}") from None
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise InvalidRequest(f"a server's address is like http://127.0.0.1:8000, not {url!r}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=patience)
        self._base = parts.path.rstrip("/")
        self.connect = self._connection.connect
        self.close = self._connection.close

    def request(self, method: str, path: str, **headers: str) -> tuple[int, Any]:
        """Return the status and the content of one answer: JSON, or else text.

        :raises OSError: if no answer comes; or `HTTPException`, if it is not HTTP. The connection is closed then.
        """
        try:
            self._connection.request(method, self._base + path, headers=headers)
            response = self._connection.getresponse()
            body = response.read()
        except BaseException:
            self.close()
            raise
        try:
            return response.status, json.loads(body) if body else None
        except ValueError:
            return response.status, body.decode(errors="replace")

    def increment_once(self, counter: str, key: str) -> int | None:
        """Send an increment once, and return its number; None if it must be sent again.

        :raises StartupError: if the answer is not a counter-server's.
        """
        status, content = self.request("POST", f"{path_of(counter)}/increment", **{"Idempotency-Key": key})
        value = content.get("value") if isinstance(content, dict) else None
        if status == 200 and type(value) is int:
            return value
        if status in _ASK_AGAIN:
            return None
        raise StartupError(f"an increment was answered {described(status, content)}")

    def increment(self, counter: str, key: str, deadline: float) -> Operation:
        """Send an increment again after every failure that leaves it open, until `deadline` (`time.monotonic`)."""
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


def described(status: int, content: Any) -> str:
    """Describe an unexpected answer in a few of its own words."""
    said = content.get("detail") if isinstance(content, dict) else content
    text = " ".join(str(said or "").split())[:100]
    return f"{status} {http.client.responses.get(status, '')}".strip() + (f": {text}" if text else "")


class Load:
    """Threads that begin together and increment a counter until they are stopped, or `each` times."""

    def __init__(self, url: str, counter: str, clients: int, *, each: int | None = None) -> None:
        self.history: list[Operation] = []  # of operations that ended; append is atomic
        self.failures: list[BaseException] = []  # each ended a client
        self._open: dict[int, Operation] = {}  # the current operation of each client
        self._counter = counter
        self._each = each
        self._keys = os.urandom(8).hex()  # the prefix of all keys of this load
        self._stop = threading.Event()
        self._barrier = threading.Barrier(clients + 1)
        self._clients = [Client(url) for _ in range(clients)]
        # Daemons: the interpreter can exit without them.
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
        except Exception as error:  # noqa: BLE001 - the owner of the load reports it
            self.failures.append(error)
        finally:
            client.close()

    def stop(self, grace: float = PATIENCE) -> None:
        """Let every client finish its operation, for at most `grace` seconds."""
        self._stop.set()
        self.join(grace)
        for client in self._clients:
            client.given_up = True

    def join(self, seconds: float = PATIENCE) -> None:
        """Wait until every client has ended, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def operations(self) -> list[Operation]:
        """Return all operations until now: ended ones in their order, then open ones."""
        begun = list(self._open.values())  # first: an operation that ends meanwhile is then in both lists
        ended = list(self.history)
        keys = {operation.key for operation in ended}
        return ended + [operation for operation in begun if operation.key not in keys]
