"""Settings of states, stores and managers: names, defaults and limits."""

import os
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple, cast, get_args

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
LARGEST_VALUE = 2**20  # bytes of plain data, encoded: the arguments of one call, its result, a durable object's state
_MOST_LARGEST_VALUE = 2**25  # bytes; a batch of such results still fits into a row of SQLite


def check_durability(name: object) -> Durability:
    if name not in DURABILITIES:
        raise InvalidRequest(f"a durability must be one of {', '.join(DURABILITIES)}, not {name!r}")
    return cast(Durability, name)


def check_seconds(seconds: object, what: str, most: float = sys.float_info.max) -> float:
    """Return `seconds`, or raise `InvalidRequest` about `what` unless it is more than 0 and at most `most`."""
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds <= most:
        return float(seconds)
    limit = f" and at most {most:g}" if most <= LONGEST_DEADLINE else ""
    raise InvalidRequest(f"{what} must be a number of seconds, more than 0{limit}, not {seconds!r}")


def check_flag(flag: object) -> bool:
    if flag not in (True, False):
        raise InvalidRequest(f"it must be True or False, not {flag!r}")
    return bool(flag)


def check_log(log: object) -> str:
    if not isinstance(log, str) or log not in ("file", "stderr"):
        raise InvalidRequest(f"a log must be file or stderr, not {log!r}")
    return log


def check_largest_value(size: object) -> int:
    if isinstance(size, int) and LARGEST_VALUE <= size <= _MOST_LARGEST_VALUE:
        return size
    raise InvalidRequest(f"it must be a number of bytes, {LARGEST_VALUE} to {_MOST_LARGEST_VALUE}, not {size!r}")


def check_store(url: object) -> str:
    if not isinstance(url, str):
        raise InvalidRequest(f"it must be the URL of a store, a str, not {type(url).__name__}")
    return url


def check_data_dir(path: object) -> object:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InvalidRequest(f"it must be a path, a str or a PathLike of str, not {path!r}")
    return path


class Setting(NamedTuple):
    """One setting of an app. The environment's text goes through `parse`; `check` raises `InvalidRequest`."""

    default: Any
    check: Callable[[Any], Any] = lambda value: value
    parse: Callable[[str], Any] = str


_FLAGS = {**dict.fromkeys(["1", "true", "yes", "on"], True), **dict.fromkeys(["0", "false", "no", "off"], False)}


def _parse_flag(text: str) -> object:
    return _FLAGS.get(text.lower(), text)


_flag = partial(Setting, check=check_flag, parse=_parse_flag)
_IN_APP = {  # without COUNTER_SERVER_
    "STORE": Setting(DEFAULT_STORE, check_store),
    "DATA_DIR": Setting(None, check_data_dir),
    "DEADLINE": Setting(DEFAULT_DEADLINE, partial(check_seconds, what="a deadline", most=LONGEST_DEADLINE), float),
    "REQUEST_DEADLINE": Setting(None, partial(check_seconds, what="a request's deadline", most=inf), float),
    "TIMING": _flag(default=False),
    "START": _flag(default=True),
    "DURABILITY": Setting(DEFAULT_DURABILITY, check_durability),
    "IDLE_TIMEOUT": Setting(60.0, partial(check_seconds, what="an idle timeout"), float),
    "LARGEST_VALUE": Setting(LARGEST_VALUE, check_largest_value, int),
    "LOG": Setting("file", check_log),
    "ERROR_HANDLER": _flag(default=True),
}


def from_environment(name: str) -> Any:
    """Return the value of a setting in the environment, else its default. An empty variable counts as missing.

    :raises InvalidRequest: about the variable.
    """
    setting, variable = _IN_APP[name], f"COUNTER_SERVER_{name}"
    text = os.environ.get(variable)
    if not text:
        return setting.default
    try:
        return setting.check(setting.parse(text))
    except ValueError as error:  # of `float` too
        raise InvalidRequest(f"the environment variable {variable} is {text!r}: {error}") from None


def complete(config: MutableMapping[str, Any]) -> None:
    """Check an app's configuration, and set what it does not name from the environment, else to the defaults.

    :raises InvalidRequest: about one of the settings.
    """
    for name, setting in _IN_APP.items():
        variable = f"COUNTER_SERVER_{name}"
        value = config[variable] if variable in config else from_environment(name)
        try:
            config[variable] = value if value is setting.default else setting.check(value)
        except InvalidRequest as error:
            raise InvalidRequest(f"{variable} in the app's configuration: {error}") from None


def default_data_dir(instance_path: str = "instance") -> str:
    """Return the data directory for an app that names none: from the environment, else in its instance folder."""
    return os.environ.get(DATA_DIR_VARIABLE) or os.path.join(instance_path, "counter-server")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How to reach a store, and whether and how to start its manager on demand. The environment has the defaults.

    :raises InvalidRequest: if a setting in the environment is wrong.
    """

    data_dir: str | None = None  # the data directory, if the URL names none; None: `default_data_dir()`
    start: bool = field(default_factory=partial(from_environment, "START"))  # whether to start a manager on demand
    durability: Durability = field(default_factory=partial(from_environment, "DURABILITY"))  # of such a manager
    # Seconds without clients after which it exits.
    idle_timeout: float = field(default_factory=partial(from_environment, "IDLE_TIMEOUT"))
    # Where it reports: "file" is manager.log in the data directory, "stderr" is the standard error of this process.
    log: str = field(default_factory=partial(from_environment, "LOG"))


@dataclass(frozen=True, kw_only=True)
class Caps:
    """The limits of one manager. It refuses anything new beyond a limit, and keeps serving everything it has."""

    counters: int = 10_000_000
    keys: int = 10_000_000  # remembered idempotency keys
    clients: int = 100_000  # remembered clients of the counters, and of each shared object
    journal_bytes: int = 16 * 2**30  # of the database file; its log may take a few MiB more
    connections: int = 10_000


DEFAULT_CAPS = Caps()
