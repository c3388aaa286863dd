"""Put a server under load and random faults for some minutes, and check all of it at the end.

    python -m tests.soak [--minutes 2] [--seed S] [--clients 16] [--json FILE]

It prints each fault and its recovery time, then whether every increment was counted exactly once and no process grew.
The exit status is 0 if both hold; otherwise it is 1 and the history is saved. A seed repeats the order of the faults,
but not their moments.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from statistics import median

import msgspec

from counter_server.history import Operation, save
from counter_server.server.prove.load import Client, Load, path_of
from counter_server.server.prove.proof import group_members
from counter_server.server.prove.verdict import judge
from tests.leaks import MEBIBYTE, Bounds, Growth, Watch
from tests.processes import PATIENCE, ROOT, Server, eventually
from tests.soak_faults import MOST_HELD, WORKERS, Faults, Injury

COUNTER = "soak"
WARM_UP = 5  # samples, one per second, during which a new process imports and fills its caches
ASKED_AGAIN = 200  # keys, at most
# After this share of the time no process is killed or replaced, so that some live long enough to be judged.
PASSING_ONLY = 0.6

# Memory: the interpreter allocates arenas of 1 MiB, the C library more for each thread, SQLite has a cache of 2 MiB,
# and waitress keeps answers that clients do not read. A leak of 1 KiB per request exceeds this within a minute.
ALLOWANCE = 12 * MEBIBYTE
# Bytes that a manager keeps for a day for each increment with a key: the key, its fingerprint, the number and overhead.
PER_KEY = 450


def bounds(clients: int) -> dict[str, Bounds]:
    # All connections of the load and of held clients may be at one worker early, and at the other one late.
    connections = clients + MOST_HELD
    return {
        # While it replaces its workers it has 3 descriptors for each new and each retiring worker, and afterwards one
        # more for the resource tracker: 17 before, at most 29 during the replacement, 18 afterwards.
        "supervisor": Bounds(memory=ALLOWANCE, descriptors=12, threads=0),
        "worker": Bounds(memory=ALLOWANCE, descriptors=connections, threads=1),
        # A thread and a descriptor per connection: one or two for each worker, and strangers for two seconds.
        "manager": Bounds(memory=ALLOWANCE, descriptors=8, threads=8, per_work=PER_KEY),
    }


class Report(msgspec.Struct, kw_only=True):
    """The outcome of a soak. Times are in seconds."""

    found: list[str]  # everything that was wrong
    seed: int
    seconds: float
    clients: int
    answered: int
    unknown: int
    final: int | None
    slowest: float | None
    injuries: list[Injury]
    growths: list[Growth]


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path | None]:
    """Mount a small file system in memory, and return it, or None without the permission."""
    place = directory / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


class Soak:
    """One run."""

    def __init__(self, minutes: float, seed: int, clients: int) -> None:
        self._minutes = minutes
        self._seed = seed
        self._chance = random.Random(seed)
        self._clients = clients
        self._probes: list[Operation] = []
        self._injuries: list[Injury] = []
        self._port = "0"
        self._url = ""

    def run(self) -> tuple[Report, list[Operation]]:
        """Soak the server, judge the result, and remove all processes and files."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
            # 300 bytes for each of 5,000 increments a second, and space for the journal's log.
            disk = stack.enter_context(small_disk(directory, int(64 + 90 * self._minutes)))
            if disk is None:
                print("left out: a full disk; only root may mount a small file system")
            data_dir = (disk or directory) / "data"

            def start() -> Server:
                where = ("--data-dir", data_dir, "--port", self._port)
                limits = ("--request-timeout", "5", "--frozen-after", "3")
                server = stack.enter_context(
                    Server("--workers", str(WORKERS), "--durability", "commit", *where, *limits)
                )
                self._url, self._port = server.url, server.url.rpartition(":")[2]
                return server

            faults = Faults(start, data_dir, disk, self._increment, self._chance)
            stack.callback(faults.close)
            load = Load(self._url, COUNTER, self._clients)
            stack.callback(load.stop, 0.0)
            with Watch(lambda: _processes(faults.server), lambda: len(load.history)) as watch:
                self._strike(faults, load)
                if all(injury.recovery is not None for injury in self._injuries):
                    with suppress(AssertionError):  # then the report names the kind
                        eventually(lambda: not self._unjudged(watch), "enough samples of a process of each kind")
            load.stop()
            seconds = time.monotonic() - load.began
            history, final = self._settled([*self._probes, *load.operations()])
            found = [str(error) or repr(error) for error in load.failures]
            growths, grown = self._grown(watch)
            found += grown + self._ended(faults)
            unhealed = [f"service was not back from {i.kind}: {i.why}" for i in self._injuries if i.recovery is None]
            verdict = judge(history, final, (), unhealed)
            found += [f"{verdict.violation} ({verdict.violations} such)"] if verdict.violation else []
            report = Report(
                found=found,
                seed=self._seed,
                seconds=seconds,
                clients=self._clients,
                answered=verdict.answered,
                unknown=verdict.unknown,
                final=final,
                slowest=verdict.slowest,
                injuries=self._injuries,
                growths=growths,
            )
            return report, history

    def _strike(self, faults: Faults, load: Load) -> None:
        """Inject one fault after the other, in random order; each kind occurs once before any repeats."""
        to_come: list[str] = []
        while (elapsed := time.monotonic() - load.began) < self._minutes * 60 and not load.failures:
            kinds = faults.passing_here + (
                list(faults.replacing) if elapsed < PASSING_ONLY * self._minutes * 60 else []
            )
            to_come = [kind for kind in to_come if kind in kinds] or self._chance.sample(kinds, len(kinds))
            injury = faults.strike(to_come.pop(), elapsed)
            self._injuries.append(injury)
            back = f"NOT BACK: {injury.why}" if injury.recovery is None else f"back after {injury.recovery:.2f} s"
            print(f"{elapsed:6.1f} s  {injury.kind}: {back}; {len(load.history):,} increments", flush=True)
            if injury.recovery is None:
                return
            time.sleep(self._chance.uniform(0.2, 1.5))  # the pace of the faults

    def _increment(self, deadline: float) -> bool:
        with closing(Client(self._url)) as client:
            self._probes.append(operation := client.increment(COUNTER, f"probe-{len(self._probes)}", deadline))
        return bool(operation.answers)

    def _settled(self, history: list[Operation]) -> tuple[list[Operation], int | None]:
        """Repeat some keys; return the history with these answers, and the counter's final value."""
        deadline = time.monotonic() + PATIENCE
        answered = [index for index, operation in enumerate(history) if operation.answers]
        with closing(Client(self._url)) as client:
            for index in self._chance.sample(answered, min(ASKED_AGAIN, len(answered))):
                again = client.increment(COUNTER, history[index].key, deadline)
                history[index] = msgspec.structs.replace(history[index], answers=history[index].answers + again.answers)
            while time.monotonic() < deadline:
                with suppress(OSError, HTTPException):
                    status, content = client.request("GET", path_of(COUNTER))
                    if status == 200:
                        return history, content["value"]
                time.sleep(0.1)
        return history, None

    def _grown(self, watch: Watch) -> tuple[list[Growth], list[str]]:
        growths = [growth for life in watch.lives if (growth := life.growth(WARM_UP)) is not None]
        allowed = bounds(self._clients)
        found = [line for growth in growths for line in growth.over(allowed[growth.kind])]
        unjudged = sorted(self._unjudged(watch))
        return growths, found + [f"no {kind} lived long enough to be judged" for kind in unjudged]

    def _unjudged(self, watch: Watch) -> set[str]:
        """Return the kinds of which no process has lived long enough yet."""
        return bounds(self._clients).keys() - {life.kind for life in watch.lives if life.growth(WARM_UP)}

    def _ended(self, faults: Faults) -> list[str]:
        """Stop the server, and return everything that went wrong."""
        faults.close()
        status = faults.server.stop()
        found = [f"the server ended with {status}: {faults.server.errors[-1:]}"] if status else []
        try:
            eventually(lambda: not group_members(faults.server.pid), "the end of every process", seconds=5)
        except AssertionError as error:
            found.append(str(error))
        return found + [line for line in faults.server.errors if "Traceback" in line or "uncaptured" in line]


