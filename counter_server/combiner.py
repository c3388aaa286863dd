"""Threads that wait at the same time share one call.

The first thread to come becomes the leader and calls at once, alone; those that come while it is
away go together in the next call, led by the first of them. A lone thread never waits for company.
The idea is that of flat combining (Hendler, Incze, Shavit, Tzafrir, 2010) and of group commit.

The same class stands at both ends: in a worker its items are operations and the call is one round
trip; in the manager its items are batches and the call is one durable commit.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from math import inf
from typing import Generic, TypeVar

from .errors import DeadlineExceeded

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LOOK_SECONDS = 0.5  # between looks of a waiting thread at whether its leader has left


class _Ticket(Generic[Item, Answer]):
    """One waiting thread. All of it is written under the combiner's lock, or by the leader alone."""

    __slots__ = ("answer", "done", "error", "heir", "item", "left", "successor", "turn")

    answer: Answer

    def __init__(self, item: Item) -> None:
        self.item = item
        self.turn: threading.Lock | None = None  # held until this thread is done or is to lead
        self.done = False
        self.left = False  # its thread has gone: nobody waits for the answer
        self.heir: _Ticket[Item, Answer] | None = None  # leads after it; its thread is to wake it
        self.successor: _Ticket[Item, Answer] | None = None  # is done; its thread is to wake it in turn
        self.error: BaseException | None = None


class _Call(Generic[Item, Answer]):
    """The tickets of one call, and their items as the callee sees them."""

    __slots__ = ("error", "items", "tickets")

    def __init__(self, tickets: list[_Ticket[Item, Answer]]) -> None:
        self.tickets = tickets
        self.items = [ticket.item for ticket in tickets]
        self.error: Exception | None = None  # how it ended; then it is not made again


