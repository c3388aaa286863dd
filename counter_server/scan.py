"""All counters whose names begin with a text, page by page."""

from collections.abc import Callable, Iterator
from unicodedata import normalize

from .operations import LARGEST_PAGE, Get, Operation, Page, Result, Scan, expect


def beginning_with(
    prefix: str, submit: Callable[[Operation], Result], *, after: str = "", at_once: int = LARGEST_PAGE
) -> Iterator[tuple[str, int]]:
    """Yield each counter whose name begins with `prefix`, and its value, in the order of the names, after a name.

    Counters that change meanwhile are seen before or after. Errors of `submit` are raised, `Unsupported` among them.

    :param at_once: counters that one operation reads.
    """
    prefix = normalize("NFC", prefix)  # as names are
    if after < prefix:  # a scan begins after a name, but the first name may be the text itself
        after = prefix
        value = submit(Get(prefix))
        if type(value) is int:
            yield prefix, value
    more = True
    while more:
        page = expect(Page, submit(Scan(after, at_once)))
        for name, value in page.counters:
            if not name.startswith(prefix):
                return
            yield name, value
        more = page.more and bool(page.counters)
        after = page.counters[-1][0] if more else after
