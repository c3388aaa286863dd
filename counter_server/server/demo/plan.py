"""What is shown: which strategies behind which servers, and the sentence that explains each."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ...errors import InvalidRequest
from .servers import SERVERS
from .strategies import OURS, STRATEGIES


@dataclass(frozen=True)
class Pair:
    """A strategy behind a server.

    :param expected: what can be told beforehand.
    :param why: why it is so.
    """

    server: str
    strategy: str
    expected: Literal["right", "wrong"]
    why: str

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return f"{self.server}/{self.strategy}"

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{SERVERS[self.server].title} · {STRATEGIES[self.strategy].title}"

    @property
    def ours(self) -> bool:
        return self.strategy == OURS

    def missing(self) -> str:
        """What it takes and is not installed, in a sentence; empty if all is there."""
        strategy = STRATEGIES[self.strategy]
        absent = [name for name in {*SERVERS[self.server].needs, *strategy.needs} if not _installed(name)]
        if absent:
            return f"{' and '.join(sorted(absent))} not installed: pip install 'counter-server[demo]'"
        if strategy.module and not _installed(strategy.module):
            return f"the {strategy.needs[0]} that is installed has none: take a newer one"
        return ""


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


_OWN = "Each process has one of its own, and counts alone."
_READ_WRITE = "It is read, and then written: two that read the same number both give the next one."
_SHARED = "One object for all, each call of it whole, and on the disk before it is answered."

PAIRS = [
    Pair("development", "global", "right", "One request after the other. This is why it is not seen at home."),
    Pair("threaded", "global", "wrong", "Another thread comes between the increment and the return."),
    Pair("threaded", "lock", "right", "A lock makes one process right, as long as there is only one."),
    Pair("processes", "global", "wrong", "Each request is a process, which begins at 0 again."),
    Pair("waitress", "global", "wrong", _OWN),
    Pair("waitress", "lock", "wrong", "A lock is for the threads of one process, and there are four."),
    Pair("gunicorn", "global", "wrong", _OWN),
    Pair("gevent", "global", "wrong", "One process and no threads: greenlets come between too, wherever one waits."),
    Pair("gunicorn", "value", "wrong", "Each worker imports the app, and so makes a value of its own."),
    Pair(
        "preload",
        "value",
        "right",
        "Workers forked from one parent share it: only a number, and gone with that parent.",
    ),
    Pair("gunicorn", "textbook", "wrong", "One object for all, but its process has a thread for each, and no lock."),
    Pair("gunicorn", "textbook-lock", "right", "With a lock it is right, as long as its process lives."),
    Pair("gunicorn", "textbook-killed", "wrong", "Nobody starts its process again, and its numbers went with it."),
    Pair("waitress", "cachelib", "wrong", f"Its inc() is a get and then a set. {_READ_WRITE}"),
    Pair("waitress", "flask-caching", "wrong", _READ_WRITE),
    Pair("waitress", "session", "wrong", "A session is one visitor's: each has one of their own."),
    Pair("gunicorn", "stash", "wrong", f"It has get and put, and no increment. {_READ_WRITE}"),
    Pair("processes", OURS, "right", _SHARED),
    Pair("waitress", OURS, "right", _SHARED),
    Pair("gunicorn", OURS, "right", _SHARED),
    Pair("gevent-4", OURS, "right", _SHARED),
]


def chosen(only: Sequence[str]) -> list[Pair]:
    """The pairs that are named: by a server, a strategy or both, as `waitress/ours`; all, if nothing is.

    :raises InvalidRequest: if a name is none of theirs.
    """
    named = {name: [pair for pair in PAIRS if name in _names(pair)] for name in only}
    for name, pairs in named.items():
        if not pairs:
            known = ", ".join(dict.fromkeys([pair.server for pair in PAIRS] + [pair.strategy for pair in PAIRS]))
            raise InvalidRequest(f"{name!r} is none of {known}, nor two of them that are shown, as waitress/ours")
    return [pair for pair in PAIRS if not only or any(pair in pairs for pairs in named.values())]


def _names(pair: Pair) -> set[str]:
    return {pair.server, pair.strategy, pair.name}
