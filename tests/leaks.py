"""Do processes leak? Their memory, descriptors and threads, as they were early and late in their lives."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

MEBIBYTE = 2**20
_FEWEST = 16  # samples of a life that is judged: four in a quarter of it


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a process had at one moment."""

    memory: int  # resident, in bytes
    descriptors: int
    threads: int
    work: int = 0  # done by then, in the unit of `Bounds.per_work`


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """By how much a process may grow between the first and the last quarter of its life."""

    memory: int
    descriptors: int
    threads: int
    per_work: int = 0  # bytes that it has to keep, for each unit of work


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The median of the first quarter of a life, and that of the last."""

    kind: str
    pid: int
    samples: int
    first: Sample
    last: Sample

    def over(self, bounds: Bounds) -> list[str]:
        """What of it is more than may be, in words."""
        allowed = bounds.memory + bounds.per_work * (self.last.work - self.first.work)
        return [
            f"{what} of {self.kind} {self.pid} went from {self._told(early)} to {self._told(late)}"
            for what, early, late, most in (
                ("memory", self.first.memory, self.last.memory, allowed),
                ("descriptors", self.first.descriptors, self.last.descriptors, bounds.descriptors),
                ("threads", self.first.threads, self.last.threads, bounds.threads),
            )
            if late - early > most
        ]

    @staticmethod
    def _told(figure: int) -> str:
        return f"{figure / MEBIBYTE:.1f} MiB" if figure >= MEBIBYTE else str(figure)


@dataclass(kw_only=True)
class Life:
    """A process, as it was seen."""

    kind: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    def growth(self, warm_up: int) -> Growth | None:
        """Over its life after the first samples, in which it is still beginning; none, if it was too short."""
        seen = self.samples[warm_up:]
        quarter = len(seen) // 4
        if len(seen) < _FEWEST:
            return None
        return Growth(
            kind=self.kind,
            pid=self.pid,
            samples=len(self.samples),
            first=_middle(seen[:quarter]),
            last=_middle(seen[-quarter:]),
        )


def _middle(samples: list[Sample]) -> Sample:
    return Sample(
        memory=int(median(sample.memory for sample in samples)),
        descriptors=int(median(sample.descriptors for sample in samples)),
        threads=int(median(sample.threads for sample in samples)),
        work=int(median(sample.work for sample in samples)),
    )


class Watch:
    """Looks at processes until the block ends.

    :param processes: those that there are now: their pids, and what each is.
    :param work: how much has been done until now.
    :param interval: seconds between two looks.
    """

    def __init__(
        self, processes: Callable[[], Mapping[int, str]], work: Callable[[], int] = lambda: 0, interval: float = 1.0
    ) -> None:
        self._processes = processes
        self._work = work
        self._interval = interval
        self._lives: dict[tuple[int, str], Life] = {}  # by pid and when it began, for pids come again
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def lives(self) -> list[Life]:
        return list(self._lives.values())

    def _look(self) -> None:
        while not self._enough.wait(self._interval):
            for pid, kind in self._processes().items():
                with suppress(OSError):  # it has gone since
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
    fields = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"{process} is a zombie")
    began = (process / "stat").read_text().rpartition(")")[2].split()[19]
    memory = int(fields["VmRSS"].split()[0]) * 1024
    return began, Sample(memory=memory, descriptors=descriptors, threads=int(fields["Threads"]), work=work)
