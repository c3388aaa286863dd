"""The page for Prometheus: what the manager reports about itself, and the counters that the operator names."""

import logging
import platform
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from flask import Flask, Response
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ...errors import CounterServerError, DeadlineExceeded, InvalidRequest, StartupError
from ...operations import Get, Operation, Result, check_name
from ...scan import beginning_with
from ...state import State
from ...status import COMMIT_BOUNDS, FIGURES, Process, Status

log = logging.getLogger(__name__)

_MOST_NAMED = 1000  # counters among the metrics


def page(state: State, patterns: Sequence[str], processes: Sequence[Process], seconds: float, accept: str) -> Response:
    """Make the page.

    :param state: a state of the application's store.
    :param patterns: of the counters to show; see `patterns_of`.
    :param seconds: the time limit for what is asked of the store.
    :param accept: the header that chooses the format.
    """
    deadline = time.monotonic() + seconds
    up, status, named = True, None, _Named()
    try:
        status = state.status(within=seconds)
        if status is None:  # the store has no figures, but does it answer?
            state.submit(Get("any"), within=seconds)
        if patterns:
            named = _find(patterns, state, deadline)
    except CounterServerError as error:
        log.warning("no figures: %s", error)
        up = False
    families = [*_metrics(up, status, processes), *(_of_counters(named) if patterns and up else ())]
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the header asks for a version that is not a number
        encode, content_type = choose_encoder("")
    # In no registry, which holds the metrics of one process.
    return Response(encode(cast(Collector, SimpleNamespace(collect=lambda: families))), content_type=content_type)


def patterns_of(app: Flask) -> list[str]:
    """Return the patterns in ``COUNTER_SERVER_METRICS_COUNTERS`` of an app's configuration: none by default.

    :raises StartupError: if a pattern can match no name.
    """
    patterns = app.config.get("COUNTER_SERVER_METRICS_COUNTERS", ())
    if not isinstance(patterns, list | tuple | set):
        raise StartupError(f"COUNTER_SERVER_METRICS_COUNTERS must be a list of patterns, not {patterns!r}")
    found = []
    for pattern in patterns:
        try:
            found.append(unicodedata.normalize("NFC", pattern))
            check_name(found[-1])
        except (InvalidRequest, TypeError) as error:
            raise StartupError(f"{pattern!r} is not a pattern of counters' names: {error}") from error
    return found


class _Named(NamedTuple):
    """The counters that the operator's patterns name, and whether some are left out."""

    counters: dict[str, int] = {}  # noqa: RUF012 - never changed
    is_cut: bool = False


def _find(patterns: Sequence[str], state: State, deadline: float) -> _Named:
    """Find the counters of all patterns until the deadline, in `time.monotonic` seconds."""
    found: dict[str, int] = {}

    def submit(operation: Operation) -> Result:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the time limit is over before all counters were looked at", "not_applied")
        return state.submit(operation, within=left)

    for pattern in patterns:
        literal = re.match(r"[^*?[]*", pattern)[0]  # type: ignore[index] # it always matches
        try:
            if literal == pattern:
                value = submit(Get(pattern))
                candidates: Iterator[tuple[str, int]] = iter([(pattern, value)] if type(value) is int else [])
            else:
                candidates = beginning_with(literal, submit)
            for name, number in candidates:
                if fnmatchcase(name, pattern):
                    if len(found) >= _MOST_NAMED and name not in found:
                        return _Named(found, is_cut=True)
                    found[name] = number
        except CounterServerError as error:
            log.warning("counters are missing in the metrics, of the pattern %r: %s", pattern, error)
            return _Named(found, is_cut=True)
    return _Named(found)


def _of_counters(named: _Named) -> Iterator[Metric]:
    values = GaugeMetricFamily("counter_server_counter", "The counters that the operator chose.", labels=["name"])
    for name, value in named.counters.items():
        values.add_metric([name], value)
    yield values
    help_ = f"Whether chosen counters are missing: beyond {_MOST_NAMED}, or beyond the time limit."
    yield GaugeMetricFamily("counter_server_counters_cut", help_, named.is_cut)


