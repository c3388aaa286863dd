"""The plan of a run: its measurements and their rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.benchmarks.load import Shape

One = TypeVar("One")

ROUNDS = 3
FEWEST_OF_BARS = 5  # rounds that a bar needs to be judged
ROUNDS_OF_BARS = 9  # because the speed of a shared machine varies


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of a run."""

    rounds_asked: int | None = None
    seconds: float = 0.5  # of each measurement
    shapes: Sequence[Shape] = ()  # empty: all
    peers: Sequence[str] = ()  # parts of their names; empty: all

    def rounds(self, *, bar: bool) -> int:
        """Return the number of rounds: more if a bar depends on them."""
        return self.rounds_asked or (ROUNDS_OF_BARS if bar else ROUNDS)

    def wants(self, name: str) -> bool:
        """Return whether the contestant of that name is measured."""
        return not self.peers or any(part.casefold() in name.casefold() for part in self.peers)


def in_turn(all_of_them: Sequence[One], number: int) -> Sequence[One]:
    """Alternate forwards and backwards, so that no contestant always follows the same one."""
    return all_of_them if number % 2 == 0 else all_of_them[::-1]
