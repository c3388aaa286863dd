"""Detect leaks: compare memory, descriptors and threads of processes early and late in their lives."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Self

MEBIBYTE = 2**20
_FEWEST = 16  # samples that a life needs to be judged: four in each quarter


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The resources of a process at one moment."""

    memory: int  # resident, in bytes
    descriptors: int
    threads: int
    work: int = 0  # done so far, in the unit of `Bounds.per_work`


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The growth that is allowed between the first and the last quarter of a process's life."""

    memory: int
    descriptors: int
    threads: int
    per_work: int = 0  # bytes that it must keep for each unit of work


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The medians of the first and the last quarter of a life."""

    kind: str
    pid: int
    samples: int
    first: Sample
    last: Sample

    def over(self, bounds: Bounds) -> list[str]:
        """Describe each resource that grew by more than `bounds`."""
        kept = {"memory": bounds.per_work * (self.last.work - self.first.work)}
        return [
            f"{what} of {self.kind} {self.pid} went from {early:,} to {late:,}"
            for what in ("memory", "descriptors", "threads")
            if (late := getattr(self.last, what)) - (early := getattr(self.first, what))
            > getattr(bounds, what) + kept.get(what, 0)
        ]


@dataclass(kw_only=True)
class Life:
    """The samples of one process."""

    kind: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    def growth(self, warm_up: int) -> Growth | None:
        """Return the growth after the `warm_up` samples of a start, or None if the life was too short."""
        seen = self.samples[warm_up:]
        quarter = len(seen) // 4
        if len(seen) < _FEWEST:
            return None
        first, last = _middle(seen[:quarter]), _middle(seen[-quarter:])
        return Growth(kind=self.kind, pid=self.pid, samples=len(self.samples), first=first, last=last)


def _middle(samples: list[Sample]) -> Sample:
    return Sample(**{each.name: int(median(getattr(one, each.name) for one in samples)) for each in fields(Sample)})


class Watch:
    """Samples processes until the block ends.

    :param processes: returns the present processes: the kind of each by its pid.
    :param work: returns the amount of work done so far.
    :param interval: seconds between two samples.
    """

    def __init__(
        self, processes: Callable[[], Mapping[int, str]], work: Callable[[], int] = lambda: 0, interval: float = 1.0
    ) -> None:
        self._processes, self._work, self._interval = processes, work, interval
        self._lives: dict[tuple[int, str], Life] = {}  # by pid and start time, because pids are reused
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def lives(self) -> list[Life]:
        return list(self._lives.values())

    def _look(self) -> None:
        while not self._enough.wait(self._interval):
            for pid, kind in self._processes().items():
                with suppress(OSError):  # it has ended meanwhile
                    began, sample = _look_at(Path(f"/proc/{pid}"), self._work())
                    life = self._lives.setdefault((pid, began), Life(kind=kind, pid=pid))
                    life.samples.append(sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._enough.set()
        self._thread.join()


def _look_at(process: Path, work: int) -> tuple[str, Sample]:
    descriptors = len(list((process / "fd").iterdir()))
    figures = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    if "VmRSS" not in figures:
        raise ProcessLookupError(f"{process} is a zombie")
    began = (process / "stat").read_text().rpartition(")")[2].split()[19]
    memory = int(figures["VmRSS"].split()[0]) * 1024
    return began, Sample(memory=memory, descriptors=descriptors, threads=int(figures["Threads"]), work=work)
