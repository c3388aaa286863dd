"""What a user holds: a counter, or a shared object. Each call of one is one operation, submitted to the store."""

import builtins
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .errors import RemoteError, StateLost
from .operations import (
    Delete,
    Get,
    Increment,
    Invoke,
    Operation,
    Raised,
    Replayed,
    Result,
    Returned,
    Set,
    check_name,
    check_step,
    decode_plain,
    encode_plain,
)

log = logging.getLogger(__name__)

Submit = Callable[[Operation], Result]
Kind = TypeVar("Kind")

_MOST_LOSSES = 10  # in a row that a forgetful handle forgives: a manager that is killed each time is told


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
        check_step(by, minimum, maximum)  # before its sign is changed: -True is an int
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


class SharedObject:
    """A handle on a shared object: a public method of it is a method of this."""

    _name: str
    _cls: type
    _invoke: Callable[[str, Invoke], Result]

    def __init__(self, name: str, cls: type, invoke: Callable[[str, Invoke], Result]) -> None:
        vars(self).update(_name=name, _cls=cls, _invoke=invoke)

    def __repr__(self) -> str:
        return f"<SharedObject {self._name!r}>"

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not callable(getattr(self._cls, method, None)):
            raise AttributeError(f"only public methods of {self._cls.__qualname__} are shared, not {method!r}")

        def call(*arguments: Any, **keywords: Any) -> Any:
            packed = encode_plain((arguments, keywords), f"the arguments of {self._name}.{method}")
            return _answer(self._invoke(self._name, Invoke(method, packed)))

        call.__name__ = method
        return call

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{name!r} would be set here and nowhere else: {self._cls.__qualname__} needs a method for it"
        )


def forgetful(handle: Kind) -> Kind:
    """A handle on the same shared object that forgives its loss: for a cache, one lost with its manager is empty."""
    if not isinstance(handle, SharedObject):
        raise TypeError(f"{handle!r} is no shared object")
    invoke = handle._invoke

    def invoke_again(name: str, operation: Invoke) -> Result:
        for _ in range(_MOST_LOSSES):
            try:
                return invoke(name, operation)
            except StateLost as lost:
                log.info("%s", lost)
        return invoke(name, operation)

    return cast(Kind, SharedObject(handle._name, handle._cls, invoke_again))


def _answer(result: Result) -> Any:
    """What a method returned; or its exception, in its own type where that is built in."""
    if isinstance(result, Returned):
        return decode_plain(result.value)
    raised = expect(Raised, result)
    if raised.arguments is None:
        raise RemoteError(raised.name, raised.text, raised.traceback)
    kind = getattr(builtins, raised.name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise RemoteError(raised.name, raised.text, raised.traceback)
    try:
        error = kind(*decode_plain(raised.arguments))
    except Exception:  # noqa: BLE001 - of a type that wants other arguments than it has itself
        raise RemoteError(raised.name, raised.text, raised.traceback) from None
    error.add_note(f"Raised in the manager process:\n{raised.traceback}")
    raise error


def expect(kind: type[Kind], result: object) -> Kind:
    """`result`, which the store owes as a `kind`."""
    if not isinstance(result, kind):
        raise TypeError(f"the store answered {result!r} where {kind.__name__} was due")
    return result
