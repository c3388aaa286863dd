"""Which counters a page of the dashboard shows: all in their order, or those whose names begin with a text."""

from itertools import takewhile

from msgspec import Struct

from ...errors import InvalidRequest, Unsupported
from ...extension import SharedState
from ...operations import Get

LARGEST_LISTING = 500  # counters on one page


class Listing(Struct, frozen=True):
    """A page of counters; `next` is its last name, where others follow, and `refusal` why the store lists none."""

    counters: list[tuple[str, int]]
    next: str | None = None
    refusal: str | None = None


def find(shared: SharedState, *, beginning: str, after: str, limit: int) -> Listing:
    """The counters whose names begin with `beginning`, in order, from the one after `after`.

    Such names stand side by side, so this costs the same among any number of counters; a search within the names would
    have to read them all.

    :param limit: how many, at most 500.
    :raises InvalidRequest: if one of these cannot be.
    """
    if not 1 <= limit <= LARGEST_LISTING:
        raise InvalidRequest(f"limit must be 1 to {LARGEST_LISTING}")
    found: list[tuple[str, int]] = []
    if after < beginning:
        # The first that such a name can have is the text itself, and a scan begins after a name: ask for that one too.
        after = beginning
        value = shared.submit(Get(beginning))
        if isinstance(value, int):
            found.append((beginning, value))
    try:
        page = shared.counters(after=after, limit=limit + 1)
    except Unsupported as error:
        return Listing(found, refusal=str(error))
    found += takewhile(lambda counter: counter[0].startswith(beginning), page.counters)
    return Listing(found[:limit], found[limit - 1][0] if len(found) > limit else None)
