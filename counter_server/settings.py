"""Settings of states, stores and managers: names, defaults and limits."""

import os
import sys
from dataclasses import dataclass
from typing import Literal, cast, get_args

from .errors import InvalidRequest

Durability = Literal["commit", "process", "none"]
DURABILITIES: tuple[str, ...] = get_args(Durability)

DEFAULT_DURABILITY: Durability = "commit"
DEFAULT_STORE = "manager://"
STORE_VARIABLE = "COUNTER_SERVER_STORE"
DATA_DIR_VARIABLE = "COUNTER_SERVER_DATA_DIR"
RUNTIME_DIR_VARIABLE = "COUNTER_SERVER_RUNTIME_DIR"  # contains sockets, keys and locks apart from the data
DEFAULT_DEADLINE = 5.0  # seconds for one call
LONGEST_DEADLINE = 60.0  # seconds; client records outlive every batch that is sent again


def check_durability(name: object) -> Durability:
    if name not in DURABILITIES:
        raise InvalidRequest(f"a durability is one of {', '.join(DURABILITIES)}, not {name!r}")
    return cast(Durability, name)


def check_seconds(seconds: object, what: str, most: float = sys.float_info.max) -> float:
    """Return `seconds`, or raise `InvalidRequest` about `what` unless it is more than 0 and at most `most`."""
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds <= most:
        return float(seconds)
    limit = f" and at most {most:g}" if most <= LONGEST_DEADLINE else ""
    raise InvalidRequest(f"{what} is a number of seconds, more than 0{limit}, not {seconds!r}")


def default_data_dir(instance_path: str = "instance") -> str:
    """Return the data directory for an app that names none: from the environment, else in its instance folder."""
    return os.environ.get(DATA_DIR_VARIABLE) or os.path.join(instance_path, "counter-server")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How to reach a store, and whether and how to start its manager on demand."""

    instance_path: str = "instance"  # contains the data directory, unless the URL or the environment names one
    start: bool = True  # whether to start a manager on demand
    durability: Durability = DEFAULT_DURABILITY  # of a manager started on demand
    idle_timeout: float = 60.0  # seconds without clients after which such a manager exits


DEFAULT_STORE_OPTIONS = StoreOptions()


@dataclass(frozen=True, kw_only=True)
class Caps:
    """The limits of one manager. It refuses anything new beyond a limit, and keeps serving everything it has."""

    counters: int = 10_000_000
    keys: int = 10_000_000  # remembered idempotency keys
    clients: int = 100_000  # remembered clients of the counters, and of each shared object
    journal_bytes: int = 16 * 2**30  # of the database file; its log may take a few MiB more
    connections: int = 10_000


DEFAULT_CAPS = Caps()
