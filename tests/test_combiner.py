"""The combiner: each thread gets its own answer, whichever thread leads, and whatever happens to the leader."""

import dis
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from math import inf
from queue import SimpleQueue
from types import CodeType, FrameType, ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from counter_server import combiner as combiner_module
from counter_server.combiner import Combiner
from counter_server.errors import DeadlineExceeded
from tests.processes import PATIENCE, eventually

UNKNOWN = DeadlineExceeded("late", "unknown")
NOT_APPLIED = DeadlineExceeded("late", "not_applied")


def answers_to(items: Iterable[int]) -> list[str]:
    return [f"answer to {item}" for item in items]


class Visit:
    """One call under way, which ends when and how a test says."""

    def __init__(self, items: list[int], deadline: float) -> None:
        self.items = items
        self.deadline = deadline
        self.thread = threading.current_thread()
        self.ending: SimpleQueue[list[str] | BaseException] = SimpleQueue()

    def answer(self) -> None:
        self.ending.put(answers_to(self.items))


class Submitter(threading.Thread):
    """A thread with one item. It is a daemon: one that hangs fails its test, and not the end of all of them."""

    def __init__(self, combiner: Combiner[int, str], item: int, deadline: float = inf) -> None:
        super().__init__(daemon=True)
        self._submit = partial(combiner.join, item, deadline)
        self._outcome: str | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._submit()
        except BaseException as error:  # noqa: BLE001 - an interrupt is one of the outcomes
            self._outcome = error

    def outcome(self) -> str | BaseException | None:
        """Return the answer or the error; None if there is neither in time."""
        self.join(PATIENCE)
        return self._outcome

    def late(self) -> str:
        """Return the outcome that its exceeded deadline reports."""
        error = self.outcome()
        assert isinstance(error, DeadlineExceeded), error
        return error.outcome


class Guarded(deque[Any]):
    def __init__(self, items: Iterable[Any], lock: threading.Lock) -> None:
        super().__init__(items)
        self._lock = lock

    def append(self, item: Any) -> None:
        assert self._lock.locked()
        super().append(item)

    def remove(self, item: Any) -> None:
        assert self._lock.locked()
        super().remove(item)


