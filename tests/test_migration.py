"""Moves between real engines, while processes are killed, count, or fill the disk."""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from counter_server.errors import Disconnected, KeyReused, StateLost, StorageFull, Unsupported
from counter_server.ledger import Contents, KeyRecord
from counter_server.moving import contents_of, move, write
from counter_server.operations import Increment
from counter_server.portable import new_file, read
from counter_server.portable import write as write_file
from counter_server.store import Store
from counter_server.stores import open_store
from tests.engines import start
from tests.load import at_once, open_client, spawn
from tests.processes import PATIENCE, ROOT, Manager, Program, eventually, fill
from tests.test_documentation import examples
from tests.test_moving import sample, shown

pytestmark = pytest.mark.slow

StartManager = Callable[..., Manager]
KINDS = ["manager", "none", "redis", "postgresql", "mariadb", "sqlite"]


def many(counters: int, keys: int = 0) -> Contents:
    records = {f"k-{n}": KeyRecord(Increment("orders", key=f"k-{n}").fingerprint(), n, 0.0) for n in range(keys)}
    return Contents({f"shop/{n % 97}/Größe {n}": n * 7919 - 5 for n in range(counters)}, keys=records)


def put(contents: Contents, path: Path) -> Path:
    with new_file(path) as file:
        write_file(contents, file, "json", lambda _records: None)
    return path


def command(*arguments: str | Path) -> Program:
    return Program("-m", "counter_server", *arguments)


def ended(program: Program) -> int:
    """Return the exit status of a program that has much to do."""
    eventually(lambda: not program.running, "its end", 6 * PATIENCE)
    return program.wait()