@cache
def _build() -> dict[str, str]:
    return {"version": version("counter-server"), "python": platform.python_version()}


def _metrics(up: bool, status: Status | None, processes: Sequence[Process]) -> Iterator[Metric]:  # noqa: FBT001
    """Describe the whole server, with names by https://prometheus.io/docs/practices/naming/."""
    yield GaugeMetricFamily("counter_server_up", "Whether the store answered.", up)
    yield InfoMetricFamily("counter_server_build", "The program that answers.", _build())
    if status is not None:
        epoch = {"durability": status.durability, "epoch": status.epoch}
        yield InfoMetricFamily("counter_server_manager", "The manager, and the epoch of its counters.", epoch)
        for name, figure in FIGURES.items():
            if figure.metric:
                kind = CounterMetricFamily if figure.grows else GaugeMetricFamily
                yield kind(f"counter_server_{figure.metric}", figure.help, getattr(status, name))
        slow = GaugeMetricFamily("counter_server_slow_call_seconds", "Seconds so far.", labels=["object", "method"])
        for call in {
            (each.object, each.method): each for each in sorted(status.slow_calls, key=attrgetter("seconds"))
        }.values():
            slow.add_metric([call.object, call.method], call.seconds)  # the longest of each method
        yield slow
        yield from _commit_times(status)
        yield from _objects(status)
        help_ = "Processes that call the store."
        yield GaugeMetricFamily("counter_server_connected_processes", help_, status.connected_processes)
    if processes:
        up_now = GaugeMetricFamily("counter_server_process_up", "Whether the process runs.", labels=["process"])
        uptime = GaugeMetricFamily("counter_server_process_uptime_seconds", "Seconds of its life.", labels=["process"])
        restarts = CounterMetricFamily("counter_server_process_restarts", "Starts after the first.", labels=["process"])
        for process in processes:
            up_now.add_metric([process.name], process.pid is not None)
            uptime.add_metric([process.name], process.uptime)
            restarts.add_metric([process.name], process.restarts)
        yield from (up_now, uptime, restarts)


def _commit_times(status: Status) -> Iterator[Metric]:
    help_ = "Commits to the journal, of counters and of shared objects."
    family = HistogramMetricFamily("counter_server_commit_duration_seconds", help_, labels=["of"])
    for kind, times in status.commit_times.items():
        bounds = [*map(repr, COMMIT_BOUNDS), "+Inf"]
        family.add_metric([kind], list(zip(bounds, accumulate(times.counts), strict=True)), times.seconds)
    yield family


def _objects(status: Status) -> Iterator[Metric]:
    """Describe each shared object that the manager could make."""

    def family(kind: type[Any], name: str, help_: str) -> Any:
        return kind(f"counter_server_object_{name}", help_, labels=["object", "class"])

    calls = family(CounterMetricFamily, "calls", "Calls that were answered.")
    failed = family(CounterMetricFamily, "errors", "Calls that raised an exception, or were refused.")
    running = family(GaugeMetricFamily, "running_calls", "Calls that run now.")
    made = family(GaugeMetricFamily, "made", "0: the object could not be made.")
    of_entries = {
        "now": family(GaugeMetricFamily, "entries", "Entries of a dict, cache or limit."),
        "most": family(GaugeMetricFamily, "most_entries", "The most entries that it may have."),
        "hits": family(CounterMetricFamily, "hits", "Reads that found an entry."),
        "misses": family(CounterMetricFamily, "misses", "Reads that found none."),
        "evictions": family(CounterMetricFamily, "evictions", "Live entries removed for lack of room."),
        "expired": family(CounterMetricFamily, "expirations", "Entries removed as they had expired."),
    }
    for each in status.hosted:
        labels = [each.name, each.cls]
        made.add_metric(labels, not each.not_made)
        if each.not_made:
            continue
        calls.add_metric(labels, each.calls)
        failed.add_metric(labels, each.errors)
        running.add_metric(labels, each.running)
        for name, metric in of_entries.items():
            value = getattr(each.entries, name, None)
            if value is not None:
                metric.add_metric(labels, value)
    yield from (calls, failed, running, made, *of_entries.values())
