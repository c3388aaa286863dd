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
    """A call of a shared object that has run for longer than `manager.server.SLOW_SECONDS`, and goes on."""

    object: str
    method: str
    seconds: float
    others_wait: bool = True  # not for a call of a concurrent object


COMMIT_BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds
_LONGEST_TEXT = 200  # characters of a command line, and of an error's class and text


class CommitTimes(Struct, frozen=True):
    """How long the commits of one kind took."""

    counts: list[int]  # by bucket of `COMMIT_BOUNDS`, and beyond them
    seconds: float  # the sum

    @property
    def number(self) -> int:
        return sum(self.counts)


class LastError(Struct, frozen=True):
    """The last error of a shared object. Its text may hold what a user entered."""

    kind: str  # the class
    text: str
    time: float  # when, in `time.time` seconds


class Entries(Struct, frozen=True, kw_only=True):
    """The entries of a bounded dict, or the windows of a limit.

    `now` includes the entries that have expired since the last write: reading it waits for no lock.
    """

    kind: Literal["dict", "limit"]
    now: int
    expired: int
    most: int | None = None  # None: unlimited
    hits: int | None = None  # of reads; these three are None for a limit
    misses: int | None = None
    evictions: int | None = None  # of live entries, for lack of room


class ObjectStatus(Struct, frozen=True, kw_only=True):
    """One shared object. `calls` and all that follows count from the start of the manager."""

    name: str
    cls: str  # module and qualified name
    durable: bool
    not_made: str = ""  # why it could not be made; then it has no calls
    calls: int = 0
    errors: int = 0  # calls whose method raised an exception, or that were refused or undone
    running: int = 0  # calls
    slowest_seconds: float = 0.0  # of a call, without its commit
    slowest_method: str = ""
    last_error: LastError | None = None
    entries: Entries | None = None  # of a dict, a cache, a visitor counter or a limit


class ConnectedProcess(Struct, frozen=True, kw_only=True):
    """A process that calls counters or shared objects."""

    pid: int  # 0: it cannot be seen from the manager, as in another container
    command: str  # its command line, shortened; empty if it cannot be seen
    connections: int
    since: float  # when the oldest of these began, in `time.time` seconds


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
    commits: int  # that these batches took
    commit_times: dict[Literal["counters", "objects"], CommitTimes]  # by what was committed; empty without a journal
    journal_bytes: Annotated[int, Figure("Journal", "Bytes of the journal and its log.", "journal_bytes", "bytes")]
    slow_calls: Annotated[list[SlowCall], Figure("Long calls", "Calls that have run for long.", unit="text")] = []
    hosted: list[ObjectStatus]  # at most 1000 of the `objects`
    processes: list[ConnectedProcess]  # at most 100, the first that connected
    more_processes: int  # that are left out

    @property
    def connected_processes(self) -> int:
        return len(self.processes) + self.more_processes

    @property
    def journal_commits(self) -> int:
        """The commits to the journal, of counters and of objects."""
        return sum(times.number for times in self.commit_times.values())

    @property
    def commit_seconds(self) -> float:
        """The seconds that these took."""
        return sum(times.seconds for times in self.commit_times.values())


FIGURES: dict[str, Figure] = {
    name: figure
    for name, kind in get_type_hints(Status, include_extras=True).items()
    for figure in get_args(kind)
    if isinstance(figure, Figure)
}


def shortened(text: str, most: int = _LONGEST_TEXT) -> str:
    """Return the beginning of a text that is not ours, without anything that could control a terminal."""
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(character if character.isprintable() else " " for character in text)


class Process(Struct, frozen=True, kw_only=True):
    """One child of the supervisor: the place, and the process that fills it now."""

    name: str  # "manager", or "worker-1", "worker-2", …
    pid: int | None  # None while the next process is not started yet
    uptime: float  # seconds since this process was started; 0 without one
    restarts: int  # how often another process was started here
