"""Per-visitor counters: a number for each browser, kept by the manager, not in a pickled session."""

import secrets
from typing import cast

from flask import session

from .dicts import BoundedDict, check_ttl, within_bounds
from .operations import check_step

DEFAULT_TTL = 24 * 3600.0  # seconds without use after which a visitor's number is forgotten
_SESSION_KEY = "_counter_server_visitor"


class VisitorCounter:
    """A number of the current visitor's own, told by an opaque id in Flask's signed session cookie.

    Two browsers never share one, and two tabs of one browser lose no update: the number is not in the cookie. A browser
    has its id from the first response on for which a method of this was called, and `value` is one.

    :param hosted: a handle on the numbers of all visitors, by id.
    :param ttl: seconds without use after which a number is forgotten.
    """

    def __init__(self, name: str, hosted: BoundedDict, ttl: float) -> None:
        self.name = name
        self._hosted = hosted
        self._ttl = check_ttl(ttl)

    def __repr__(self) -> str:
        return f"<VisitorCounter {self.name!r}>"

    def increment(self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None) -> int:
        """Add `by` and return the result.

        :param by: negative to count down.
        :param minimum: the result may not be less.
        :param maximum: the result may not be more.
        :raises LimitReached: if the result would lie outside the bounds; nothing is changed.
        """
        check_step(by, minimum, maximum)
        number = self._hosted.incr(_visitor(), by, self._ttl, minimum, maximum, renew=True)
        return cast(int, within_bounds(number, self.name))

    def decrement(self, by: int = 1, *, minimum: int | None = None, maximum: int | None = None) -> int:
        """Subtract `by` and return the result; all else is as for `increment`."""
        check_step(by, minimum, maximum)  # before the sign is changed: -True is an int
        return self.increment(-by, minimum=minimum, maximum=maximum)

    @property
    def value(self) -> int:
        """The number as it is now; 0 where this visitor has counted nothing, or not for long."""
        return cast(int, self._hosted.renew(_visitor(), 0, self._ttl))

    def reset(self) -> None:
        """Begin at 0 again."""
        self._hosted.delete(_visitor())


def _visitor() -> str:
    """The id of the one who asks, given now if it was not before. Needs a request, and the app's ``SECRET_KEY``."""
    visitor = session.get(_SESSION_KEY)
    if not isinstance(visitor, str):
        visitor = session[_SESSION_KEY] = secrets.token_urlsafe(16)
    return visitor
