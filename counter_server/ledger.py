"""The locked Python objects: counters, and the memory that makes calls exactly-once.

No Flask, no processes and no files here. What is to be durable goes through `commit`, which a `Journal`
provides; memory changes only after it has returned, so nothing is readable before it is on disk.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from math import inf
from typing import Any, NamedTuple, TypeVar

from sortedcontainers import SortedDict

from .errors import BatchRefused, StorageFull
from .operations import (
    LARGEST,
    READS,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Invoke,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
)
from .settings import LONGEST_DEADLINE, Caps

CLIENT_LIFETIME = 3600.0  # seconds past its last use that a client is remembered; deadlines are 60 at most
CLIENT_MINIMUM = 2 * LONGEST_DEADLINE  # seconds that a client is remembered even where there is no room for another
KEY_LIFETIME = 86400.0  # seconds that an idempotency key is remembered
_FORGET_EVERY = 1.0  # seconds
_FORGET_AT_ONCE = 1000  # expired records removed in one commit, so that no commit is long
_TURNED_AWAY = 10_000  # clients


class ClientRecord(NamedTuple):
    """The last batch of a client, for when it is sent again."""

    sequence: int
    results: list[Result]
    used: float
    object: str = ""  # whose batches they are: a shared object's name, or none for the counters


class KeyRecord(NamedTuple):
    """What an idempotency key was used for, and the number it was given."""

    fingerprint: bytes
    value: int
    used: float


@dataclass
class Contents:
    """All that is remembered. `clients` and `keys` are in the order of `used`; `objects` are pickles by name."""

    counters: dict[str, int] = field(default_factory=dict)
    clients: dict[bytes, ClientRecord] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Changes:
    """What a commit is to do: an overlay over the ledger until then. None removes."""

    now: float
    counters: dict[str, int | None] = field(default_factory=dict)
    clients: dict[bytes, ClientRecord | None] = field(default_factory=dict)
    keys: dict[str, KeyRecord | None] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    # How many more there are with it than without; what is forgotten makes room in the next commit.
    more_counters: int = 0
    more_clients: int = 0
    more_keys: int = 0


KEY_REUSED = Refusal("key_reused", "this idempotency key was used for another request; nothing was counted")


def beyond_bounds(operation: Increment, current: int) -> Refusal | None:
    """The refusal of an increment that would leave its bounds, or 64 bits."""
    minimum = SMALLEST if operation.minimum is None else operation.minimum
    maximum = LARGEST if operation.maximum is None else operation.maximum
    value = current + operation.by
    if minimum <= value <= maximum:
        return None
    bound = f"below {minimum}" if value < minimum else f"above {maximum}"
    return Refusal(
        "limit", f"{operation.name!r} is {current} and {operation.by:+d} would take it {bound}; nothing was counted"
    )


def no_room(what: str, most: int, option: str) -> Refusal:
    """The refusal of what would be one too many."""
    return Refusal(
        "storage_full",
        f"no room for another {what}: there are {most:,}, the most that --max-{option} allows; nothing was counted",
    )


class Clients:
    """Remembers the last batch of each client, in the order of their last use.

    :param records: what was remembered before, in that order.
    :param most: the most clients. The client that was idle longest makes room for another, if no batch of it can
        arrive any more.
    :param owner: the shared object whose clients they are; empty for the counters.
    """

    def __init__(self, records: dict[bytes, ClientRecord], most: float = inf, owner: str = "") -> None:
        self._records = records
        self._most = most
        self._owner = owner
        # A refused batch may arrive a second time, over a connection that its client gave up. Applying it then would
        # make the refusal wrong, so the last clients that were turned away stay turned away.
        self._turned_away: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> dict[bytes, ClientRecord]:
        """The records as they are, for a reader that keeps writers out."""
        return self._records

    def answer(self, batch: Batch, changes: Changes) -> list[Result] | BatchRefused | None:
        """Apply the rule of sequences: return the answer to this batch, or None if it is to be executed."""
        record = self._find(batch.client, changes)
        last = 0 if record is None else record.sequence
        if record is not None and batch.sequence == last:
            return record.results
        if batch.sequence != last + 1:
            return BatchRefused(f"batch {batch.sequence} does not follow batch {last}")
        return None

    def admit(self, client: bytes, changes: Changes) -> Refusal | None:
        """Make room for a client; return why there is none, if there is none."""
        if self._find(client, changes) is not None:
            return None
        if client not in self._turned_away:
            if len(self._records) + changes.more_clients < self._most:
                return None
            for idle, record in self._records.items():
                if record.used > changes.now - CLIENT_MINIMUM:
                    break
                if idle not in changes.clients:
                    changes.clients[idle] = None
                    changes.more_clients -= 1
                    return None
        self._turned_away[client] = None
        if len(self._turned_away) > _TURNED_AWAY:
            del self._turned_away[next(iter(self._turned_away))]
        return no_room("client", int(self._most), "clients")

    def remember(self, batch: Batch, results: list[Result], changes: Changes) -> None:
        """Note the answer, for when the batch is sent again."""
        changes.more_clients += self._find(batch.client, changes) is None
        changes.clients[batch.client] = ClientRecord(batch.sequence, results, changes.now, self._owner)

    def forget(self, changes: Changes) -> bool:
        """Forget clients that expired; return whether there may be more."""
        expired = _expired(self._records, changes.now - CLIENT_LIFETIME)
        changes.clients.update(dict.fromkeys(expired))
        return len(expired) == _FORGET_AT_ONCE

    def merge(self, changes: Changes) -> None:
        """Make the changes that were committed."""
        for client, record in changes.clients.items():
            self._records.pop(client, None)  # to the end: the order is that of the last use
            if record is not None:
                self._records[client] = record

    def _find(self, client: bytes, changes: Changes) -> ClientRecord | None:
        return changes.clients.get(client) or self._records.get(client)


def results_of(answer: list[Result] | BatchRefused) -> list[Result]:
    """A batch's results; its refusal is raised."""
    if isinstance(answer, BatchRefused):
        raise answer
    return answer


