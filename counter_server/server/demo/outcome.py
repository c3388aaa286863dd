"""What came back, and whether it is right."""

from collections import Counter
from dataclasses import dataclass, field

from .clients import Answer
from .plan import Pair


@dataclass(frozen=True)
class Round:
    """One round: what each client came back with, in the order of the answers.

    :param killed_after: how many had their answer when the manager was killed; None if it was not.
    """

    answers: list[Answer]
    killed_after: int | None = None

    @property
    def numbers(self) -> Counter[int]:
        """How many clients were given each number."""
        return Counter(answer.number for answer in self.answers if answer.number is not None)

    @property
    def unique(self) -> int:
        """How many different numbers were given."""
        return len(self.numbers)

    @property
    def duplicates(self) -> int:
        """How many clients were given a number that another one had been given."""
        return self.numbers.total() - self.unique

    @property
    def unanswered(self) -> int:
        """How many clients were given none."""
        return len(self.answers) - self.numbers.total()

    @property
    def skipped(self) -> int:
        """How many of the numbers 1, 2, 3, … up to the number of clients nobody was given."""
        return len(self.answers) - len(set(range(1, len(self.answers) + 1)) & set(self.numbers))

    @property
    def slowest(self) -> float:
        """Seconds until the last had an answer."""
        return max((answer.seconds for answer in self.answers if answer.number is not None), default=0.0)

    @property
    def right(self) -> bool:
        """Whether the clients were given exactly the numbers 1, 2, 3, …, each once."""
        return self.skipped == 0


@dataclass(frozen=True)
class Outcome:
    """What a pair did in all its rounds, or why it was left out."""

    pair: Pair
    rounds: list[Round] = field(default_factory=list)
    left_out: str = ""

    @property
    def right(self) -> bool:
        """Whether every round was."""
        return bool(self.rounds) and all(each.right for each in self.rounds)

    @property
    def verdict(self) -> str:
        """In words."""
        return "left out" if self.left_out else "right" if self.right else "wrong"

    @property
    def failed(self) -> bool:
        """Whether it is ours, and was not right."""
        return self.pair.ours and not self.right

    @property
    def shown(self) -> Round:
        """The round that a table shows: the first that was wrong, else the slowest."""
        wrong = [each for each in self.rounds if not each.right]
        return wrong[0] if wrong else max(self.rounds, key=lambda each: each.slowest)

    @property
    def sentence(self) -> str:
        """What happened, and why."""
        parts = [self.pair.why if self.verdict == self.pair.expected else self._unexpected()]
        (number, times) = max(self.shown.numbers.items(), key=lambda item: item[1], default=(0, 0))
        if times > 1:
            parts.append(f"The number {number} was given {times} times.")
        if self.shown.killed_after is not None:
            parts.append(f"Killed after {self.shown.killed_after} answers.")
        if self.shown.unanswered:
            parts.append(f"{self.shown.unanswered} clients got no number.")
        if len(self.rounds) > 1:
            parts.append(f"Right in {sum(each.right for each in self.rounds)} of {len(self.rounds)} rounds.")
        return " ".join(parts)

    def _unexpected(self) -> str:
        if self.right:
            return "Right this time, by luck."
        if errors := [answer.error for answer in self.shown.answers if answer.error]:
            return f"Not expected: the first client without a number was told {errors[0]!r}."
        return "Not expected: please report it."
