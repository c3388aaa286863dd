"""What a user holds: a state, and the counters in it."""

import os
import time
import weakref
from collections.abc import Callable
from typing import Self, TypeVar

from .combiner import Combiner
from .operations import (
    LARGEST_BATCH,
    Delete,
    Get,
    Increment,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
    check_name,
)
from .session import Session
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, StoreOptions, check_deadline
from .stores import Store, open_store

Submit = Callable[[Operation], Result]
Kind = TypeVar("Kind")

_states: "weakref.WeakSet[State]" = weakref.WeakSet()


def open_state(
    url: str, *, deadline: float = DEFAULT_DEADLINE, options: StoreOptions = DEFAULT_STORE_OPTIONS
) -> "State":
    """The shared state at `url`, for any program; in a Flask app, `SharedState` does this.

    :param url: `manager:///absolute/data/directory`, or `memory://` for this process only.
    :param deadline: seconds that each call may take, at most 60.
    :param options: whether and how a manager is started where there is none.
    :raises InvalidRequest: if there is no such store or the deadline is not acceptable.

    It connects at the first call, is safe from any thread, and after a fork.
    """
    return State(open_store(url, options), deadline=deadline)


class State:
    """Counters in one store. All threads of a process share one, and with it their round trips."""

    def __init__(self, store: Store, *, deadline: float = DEFAULT_DEADLINE) -> None:
        self.store = store
        self._deadline = check_deadline(deadline)
        self._session = Session(store)
        self._combiner: Combiner[Operation, Result] = Combiner(self._session.apply, limit=LARGEST_BATCH)
        _states.add(self)

    def counter(self, name: str) -> "Counter":
        """The counter of that name. It exists from its first increment on.

        :raises InvalidRequest: if that cannot be a name.
        """
        return Counter(name, self.submit)

    def counters(self, *, after: str = "", limit: int = 100) -> Page:
        """A page of counters in the order of their names.

        :param after: the last name of the page before.
        :param limit: how many, at most 1000.
        """
        return expect(Page, self.submit(Scan(after, limit)))

    def submit(self, operation: Operation) -> Result:
        """Have one operation applied, exactly once, and return its result.

        :raises CounterServerError: any of its tree; its `outcome` says whether something may have been counted.
        """
        result = self._combiner.submit(operation, time.monotonic() + self._deadline)
        if isinstance(result, Refusal):
            raise result.error()
        return result

    def close(self) -> None:
        """Close the connection to the store. The next call opens it again."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        self._combiner.reset()
        self._session.renew()
        self.store.after_fork()


class Counter:
    """A number that all workers share. Every increment is counted exactly once.

    Each method makes one call to the store, shared with the other threads that wait at the same time, and raises
    `CounterServerError` where it cannot be done.
    """

    def __init__(self, name: str, submit: Submit) -> None:
        check_name(name)
        self.name = name
        self._submit = submit

    def __repr__(self) -> str:
        return f"<Counter {self.name!r}>"

    def increment(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Add `by` and return the result.

        :param by: not 0; negative to count down.
        :param minimum: the result may not be less.
        :param maximum: the result may not be more.
        :param key: an idempotency key: the same key with the same request is answered with the same number
            for 24 hours, and counted once.
        :raises LimitReached: if the result would lie outside the bounds, or outside 64 bits; nothing is changed.
        :raises KeyReused: if the key was used for another request; nothing is changed.
        """
        result = self._submit(Increment(self.name, by, minimum, maximum, key))
        return result.value if isinstance(result, Replayed) else expect(int, result)

    def decrement(
        self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None, key: str | None = None
    ) -> int:
        """Subtract `by` and return the result; all else is as for `increment`."""
        return self.increment(-by, minimum=minimum, maximum=maximum, key=key)

    @property
    def value(self) -> int:
        """The number as it is now; 0 where nothing was counted yet."""
        return expect(int, self._submit(Get(self.name)) or 0)

    def set(self, value: int) -> int:
        """Make it `value`, and return that."""
        return expect(int, self._submit(Set(self.name, value)))

    def delete(self) -> bool:
        """Remove it; whether there was one."""
        return expect(bool, self._submit(Delete(self.name)))


def expect(kind: type[Kind], result: object) -> Kind:
    """`result`, which the store owes as a `kind`."""
    if not isinstance(result, kind):
        raise TypeError(f"the store answered {result!r} where {kind.__name__} was due")
    return result


def _after_fork_in_child() -> None:
    for state in list(_states):
        state._after_fork()


# Also called for `multiprocessing`'s forks, gunicorn's and uWSGI's: they all go through the interpreter.
os.register_at_fork(after_in_child=_after_fork_in_child)
