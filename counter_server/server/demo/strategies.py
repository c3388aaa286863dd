"""The ways to share a number: what people call them, and what they take. How each does it is in `taking`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """One way.

    :param title: what people call it.
    :param needs: the packages that it takes, beyond what is always there.
    :param module: one that a version of them may not have yet.
    :param companion: a module to run beside the server, which all processes reach.
    :param gunicorn: options that it takes there.
    :param killed: whether the process that holds the number is killed in the middle.
    """

    title: str
    needs: tuple[str, ...] = ()
    module: str = ""
    companion: str = ""
    gunicorn: tuple[str, ...] = ()
    killed: bool = False


_TEXTBOOK = "counter_server.server.demo.textbook"
_DIRTY = ("--dirty-workers", "1", "--dirty-app", "counter_server.server.demo.dirty:Nothing")

STRATEGIES = {
    "global": Strategy("a global"),
    "lock": Strategy("a global with a lock"),
    "value": Strategy("multiprocessing.Value"),
    "textbook": Strategy("BaseManager, the textbook recipe", companion=_TEXTBOOK),
    "textbook-lock": Strategy("BaseManager with a lock", companion=_TEXTBOOK),
    "textbook-killed": Strategy("BaseManager with a lock, killed", companion=_TEXTBOOK, killed=True),
    "cachelib": Strategy("cachelib's file cache", needs=("cachelib",)),
    "flask-caching": Strategy("Flask-Caching, get and set", needs=("flask_caching",)),
    "session": Strategy("a Flask session"),
    "stash": Strategy("gunicorn's Dirty Stash", needs=("gunicorn",), module="gunicorn.dirty.stash", gunicorn=_DIRTY),
    "ours": Strategy("counter-server, its manager killed", killed=True),
}
OURS = "ours"
DATA = "data"  # our manager's directory, among the files of a server
