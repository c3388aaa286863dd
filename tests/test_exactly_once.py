"""The main promise, over HTTP and straight at the store, in peace and under `kill -9`: 1 to F, each once, in order.

`tests/test_engines.py` kills the manager and the other engines under the load of processes.
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
from tests.load import HttpLoad, StoreLoad, open_client
from tests.processes import Manager, Server, eventually


def value(data_dir: Path, counter: str) -> int:
    with open_client(f"manager://{data_dir}") as state:
        return state.counter(counter).value


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_100_simultaneous_clients_each_see_a_different_number_1_to_100(
    start_server: Callable[..., Server], data_dir: Path, tmp_path: Path, workers: int
) -> None:
    server = start_server("--workers", str(workers))
    history = HttpLoad(server.url, "visits", 100, each=1).finish(stop=False)
    assert sorted(value for operation in history for value in operation.answers) == list(range(1, 101))
    assert_exactly_once(history, value(data_dir, "visits"), tmp_path / "history.json")


@pytest.mark.slow
def test_8_processes_of_8_threads_straight_at_the_store(
    start_manager: Callable[..., Manager], data_dir: Path, tmp_path: Path
) -> None:
    history = StoreLoad(start_manager().url, "hot", 8, 8, tmp_path, each=20).finish(stop=False)
    assert len(history) == 8 * 8 * 20
    assert all(operation.answers for operation in history)
    final = value(data_dir, "hot")
    assert final == len(history)
    assert_exactly_once(history, final, tmp_path / "history.json")


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["commit", "process"])
def test_http_through_5_kills_of_the_manager_and_5_of_a_worker(
    start_server: Callable[..., Server], data_dir: Path, tmp_path: Path, durability: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = start_server("--workers", "2", "--durability", durability)
    load = HttpLoad(server.url, "hot", 32)
    victims = ["manager", "worker"] * 5
    chance.shuffle(victims)
    for kind in victims:
        load.progress(chance.randrange(50, 150))
        os.kill(chance.choice(eventually(lambda: server.children(kind), f"a {kind} to kill")), signal.SIGKILL)
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


def test_numbers_of_a_volatile_manager_begin_again_only_with_an_error_that_says_so(
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
