"""The results: figures of each round, and their medians."""

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Place(NamedTuple):
    """A contestant in one case of one level."""

    level: str  # "store", "http", "thread", "growth", "startup", "pages"
    case: str  # a shape, or another varied quantity
    who: str


@dataclass
class Results:
    """All results of one run. The name of a figure includes its unit: "increments/s", "p50 us"."""

    figures: dict[Place, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # of the machine before the run
    missing: dict[str, str] = field(default_factory=dict)  # the reason by the name of each missing contestant

    def add(self, place: Place, figures: Mapping[str, float]) -> None:
        """Add the figures of one more round."""
        for name, figure in figures.items():
            self.figures[place][name].append(figure)

    def median(self, place: Place, figure: str) -> float:
        """Return the median of all rounds.

        :raises KeyError: if it was not measured.
        """
        return statistics.median(self._rounds(place, figure))

    def rounds(self, place: Place, figure: str) -> int:
        """Return the number of rounds.

        :raises KeyError: if it was not measured.
        """
        return len(self._rounds(place, figure))

    def _rounds(self, place: Place, figure: str) -> list[float]:
        found = self.figures.get(place, {}).get(figure)
        if not found:
            raise KeyError(f"{' '.join(place)}: {figure}")
        return found

    def wrong(self) -> dict[Place, int]:
        """Return the count of wrong numbers over all rounds, for each place with any."""
        return {
            place: int(sum(figures["wrong"]))
            for place, figures in self.figures.items()
            if any(figures.get("wrong", []))
        }

    def tables(self) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
        """Yield each level and case with the medians of its contestants, in the order of measurement."""
        cases: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
        for (level, case, who), figures in self.figures.items():
            cases[level, case][who] = {name: statistics.median(rounds) for name, rounds in figures.items()}
        for (level, case), medians in cases.items():
            yield level, case, medians
