"""The counters, and the memory that makes calls exactly-once.

Durable changes go through a `Journal`. Memory changes after its commit has returned, so that every readable value is on
disk.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice, takewhile
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from msgspec import Struct, field
from sortedcontainers import SortedSet

from .combiner import Combiner
from .errors import BatchRefused, StorageFull
from .operations import (
    LARGEST,
    READS,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Keep,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
)
from .settings import LONGEST_DEADLINE, Caps

CLIENT_LIFETIME = 3600.0  # seconds past its last use for which a client is remembered; deadlines are 60 at most
CLIENT_MINIMUM = 2 * LONGEST_DEADLINE  # seconds for which a client is remembered even when the room is full
KEY_LIFETIME = 86400.0  # seconds for which an idempotency key is remembered
_FORGET_EVERY = 1.0  # seconds
_FORGET_AT_ONCE = 1000  # expired records removed in one commit, so that no commit takes long
_TURNED_AWAY = 10_000  # clients
_MOST_BATCHES = 1000  # in one commit; in practice one for each connected worker


class ClientRecord(NamedTuple):
    """The last batch of a client, for when it is resent."""

    sequence: int
    results: list[Result]
    used: float
    object: str = ""  # the shared object that the client calls; empty for the counters


class KeyRecord(NamedTuple):
    """The request of an idempotency key, and its result."""

    fingerprint: bytes
    value: int
    used: float


class Contents(Struct):
    """Everything that is remembered. `clients` and `keys` are in the order of `used`; `objects` are pickles by name."""

    counters: dict[str, int] = field(default_factory=dict)
    clients: dict[bytes, ClientRecord] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def without_expired(self, now: float | None = None) -> "Contents":
        """Remove the keys that have expired; return itself.

        :param now: in seconds of the ledger's own time; by default the newest record's, before which it surely is not.
        """
        newest = (record.used for records in (self.clients, self.keys) for record in records.values())
        before = (max(newest, default=0.0) if now is None else now) - KEY_LIFETIME
        self.keys = {key: record for key, record in self.keys.items() if record.used > before}
        return self


class Changes(Struct):
    """The effect of a commit: an overlay over the ledger until then. None removes."""

    now: float
    counters: dict[str, int | None] = field(default_factory=dict)
    clients: dict[bytes, ClientRecord | None] = field(default_factory=dict)
    keys: dict[str, KeyRecord | None] = field(default_factory=dict)
    objects: dict[str, bytes | None] = field(default_factory=dict)
    # Net numbers of records that this commit adds. Expired records are not subtracted: their room is free afterwards.
    more_counters: int = 0
    more_clients: int = 0
    more_keys: int = 0


class Commits(Protocol):
    """A place that makes changes durable. `commit` returns when they are, or raises `StorageFull` if none was made."""

    def commit(self, changes: Changes, /) -> None: ...


Answer = list[Result] | BatchRefused

KEY_REUSED = Refusal("key_reused", "this idempotency key was used for another request; nothing was counted")


def beyond_bounds(operation: Increment, current: int) -> Refusal | None:
    minimum = SMALLEST if operation.minimum is None else operation.minimum
    maximum = LARGEST if operation.maximum is None else operation.maximum
    value = current + operation.by
    if minimum <= value <= maximum:
        return None
    bound = f"below {minimum}" if value < minimum else f"above {maximum}"
    return Refusal(
        "limit", f"{operation.name!r} is {current} and {operation.by:+d} would take it {bound}; nothing was counted"
    )


def has_ended(pid: int) -> bool:
    """Return whether a process has surely ended; False for 0, a process that cannot be seen from here."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)  # not `/proc`, which may hide processes that are there
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False


def no_room(what: str, most: float, option: str) -> Refusal:
    return Refusal(
        "storage_full",
        f"no room for another {what}: there are {int(most):,}, the maximum of --max-{option}; nothing was counted",
    )


def raise_error(error: BaseException) -> NoReturn:
    """Raise `error`: what a ledger or an object in memory does where a manager would end its process."""
    raise error


