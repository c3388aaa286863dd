"""Let threads that wait at the same time share one call.

The first thread becomes the leader and calls at once, alone. Threads that arrive during that call go together in the
next one, and the first of them leads it. A lone thread never waits for company. The idea comes from flat combining
(Hendler, Incze, Shavit, Tzafrir, 2010) and from group commit.

Both ends use this class. In a worker the items are operations and a call is one round trip. In the manager the items
are batches and a call is one durable commit.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from .errors import DeadlineExceeded

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Answers = TypeVar("Answers", covariant=True)

_LOOK_SECONDS = 0.5  # between the checks of a waiting thread whether its leader has left


class Callee(Protocol[Item, Answers]):
    """Makes shared calls."""

    def perform(self, items: list[Item], deadline: float, /) -> Sequence[Answers]:
        """Return one answer for each item, in order, before the leader's deadline (in `time.monotonic` seconds).

        The same list object again means the same call again: another thread resumes it. If the call has finished, it
        must return the same answers. `DeadlineExceeded` ends only the leader's part.
        """
        ...


class _Ticket(Struct, Generic[Item, Answer], eq=False):
    """One waiting thread. Only the leader, or a holder of the combiner's lock, writes to it."""

    item: Item
    turn: Any = None  # a lock, released when the thread is done or leads
    done: bool = False
    left: bool = False  # the thread has gone, so it needs no answer
    heir: "_Ticket[Item, Answer] | None" = None  # leads after this thread, which must wake it
    successor: "_Ticket[Item, Answer] | None" = None  # is done, and this thread must wake it
    error: BaseException | None = None
    answer: Any = None


class _Call(Struct, Generic[Item, Answer], eq=False):
    tickets: list[_Ticket[Item, Answer]]
    items: list[Item]
    error: Exception | None = None  # if the call has failed; then it is not made again


