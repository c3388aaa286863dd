"""The figures of running processes: the manager's own, and what the supervisor knows of its children."""

from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

from msgspec import Struct

from .settings import Durability


class Figure(NamedTuple):
    """What a field of `Status` is called: `label` on the dashboard, `metric` for Prometheus; not shown if empty."""

    label: str
    help: str
    metric: str = ""
    unit: Literal["text", "number", "seconds", "bytes"] = "number"
    grows: bool = False  # it only grows while the manager runs


class SlowCall(Struct, frozen=True):
    """A call of a shared object that has run for longer than `manager.services.SLOW_SECONDS`, and goes on."""

    object: str
    method: str
    seconds: float


class Status(Struct, frozen=True, kw_only=True):
    """The figures of one manager. It reads them one by one while it works, so two may be a commit apart."""

    pid: Annotated[int, Figure("Process", "Process id of the manager.", unit="text")]
    epoch: Annotated[str, Figure("", "Another epoch means that the counters before it are lost.", unit="text")]
    uptime: Annotated[float, Figure("Uptime", "Seconds since the manager began.", "manager_uptime_seconds", "seconds")]
    starts: Annotated[int, Figure("Starts on its data", "Starts on this data directory.", "manager_starts", grows=True)]
    durability: Annotated[Durability, Figure("Durability", "What a number survives.", unit="text")]
    counters: Annotated[int, Figure("Counters", "Counters in the store.", "counters")]
    objects: Annotated[int, Figure("Shared objects", "Shared objects that the manager hosts.", "objects")]
    keys: Annotated[int, Figure("Idempotency keys", "Idempotency keys that the manager remembers.", "idempotency_keys")]
    clients: Annotated[int, Figure("Clients remembered", "Clients whose last batch the manager remembers.", "clients")]
    connections: Annotated[int, Figure("Connections", "Open connections, the caller's included.", "connections")]
    batches: Annotated[int, Figure("", "Batches of writes since the manager began.", "batches", grows=True)]
    operations: Annotated[int, Figure("", "Operations in these batches.", "operations", grows=True)]
    commits: Annotated[int, Figure("", "Commits that these batches took.", "commits", grows=True)]
    commit_seconds: Annotated[float, Figure("", "Seconds that these commits took.", "commit_seconds", grows=True)]
    journal_bytes: Annotated[int, Figure("Journal", "Bytes of the journal and its log.", "journal_bytes", "bytes")]
    slow_calls: Annotated[list[SlowCall], Figure("Long calls", "Calls that have run for long.", unit="text")] = []


FIGURES: dict[str, Figure] = {
    name: get_args(kind)[1] for name, kind in get_type_hints(Status, include_extras=True).items()
}


class Process(Struct, frozen=True, kw_only=True):
    """One child of the supervisor: the place, and the process that fills it now."""

    name: str  # "manager", or "worker-1", "worker-2", …
    pid: int | None  # None while the next process is not started yet
    uptime: float  # seconds since this process was started; 0 without one
    restarts: int  # how often another process was started here
