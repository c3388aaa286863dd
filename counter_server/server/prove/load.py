"""The load: HTTP clients that send each increment, under one key, until it is answered; and their history."""

import http.client
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from ...errors import InvalidRequest, StartupError
from ...history import Operation

PATIENCE = 30.0  # seconds that a client tries one increment, however often
_FIRST_PAUSE = 0.02  # seconds before the second attempt; doubles
_LONGEST_PAUSE = 0.5
_ASK_AGAIN = {429, 502, 503, 504}  # too many requests, or not now: from the server or a proxy before it


def path_of(counter: str) -> str:
    """Return the path of a counter below the URL of its server."""
    return f"/api/v1/counters/{quote(counter)}"


def value_in(status: int, content: Any) -> int | None:
    """Return the value of a counter in an answer; None if there is none."""
    value = content.get("value") if status == 200 and isinstance(content, dict) else None
    return value if type(value) is int else None


def described(status: int, content: Any) -> str:
    """Describe an unexpected answer in a few of its own words."""
    said = content.get("detail") if isinstance(content, dict) else content
    text = " ".join(str(said or "").split())[:100]
    return f"{status} {http.client.responses.get(status, '')}".strip() + (f": {text}" if text else "")


class Client:
    """A client of one server, on one connection that it keeps while it works.

    :param url: of the server: `http://` or `https://`, with or without a path.
    :param patience: seconds that it waits for the server.
    :raises InvalidRequest: if the URL is not one of these.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.given_up = False  # set from outside: nothing is sent again
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
        value = value_in(status, content)
        if value is None and status not in _ASK_AGAIN:
            raise StartupError(f"an increment was answered {described(status, content)}")
        return value

    def increment(self, counter: str, key: str, deadline: float) -> Operation:
        """Send an increment again after every failure that leaves it open, until `deadline` (`time.monotonic`)."""
        invoked = time.monotonic()
        value = self.retry(lambda: self.increment_once(counter, key), deadline)
        return Operation(key, invoked) if value is None else Operation(key, invoked, time.monotonic(), (value,))

    def retry(
        self, attempt: Callable[[], int | None], deadline: float, longest_pause: float = _LONGEST_PAUSE
    ) -> int | None:
        """Return the first result of `attempt`, which may fail or return None until then; None after the deadline."""
        pause = _FIRST_PAUSE
        while time.monotonic() < deadline and not self.given_up:
            with suppress(OSError, http.client.HTTPException):
                if (value := attempt()) is not None:
                    return value
            time.sleep(pause)
            pause = min(2 * pause, longest_pause)
        return None


class Load:
    """Threads that begin together and increment a counter until they are stopped, or `each` times."""

    def __init__(self, url: str, counter: str, clients: int, *, each: int | None = None) -> None:
        self.history: list[Operation] = []  # of operations that ended; append is atomic
        self.failures: list[BaseException] = []  # each ended a client
        self._operations: dict[str, Operation] = {}  # the current state of all, by key
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
                self._operations[key] = Operation(key, time.monotonic())
                self._operations[key] = client.increment(self._counter, key, time.monotonic() + PATIENCE)
                self.history.append(self._operations[key])
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
        """Return all operations until now, the open ones included."""
        return list(self._operations.values())
