"""How far each engine goes: a small model, fed with what `python -m tests.benchmarks.scale` measured.

    python docs/scale.py

prints the tables of `scale.md`.
"""

from dataclasses import dataclass

MEASURED_WITH = 16  # increments in a call


@dataclass(frozen=True)
class Figures:
    """All in microseconds."""

    call: float  # one increment alone: the round trip, the commit, the fsync
    operation: float  # each further increment in the same call
    thread: float  # of a worker's own, for each increment: to wake the thread that waits for it
    hot: float  # between two calls of several processes on one counter: what must happen one after the other
    spread: float  # the same, on counters of their own

    def rate(self, processes: int, threads: int, *, one_counter: bool = True, distance: float = 0) -> float:
        """Increments per second.

        A process has one call under way, with all its threads in it. A server does the calls of all of them one
        after the other, as far as it must.

        :param threads: of each process that wait at the same time: the increments in a call.
        :param distance: microseconds that the network adds to a round trip.
        """
        cycle = self.call + distance + threads * (self.operation + self.thread)
        alone = threads / cycle * 1e6
        if processes == 1:
            return alone
        between = (self.hot if one_counter else self.spread) + (threads - MEASURED_WITH) * self.operation
        return min(processes * alone, threads / between * 1e6)


# 2 cores of an Intel Xeon, clients and servers on the same machine, Python 3.11, a sync of 0.1 ms.
FIGURES = {
    "manager, `none`": Figures(51.8, 1.5, 24.3, 74.3, 68.8),
    "manager, `commit`": Figures(218.0, 2.0, 33.1, 256.2, 236.1),
    "Redis, nothing on disk": Figures(83.7, 5.6, 29.9, 91.1, 91.8),
    "Redis, `appendfsync always`": Figures(193.8, 7.6, 35.1, 164.4, 168.8),
    "PostgreSQL": Figures(2158.7, 1.6, 40.5, 2890.2, 1406.5),
    "SQLite": Figures(644.6, 1.2, 33.2, 1144.2, 1161.4),
    "memcached": Figures(114.1, 40.4, 30.9, 287.2, 280.3),
}
SHAPES = [(1, 1), (1, 16), (2, 16), (4, 16), (16, 16), (64, 16)]
ONE_MACHINE = ("manager", "SQLite")
NETWORK = 500.0  # microseconds: a round trip to another machine of the same data centre, as it often is


def rounded(number: float) -> str:
    """Two digits: a model does not know more."""
    digits = len(str(int(number))) - 2
    return f"{round(number, -digits):,.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured() -> str:
    """What goes in."""
    head = ["µs", "a call alone", "each further increment", "a thread", "between calls, one counter", "many counters"]
    values = ["call", "operation", "thread", "hot", "spread"]
    rows = [[name, *(f"{getattr(figures, value):.1f}" for value in values)] for name, figures in FIGURES.items()]
    return table(head, rows)


def one_hot_counter() -> str:
    """Increments per second of one counter, by processes x threads."""
    head = ["one counter", *(f"{processes}x{threads}" for processes, threads in SHAPES)]
    rows = [[name, *(rounded(figures.rate(*shape)) for shape in SHAPES)] for name, figures in FIGURES.items()]
    return table(head, rows)


def many_machines() -> str:
    """The same with a network between, and each process on counters of its own beside it."""
    head = ["over a network", "1x1", "2x16", "16x16", "64x16", "64x16, many counters"]
    rows = []
    for name, figures in FIGURES.items():
        if name.startswith(ONE_MACHINE):
            continue
        rates = [figures.rate(*shape, distance=NETWORK) for shape in ((1, 1), (2, 16), (16, 16), (64, 16))]
        rates.append(figures.rate(64, 16, one_counter=False, distance=NETWORK))
        rows.append([name, *map(rounded, rates)])
    return table(head, rows)


if __name__ == "__main__":
    print(measured(), one_hot_counter(), many_machines(), sep="\n\n")
