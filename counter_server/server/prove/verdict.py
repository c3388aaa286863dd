"""The verdict on a history of increments, and on how service survived each kill."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from jinja2 import Environment
from msgspec import Struct

from ...history import Operation, violations


class Kill(Struct, frozen=True, kw_only=True):
    """One `kill -9` and its effect."""

    victim: str  # "manager" or "worker"
    pid: int
    moment: float  # seconds after the load began
    recovery: float | None  # seconds until service was back; None if it did not come back


class Verdict(Struct, frozen=True, kw_only=True):
    """The outcome of one proof. Times are in seconds."""

    right: bool
    violation: str | None  # the first, in words
    violations: int
    answered: int  # increments
    unknown: int  # increments without an answer: they may have been counted, or not
    asked_again: int  # increments sent once more under their keys, in the end
    final: int | None  # the value of the counter; None if it could not be read
    slowest: float | None  # answer, from the first sending
    median: float | None
    kills: list[Kill]
    url: str | None = None  # of the server; None for a saved history
    counter: str | None = None
    clients: int | None = None
    seconds: float | None = None  # of load
    per_second: float | None = None  # increments answered
    stopped_early: bool = False
    stays: str | None = None  # why the counter was not deleted
    history: str | None = None  # the file of the saved history


def judge(history: list[Operation], final: int | None, kills: Iterable[Kill] = (), seen: Iterable[str] = ()) -> Verdict:
    """Judge a history, together with other faults that were `seen`."""
    kills = list(kills)
    found = list(seen)
    found += [f"service was not back after the kill of the {kill.victim}" for kill in kills if kill.recovery is None]
    answered = [operation for operation in history if operation.answers]
    if final is not None:
        found += violations(history, final)
    elif not found:
        found.append("the counter could not be read in the end")
    if not answered:
        found.append("no increment was answered, so nothing was shown")
    times = [operation.returned - operation.invoked for operation in answered if operation.returned is not None]
    return Verdict(
        right=not found,
        violation=found[0] if found else None,
        violations=len(found),
        answered=len(answered),
        unknown=len(history) - len(answered),
        asked_again=sum(len(operation.answers) > 1 for operation in answered),
        final=final,
        slowest=max(times, default=None),
        median=median(times) if times else None,
        kills=kills,
    )


def screen(verdict: Verdict) -> str:
    """Format the verdict for people."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - plain text
    environment.filters |= {"n": "{:,}".format, "time": _time, "median": median}
    template = environment.from_string(Path(__file__).with_name("verdict.txt").read_text(encoding="utf-8"))
    return template.render(verdict=verdict).rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
