"""What is told of the running processes: the manager's own figures, and what the supervisor knows of its children."""

from msgspec import Struct

from .settings import Durability


class SlowCall(Struct, frozen=True):
    """A call of a shared object that has run for longer than `manager.services.SLOW_SECONDS`, and goes on."""

    object: str
    method: str
    seconds: float


class Status(Struct, frozen=True, kw_only=True):
    """The figures of one manager: the same ones for whoever asks.

    They are read one after the other while it works on, so two of them may be a commit apart.
    """

    pid: int
    epoch: str  # of its counters; another one means that what was there before is lost
    durability: Durability
    uptime: float  # seconds
    starts: int  # how often a manager began on this data directory, this one included; 1 with durability none
    counters: int
    objects: int  # shared objects that it hosts
    clients: int  # whose last batch it remembers
    keys: int  # idempotency keys that it remembers
    connections: int  # open ones, that of who asks included
    batches: int  # of writes to counters, answered since its start
    operations: int  # in these batches
    commits: int  # that these batches took; so batches / commits is how many shared one
    commit_seconds: float  # that these commits took together
    journal_bytes: int  # the journal's file and its log; 0 with durability none
    slow_calls: list[SlowCall] = []


class Process(Struct, frozen=True, kw_only=True):
    """One child of the supervisor: the place, and the process that fills it now."""

    name: str  # "manager", where the store has one, or "worker-1", "worker-2", …
    pid: int | None  # None: it has died, and the next one is yet to be started
    uptime: float  # seconds since this process was started; 0 without one
    restarts: int  # how often another one had to be started here, since the server was
