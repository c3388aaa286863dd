"""The main promise, over HTTP, in peace and under `kill -9`: 1 to F, each once, in order.

`tests/test_engines.py` kills the manager and the other engines under the load of processes that call them directly.
"""

import os
import random
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from counter_server.errors import StateLost
from counter_server.history import assert_exactly_once
from tests.load import HttpLoad, open_client
from tests.processes import Manager, Server, eventually


def value(data_dir: Path, counter: str) -> int:
    with open_client(f"manager://{data_dir}") as state:
        return state.counter(counter).value


def test_100_simultaneous_clients_each_see_a_different_number_1_to_100(
    start_server: Callable[..., Server], data_dir: Path, tmp_path: Path
) -> None:
    server = start_server("--workers", "2")
    history = HttpLoad(server.url, "visits", 100, each=1).finish(stop=False)
    assert sorted(value for operation in history for value in operation.answers) == list(range(1, 101))
    assert_exactly_once(history, value(data_dir, "visits"), tmp_path / "history.json")


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["commit", "process"])
def test_http_through_kills_of_the_manager_and_of_workers(
    start_server: Callable[..., Server], data_dir: Path, tmp_path: Path, durability: str
) -> None:
    server = start_server("--workers", "2", "--durability", durability)
    load = HttpLoad(server.url, "hot", 32)
    victims = ["manager", "worker"] * 3
    random.shuffle(victims)
    for kind in victims:
        load.progress(random.randrange(50, 150))
        os.kill(random.choice(eventually(lambda: server.children(kind), f"a {kind} to kill")), signal.SIGKILL)
    load.progress(100)
    history = load.finish()
    assert server.running
    eventually(lambda: len(server.children("worker")) == 2 and len(server.children("manager")) == 1, "all are back")
    assert_exactly_once(history, value(data_dir, "hot"), tmp_path / "history.json")


def test_a_killed_manager_costs_no_request_an_error_and_no_worker_its_place(
    start_server: Callable[..., Server], data_dir: Path, tmp_path: Path
) -> None:
    server = start_server("--workers", "2")
    workers = sorted(server.children("worker"))
    load = HttpLoad(server.url, "hot", 8)
    load.progress(100)
    (manager,) = server.children("manager")
    os.kill(manager, signal.SIGKILL)
    load.progress(200)
    history = load.finish()
    assert sorted(server.children("worker")) == workers
    assert all(operation.answers for operation in history)
    assert_exactly_once(history, value(data_dir, "hot"), tmp_path / "history.json")


def test_a_volatile_manager_that_was_killed_is_reported_first(
    start_manager: Callable[..., Manager], stack: ExitStack
) -> None:
    manager = start_manager("--durability", "none")
    state = stack.enter_context(open_client(manager.url))
    assert [state.counter("c").increment() for _ in range(3)] == [1, 2, 3]
    manager.kill()
    start_manager("--durability", "none")
    with pytest.raises(StateLost) as lost:
        state.counter("c").increment()
    assert lost.value.outcome == "not_applied"
    assert state.counter("c").increment() == 1
