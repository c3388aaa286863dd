"""What a proof came to: right or wrong, and its figures, on one screen or as JSON."""

from collections.abc import Iterable
from statistics import median

from msgspec import Struct

from .faults import Kill
from .history import Operation, violations


class Verdict(Struct, frozen=True, kw_only=True):
    """The outcome of one proof. Times are in seconds."""

    right: bool
    violation: str | None  # the first, in words
    violations: int
    answered: int  # increments
    unknown: int  # increments that were never answered: they may have been counted, or not
    asked_again: int  # of those answered: once more under their keys, in the end
    final: int | None  # what the counter came to; none, if it could not be read
    slowest: float | None  # of the answers, each from the first sending on
    median: float | None
    kills: list[Kill]
    url: str | None = None  # of the server; none, for a history that was saved
    counter: str | None = None
    clients: int | None = None
    seconds: float | None = None  # that the load went on
    per_second: float | None = None  # increments answered
    stopped_early: bool = False
    stays: str | None = None  # why the counter is still there
    history: str | None = None  # the file that it was saved in


def judge(history: list[Operation], final: int | None, kills: Iterable[Kill] = (), seen: Iterable[str] = ()) -> Verdict:
    """The verdict over a history, and over what was `seen` beside it that must not be."""
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
    times = [operation.returned - operation.invoked for operation in answered]
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
    """The verdict for people."""
    more = f" (and {verdict.violations - 1:,} more)" if verdict.violations > 1 else ""
    first = "right" if verdict.right else f"WRONG: {verdict.violation}{more}"
    rows = [("increments", f"{verdict.answered:,} answered, {verdict.unknown:,} unknown")]
    rows.append(("final value", "not known" if verdict.final is None else f"{verdict.final:,}"))
    if verdict.asked_again:
        rows.append(("asked again", f"{verdict.asked_again:,} under their keys"))
    for victim in ("manager", "worker"):
        of_these = [kill for kill in verdict.kills if kill.victim == victim]
        recoveries = [kill.recovery for kill in of_these if kill.recovery is not None]
        if recoveries:
            survived = f"{len(recoveries)} of {len(of_these)} survived"
            back = f"back after {_time(median(recoveries))} (median), {_time(max(recoveries))} (worst)"
            rows.append((f"{victim} kills", f"{survived}; {back}"))
        elif of_these:
            rows.append((f"{victim} kills", f"0 of {len(of_these)} survived"))
    if verdict.seconds is not None and verdict.per_second is not None:
        early = ", stopped early" if verdict.stopped_early else ""
        by = f"{verdict.clients} clients in {verdict.seconds:.1f} s{early}"
        rows.append(("throughput", f"{verdict.per_second:,.0f} increments/s by {by}"))
    if verdict.median is not None and verdict.slowest is not None:
        rows.append(("answers", f"after {_time(verdict.median)} (median), {_time(verdict.slowest)} (slowest)"))
    if verdict.stays:
        rows.append(("left there", f"the counter {verdict.counter}: {verdict.stays}"))
    if verdict.history:
        rows.append(("history", verdict.history))
    return "\n".join([first, *(f"{name:<14}{text}" for name, text in rows)])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