class Combiner(Generic[Item, Answer]):
    """Gathers the items of waiting threads into calls, one call at a time.

    Every thread of a call gets the exception that the call raises, with two exceptions: `DeadlineExceeded`, and
    anything that is not an `Exception` (`KeyboardInterrupt`), ends only the leader's part. Then another thread of the
    call leads it, with the same list object if the call may have been sent.

    :param callee: makes the calls.
    :param limit: the maximum number of items in a call.
    :ivar together: start the next call when all threads of the last one are awake, so that threads that come straight
        back are in it. This suits calls that take longer than waking threads. For short calls it is better to wake half
        of the threads while the other half is being served. It may change at any time; at first it is False.
    """

    def __init__(self, callee: Callee[Item, Answer], *, limit: int) -> None:
        self._callee = callee
        self._limit = limit
        self.together = False
        self.reset()

    def reset(self) -> None:
        """Forget every thread and call: in the child of a fork, none of them exists."""
        self._lock = threading.Lock()  # guards everything below, and the tickets
        self._leader: _Ticket[Item, Answer] | None = None  # makes the calls, or is about to
        self._waiting: deque[_Ticket[Item, Answer]] = deque()
        self._unfinished: _Call[Item, Answer] | None = None

    def join(self, item: Item, deadline: float = inf) -> Answer:
        """Make `item` part of a call, and return its answer.

        :param deadline: in `time.monotonic` seconds. After it, an item that is not yet part of a call is withdrawn.
        :raises DeadlineExceeded: with the outcome ``"not_applied"`` if withdrawn, else ``"unknown"``.
        """
        ticket: _Ticket[Item, Answer] = _Ticket(item)
        try:
            with self._lock:
                if self._leader is not None and self._leader.left:
                    self._pass_on(self._leader)
                if self._leader is None:  # then no thread waits either
                    call = _Call([ticket], [item])
                    self._leader = ticket
                    self._unfinished = call
                else:
                    ticket.turn = threading.Lock()
                    ticket.turn.acquire()
                    self._waiting.append(ticket)
            if ticket.turn is not None:
                self._wait(ticket, ticket.turn, deadline)
            if self._leader is ticket:
                if ticket.done:
                    with self._lock:
                        self._pass_on(ticket)
                else:
                    self._lead(ticket, deadline)
        except BaseException:
            # The mark comes first, and without a call, so no interrupt can precede it. If an interrupt ends the rest,
            # waiting threads and the next arrival see the mark and continue without this thread.
            ticket.left = True
            self._leave(ticket)
            raise
        finally:
            # No call precedes a release: an interrupt strikes after a call, and then the other release still happens.
            try:
                if ticket.heir is not None and ticket.heir.turn is not None:
                    ticket.heir.turn.release()
            finally:
                if ticket.successor is not None and ticket.successor.turn is not None:
                    ticket.successor.turn.release()
        if ticket.error is not None:
            raise ticket.error
        answer: Answer = ticket.answer
        return answer

    def _wait(self, ticket: _Ticket[Item, Answer], turn: threading.Lock, deadline: float) -> None:
        """Return when the ticket is done or leads.

        The thread also checks by itself now and then: interrupts may have ended the thread that should release it.
        """
        while True:
            remaining = deadline - time.monotonic()
            if remaining > 0 and turn.acquire(timeout=min(remaining, _LOOK_SECONDS)):
                return
            with self._lock:
                if ticket.done:
                    return
                if remaining > _LOOK_SECONDS:
                    if self._leader is not None and self._leader.left:
                        self._pass_on(self._leader)
                    if self._leader is ticket:
                        return
                    continue
                if ticket not in self._waiting:
                    raise DeadlineExceeded(
                        "no answer before the deadline; it may have been applied, at most once", "unknown"
                    )
                self._waiting.remove(ticket)  # under the same lock, before a leader can take it along
                raise DeadlineExceeded("not sent before the deadline: earlier calls were still waiting", "not_applied")

    def _lead(self, ticket: _Ticket[Item, Answer], deadline: float) -> None:
        """Make the unfinished call, or one for all waiting threads, and answer its threads."""
        call = self._unfinished or self._gather()
        if call.error is None:
            try:
                answers = self._callee.perform(call.items, deadline)
                if len(answers) != len(call.items):
                    raise RuntimeError(f"{len(answers)} answers to {len(call.items)} items")
            except DeadlineExceeded as error:
                if error.outcome == "not_applied":
                    self._disband(call, ticket)
                raise
            except Exception as error:  # noqa: BLE001 - every thread of the call gets it
                call.error = error
            else:
                for index, member in enumerate(call.tickets):
                    member.answer = answers[index]
        if call.error is not None:
            for member in call.tickets:
                member.error = call.error
        self._finish(call, ticket)

    def _gather(self) -> _Call[Item, Answer]:
        """Begin a call for all waiting threads."""
        with self._lock:
            tickets = list(islice(self._waiting, self._limit))
            call = _Call(tickets, [each.item for each in tickets])
            others = deque(islice(self._waiting, len(tickets), None))
            self._unfinished, self._waiting = call, others  # at once, so that no interrupt loses a thread
            return call

    def _finish(self, call: _Call[Item, Answer], ticket: _Ticket[Item, Answer]) -> None:
        """Wake the threads of this call, which has its answers, and hand over.

        The threads wake in a chain, each by the one before. If all woke at once, they would only queue for the
        interpreter's lock and sleep again: that costs a fifth of the throughput with 16 threads.
        """
        with self._lock:
            last = ticket
            for member in call.tickets:
                if member is not ticket and not member.left and not member.done:
                    last.successor = member
                    last = member
                member.done = True
            # Not earlier, so that an interrupted leader's heir finishes the rest. No call stands between these lines,
            # so no interrupt does.
            self._unfinished = None
            if self.together and last is not ticket:
                self._leader = last
            elif self._waiting:
                self._pass_on(ticket)
            else:
                self._leader = None

    def _disband(self, call: _Call[Item, Answer], leader: _Ticket[Item, Answer]) -> None:
        """Put the other threads of a call that was never sent back at the head of the queue."""
        with self._lock:
            waiting = deque([member for member in call.tickets if member is not leader and not member.left])
            waiting.extend(self._waiting)
            self._unfinished, self._waiting = None, waiting

    def _leave(self, ticket: _Ticket[Item, Answer]) -> None:
        """Withdraw a thread that leaves without an answer. If it leads, hand over."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if self._leader is ticket:
                self._pass_on(ticket)

    def _pass_on(self, leader: _Ticket[Item, Answer]) -> None:
        """Make the first thread that waits the leader. Call with the lock held; `leader` must wake its heir."""
        heir: _Ticket[Item, Answer] | None = None
        if self._unfinished is not None:
            for member in self._unfinished.tickets:  # no generator, in which an interrupt could strike
                if not member.left and not member.done:
                    heir = member
                    break
            else:
                self._unfinished = None
        if heir is None:
            for member in self._waiting:
                if not member.left:
                    heir = member
                    break
        # No call from here on, and so no interrupt: there is always one leader, or none.
        leader.heir = heir
        self._leader = heir
