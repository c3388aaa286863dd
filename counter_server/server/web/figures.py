"""What the dashboard tells of the manager and of the server's processes, in words and figures for people."""

from collections.abc import Sequence

from msgspec import Struct

from ...status import Process, Status


class Totals(Struct, frozen=True):
    """What only grows while `epoch` and `pid` stay the same: two of these tell the rates between them."""

    epoch: str
    pid: int
    batches: int
    operations: int
    commits: int
    commit_seconds: float


class Figures(Struct, frozen=True):
    """Of the manager: what holds now, by what it is called, and the totals."""

    now: dict[str, str]
    totals: Totals


class ProcessRow(Struct, frozen=True):
    """Of one process of the server."""

    name: str
    pid: str
    uptime: str
    restarts: str


def figures(status: Status) -> Figures:
    """What to tell of a manager; the same, but for its uptime, while nothing happens there."""
    now = {
        "Process": str(status.pid),
        "Uptime": duration(status.uptime),
        "Starts on its data": f"{status.starts:,}",
        "Durability": status.durability,
        "Counters": f"{status.counters:,}",
        "Shared objects": f"{status.objects:,}",
        "Idempotency keys": f"{status.keys:,}",
        "Clients remembered": f"{status.clients:,}",
        "Connections": f"{status.connections:,}",
        "Journal": size(status.journal_bytes),
        "Long calls": ", ".join(f"{call.object}.{call.method}" for call in status.slow_calls) or "none",
    }
    totals = Totals(status.epoch, status.pid, status.batches, status.operations, status.commits, status.commit_seconds)
    return Figures(now, totals)


def means(status: Status) -> dict[str, str]:
    """Rates and means since the manager's start. The page's script replaces them by those of the last seconds."""
    return {
        "batches": f"{status.batches / max(status.uptime, 1):,.1f}/s",
        "batch": _mean(status.operations, status.batches, "operations"),
        "commit": _mean(status.commit_seconds * 1000, status.commits, "ms"),
    }


def _mean(total: float, number: int, unit: str) -> str:
    return f"{total / number:,.2f} {unit}" if number else "none yet"


def processes(found: Sequence[Process]) -> list[ProcessRow]:
    """What to tell of the processes."""
    return [
        ProcessRow(
            process.name,
            "being started" if process.pid is None else str(process.pid),
            "" if process.pid is None else duration(process.uptime),
            f"{process.restarts:,}",
        )
        for process in found
    ]


def duration(seconds: float) -> str:
    """A time in its largest unit: as exact as people say it, and so the same for a while."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        number = int(seconds // length)
        if number:
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return "under a minute"


def size(number: int) -> str:
    """Bytes, in the unit in which they are a number below 1000."""
    amount, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
