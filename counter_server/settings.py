"""Options, once: their names, defaults and limits, for the command line, the extension and the servers."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal, cast, get_args

from .errors import InvalidRequest

Durability = Literal["commit", "process", "none"]
DURABILITIES: tuple[str, ...] = get_args(Durability)

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)

DEFAULT_DURABILITY: Durability = "commit"
DEFAULT_STORE = "manager://"
STORE_VARIABLE = "COUNTER_SERVER_STORE"
DATA_DIR_VARIABLE = "COUNTER_SERVER_DATA_DIR"
DEFAULT_DEADLINE = 5.0  # seconds that a call may take
LONGEST_DEADLINE = 60.0  # seconds; client records live much longer than any resent batch


def check_durability(name: object) -> Durability:
    """`name`, if it is one of the durabilities."""
    if name not in DURABILITIES:
        raise InvalidRequest(f"a durability is one of {', '.join(DURABILITIES)}, not {name!r}")
    return cast(Durability, name)


def check_seconds(seconds: object, what: str, most: float = sys.float_info.max) -> float:
    """`seconds`, if that is a time of more than 0 and at most `most`.

    :param what: names it in the error.
    :raises InvalidRequest: if it is not.
    """
    try:
        number = float(seconds) if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) else nan
    except OverflowError:  # an int beyond any float
        number = nan
    if not 0 < number <= most:
        limit = f" and at most {most:g}" if most <= LONGEST_DEADLINE else ""
        raise InvalidRequest(f"{what} is a number of seconds, more than 0{limit}, not {seconds!r}")
    return number


def default_data_dir(instance_path: str = "instance") -> str:
    """The data directory where none was named: an app's instance folder, or one here, holds it."""
    return os.environ.get(DATA_DIR_VARIABLE) or os.path.join(instance_path, "counter-server")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How a store is reached, and how its manager is started where it needs one and there is none."""

    instance_path: str = "instance"  # holds the data directory, where neither the URL nor the environment names one
    start: bool = True  # start a manager on demand
    durability: Durability = DEFAULT_DURABILITY  # of a manager that is started
    idle_timeout: float = 60.0  # seconds without any client after which such a manager ends


DEFAULT_STORE_OPTIONS = StoreOptions()


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What one manager takes at the most. Beyond one of them it refuses by name, and what is there goes on."""

    counters: int = 10_000_000
    keys: int = 10_000_000  # idempotency keys that are remembered
    clients: int = 100_000  # whose last batch is remembered: of the counters, and of each shared object
    journal_bytes: int = 16 * 2**30  # of the file; its log may have some MiB beside
    connections: int = 10_000


DEFAULT_CAPS = Caps()


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `counter-server run` serves, and how."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    workers: int = max(2, os.cpu_count() or 1)
    threads: int = 8  # that run requests, in each worker
    request_timeout: float = 20.0  # seconds from the first byte of a request to its last
    frozen_after: float = 6.0  # seconds without a sign of life after which a worker is replaced
    store: str = DEFAULT_STORE
    durability: Durability = DEFAULT_DURABILITY
    log_format: LogFormat = "text"
    attach: bool = False  # to a manager that runs already
    caps: Caps = DEFAULT_CAPS  # of the manager
    web: Mapping[str, Any] = field(default_factory=dict)  # the web application's configuration