Commit = Callable[[Changes], None]
Name = TypeVar("Name", str, bytes)


def _keep_in_memory(changes: Changes) -> None:
    """The commit of a ledger that is not durable."""


class Ledger:
    """Counters, clients and idempotency keys, changed by batches, several in one commit.

    Its time is its own: the seconds that it has run, continued from the newest record in `contents`. So a
    clock that jumps neither revives nor repeats anything, and time spent switched off lengthens what is
    remembered.

    :param commit: makes `Changes` durable, or raises. `StorageFull` means that it changed nothing.
    :param clock: tells the seconds, where the time is not its own but that of who keeps `contents`.
    :param caps: what it holds at the most, if not all that there is room for.
    """

    def __init__(
        self,
        contents: Contents | None = None,
        commit: Commit = _keep_in_memory,
        clock: Callable[[], float] | None = None,
        caps: Caps | None = None,
    ) -> None:
        contents = contents or Contents()
        self._most_counters = caps.counters if caps else inf
        self._most_keys = caps.keys if caps else inf
        self._commit = commit
        self._counters: Any = SortedDict(contents.counters)
        self._clients = Clients(
            {client: record for client, record in contents.clients.items() if not record.object},
            caps.clients if caps else inf,
        )
        self._keys = contents.keys
        last_used = [record.used for record in contents.clients.values()] + [
            known.used for known in self._keys.values()
        ]
        born = time.monotonic() - max(last_used, default=0.0)
        self._clock = clock or (lambda: time.monotonic() - born)
        self._next_forgetting = 0.0
        self._execute: dict[type[Operation], Callable[[Any, Changes], Result]] = {
            Increment: self._increment,
            Set: self._set,
            Delete: self._delete,
            Get: self._get,
            Scan: self._scan,
            Invoke: lambda _operation, _changes: Refusal("unsupported", "counters have no methods"),
        }
        self.after_fork()

    def after_fork(self) -> None:
        """New locks: in the child of a fork nobody is left to release the old ones."""
        self._writing = threading.Lock()  # held through a commit; who holds it is the only one to change memory
        self._memory = threading.Lock()  # held while memory changes, or is read without the lock above

    def stop(self) -> None:
        """Wait for the commit under way; no other one will ever begin."""
        self._writing.acquire()

    def now(self) -> float:
        """Its own time, in seconds; see the class."""
        return self._clock()

    def __len__(self) -> int:
        return len(self._counters)

    @property
    def clients(self) -> int:
        """How many clients are remembered."""
        return len(self._clients)

    @property
    def keys(self) -> int:
        """How many idempotency keys are remembered."""
        return len(self._keys)

    def show(self, to: Callable[[Contents], None]) -> Contents:
        """Have `to` look at all that is remembered while nobody writes; return it."""
        with self._writing:
            contents = Contents(self._counters, self._clients.records, self._keys)
            to(contents)
            return contents

    def read(self, batch: Batch) -> list[Result]:
        """The results of a batch of reads. Never waits for a commit."""
        changes = Changes(0.0)
        with self._memory:
            return [self._execute[type(operation)](operation, changes) for operation in batch.operations]

    def apply(self, batches: Sequence[Batch]) -> list[list[Result] | BatchRefused]:
        """Apply batches of writes, in order, in one commit; a result list for each, or its refusal.

        Where the disk takes no writes, each is answered with a refusal, and reads go on.
        """
        with self._writing:
            changes = Changes(self.now())
            if changes.now >= self._next_forgetting:
                self._forget(changes)  # first: on the disk, too, what it leaves is room for what comes
            answers = [self._apply(batch, changes) for batch in batches]
            try:
                self._commit(changes)
            except StorageFull as error:
                changes = Changes(changes.now)
                # These answers are remembered too, in memory: a refused batch sent again is refused again.
                refusal = Refusal("storage_full", str(error))
                answers = [self._apply(batch, changes, refusal) for batch in batches]
            with self._memory:
                self._merge(changes)
        return answers

    def _apply(self, batch: Batch, changes: Changes, refusal: Refusal | None = None) -> list[Result] | BatchRefused:
        """One batch, by the rule of sequences, its writes answered with `refusal` if there is one."""
        answered = self._clients.answer(batch, changes)
        if answered is not None:
            return answered
        turned_away = self._clients.admit(batch.client, changes)
        refusal = refusal or turned_away
        execute = self._execute
        results = [
            execute[type(operation)](operation, changes)
            if refusal is None or isinstance(operation, READS)
            else self._known_result(operation, changes) or refusal
            for operation in batch.operations
        ]
        if turned_away is None:
            self._clients.remember(batch, results, changes)
        return results

    def _get(self, operation: Get, changes: Changes) -> int | None:
        return self._value(operation.name, changes)

    def _set(self, operation: Set, changes: Changes) -> int | Refusal:
        if self._value(operation.name, changes) is None:
            if len(self._counters) + changes.more_counters >= self._most_counters:
                return no_room("counter", int(self._most_counters), "counters")
            changes.more_counters += 1
        changes.counters[operation.name] = operation.value
        return operation.value

    def _delete(self, operation: Delete, changes: Changes) -> bool:
        existed = self._value(operation.name, changes) is not None
        if existed:
            changes.counters[operation.name] = None
            changes.more_counters -= 1
        return existed

    def _value(self, name: str, changes: Changes) -> int | None:
        if name in changes.counters:
            return changes.counters[name]
        value: int | None = self._counters.get(name)
        return value

    def _known_result(self, operation: Operation, changes: Changes) -> Replayed | Refusal | None:
        """What the operation's idempotency key says of it, if the key was used: also where nothing can be written."""
        if not isinstance(operation, Increment) or operation.key is None:
            return None
        known = changes.keys.get(operation.key) or self._keys.get(operation.key)
        if known is None or known.used <= changes.now - KEY_LIFETIME:
            return None
        return Replayed(known.value) if known.fingerprint == operation.fingerprint() else KEY_REUSED

    def _increment(self, operation: Increment, changes: Changes) -> Result:
        name, key = operation.name, operation.key
        if key is not None and (known := self._known_result(operation, changes)) is not None:
            return known
        there = self._value(name, changes)
        current = there or 0
        value = current + operation.by
        refusal = beyond_bounds(operation, current)
        if refusal is not None:
            return refusal
        if there is None and len(self._counters) + changes.more_counters >= self._most_counters:
            return no_room("counter", int(self._most_counters), "counters")
        if key is not None and key not in changes.keys and key not in self._keys:
            if len(self._keys) + changes.more_keys >= self._most_keys:
                return no_room("idempotency key", int(self._most_keys), "keys")
            changes.more_keys += 1
        if there is None:
            changes.more_counters += 1
        changes.counters[name] = value
        if key is not None:
            changes.keys[key] = KeyRecord(operation.fingerprint(), value, changes.now)
        return value

    def _scan(self, operation: Scan, changes: Changes) -> Page:
        """A page, with the overlay seen through: counters made or removed earlier in this commit included."""
        after, limit = operation.after, operation.limit
        found: list[tuple[str, int]] = []
        fresh = iter(
            sorted(n for n, v in changes.counters.items() if n > after and v is not None and n not in self._counters)
        )
        pending = next(fresh, None)
        for name in self._counters.irange(minimum=after or None, inclusive=(False, True)):
            while pending is not None and pending < name:
                found.append((pending, self._value(pending, changes) or 0))
                pending = next(fresh, None)
            value = self._value(name, changes)
            if value is not None:
                found.append((name, value))
            if len(found) > limit:
                break
        while pending is not None and len(found) <= limit:
            found.append((pending, self._value(pending, changes) or 0))
            pending = next(fresh, None)
        return Page(found[:limit], more=len(found) > limit)

    def _forget(self, changes: Changes) -> None:
        """Add the removal of what has expired: the records stand in the order of their last use."""
        self._next_forgetting = changes.now + _FORGET_EVERY
        more = self._clients.forget(changes)
        keys = _expired(self._keys, changes.now - KEY_LIFETIME)
        changes.keys.update(dict.fromkeys(keys))
        if more or len(keys) == _FORGET_AT_ONCE:
            self._next_forgetting = changes.now  # there are more: the next commit goes on

    def _merge(self, changes: Changes) -> None:
        for name, value in changes.counters.items():
            if value is None:
                self._counters.pop(name, None)
            else:
                self._counters[name] = value
        self._clients.merge(changes)
        for key, known in changes.keys.items():
            self._keys.pop(key, None)
            if known is not None:
                self._keys[key] = known


def _expired(records: Mapping[Name, ClientRecord | KeyRecord], before: float) -> list[Name]:
    """The first records that were last used by then; not so many that a commit becomes long."""
    expired = takewhile(lambda item: item[1].used <= before, records.items())
    return [name for name, _ in islice(expired, _FORGET_AT_ONCE)]