def cli(*arguments: str | Path, status: int = 0) -> str:
    """Run a command to its end; return what it says."""
    with command(*arguments) as program:
        assert ended(program) == status, (program.output, program.errors)
        return "\n".join(program.errors if status else program.output)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Return a function that makes an empty place of a kind, and returns its URL."""
    with ExitStack() as stack:
        engines: dict[str, Any] = {}

        def make(kind: str) -> str:
            directory = tmp_path_factory.mktemp(kind)
            if kind in ("manager", "none"):
                durability = "commit" if kind == "manager" else "none"
                return stack.enter_context(Manager(directory / "data", "--durability", durability)).url
            if kind == "sqlite":
                return f"sqlite:///{directory}/counters.db"
            if kind not in engines:
                engines[kind] = stack.enter_context(start(kind, directory))
            place: str = engines[kind].make(f"place{time.time_ns()}")
            return place

        yield make


def test_a_round_trip_of_100_000_counters_gives_the_same_bytes_and_keys_still_answer(
    places: Callable[[str], str], tmp_path: Path
) -> None:
    """Manager, Redis, PostgreSQL, manager, by the commands that people use."""
    urls = [places(kind) for kind in ("manager", "redis", "postgresql", "manager")]
    put(many(100_000, keys=1000), tmp_path / "given.jsonl")
    cli("import", tmp_path / "given.jsonl", "--store", urls[0])
    with open_client(urls[0]) as state:
        assert state.counter("orders").increment(3, key="before") == 3
        assert state.counter("orders").increment(key="order-1") == 4
    cli("export", tmp_path / "first.jsonl", "--store", urls[0])
    for source, target in pairwise(urls):
        assert cli("migrate", "--from", source, "--to", target).startswith(
            "100,001 counters and 1,002 keys were written"
        )
    cli("export", tmp_path / "last.jsonl", "--store", urls[-1])
    assert (tmp_path / "last.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    for url in urls[1:]:
        with open_client(url) as state:
            orders = state.counter("orders")
            assert [orders.increment(3, key="before"), orders.increment(key="order-1")] == [3, 4]
            with pytest.raises(KeyReused):
                orders.increment(2, key="before")
            assert orders.increment() == 5


@pytest.mark.parametrize(("source", "target"), list(zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True)))
def test_every_store_moves_to_another(places: Callable[[str], str], source: str, target: str) -> None:
    """Each is read once and written once: a move knows nothing of pairs."""
    contents = sample()
    contents.counters |= {f"{number:04d}{'é' * 125}": number for number in range(6000)}  # more than fit into one answer
    with closing(open_store(places(source))) as first, closing(open_store(places(target))) as second:
        write(contents, first)
        move(first, second)
        assert shown(contents_of(second)) == shown(contents)


def test_memcached_takes_what_it_can_and_refuses_the_rest_before_anything_is_changed(tmp_path: Path) -> None:
    with start("memcached", tmp_path / "memcached") as server, closing(open_store(server.url)) as target:
        counters = {f"c{n}": n for n in range(2500)}
        key = {"k": KeyRecord(b"f" * 16, 1, 0.0)}
        for contents, says in [
            (Contents({**counters, "low": -1}), "no negative numbers.*; nothing was changed"),
            (Contents(counters, keys=key), "no idempotency keys.*; nothing was changed"),
        ]:
            with pytest.raises(Unsupported, match=says):
                write(contents, target, overwrite=True)
        with open_client(server.url) as state:
            assert state.counter("c7").value == 0
        with pytest.raises(Unsupported, match=r"cannot list its counters, .* use --overwrite"):
            write(Contents(counters), target)
        assert write(Contents(counters), target, overwrite=True).counters == 2500
        assert write(Contents({**counters, "more": 1}), target, overwrite=True).counters == 1
        with open_client(server.url) as state:
            assert state.counter("c2499").increment() == 2500
        with pytest.raises(Unsupported, match="cannot be exported"):
            contents_of(target)


def _count(url: str, name: str, began: Barrier, stop: Any) -> None:
    with open_client(url, deadline=PATIENCE) as state:
        began.wait(PATIENCE * 2)
        turn = 0
        while not stop.value:
            turn += 1
            state.counter("orders").increment(key=f"{name}-{turn}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_of_one_moment(places: Callable[[str], str], kind: str) -> None:
    """Each increment takes a key and the next number: at each moment the keys have the numbers up to the counter."""
    url = places(kind)
    began, stop = spawn.Barrier(3), spawn.RawValue("b", 0)
    processes = [spawn.Process(target=_count, args=(url, f"p{number}", began, stop)) for number in range(2)]
    try:
        for process in processes:
            process.start()
        began.wait(PATIENCE * 2)
        with closing(open_store(url)) as store:
            eventually(lambda: contents_of_or_none(store), "the first increment")
            seen: list[int] = []
            while len(set(seen)) < 5:
                found = contents_of(store)
                value = found.counters["orders"]
                assert sorted(record.value for record in found.keys.values()) == list(range(1, value + 1))
                seen.append(value)
                assert all(process.is_alive() for process in processes)
        assert seen == sorted(seen)
    finally:
        stop.value = 1
        for process in processes:
            process.join(PATIENCE)
            process.kill()
            process.join()


def contents_of_or_none(store: Store) -> Contents | None:
    assert hasattr(store, "contents")
    with suppress(Disconnected):  # SQLite, while the other process makes the file: a caller asks again
        found: Contents | None = store.contents(time.monotonic() + PATIENCE)
        return found if found and found.counters else None
    return None


@pytest.mark.parametrize("kind", ["postgresql", "mariadb", "sqlite"])
def test_tables_that_are_made_just_now_are_no_loss(places: Callable[[str], str], kind: str) -> None:
    for _ in range(4):
        url = places(kind)
        turns = iter(range(2))

        def use(url: str = url, turns: Iterator[int] = turns) -> int:
            with closing(open_store(url)) as store:
                if next(turns):
                    write(Contents({"a": 1}), store)
                    return 1
                while not (found := contents_of_or_none(store)):
                    pass
                return found.counters["a"]

        assert at_once(2, use) == [1, 1]


@pytest.mark.parametrize("statement", ["DROP TABLE counter_server_keys", "DELETE FROM counter_server_counters"])
def test_a_store_that_lost_a_part_is_not_exported(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "x.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        write(sample(), store)
    with closing(sqlite3.connect(path)) as other:
        other.execute(statement)
        other.commit()
    with closing(open_store(f"sqlite:///{path}")) as store, pytest.raises(StateLost, match="lost some or all"):
        contents_of(store)


@pytest.mark.parametrize("kind", ["manager", "redis", "postgresql", "sqlite"])
def test_a_migration_that_is_killed_again_and_again_is_complete_in_the_end(
    places: Callable[[str], str], kind: str
) -> None:
    contents = many(6000, keys=300)
    source, target = places("sqlite"), places(kind)
    with closing(open_store(source)) as store:
        write(contents, store)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, found = random.Random(seed), 0
    with closing(open_store(target)) as store:
        for _ in range(3):
            with command("migrate", "--from", source, "--to", target) as program:
                goal = found + chance.randrange(1, 2000)

                def is_far(goal: int = goal, program: Program = program) -> bool:
                    now = contents_of_or_none(store)
                    return not program.running or (now is not None and len(now.counters) >= goal)

                eventually(is_far, f"{goal} counters", 2 * PATIENCE)
                program.kill()
            there = contents_of_or_none(store)
            found = len(there.counters) if there else 0
            assert all(contents.counters[name] == value for name, value in (there.counters if there else {}).items())
        printed = cli("migrate", "--from", source, "--to", target)
        assert f"{6000 - found:,} counters" in printed
        assert shown(contents_of(store)) == shown(contents)


def test_a_manager_that_is_killed_in_the_middle_is_started_again(
    tmp_path: Path, on_demand: str, data_dir: Path
) -> None:
    file = put(many(12_000, keys=1000), tmp_path / "x.jsonl")
    with command("import", file, "--store", on_demand) as program:
        journal = data_dir / "journal.sqlite3-wal"
        for size in (100_000, 300_000):
            with closing(open_store(on_demand)) as store:
                eventually(
                    lambda size=size: not program.running or (journal.exists() and journal.stat().st_size > size),  # type: ignore[misc]
                    "commits",
                )
                assert program.running, (program.output, program.errors)
                os.kill(store.status(time.monotonic() + PATIENCE).pid, signal.SIGKILL)  # type: ignore[attr-defined]
                eventually(lambda: journal.exists(), "the next manager")
        assert ended(program) == 0, program.errors
    with closing(open_store(on_demand)) as store:
        assert shown(contents_of(store)) == shown(many(12_000, keys=1000))


def test_a_source_is_read_without_its_manager_and_after_a_kill(
    start_manager: StartManager, data_dir: Path, tmp_path: Path
) -> None:
    """What a killed export left in the data directory is gone with the next export, or with the next manager."""
    manager = start_manager()
    with closing(open_store(manager.url)) as store:
        write(sample(), store)
    stale = data_dir / ".copy" / "part"

    def leave() -> None:
        stale.parent.mkdir()
        stale.write_text("half")

    def export() -> Contents:
        cli("export", tmp_path / "x.jsonl", "--data-dir", data_dir, "--overwrite")
        with (tmp_path / "x.jsonl").open("rb") as file:
            return read(file, "json", "x")[0]

    manager.kill()
    leave()
    assert shown(export()) == shown(sample())
    start_manager()
    assert not stale.parent.exists()
    leave()
    assert shown(export()) == shown(sample())
    assert not stale.parent.exists()


def test_a_full_disk_is_said_and_the_same_command_continues(small_disk: Path, tmp_path: Path) -> None:
    file = put(many(20_000), tmp_path / "x.jsonl")
    data_dir = small_disk / "data"
    with Manager(data_dir) as manager:
        filler = small_disk / "filler"
        filler.write_bytes(b"\0" * 300_000)
        says = cli("import", file, "--store", manager.url, status=1)
        assert "nothing was counted" in says
        assert "again continues" in says
        with open_client(manager.url) as state:
            assert len(state.counters(limit=1000).counters) == 1000
        filler.unlink()
        # The export needs room beside the journal for a moment, and leaves nothing without it.
        fill(filler)
        says = cli("export", small_disk / "y.jsonl", "--store", manager.url, status=1)
        assert "disk is full; counting goes on" in says or "no part of it is left" in says
        assert not (data_dir / ".copy").exists()
        assert sorted(each.name for each in small_disk.iterdir()) == ["data", "filler"]
    with Manager(tmp_path / "larger") as manager:
        cli("import", file, "--store", manager.url)


def test_the_targets_caps_hold(start_manager: StartManager) -> None:
    contents = many(1500)
    with closing(open_store(start_manager("--max-counters", "1200").url)) as store:
        with pytest.raises(StorageFull, match=r"--max-counters.*again continues"):
            write(contents, store)
        assert len(contents_of(store).counters) == 1200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path, number: int) -> None:
    source = f"sqlite:///{tmp_path}/source.db"
    with closing(open_store(source)) as store:
        write(many(30_000), store)
    place = tmp_path / "place"
    place.mkdir()
    with command("export", place / "x.jsonl", "--store", source) as program:
        eventually(lambda: list(place.iterdir()), "its first bytes")
        program.send_signal(number)
        assert program.wait() != 0
    assert list(place.iterdir()) == []


def test_a_bar_is_for_terminals_alone(tmp_path: Path) -> None:
    write_to = f"sqlite:///{tmp_path}/source.db"
    with closing(open_store(write_to)) as store:
        write(many(2000), store)
    ours, theirs = os.openpty()
    arguments = f"['export', '-', '--store', {write_to!r}, '--format', 'json']"
    program = f"import os, sys; os.dup2({theirs}, 2); from counter_server.cli import main; main({arguments})"
    with Program("-c", program, descriptors=(theirs,)) as running:
        os.close(theirs)
        shown_there = b""
        while b"SHA-256" not in shown_there:
            shown_there += os.read(ours, 65536)
        assert running.wait() == 0
    os.close(ours)
    assert b"Exporting" in shown_there
    assert b"100%" in shown_there
    assert json.loads(running.output[-1])["counters"] == 2000


def test_objects_that_stay_are_mentioned(tmp_path: Path, on_demand: str) -> None:
    from counter_server import open_state
    from tests.hosted_classes import SomeObj

    with open_state(on_demand) as state:
        state.object("global_obj", SomeObj, 0).query()
        state.counter("visits").increment()
    with command("migrate", "--from", on_demand, "--to", f"sqlite:///{tmp_path}/x.db") as program:
        assert program.wait() == 0
        (line,) = program.errors
    assert line.startswith("1 shared objects stay in manager://")
    assert "counter-server backup" in line


def test_the_commands_of_the_page_work(tmp_path: Path, on_demand: str, data_dir: Path) -> None:
    """Each one of docs/moving.md, in its order; all managers end with the test."""
    blocks = examples(ROOT / "docs" / "moving.md")
    (table,) = (block for block in blocks if block.startswith("name,value"))
    (tmp_path / "table.csv").write_text(table)
    (tmp_path / "app").mkdir()
    with closing(open_store(on_demand)) as store:
        write(sample(), store)
    with start("redis", tmp_path / "redis") as server:
        lines = [line for block in blocks if block.startswith("counter-server ") for line in block.splitlines()]
        assert len(lines) == 5
        for line in lines:
            replaced = line.replace("/var/lib/counters", str(data_dir)).replace("/var/lib", str(tmp_path))
            where = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            ran = replaced.replace("redis://localhost", f"'{server.url}'")
            with Program("-ec", f"set -o pipefail; {ran}", program="bash", cwd=tmp_path, environment=where) as program:
                assert program.wait() == 0, (line, program.errors)
    for name in ("counters", "other"):
        url = f"sqlite:///{tmp_path}/app/counters.db" if name == "counters" else f"manager://{tmp_path}/{name}"
        with closing(open_store(url)) as store:
            assert shown(contents_of(store)) == shown(sample())
    with closing(open_store(f"manager://{tmp_path}/table")) as store:
        assert contents_of(store).counters == {"visits": 3, "shop, orders": -5}
