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
from math import inf
from typing import Generic, TypeVar

from .errors import DeadlineExceeded

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LONGEST_WAIT = threading.TIMEOUT_MAX


class _Ticket(Generic[Item, Answer]):
    """One waiting thread. All of it is written under the combiner's lock, or by the leader alone."""

    __slots__ = ("answer", "done", "error", "item", "leads", "left", "successor", "taken", "turn")

    answer: Answer

    def __init__(self, item: Item) -> None:
        self.item = item
        self.turn: threading.Lock | None = None  # held until this thread is done or is to lead
        self.taken = False  # it is part of a call; a flag, as a reference would be a cycle for the collector to find
        self.leads = False
        self.done = False
        self.left = False  # its thread has gone: nobody waits for the answer
        self.successor: _Ticket[Item, Answer] | None = None  # that its thread is to wake in turn
        self.error: BaseException | None = None


class _Call(Generic[Item, Answer]):
    """The tickets of one call, and their items as the callee sees them."""

    __slots__ = ("items", "tickets")

    def __init__(self, tickets: list[_Ticket[Item, Answer]]) -> None:
        self.tickets = tickets
        self.items = [ticket.item for ticket in tickets]
        for ticket in tickets:
            ticket.taken = True


class Combiner(Generic[Item, Answer]):
    """Gathers the items of waiting threads into calls, one call at a time.

    :param call: takes the items and the leader's deadline (`time.monotonic` seconds) and returns one
        answer for each item, in their order. What it raises goes to every thread of that call, except:
        `DeadlineExceeded`, or what is not an `Exception` (`KeyboardInterrupt`), ends only the leader's
        part. Then another thread of the call leads on: with the *same list object* if the call may have
        been sent, so that the callee can tell a call resumed from a new one. (An interrupt may also come
        after the call has returned: the callee answers a list that it has finished as it did before.)
    :param limit: the most items in a call.
    """

    def __init__(self, call: Callable[[list[Item], float], Sequence[Answer]], *, limit: int) -> None:
        self._call = call
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget every thread and call: for the child of a fork, where none of them exists."""
        self._lock = threading.Lock()  # guards all below, and the tickets
        self._led = False  # some thread leads, or has been told to
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
                if self._led:
                    ticket.turn = threading.Lock()
                    ticket.turn.acquire()
                    self._waiting.append(ticket)
                else:  # then nobody waits either
                    ticket.leads = True  # before _led: interrupted in between, _leave mends it
                    self._led = True
                    self._unfinished = _Call([ticket])
            if ticket.turn is not None:
                self._wait(ticket, ticket.turn, deadline)
            if ticket.leads:
                self._lead(ticket, deadline)
        except BaseException:
            self._leave(ticket)
            raise
        finally:
            if ticket.successor is not None:
                _wake(ticket.successor)
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _wait(self, ticket: _Ticket[Item, Answer], turn: threading.Lock, deadline: float) -> None:
        """Return when the ticket is done or leads."""
        seconds = min(deadline - time.monotonic(), _LONGEST_WAIT)
        if (seconds > 0 and turn.acquire(timeout=seconds)) or ticket.done:
            return
        with self._lock:
            if ticket.done:
                return
            if ticket.taken:
                raise DeadlineExceeded(
                    "no answer before the deadline; it may have been applied, at most once", "unknown"
                )
            raise DeadlineExceeded("not sent before the deadline: earlier calls were still waiting", "not_applied")

    def _lead(self, ticket: _Ticket[Item, Answer], deadline: float) -> None:
        """Make the unfinished call, or one of all that wait now, and give its threads their answers."""
        call = self._unfinished
        if call is None:
            with self._lock:
                count = min(len(self._waiting), self._limit)
                call = self._unfinished = _Call([self._waiting.popleft() for _ in range(count)])
        try:
            answers = self._call(call.items, deadline)
            if len(answers) != len(call.items):
                raise RuntimeError(f"{len(answers)} answers to {len(call.items)} items")
        except DeadlineExceeded as error:
            if error.outcome == "not_applied":
                self._disband(call, ticket)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, all threads of the call are told
            for member in call.tickets:
                member.error = error
        else:
            for member, answer in zip(call.tickets, answers, strict=True):
                member.answer = answer
        self._finish(call, ticket)

    def _finish(self, call: _Call[Item, Answer], leader: _Ticket[Item, Answer]) -> None:
        """Have the next leader go first, then the threads of this call, which has its answers.

        They wake in a chain, each the one after it: all at once they would only queue for the interpreter's
        lock, and be put to sleep a second time (a fifth of the throughput, at 16 threads).
        """
        with self._lock:
            self._unfinished = None
            last = leader
            for member in call.tickets:
                member.done = True
                if member is not leader and not member.left:
                    last.successor = member
                    last = member
            leader.leads = False
            self._pass_on()

    def _disband(self, call: _Call[Item, Answer], leader: _Ticket[Item, Answer]) -> None:
        """The call never left: put its other threads back at the head of the queue."""
        with self._lock:
            self._unfinished = None
            for member in reversed(call.tickets):
                if member is not leader and not member.left:
                    member.taken = False
                    self._waiting.appendleft(member)

    def _leave(self, ticket: _Ticket[Item, Answer]) -> None:
        """This thread goes without an answer: withdraw what can be, and let nobody wait for it."""
        with self._lock:
            ticket.left = True
            if not ticket.taken and ticket in self._waiting:
                self._waiting.remove(ticket)
            if ticket.leads:
                ticket.leads = False
                self._pass_on()

    def _pass_on(self) -> None:
        """Name the next leader, if anybody waits. Called with the lock held, by the last one."""
        heir: _Ticket[Item, Answer] | None = None
        if self._unfinished is not None:
            heir = next((t for t in self._unfinished.tickets if not t.left and not t.done), None)
            if heir is None:
                self._unfinished = None
        if heir is None and self._waiting:
            heir = self._waiting[0]
        if heir is None:
            self._led = False
        else:
            heir.leads = True
            _wake(heir)


def _wake(ticket: _Ticket[Item, Answer]) -> None:
    if ticket.turn is not None:
        ticket.turn.release()