class Clients:
    """Remembers the last batch of each client, in the order of their last use.

    :param most: the maximum number of clients. If there is no room, a client is forgotten whose process has ended, or
        else the client that was idle longest. It must be certain that none of its batches can still arrive.
    :param owner: the shared object that they call; empty for the counters.
    """

    def __init__(self, records: dict[bytes, ClientRecord], most: float = inf, owner: str = "") -> None:
        self.records = records  # changed only by `merge`
        self._most = most
        self._owner = owner
        # A refused batch may arrive a second time, over a connection that its client gave up. Applying it then would
        # make the refusal wrong, so rejected clients stay rejected.
        self._turned_away: dict[bytes, None] = {}
        # Clients whose connection has ended, with their processes. One that still runs may have another connection.
        self._left: deque[tuple[bytes, int]] = deque(maxlen=None if most == inf else int(most))

    def leave(self, client: bytes, pid: int) -> None:
        """Note that a connection of a client has ended. Any thread may call this.

        :param pid: of its process; 0 if that cannot be seen from here.
        """
        self._left.append((client, pid))

    def answer(self, batch: Batch, changes: Changes) -> Answer | None:
        """Apply the rule of sequences: return the answer to this batch, or None if it must be executed."""
        record = changes.clients.get(batch.client) or self.records.get(batch.client)
        if record is not None and changes.clients.get(batch.client, record) is None:  # this commit removes it
            is_expired = record.used <= changes.now - CLIENT_LIFETIME  # then it is kept, as it returns
            record = record if is_expired else None  # else another client has its place
        if record is not None and batch.sequence == record.sequence:
            return record.results
        last = record.sequence if record else 0
        follows = batch.sequence == last + 1
        return None if follows else BatchRefused(f"batch {batch.sequence} does not follow batch {last}")

    def admit(self, client: bytes, changes: Changes) -> Refusal | None:
        """Make room for a client whose first batch must be executed; return a refusal if there is no room."""
        if client not in self._turned_away:
            if len(self.records) + changes.more_clients < self._most:
                return None
            while self._left:
                gone, pid = self._left.popleft()
                if gone in self.records and gone not in changes.clients and has_ended(pid):
                    changes.clients[gone] = None
                    changes.more_clients -= 1
                    return None
            for idle, record in self.records.items():
                if record.used > changes.now - CLIENT_MINIMUM:
                    break
                if idle not in changes.clients:
                    changes.clients[idle] = None
                    changes.more_clients -= 1
                    return None
        self._turned_away[client] = None
        if len(self._turned_away) > _TURNED_AWAY:
            del self._turned_away[next(iter(self._turned_away))]
        return no_room("client", self._most, "clients")

    def remember(self, batch: Batch, results: list[Result], changes: Changes) -> None:
        changes.more_clients += batch.sequence == 1  # only then is it a new client
        changes.clients[batch.client] = ClientRecord(batch.sequence, results, changes.now, self._owner)

    def forget(self, changes: Changes) -> bool:
        """Forget expired clients; return whether there may be more."""
        expired = _expired(self.records, changes.now - CLIENT_LIFETIME)
        changes.clients.update(dict.fromkeys(expired))
        return len(expired) == _FORGET_AT_ONCE

    def merge(self, changes: Changes) -> None:
        _merge(self.records, changes.clients)