def _processes(server: Server) -> dict[int, str]:
    """Return the kind of each of a server's processes that have started, by pid."""
    workers = dict.fromkeys(filter(_serves, server.children("worker")), "worker")
    return {server.pid: "supervisor", **workers, **dict.fromkeys(server.children("manager"), "manager")}


def _serves(worker: int) -> bool:
    """Return whether a worker has its threads: it starts them last, on a busy machine long after it was forked."""
    with suppress(FileNotFoundError):
        return len(list(Path(f"/proc/{worker}/task").iterdir())) > 1
    return False


def screen(report: Report) -> str:
    """Format the report for people."""
    lines = [f"{'fault':<36}{'times':>6}{'median':>10}{'worst':>10}"]
    for kind, count in Counter(injury.kind for injury in report.injuries).most_common():
        times = [i.recovery for i in report.injuries if i.kind == kind and i.recovery is not None]
        told = f"{median(times):8.2f} s{max(times):8.2f} s" if times else f"{'not back':>10}"
        lines.append(f"{kind:<36}{count:>6}{told}")
    lines.append(f"{'process':<20}{'seconds':>8}{'memory, MiB':>18}{'descriptors':>14}{'threads':>12}")
    for growth in report.growths:
        a, b = growth.first, growth.last
        memory = f"{a.memory / MEBIBYTE:.1f} -> {b.memory / MEBIBYTE:.1f}"
        lines.append(
            f"{f'{growth.kind} {growth.pid}':<20}{growth.samples:>8}{memory:>18}"
            f"{f'{a.descriptors} -> {b.descriptors}':>14}{f'{a.threads} -> {b.threads}':>12}"
        )
    slowest = "" if report.slowest is None else f", the slowest after {report.slowest:.2f} s"
    lines.append(
        f"{len(report.injuries)} faults in {report.seconds:.0f} s; {report.answered:,} increments answered"
        f" ({report.unknown} not){slowest}; the counter came to {report.final}"
    )
    lines += [f"WRONG: {line}" for line in report.found[:20]] or ["right: each increment was counted exactly once"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Inject random faults under load, and check the whole history."
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="at least 1 (default: 2)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the order of faults (default: random)")
    parser.add_argument("--clients", type=int, default=16, help="number of clients that increment (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("--minutes must be at least 1: no process lives long enough to be judged in less")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that cleanup runs
    report, history = Soak(options.minutes, seed, options.clients).run()
    print(screen(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if report.found:
        place = ROOT / "build" / f"soak-{seed}.jsonl"
        place.parent.mkdir(exist_ok=True)
        save(place, history, report.final)
        print(f"the history: {place}")
    return 1 if report.found else 0


if __name__ == "__main__":
    threading.stack_size(2**18)  # because there are many clients
    sys.exit(main())
