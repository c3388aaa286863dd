"""The figures in Prometheus' words: https://prometheus.io/docs/practices/naming/."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ...status import Process, Status


def exposition(accept: str, *, up: bool, status: Status | None, processes: list[Process]) -> tuple[bytes, str]:
    """The figures as text, and its content type: OpenMetrics or Prometheus' own, as `accept` asks."""
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # a version that is not made of numbers
        encode, content_type = choose_encoder("")
    return encode(_Figures(up, status, processes)), content_type


class _Figures(Collector):
    """What is told once. It is in no registry: what a process has registered is that process's truth alone."""

    def __init__(self, up: bool, status: Status | None, processes: list[Process]) -> None:  # noqa: FBT001
        self._up = up
        self._status = status
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        yield _gauge("up", "Whether the store answered.", self._up)
        if self._status is not None:
            yield from _of_manager(self._status)
        if self._processes:
            yield from _of_processes(self._processes)


def _of_manager(status: Status) -> Iterator[Metric]:
    labels = {"durability": status.durability, "epoch": status.epoch}
    yield InfoMetricFamily("counter_server_manager", "The manager, and the epoch of its counters.", labels)
    yield _gauge("manager_uptime_seconds", "Seconds since the manager began.", status.uptime)
    yield _count("manager_starts", "How often a manager began on this data directory.", status.starts)
    yield _gauge("counters", "Counters that there are.", status.counters)
    yield _gauge("objects", "Shared objects that the manager hosts.", status.objects)
    yield _gauge("clients", "Clients whose last batch the manager remembers.", status.clients)
    yield _gauge("idempotency_keys", "Idempotency keys that the manager remembers.", status.keys)
    yield _gauge("connections", "Open connections to the manager.", status.connections)
    yield _count("batches", "Batches of writes to counters, since the manager began.", status.batches)
    yield _count("operations", "Operations in these batches.", status.operations)
    yield _count("commits", "Commits that these batches took.", status.commits)
    yield _count("commit_seconds", "Seconds that these commits took.", status.commit_seconds)
    slow = GaugeMetricFamily(
        "counter_server_slow_call_seconds",
        "Seconds that a long call of a shared object has run; it still does.",
        labels=["object", "method"],
    )
    for call in status.slow_calls:
        slow.add_metric([call.object, call.method], call.seconds)
    yield slow
    yield _gauge("journal_bytes", "Bytes of the journal, its log included.", status.journal_bytes)


def _of_processes(processes: list[Process]) -> Iterator[Metric]:
    up = GaugeMetricFamily("counter_server_process_up", "Whether a process fills this place.", labels=["process"])
    uptime = GaugeMetricFamily(
        "counter_server_process_uptime_seconds", "Seconds since that process was started.", labels=["process"]
    )
    restarts = CounterMetricFamily(
        "counter_server_process_restarts", "How often another one had to be started there.", labels=["process"]
    )
    for process in processes:
        up.add_metric([process.name], process.pid is not None)
        uptime.add_metric([process.name], process.uptime)
        restarts.add_metric([process.name], process.restarts)
    yield from (up, uptime, restarts)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"counter_server_{name}", meaning, value)


def _count(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"counter_server_{name}", meaning, value)