class CheckedCombiner(Combiner[int, str]):
    """Fails if anything that the lock guards changes without it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_leader", "_unfinished", "_waiting") and name in self.__dict__:
            assert self._lock.locked(), name
        super().__setattr__(name, Guarded(value, self._lock) if name == "_waiting" else value)


class Scene:
    """A combiner whose first call is under way, by a thread with item 0, and threads that come one after the other."""

    def __init__(self, *, limit: int = 100, together: bool = False) -> None:
        self.begins: SimpleQueue[Visit] = SimpleQueue()
        self.combiner = CheckedCombiner(self, limit=limit)
        self.combiner.together = together
        self.first = Submitter(self.combiner, 0)
        self.visit = self.begun()

    def perform(self, items: list[int], deadline: float, /) -> list[str]:
        visit = Visit(items, deadline)
        self.begins.put(visit)
        ending = visit.ending.get(timeout=PATIENCE)
        if isinstance(ending, BaseException):
            raise ending
        return ending

    def begun(self) -> Visit:
        """Wait for the next call."""
        return self.begins.get(timeout=PATIENCE)

    def come(self, *items: int, deadline: float = inf) -> list[Submitter]:
        """Start threads that wait, in this order. Nothing outside shows that they wait, so this looks inside."""
        submitters = []
        for item in items:
            count = len(self.combiner._waiting) + 1
            submitters.append(Submitter(self.combiner, item, deadline))
            eventually(lambda count=count: len(self.combiner._waiting) == count, "a waiting thread")  # type: ignore[misc]
        return submitters

    def next_call(self) -> Visit:
        """End the first call, and see the next one begin."""
        self.visit.answer()
        self.visit = self.begun()
        return self.visit

    def still_works(self) -> bool:
        """Return whether a thread that comes now, alone, gets its answer at once."""
        late_comer = Submitter(self.combiner, 999)
        visit = self.begun()
        visit.answer()
        is_right = visit.items == [999] and late_comer.outcome() == "answer to 999"
        return is_right and not (self.combiner._unfinished or self.combiner._leader or self.combiner._waiting)


@pytest.fixture(autouse=True)
def _no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads wait for ever, so that one which nobody wakes does not help itself."""
    monkeypatch.setattr(combiner_module, "_LOOK_SECONDS", 1000.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the time of the combiner, which waiting threads look at often: deadlines pass when a test says."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(combiner_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(combiner_module, "_LOOK_SECONDS", 0.01)
    return clock


def test_the_first_waiting_thread_leads_up_to_the_limit_with_its_own_deadline() -> None:
    """And the first thread of all, which is alone, calls at once."""
    scene = Scene(limit=3)
    assert (scene.visit.thread, scene.visit.items, scene.visit.deadline) == (scene.first, [0], inf)
    soon = time.monotonic() + 1000
    waiting = [scene.come(item, deadline=soon + item)[0] for item in range(1, 8)]
    for expected in ([1, 2, 3], [4, 5, 6], [7]):
        visit, leader = scene.next_call(), expected[0]
        assert (visit.thread, visit.items, visit.deadline) == (waiting[leader - 1], expected, soon + leader)
    scene.visit.answer()
    assert [thread.outcome() for thread in (scene.first, *waiting)] == answers_to(range(8))


@pytest.mark.parametrize("together", [False, True])
def test_threads_that_come_straight_back_share_a_call_if_together(*, together: bool) -> None:
    """Threads wake one after the other. Here the last one is not woken before the first one has come back."""
    scene = Scene(together=together)
    woken = threading.Event()
    one, two, three = scene.come(1, 2, 3)
    ticket, turn = scene.combiner._waiting[2], scene.combiner._waiting[2].turn
    ticket.turn = SimpleNamespace(release=lambda: (woken.wait(PATIENCE), turn.release()))
    visit = scene.next_call()
    scene.come(4)
    visit.answer()
    assert one.outcome() == "answer to 1"
    if not together:
        visit = scene.begun()
        assert visit.items == [4]
    scene.come(5)
    assert scene.begins.empty()
    woken.set()
    assert [two.outcome(), three.outcome()] == answers_to([2, 3])
    if not together:
        visit.answer()
    visit = scene.begun()
    assert visit.items == ([4, 5] if together else [5])
    visit.answer()
    assert scene.still_works()


@pytest.mark.parametrize("ending", [ValueError("refused"), [], ["1", "2"], ["1", "2", "3", "4"]], ids=repr)
def test_an_error_reaches_all_threads_of_its_call_and_no_other(ending: Exception | list[str]) -> None:
    """A wrong number of answers is an error too."""
    scene = Scene()
    members = scene.come(1, 2, 3)
    visit = scene.next_call()
    others = scene.come(4, 5)
    visit.ending.put(ending)
    outcomes = [member.outcome() for member in members]
    assert outcomes == [outcomes[0]] * 3
    if isinstance(ending, list):
        assert repr(outcomes[0]) == f"RuntimeError('{len(ending)} answers to 3 items')"
    else:
        assert outcomes[0] is ending
    scene.begun().answer()
    assert [other.outcome() for other in (scene.first, *others)] == answers_to([0, 4, 5])
    assert scene.still_works()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("ending", [None, UNKNOWN, KeyboardInterrupt(), NOT_APPLIED], ids=repr)
def test_another_thread_leads_if_the_leader_cannot(
    ending: BaseException | None, request: pytest.FixtureRequest, *, gone: bool
) -> None:
    """It continues with the same list, unless that was never sent: then the others go first in the next call.

    A thread whose deadline passes meanwhile cannot know the outcome, does not lead, and is not sent again.
    """
    clock = request.getfixturevalue("clock") if gone else None
    scene = Scene()
    one, two, three = *scene.come(1), *scene.come(2, deadline=10.0 if clock else inf), *scene.come(3)
    visit = scene.next_call()
    (four,) = scene.come(4)
    if clock:
        clock.now = 10.0
        assert two.late() == "unknown"
    others = [3] if gone else [2, 3]
    if ending is None:
        visit.answer()
        assert one.outcome() == "answer to 1"
    else:
        visit.ending.put(ending)
        assert one.outcome() is ending
        resumed = scene.begun()
        assert resumed.thread is (three if gone else two)
        assert (resumed.items is visit.items) == (ending is not NOT_APPLIED)
        assert resumed.items == ([*others, 4] if ending is NOT_APPLIED else [1, 2, 3])
        resumed.answer()
    if ending is not NOT_APPLIED:
        following = scene.begun()
        assert following.items == [4]
        following.answer()
    assert [three.outcome(), four.outcome()] == answers_to([3, 4])
    assert gone or two.outcome() == "answer to 2"
    assert scene.still_works()


def test_a_call_whose_leaders_all_give_up_is_abandoned() -> None:
    scene = Scene()
    members = scene.come(1, 2, 3)
    visits = [scene.next_call()]
    (four,) = scene.come(4)
    for member in members:
        visits[-1].ending.put(UNKNOWN)
        assert member.late() == "unknown"
        visits.append(scene.begun())
    assert [visit.items is visits[0].items for visit in visits] == [True, True, True, False]
    assert visits[-1].items == [4]
    visits[-1].answer()
    assert four.outcome() == "answer to 4"
    assert scene.still_works()


def test_an_item_whose_deadline_passes_in_the_queue_is_never_sent(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may begin a call while the thread of the item leaves. To hold it there this looks inside."""
    scene = Scene()
    leave = scene.combiner._leave
    leaving, go_on = threading.Event(), threading.Event()

    def leave_slowly(ticket: Any) -> None:
        leaving.set()
        assert go_on.wait(PATIENCE)
        leave(ticket)

    gone_at_once = Submitter(scene.combiner, 3, deadline=0.0)
    assert gone_at_once.late() == "not_applied"
    one, two = *scene.come(1), *scene.come(2, deadline=10.0)
    monkeypatch.setattr(scene.combiner, "_leave", leave_slowly)
    clock.now = 9.9
    two.join(0.1)
    assert not leaving.is_set()
    clock.now = 10.0
    assert leaving.wait(PATIENCE)
    items = list(scene.next_call().items)
    go_on.set()
    scene.visit.answer()
    assert (two.late(), one.outcome(), items) == ("not_applied", "answer to 1", [1])
    assert scene.still_works()


class PatientLock:
    """Waits for as long as it takes, whatever the time limit, so that a slow machine decides nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release, self.locked = self._lock.release, self._lock.locked

    def acquire(self, timeout: float = -1) -> bool:
        return self._lock.acquire(timeout=PATIENCE if timeout > 0 else timeout)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_thread_waits_until_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combiner_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(combiner_module, "threading", SimpleNamespace(Lock=PatientLock))
    scene = Scene()
    (one,) = scene.come(1, deadline=0.001)
    scene.next_call().answer()
    assert one.outcome() == "answer to 1"


def test_the_item_of_an_interrupted_thread_in_the_queue_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    go_on = threading.Event()

    def interrupted(*_: Any) -> None:
        assert go_on.wait(PATIENCE)
        raise KeyboardInterrupt

    (one,) = scene.come(1)
    monkeypatch.setattr(scene.combiner, "_wait", interrupted)
    (two,) = scene.come(2)
    go_on.set()
    assert isinstance(two.outcome(), KeyboardInterrupt)
    assert scene.next_call().items == [1]
    scene.visit.answer()
    assert one.outcome() == "answer to 1"
    assert scene.still_works()


# Interrupts


@lru_cache
def _moments(code: CodeType) -> frozenset[int]:
    """Where in this code the interpreter looks for signals: after calls, on entry, and where a loop begins again."""
    found: set[int] = set()
    previous = ""
    for instruction in dis.get_instructions(code):
        if previous.startswith("CALL") or previous == "RESUME":
            found.add(instruction.offset)
        if instruction.opname.startswith("JUMP_BACKWARD"):
            assert isinstance(instruction.argval, int)
            found.add(instruction.argval)
        if instruction.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG"):
            previous = instruction.opname
    return frozenset(found)


class InterruptedAt:
    """While it is entered, one KeyboardInterrupt comes to this thread, at the nth moment in `module` when one could.

    `then` is called just before. `place` says where it came, or is None if there were not as many moments.
    """

    def __init__(self, module: ModuleType, moment: int, then: Callable[[], object] = lambda: None) -> None:
        self._file = module.__file__
        self._left = moment
        self._then = then
        self.place: str | None = None

    def __enter__(self) -> "InterruptedAt":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != self._file or self.place is not None:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in _moments(frame.f_code):
            self._left -= 1
            if self._left == 0:
                self.place = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                self._then()
                raise KeyboardInterrupt
        return self._trace


class InterruptedLock:
    """A combiner's lock, which interrupts one thread the next few times that it asks for it."""

    def __init__(self, combiner: Combiner[int, str], times: int) -> None:
        self._lock, self._left, self._thread = combiner._lock, times, threading.get_ident()
        cast(Any, combiner)._lock = self

    def __enter__(self) -> None:
        if self._left and threading.get_ident() == self._thread:
            self._left -= 1
            raise KeyboardInterrupt
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Script:
    """Calls that bring about, on the way, that other threads come; and never execute an item twice.

    :param place: of this thread, in the call that it shares with three others.
    """

    def __init__(self, *, place: int, gives_up: Exception | None, together: bool) -> None:
        self.combiner: Combiner[int, str] = Combiner(self, limit=100)
        self.combiner.together = together
        self.others: list[Submitter] = []
        self.ended = threading.Event()  # the interrupted thread has come back
        self.executed: Counter[int] = Counter()
        self.made_again = False  # a call that had ended with an error, which is as definite as an answer
        self._place = place
        self._gives_up = gives_up
        self._finished: list[int] | None = None
        self._refused: list[int] | None = None
        self._calls = 0
        self._come(0, waiting=0)  # it makes the first call, and returns from it when this thread and others wait
        while self._calls == 0:
            time.sleep(0)
        for item in range(1, place + 1):
            self._come(item, waiting=item)

    def _come(self, item: int, waiting: int) -> None:
        self.others.append(Submitter(self.combiner, item))
        self._wait_for(waiting)

    def _wait_for(self, waiting: int) -> None:
        while len(self.combiner._waiting) < waiting and not self.ended.is_set():
            time.sleep(0)

    def perform(self, items: list[int], _deadline: float, /) -> list[str]:
        if items is self._finished:
            return answers_to(items)
        self.made_again |= items is self._refused
        self._calls += 1
        if self._calls == 1:
            self._wait_for(self._place + 1)
            for item in range(self._place + 1, 4):
                self._come(item, waiting=item + 1)
        if self._calls == 2:
            self._come(4, waiting=1)
            if self._gives_up is not None:
                self._refused = items if isinstance(self._gives_up, ValueError) else None
                raise self._gives_up
        self._finished = items
        self.executed.update(items)
        return answers_to(items)


@pytest.mark.traces_opcodes
@pytest.mark.parametrize("gives_up", [None, ValueError("refused"), UNKNOWN, NOT_APPLIED], ids=repr)
@pytest.mark.parametrize("place", [0, 1, 3], ids=["leader", "follower", "last"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("more", [0, 3], ids=["once", "four times"])
def test_interrupts_leave_nobody_waiting_and_execute_nothing_twice(
    gives_up: Exception | None, place: int, more: int, *, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each moment at which a signal's handler could run, interrupt; and `more` times while the thread leaves."""
    monkeypatch.setattr(combiner_module, "_LOOK_SECONDS", 0.01)
    for moment in range(1, 1000):
        script = Script(place=place, gives_up=gives_up, together=together)
        interrupt = InterruptedAt(combiner_module, moment, partial(InterruptedLock, script.combiner, more))
        answer = ""
        try:
            with interrupt:
                answer = script.combiner.join(100, time.monotonic() + PATIENCE)
        except (KeyboardInterrupt, DeadlineExceeded, ValueError):
            pass
        finally:
            script.ended.set()
        if interrupt.place is None:
            break
        for other in script.others:
            assert isinstance(other.outcome(), str | DeadlineExceeded | ValueError), interrupt.place
        assert Submitter(script.combiner, 999).outcome() == "answer to 999", interrupt.place
        assert answer in ("", "answer to 100")
        assert max(script.executed.values()) == 1, interrupt.place
        assert not script.made_again, interrupt.place
    else:
        pytest.fail("there were more moments than any code should have")
    assert moment > 5


class Unreliable:
    """A call that fails in every way that it may, and counts what it executes."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.executed: Counter[int] = Counter()
        self._busy = threading.Lock()
        self._sent: list[int] = []
        self._done: list[int] = []

    def perform(self, items: list[int], _deadline: float, /) -> list[str]:
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            if items is not self._sent:
                self._fail_perhaps(NOT_APPLIED)
                self._sent = items
            self._fail_perhaps(UNKNOWN, KeyboardInterrupt(), ValueError())
            if items is not self._done:
                time.sleep(self.chance.choice([0, 0, 0.002]))  # the round trip: deadlines pass meanwhile
                self.executed.update(items)
                self._done = items
            self._fail_perhaps(UNKNOWN, KeyboardInterrupt(), ValueError())
            return answers_to(items)
        finally:
            self._busy.release()

    def _fail_perhaps(self, *errors: BaseException) -> None:
        if self.chance.random() < 0.2:
            raise self.chance.choice(errors)


@pytest.mark.parametrize("together", [False, True])
def test_whatever_fails_every_thread_returns_and_nothing_runs_twice(*, together: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    unreliable = Unreliable(seed)
    combiner = CheckedCombiner(unreliable, limit=5)
    combiner.together = together
    outcomes: dict[int, str | BaseException] = {}

    def run(number: int) -> None:
        for item in range(number * 60, number * 60 + 60):
            seconds = unreliable.chance.choice([-0.001, 0.0005, 0.001, 0.002, 0.005, inf])
            try:
                outcomes[item] = combiner.join(item, time.monotonic() + seconds)
            except BaseException as error:  # noqa: BLE001 - an interrupt is one of the outcomes
                outcomes[item] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(outcomes) == 16 * 60, "a thread hangs"
    for item, outcome in outcomes.items():
        times = unreliable.executed[item]
        if isinstance(outcome, str):
            assert (outcome, times) == (f"answer to {item}", 1)
        elif isinstance(outcome, DeadlineExceeded) and outcome.outcome == "not_applied":
            assert times == 0, item
        else:
            assert isinstance(outcome, DeadlineExceeded | KeyboardInterrupt | ValueError), outcome
            assert times <= 1
    assert len({type(outcome) for outcome in outcomes.values()}) == 4
    assert (combiner._unfinished, combiner._leader, list(combiner._waiting)) == (None, None, [])