class Ledger:
    """Counters, clients and idempotency keys, changed by batches, several in one commit.

    The ledger has its own time: the seconds that it has run, continued from the newest record in `contents`. So a
    clock that jumps has no effect, and time without a manager does not count: records then live longer.

    :param journal: makes each commit durable, so batches that wait at the same time share one.
    :param clock: returns the seconds, if not its own time.
    :param caps: the maximum number of records; unlimited by default.
    :param fail: ends the process, after an error that may leave memory different from the disk.
    """

    def __init__(
        self,
        contents: Contents | None = None,
        journal: Commits | None = None,
        *,
        clock: Callable[[], float] | None = None,
        caps: Caps | None = None,
        fail: Callable[[BaseException], NoReturn] = raise_error,
    ) -> None:
        contents = contents or Contents()
        self._journal = journal
        self._fail = fail
        self._most_counters = caps.counters if caps else inf
        self._most_keys = caps.keys if caps else inf
        self._counters = contents.counters
        self._names: Any = SortedSet(contents.counters)
        counting = {client: record for client, record in contents.clients.items() if not record.object}
        self.remembered = Clients(counting, caps.clients if caps else inf)
        self._keys = contents.keys
        used = [record.used for records in (contents.clients, contents.keys) for record in records.values()]
        self._born = time.monotonic() - max(used, default=0.0)
        self._clock = clock
        self._next_forgetting = 0.0
        # Of writes, since the start; guarded by `_writing`.
        self.batches = self.operations = self.commits = 0
        self._combiner: Combiner[Batch, Answer] = Combiner(self, limit=_MOST_BATCHES)
        self.after_fork()

    def after_fork(self) -> None:
        # New locks: in the child of a fork, no thread exists that could release the old ones.
        self._writing = threading.Lock()  # held through a commit; only its holder changes memory
        # Held while memory changes, or is read; one lock is enough if no commit takes long.
        self._memory = threading.Lock() if self._journal else self._writing
        self._combiner.reset()

    def now(self) -> float:
        """Return its own time, in seconds."""
        return time.monotonic() - self._born if self._clock is None else self._clock()

    def stop(self) -> None:
        """Wait for the commit under way, and prevent any later one."""
        self._writing.acquire()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of counters, clients and idempotency keys."""
        return len(self._counters), len(self.remembered.records), len(self._keys)

    def show(self, to: Callable[[Contents], None]) -> Contents:
        """Call `to` with the contents, while no thread writes; return them."""
        with self._writing:
            contents = Contents(self._counters, self.remembered.records, self._keys)
            to(contents)
            return contents

    def copied(self) -> Contents:
        """Return a copy of the counters and the keys, as they are at one moment."""
        with self._writing:
            copy = Contents(dict(self._counters), keys=dict(self._keys))
        return copy.without_expired(self.now())

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        """Execute `batch`, or repeat its answer; see `Store.apply`. A batch of reads never waits for a commit."""
        if batch.sequence == 0:
            nothing = Changes(0.0)
            with self._memory:
                return [self._execute(operation, nothing) for operation in batch.operations]
        answer = self.perform([batch], deadline)[0] if self._journal is None else self._combiner.join(batch, deadline)
        if isinstance(answer, BatchRefused):
            raise answer
        return answer

    def perform(self, batches: list[Batch], _deadline: float = inf) -> list[Answer]:
        """Apply batches of writes, in order, in one commit; return the results of each, or its refusal.

        If the disk takes no writes, every write is refused, and reads continue.
        """
        with self._writing:
            try:
                changes = Changes(self.now())
                if changes.now >= self._next_forgetting:
                    self._forget(changes)  # first, so that it makes room on the disk
                answers = []
                for batch in batches:
                    answers.append(self.answer(batch, changes))
                    self.operations += len(batch.operations)
                if self._journal is None:
                    self._merge(changes)
                else:
                    try:
                        self._journal.commit(changes)
                    except StorageFull as error:
                        changes = Changes(changes.now)
                        # Memory keeps these answers too: a refused batch is refused again when it is resent.
                        refusal = Refusal("storage_full", str(error))
                        answers = [self.answer(batch, changes, refusal) for batch in batches]
                    with self._memory:
                        self._merge(changes)
                self.commits += 1
                self.batches += len(batches)
            except BaseException as error:  # noqa: BLE001 - refusals are returned; after any other error memory may differ
                self._fail(error)
        return answers

    def answer(self, batch: Batch, changes: Changes, refusal: Refusal | None = None) -> Answer:
        """Execute one batch on the overlay `changes`, by the rule of sequences.

        :param refusal: the result of each write, if writes are refused.
        """
        answered = self.remembered.answer(batch, changes)
        if answered is not None:
            return answered
        turned_away = self.remembered.admit(batch.client, changes) if batch.sequence == 1 else None
        refusal = refusal or turned_away
        results: list[Result] = []
        for operation in batch.operations:
            if refusal is not None and not isinstance(operation, READS):
                results.append(self._known_result(operation, changes) or refusal)
            elif type(operation) is Increment:  # nearly always
                results.append(self._increment(operation, changes))
            else:
                results.append(self._execute(operation, changes))
        if turned_away is None:
            self.remembered.remember(batch, results, changes)
        return results

    def _execute(self, operation: Operation, changes: Changes) -> Result:
        match operation:
            case Get():
                return self._value(operation.name, changes)
            case Set(name, value):
                if self._value(name, changes) is None:
                    if len(self._counters) + changes.more_counters >= self._most_counters:
                        return no_room("counter", self._most_counters, "counters")
                    changes.more_counters += 1
                changes.counters[name] = value
                return value
            case Keep():
                return self._keep(operation, changes)
            case Delete(name):
                existed = self._value(name, changes) is not None
                if existed:
                    changes.counters[name] = None
                    changes.more_counters -= 1
                return existed
            case Scan(after, limit):
                names = self._names.irange(minimum=after or None, inclusive=(False, True))
                found = [(name, self._counters[name]) for name in islice(names, limit + 1)]
                return Page(found[:limit], more=len(found) > limit)
            case _:
                return Refusal("unsupported", "counters have no methods")

    def _value(self, name: str, changes: Changes) -> int | None:
        return changes.counters[name] if name in changes.counters else self._counters.get(name)

    def _increment(self, operation: Increment, changes: Changes) -> Result:
        name, key = operation.name, operation.key
        if key is not None and (known := self._known_result(operation, changes)) is not None:
            return known
        there = self._value(name, changes)
        value = (there or 0) + operation.by
        if operation.minimum is not None or operation.maximum is not None or not SMALLEST <= value <= LARGEST:
            refusal = beyond_bounds(operation, there or 0)
            if refusal is not None:
                return refusal
        if there is None and len(self._counters) + changes.more_counters >= self._most_counters:
            return no_room("counter", self._most_counters, "counters")
        if key is not None:
            refusal = self._remember_key(key, operation.fingerprint(), value, changes)
            if refusal is not None:
                return refusal
        if there is None:
            changes.more_counters += 1
        changes.counters[name] = value
        return value

    def _keep(self, operation: Keep, changes: Changes) -> Result:
        known = self._known_key(operation.key, changes)
        if known is not None and known[:2] == (operation.fingerprint, operation.value):
            return operation.value
        if known is not None and not operation.overwrite:
            return KEY_REUSED
        refusal = self._remember_key(operation.key, operation.fingerprint, operation.value, changes)
        return refusal or operation.value

    def _remember_key(self, key: str, fingerprint: bytes, value: int, changes: Changes) -> Refusal | None:
        """Add an idempotency key, in place of an expired record if it has one; return a refusal if there is no room."""
        if key not in changes.keys and key not in self._keys:
            if len(self._keys) + changes.more_keys >= self._most_keys:
                return no_room("idempotency key", self._most_keys, "keys")
            changes.more_keys += 1
        changes.keys[key] = KeyRecord(fingerprint, value, changes.now)
        return None

    def _known_key(self, key: str, changes: Changes) -> KeyRecord | None:
        known = changes.keys.get(key) or self._keys.get(key)
        return None if known is None or known.used <= changes.now - KEY_LIFETIME else known

    def _known_result(self, operation: Operation, changes: Changes) -> Replayed | Refusal | None:
        """Return the result that the operation's idempotency key has, if any. This works even on a full disk."""
        if not isinstance(operation, Increment) or operation.key is None:
            return None
        known = self._known_key(operation.key, changes)
        if known is None:
            return None
        return Replayed(known.value) if known.fingerprint == operation.fingerprint() else KEY_REUSED

    def _forget(self, changes: Changes) -> None:
        """Add the removal of expired records: they stand in the order of their last use."""
        self._next_forgetting = changes.now + _FORGET_EVERY
        more = self.remembered.forget(changes)
        keys = _expired(self._keys, changes.now - KEY_LIFETIME)
        changes.keys.update(dict.fromkeys(keys))
        if more or len(keys) == _FORGET_AT_ONCE:
            self._next_forgetting = changes.now  # the next commit removes more

    def _merge(self, changes: Changes) -> None:
        for name, value in changes.counters.items():
            if value is None:
                if self._counters.pop(name, None) is not None:
                    self._names.remove(name)
            else:
                if name not in self._counters:
                    self._names.add(name)
                self._counters[name] = value
        self.remembered.merge(changes)
        if changes.keys:
            _merge(self._keys, changes.keys)


Name = TypeVar("Name", str, bytes)
Record = TypeVar("Record", ClientRecord, KeyRecord)


def _merge(records: dict[Name, Record], changes: Mapping[Name, Record | None]) -> None:
    for name, record in changes.items():
        records.pop(name, None)  # to the end: records are in the order of their last use
        if record is not None:
            records[name] = record


def _expired(records: Mapping[Name, ClientRecord | KeyRecord], before: float) -> list[Name]:
    """Return the first records that were last used before a time, at most as many as one commit should remove."""
    expired = takewhile(lambda item: item[1].used <= before, records.items())
    return [name for name, _ in islice(expired, _FORGET_AT_ONCE)]
