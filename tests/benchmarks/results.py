"""What was measured: figures of each round, and their medians."""

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Place(NamedTuple):
    """Who was measured, at what."""

    level: str  # "store", "http", "growth", "startup"
    case: str  # a shape, or what else was varied
    who: str


@dataclass
class Results:
    """All of one run. A figure is named with its unit: "increments/s", "p50 us"."""

    figures: dict[Place, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # of the machine, before
    missing: dict[str, str] = field(default_factory=dict)  # what was not there to be measured, and why

    def add(self, place: Place, figures: Mapping[str, float]) -> None:
        """The figures of one more round."""
        for name, figure in figures.items():
            self.figures[place][name].append(figure)

    def median(self, place: Place, figure: str) -> float:
        """:raises KeyError: if that was not measured."""
        return statistics.median(self._rounds(place, figure))

    def rounds(self, place: Place, figure: str) -> int:
        """How many there were; :raises KeyError: if there was none."""
        return len(self._rounds(place, figure))

    def _rounds(self, place: Place, figure: str) -> list[float]:
        found = self.figures.get(place, {}).get(figure)
        if not found:
            raise KeyError(f"{' '.join(place)}: {figure}")
        return found

    def wrong(self) -> dict[Place, int]:
        """Where numbers were given to several or to nobody, and how many in all rounds."""
        return {
            place: int(sum(figures["wrong"]))
            for place, figures in self.figures.items()
            if any(figures.get("wrong", []))
        }

    def tables(self) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
        """Level, case, and the medians of everybody who was measured there, in the order of the measurements."""
        cases: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
        for (level, case, who), figures in self.figures.items():
            cases[level, case][who] = {name: statistics.median(rounds) for name, rounds in figures.items()}
        for (level, case), medians in cases.items():
            yield level, case, medians
