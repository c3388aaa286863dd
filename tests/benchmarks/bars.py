"""The bars: required ratios of ours to peers and limits, each from the medians of one run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.benchmarks.growth import COUNTERS
from tests.benchmarks.growth import place as grown
from tests.benchmarks.in_one_thread import API, HOME, TEMPLATE, VIEW
from tests.benchmarks.in_one_thread import CASE as IN_ONE_THREAD
from tests.benchmarks.over_http import BAR, BARE
from tests.benchmarks.over_http import case_of as requests
from tests.benchmarks.painting import CASE as OPENED
from tests.benchmarks.painting import PAGES
from tests.benchmarks.peers import CONTESTANTS, LIMIT_COMMIT
from tests.benchmarks.plan import FEWEST_OF_BARS
from tests.benchmarks.results import Place, Results
from tests.benchmarks.startup import BARE as SMALLEST
from tests.benchmarks.startup import CASE, OURS

VOLATILE, DURABLE = "ours, none", "ours, commit"


@dataclass(frozen=True)
class Bar:
    """A required figure."""

    title: str
    limit: float
    figure: Callable[[Results], float]
    places: tuple[tuple[Place, str], ...]  # from which the figure is computed
    at_least: bool = True  # otherwise at most


@dataclass(frozen=True)
class Verdict:
    """The result for one bar."""

    bar: Bar
    figure: float | None  # None: not measured
    rounds: int = 0  # of the place with the fewest

    @property
    def reached(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.bar.limit if self.bar.at_least else self.figure <= self.bar.limit

    @property
    def words(self) -> str:
        if self.figure is None:
            return "not measured"
        few = "" if self.rounds >= FEWEST_OF_BARS else f", by {self.rounds} round{'' if self.rounds == 1 else 's'} only"
        return ("reached" if self.reached else "short") + few


def judge(results: Results) -> list[Verdict]:
    """Judge all bars of the measured levels."""
    levels = {place.level for place in results.figures}
    return [_verdict(bar, results) for bar in BARS if all(place.level in levels for place, _ in bar.places)]


def _verdict(bar: Bar, results: Results) -> Verdict:
    try:
        return Verdict(bar, bar.figure(results), min(results.rounds(*place) for place in bar.places))
    except KeyError:
        return Verdict(bar, None)


def _ratio(title: str, figure: str, of: Place, to: Place, limit: float, *, at_least: bool = True) -> Bar:
    return Bar(
        title,
        limit,
        lambda results: results.median(of, figure) / results.median(to, figure),
        ((of, figure), (to, figure)),
        at_least,
    )


def _store(shape: str, who: str) -> Place:
    return Place("store", shape, who)


def _http(who: str) -> Place:
    return Place("http", requests(*BAR), who)


def _throughput() -> Iterator[Bar]:
    for ours, name, peers in (
        (
            VOLATILE,
            "volatile",
            {
                "BaseManager proxy, AF_UNIX": 6,
                "redis-py INCR, volatile": 6,
                "pymemcache incr": 1.5,
                "SQLite WAL, NORMAL": 1.8,
                "multiprocessing.Value": 0.5,
            },
        ),
        (
            DURABLE,
            "durable",
            {"redis-py INCR, fsync always": 2, "SQLite WAL, FULL": 3, "PostgreSQL row update": 25},
        ),
    ):
        for peer, limit in peers.items():
            yield _ratio(
                f"2x16 {name}: times {peer}", "increments/s", _store("2x16", ours), _store("2x16", peer), limit
            )
    commits, limit_of_commits = (_store("2x16", DURABLE), "commits/s"), (_store("2x16", LIMIT_COMMIT), "increments/s")
    yield Bar(
        "2x16 durable: commits, of raw append and fdatasync",
        0.5,
        lambda results: results.median(*commits) / results.median(*limit_of_commits),
        (commits, limit_of_commits),
    )


def _latency() -> Iterator[Bar]:
    plain = "BaseManager proxy, AF_UNIX"
    yield _ratio(
        "1x1 volatile: median, of the plain proxy's", "p50 us", _store("1x1", VOLATILE), _store("1x1", plain), 1.2,
        at_least=False,
    )  # fmt: skip
    everyone = [one.name for one in CONTESTANTS if one.networked]
    durable = [one.name for one in CONTESTANTS if one.networked and one.durable]
    yield _below("2x16 volatile: p99, of the best networked peer's", VOLATILE, everyone)
    yield _below("2x16 durable: p99, of the best durable networked peer's", DURABLE, durable)


def _below(title: str, ours: str, peers: Iterable[str]) -> Bar:
    """Return a bar for the ratio of ours to the lowest figure of the measured peers."""
    places = [(_store("2x16", peer), "p99 us") for peer in peers]
    mine = (_store("2x16", ours), "p99 us")

    def figure(results: Results) -> float:
        there = [place for place in places if place[0] in results.figures]
        if not there:
            raise KeyError("no networked peer")
        return results.median(*mine) / min(results.median(*place) for place in there)

    return Bar(title, 1.0, figure, (mine,), at_least=False)


def _over_http() -> Iterator[Bar]:
    for ours, name, rate, cost in (
        ("ours, API, none", "our API, volatile", 0.75, 1.35),
        ("ours, API, commit", "our API, durable", 0.6, 1.6),
        (VOLATILE, "the view with our counter, volatile", 0.8, None),
        (DURABLE, "the view with our counter, durable", 0.65, None),
    ):
        of, to = _http(ours), _http(BARE)
        yield _ratio(f"HTTP, {name}: requests/s, of the bare view's", "requests/s", of, to, rate)
        if cost is not None:
            title = f"HTTP, {name}: processor time, of the bare view's"
            yield _ratio(title, "cpu us/request", of, to, cost, at_least=False)
    for mine, theirs, limit in ((API, VIEW, 1.45), (HOME, TEMPLATE, 2.0)):
        of, to = (Place("thread", IN_ONE_THREAD, who) for who in (mine, theirs))
        yield _ratio(
            f"one thread, {mine}: processor time, of {theirs}", "cpu us/request", of, to, limit, at_least=False
        )


def _growth() -> Iterator[Bar]:
    for durability, name in (("none", "volatile"), ("commit", "durable")):
        places = tuple((grown("counters", counters, durability), "p50 us") for counters in COUNTERS)

        def spread(results: Results, places: tuple[tuple[Place, str], ...] = places) -> float:
            medians = [results.median(*place) for place in places]
            return max(medians) / min(medians)

        yield Bar(
            f"1 to 1,000,000 counters, {name}: slowest median, of the quickest", 1.2, spread, places, at_least=False
        )
    memory = (grown("counters", COUNTERS[-1], "none"), "bytes/counter")
    yield Bar("memory of a counter, in bytes", 200, lambda results: results.median(*memory), (memory,), at_least=False)
    yield _ratio(
        f"start: {OURS}, of {SMALLEST}", "ms", Place("startup", CASE, OURS), Place("startup", CASE, SMALLEST), 2,
        at_least=False,
    )  # fmt: skip


def _pages() -> Iterator[Bar]:
    places = tuple((Place("pages", OPENED, path), "kB") for path in PAGES)
    yield Bar(
        "pages: kB of the largest",
        60,
        lambda results: max(results.median(*place) for place in places),
        places,
        at_least=False,
    )


BARS = [*_throughput(), *_latency(), *_over_http(), *_growth(), *_pages()]
