"""What a run is to measure, and how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.benchmarks.load import Shape

One = TypeVar("One")

ROUNDS = 3
FEWEST_OF_BARS = 5  # rounds that a bar can be judged by
ROUNDS_OF_BARS = 9  # a machine that is not ours alone has moments of all kinds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of a run."""

    rounds_asked: int | None = None
    seconds: float = 0.5  # of each measurement
    shapes: Sequence[Shape] = ()  # all, if there are none
    peers: Sequence[str] = ()  # parts of their names; all, if there are none

    def rounds(self, *, bar: bool) -> int:
        """How many; more of them where a bar is judged by it."""
        return self.rounds_asked or (ROUNDS_OF_BARS if bar else ROUNDS)

    def wants(self, name: str) -> bool:
        """Whether who goes by that name is to be measured."""
        return not self.peers or any(part.casefold() in name.casefold() for part in self.peers)


def in_turn(all_of_them: Sequence[One], number: int) -> Sequence[One]:
    """Forwards and backwards by turns, so that nobody always comes after the same one."""
    return all_of_them if number % 2 == 0 else all_of_them[::-1]
