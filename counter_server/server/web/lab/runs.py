"""A run of the lab: begun by one worker, known to all, and over after a minute."""

import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import TTLCache
from flask import current_app
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from werkzeug.exceptions import Gone, NotFound, ServiceUnavailable

Kept = TypeVar("Kept")

_SECONDS = 60  # that a run may last
FORGOTTEN = 2 * _SECONDS  # after it began nobody asks any more, nor is anybody still being answered
_MOST = 100  # runs that a worker keeps something for
_NAME = re.compile(r"([0-9]{1,12})-[0-9a-f]{16}")


@dataclass(frozen=True)
class Run:
    """One run. What is kept for it bears its name, which says when it began: what is left of old ones can be found."""

    strategy: str
    name: str


def begin(strategy: str) -> str:
    """The id of a new run. The server signs it, so that each worker knows it without having to be told."""
    return _signer().dumps([strategy, secrets.token_hex(8)])


def find(run_id: str) -> Run:
    """The run of that id.

    :raises NotFound: if the server never made it.
    :raises Gone: if it is over.
    """
    try:
        (strategy, nonce), began = _signer().loads(run_id, max_age=_SECONDS, return_timestamp=True)
    except SignatureExpired:
        raise Gone(f"this run began more than {_SECONDS} seconds ago and is over: start another") from None
    except BadSignature:
        raise NotFound("there is no such run: start one") from None
    return Run(strategy, f"{began.timestamp():.0f}-{nonce}")


def is_over(name: str) -> bool:
    """Whether that is the name of a run of which nothing is needed any more."""
    match = _NAME.fullmatch(name)
    return match is not None and int(match[1]) + FORGOTTEN < time.time()


def _signer() -> URLSafeTimedSerializer:
    assert current_app.secret_key is not None
    return URLSafeTimedSerializer(current_app.secret_key, salt="counter_server lab run")


class PerRun(Generic[Kept]):
    """What one worker process keeps for each run: made anew at the run's first client here, and gone with the run."""

    def __init__(self, make: Callable[[], Kept]) -> None:
        self._make = make
        self._kept: TTLCache[str, Kept] = TTLCache(_MOST, FORGOTTEN, time.monotonic)
        self._lock = threading.Lock()  # guards what is above, not what is kept there

    def of(self, run: Run) -> Kept:
        """The run's own.

        :raises ServiceUnavailable: if there are too many runs. None is forgotten to make room: its numbers would be
            wrong for another reason than the one to be seen.
        """
        with self._lock:
            found = self._kept.get(run.name)
            if found is None:
                if len(self._kept) >= _MOST:
                    raise ServiceUnavailable("the lab has too many runs under way: nothing was counted; try again soon")
                found = self._kept[run.name] = self._make()
            return found

    def forget(self, run: Run) -> None:
        """Let go of the run's."""
        with self._lock:
            self._kept.pop(run.name, None)