class Combiner(Generic[Item, Answer]):
    """Gathers the items of waiting threads into calls, one call at a time.

    :param call: takes the items and the leader's deadline (`time.monotonic` seconds) and returns one
        answer for each item, in their order. What it raises goes to every thread of that call, except:
        `DeadlineExceeded`, or what is not an `Exception` (`KeyboardInterrupt`), ends only the leader's
        part. Then another thread of the call leads on: with the *same list object* if the call may have
        been sent, so that the callee can tell a call resumed from a new one. (An interrupt may also come
        after the call has returned: the callee answers a list that it has finished as it did before.)
    :param limit: the most items in a call.
    :param together: have the next call begin when the threads of the last one are all awake, so that those who come
        straight back are in it. For calls that take longer than to wake their threads; before a short call, half of
        the threads are better woken while the other half is away.
    """

    def __init__(
        self, call: Callable[[list[Item], float], Sequence[Answer]], *, limit: int, together: bool = False
    ) -> None:
        self._call = call
        self._limit = limit
        self._together = together
        self.reset()

    def reset(self) -> None:
        """Forget every thread and call: for the child of a fork, where none of them exists."""
        self._lock = threading.Lock()  # guards all below, and the tickets
        self._leader: _Ticket[Item, Answer] | None = None  # makes the calls, or is about to
        self._waiting: deque[_Ticket[Item, Answer]] = deque()
        self._unfinished: _Call[Item, Answer] | None = None

    def submit(self, item: Item, deadline: float = inf) -> Answer:
        """Have `item` be part of a call, and return its answer.

        :param deadline: in `time.monotonic` seconds. Past it, an item not yet part of a call is withdrawn.
        :raises DeadlineExceeded: with the outcome ``"not_applied"`` if withdrawn, else ``"unknown"``.
        """
        ticket: _Ticket[Item, Answer] = _Ticket(item)
        try:
            with self._lock:
                self._replace_leader_that_left()
                if self._leader is None:  # then no thread waits either
                    call = _Call([ticket])
                    self._leader = ticket
                    self._unfinished = call
                else:
                    ticket.turn = threading.Lock()
                    ticket.turn.acquire()
                    self._waiting.append(ticket)
            if ticket.turn is not None:
                self._wait(ticket, ticket.turn, deadline)
            if self._leader is ticket and not ticket.done:
                self._lead(ticket, deadline)
            if self._leader is ticket:
                self._step_down(ticket)
        except BaseException:
            # First, and without a call, so that no interrupt comes before it. If one ends the rest, the threads that
            # wait and the next one that comes see this mark and go on without this thread.
            ticket.left = True
            self._leave(ticket)
            raise
        finally:
            # No call before a release: an interrupt comes after a call, and then the other one is still made.
            try:
                if ticket.heir is not None and ticket.heir.turn is not None:
                    ticket.heir.turn.release()
            finally:
                if ticket.successor is not None and ticket.successor.turn is not None:
                    ticket.successor.turn.release()
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _wait(self, ticket: _Ticket[Item, Answer], turn: threading.Lock, deadline: float) -> None:
        """Return when the ticket is done or leads.

        Its turn is released when that happens, unless interrupts have ended the thread that was to do it: so it looks
        by itself now and then.
        """
        while True:
            remaining = deadline - time.monotonic()
            if remaining > 0 and turn.acquire(timeout=min(remaining, _LOOK_SECONDS)):
                return
            with self._lock:
                if ticket.done:
                    return
                if remaining > _LOOK_SECONDS:
                    self._replace_leader_that_left()
                    if self._leader is ticket:
                        return
                    continue
                if ticket not in self._waiting:
                    raise DeadlineExceeded(
                        "no answer before the deadline; it may have been applied, at most once", "unknown"
                    )
                self._waiting.remove(ticket)  # under the same lock: a moment later a leader would take it along
                raise DeadlineExceeded("not sent before the deadline: earlier calls were still waiting", "not_applied")

    def _lead(self, ticket: _Ticket[Item, Answer], deadline: float) -> None:
        """Make the unfinished call, or one of all that wait now, and give its threads their answers."""
        call = self._unfinished
        if call is None:
            with self._lock:
                call = _Call(list(islice(self._waiting, self._limit)))
                others = deque(islice(self._waiting, len(call.items), None))
                self._unfinished, self._waiting = call, others  # at once: no interrupt loses a thread in between
        if call.error is None:
            self._make(call, ticket, deadline)
        if call.error is not None:
            for member in call.tickets:
                member.error = call.error
        self._finish(call, ticket)

    def _make(self, call: _Call[Item, Answer], ticket: _Ticket[Item, Answer], deadline: float) -> None:
        try:
            answers = self._call(call.items, deadline)
            if len(answers) != len(call.items):
                raise RuntimeError(f"{len(answers)} answers to {len(call.items)} items")
        except DeadlineExceeded as error:
            if error.outcome == "not_applied":
                self._disband(call, ticket)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, all threads of the call are told
            call.error = error
        else:
            for member, answer in zip(call.tickets, answers, strict=True):
                member.answer = answer

    def _finish(self, call: _Call[Item, Answer], leader: _Ticket[Item, Answer]) -> None:
        """Wake the threads of this call, which has its answers.

        They wake in a chain, each the one after it: all at once they would only queue for the interpreter's
        lock, and be put to sleep a second time (a fifth of the throughput, at 16 threads).
        """
        with self._lock:
            last = leader
            for member in call.tickets:
                if member is not leader and not member.left and not member.done:
                    last.successor = member
                    last = member
                member.done = True
            # Not before: an interrupted leader's heir finishes with the rest. And without a call in between, so
            # without an interrupt.
            self._unfinished = None
            if self._together:
                self._leader = last

    def _step_down(self, ticket: _Ticket[Item, Answer]) -> None:
        """Hand over to the thread that has waited longest."""
        with self._lock:
            self._pass_on(ticket)

    def _disband(self, call: _Call[Item, Answer], leader: _Ticket[Item, Answer]) -> None:
        """The call never left: put its other threads back at the head of the queue."""
        with self._lock:
            waiting = deque([member for member in call.tickets if member is not leader and not member.left])
            waiting.extend(self._waiting)
            self._unfinished, self._waiting = None, waiting

    def _leave(self, ticket: _Ticket[Item, Answer]) -> None:
        """Withdraw a thread that goes without an answer, and hand over if it leads."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if self._leader is ticket:
                self._pass_on(ticket)

    def _replace_leader_that_left(self) -> None:
        """Name another leader where the last one was interrupted before it could. Called with the lock held."""
        if self._leader is not None and self._leader.left:
            self._pass_on(self._leader)

    def _pass_on(self, leader: _Ticket[Item, Answer]) -> None:
        """Name the next leader, if anybody waits; the last one is to wake it. Called with the lock held."""
        heir: _Ticket[Item, Answer] | None = None
        if self._unfinished is not None:
            for member in self._unfinished.tickets:  # no generator: an interrupt could strike inside it
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
        # From here on without a call, and so without an interrupt: there is always one leader, or none.
        leader.heir = heir
        self._leader = heir
