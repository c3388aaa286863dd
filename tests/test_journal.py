"""The journal: every commit survives the process, and foreign files are left alone."""

import gc
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from counter_server.errors import BatchRefused, StartupError, StorageFull
from counter_server.journal import Journal, JournalFailed
from counter_server.ledger import KEY_LIFETIME, Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import (
    LARGEST,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Set,
)
from tests.processes import Program

ANN = b"ann".ljust(16)
BOB = b"bob".ljust(16)
CYD = b"cyd".ljust(16)

RESULTS: list[Result] = [
    1,
    SMALLEST,
    LARGEST,
    True,
    False,
    None,
    Replayed(3),
    Page([("a", 1), ("\u4e2d", -1)], more=True),
    Refusal("limit", "too much"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def open_journal(path: Path) -> Iterator[Callable[..., Journal]]:
    """Open a journal, by default the test's own; all are closed at the end."""
    opened: list[Journal] = []

    def open_journal(at: Path = path, durability: str = "commit") -> Journal:
        opened.append(Journal(at, durability))
        return opened[-1]

    yield open_journal
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(open_journal: Callable[..., Journal]) -> Journal:
    return open_journal()


def some_changes() -> Changes:
    return Changes(
        now=20.0,
        counters={"a": 1, "\u4e2d": SMALLEST, "b": LARGEST, "zero": 0},
        clients={ANN: ClientRecord(7, RESULTS, 20.0), BOB: ClientRecord(LARGEST, [2], 10.5)},
        keys={"k": KeyRecord(b"\0" * 16, 5, 20.0), "l": KeyRecord(b"\xff" * 16, LARGEST, 3.25)},
    )


def as_contents(changes: Changes) -> Contents:
    return Contents(
        {name: value for name, value in changes.counters.items() if value is not None},
        {client: record for client, record in changes.clients.items() if record is not None},
        {key: known for key, known in changes.keys.items() if known is not None},
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_left_alone(directory: Path, before: dict[str, bytes]) -> None:
    """Assert that every file is still there with the same bytes, even after garbage collection."""
    gc.collect()
    after = files_of(directory)
    assert {name: len(content) for name, content in after.items() if name in before} == {
        name: len(content) for name, content in before.items()
    }
    assert {name: after[name] for name in before} == before


def pragma(journal: Journal, name: str) -> int | str:
    """Return a setting of the journal's own connection, which locks all others out."""
    value: int | str = journal._connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def large_changes() -> Changes:
    """Return more changes than fit into a few pages; the first of them would fit."""
    return Changes(now=30.0, counters={"a": 100, **{f"{number:0200}": number for number in range(1000)}})


# Every commit survives


def test_a_new_journal_is_empty(journal: Journal) -> None:
    assert journal.load() == Contents()


def test_the_next_journal_loads_every_commit(open_journal: Callable[..., Journal]) -> None:
    first = open_journal()
    first.commit(some_changes())
    first.close()
    assert open_journal().load() == as_contents(some_changes())


def test_a_later_commit_replaces_and_removes(open_journal: Callable[..., Journal]) -> None:
    first = open_journal()
    first.commit(some_changes())
    first.commit(
        Changes(
            now=30.0,
            counters={"a": 2, "b": None, "never-there": None},
            clients={ANN: ClientRecord(8, [9], 30.0), BOB: None},
            keys={"k": None, "m": KeyRecord(b"m" * 16, 6, 30.0)},
        )
    )
    first.close()
    assert open_journal().load() == Contents(
        counters={"a": 2, "\u4e2d": SMALLEST, "zero": 0},
        clients={ANN: ClientRecord(8, [9], 30.0)},
        keys={"l": KeyRecord(b"\xff" * 16, LARGEST, 3.25), "m": KeyRecord(b"m" * 16, 6, 30.0)},
    )


def test_an_empty_commit_is_allowed(open_journal: Callable[..., Journal]) -> None:
    first = open_journal()
    first.commit(Changes(now=1.0))
    first.commit(some_changes())
    first.commit(Changes(now=2.0))
    first.close()
    assert open_journal().load() == as_contents(some_changes())


@pytest.mark.parametrize("durability", ["commit", "process"])
def test_the_files_of_a_journal_that_was_never_closed_hold_every_commit(
    open_journal: Callable[..., Journal], path: Path, tmp_path: Path, durability: str
) -> None:
    first = open_journal(path, durability)
    first.commit(some_changes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, content in _copies(path):
        (elsewhere / name).write_bytes(content)
    second = open_journal(elsewhere / path.name)
    assert second.load() == as_contents(some_changes())
    assert second.epoch == first.epoch


def _copies(path: Path) -> list[tuple[str, bytes]]:
    """Return the contents of the journal and its log as they are on disk at this moment."""
    return [(file.name, file.read_bytes()) for file in path.parent.glob(path.name + "*")]


_WRITER = """
import sys, pathlib
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.operations import Batch, Increment

journal = Journal(pathlib.Path(sys.argv[1]), sys.argv[2])
ledger = Ledger(journal.load(), journal)
for sequence in range(1, 1_000_000):
    ((value,),) = ledger.perform([Batch(b"w" * 16, sequence, [Increment("a", key=f"k{sequence}")])])
    print(f"answered {value}", flush=True)
"""


@pytest.mark.parametrize("durability", ["commit", "process"])
def test_every_answered_increment_survives_a_kill(
    open_journal: Callable[..., Journal], path: Path, durability: str
) -> None:
    with Program("-c", _WRITER, path, durability) as writer:
        for _ in range(50):
            writer.expect("answered")
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    answered = int(writer.output[-1].split()[1])
    contents = open_journal().load()
    value = contents.counters["a"]
    # The last commit may have been made and not yet answered; nothing else is in doubt.
    assert value in (answered, answered + 1)
    record = contents.clients[b"w" * 16]
    assert (record.sequence, record.results) == (value, [value])
    assert [known.value for known in contents.keys.values()] == list(range(1, value + 1))


def test_the_epoch_stays_the_same_while_the_file_exists(open_journal: Callable[..., Journal], tmp_path: Path) -> None:
    first = open_journal()
    epoch = first.epoch
    assert len(epoch) == 32
    first.commit(some_changes())
    assert first.epoch == epoch
    first.close()
    assert open_journal().epoch == epoch
    assert open_journal(tmp_path / "another").epoch != epoch


def test_clients_and_keys_are_loaded_in_the_order_of_their_last_use(open_journal: Callable[..., Journal]) -> None:
    first = open_journal()
    used = {ANN: 3.0, BOB: 1.0, CYD: 2.0}
    first.commit(
        Changes(
            now=3.0,
            clients={client: ClientRecord(1, [1], time) for client, time in used.items()},
            keys={client.decode().strip(): KeyRecord(b"f" * 16, 1, time) for client, time in used.items()},
        )
    )
    first.commit(Changes(now=4.0, clients={BOB: ClientRecord(2, [1], 4.0)}))
    contents = first.load()
    assert list(contents.clients) == [CYD, ANN, BOB]
    assert list(contents.keys) == ["bob", "cyd", "ann"]


def test_under_load_the_log_is_folded_in_again_and_again(open_journal: Callable[..., Journal], path: Path) -> None:
    journal = open_journal(path, "process")
    largest = 0
    for number in range(1500):
        journal.commit(
            Changes(now=1.0, counters={f"{number % 50:0200}": number}, clients={ANN: ClientRecord(1, [1], 1.0)})
        )
        largest = max(largest, journal.size)
    assert 3 * 2**20 < largest < 6 * 2**20  # a thousand pages, not everything that was ever written
    journal.close()
    assert path.stat().st_size < 100_000
    assert open_journal().load().counters[f"{49:0200}"] == 1499


@pytest.mark.parametrize(("durability", "synchronous"), [("commit", 2), ("process", 1)])
def test_commits_are_synced_where_they_were_promised_to_be(
    open_journal: Callable[..., Journal], path: Path, durability: str, synchronous: int
) -> None:
    """FULL is 2 and NORMAL is 1; in WAL mode FULL syncs at each commit. Check an existing file, too."""
    for _ in range(2):
        journal = open_journal(path, durability)
        assert pragma(journal, "synchronous") == synchronous
        assert pragma(journal, "journal_mode") == "wal"
        journal.close()


# A ledger on it


def answer_of(ledger: Ledger, batch: Batch) -> list[Result]:
    (answer,) = ledger.perform([batch])
    assert not isinstance(answer, BatchRefused), answer
    return answer


def test_a_batch_sent_again_after_a_restart_is_answered_as_before(open_journal: Callable[..., Journal]) -> None:
    operations: list[Operation] = [
        Increment("a", key="k"),
        Increment("a", key="k"),
        Increment("b", key="k"),
        Increment("a", 1, maximum=1),
        Set("c", 5),
        Get("c"),
        Get("d"),
        Delete("d"),
        Delete("c"),
    ]
    first = open_journal()
    before = answer_of(Ledger(first.load(), first), Batch(ANN, 1, operations))
    assert before[:2] == [1, Replayed(1)]
    first.close()
    second = open_journal()
    ledger = Ledger(second.load(), second)
    assert answer_of(ledger, Batch(ANN, 1, operations)) == before
    assert answer_of(ledger, Batch(ANN, 2, [Increment("a"), Increment("a", key="k"), Get("c")])) == [
        2,
        Replayed(1),
        None,
    ]
    assert second.load().counters == {"a": 2}


def test_time_goes_on_from_the_newest_record_whatever_the_clock_says(
    open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=5000.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    first = open_journal()
    ledger = Ledger(first.load(), first)
    clock.now += 100
    answer_of(ledger, Batch(ANN, 1, [Increment("a", key="k")]))
    clock.now += 50
    answer_of(ledger, Batch(BOB, 1, [Increment("a")]))
    first.close()

    clock.now = 7.0  # the machine was started again
    second = open_journal()
    ledger = Ledger(second.load(), second)
    clock.now += 10
    answer_of(ledger, Batch(CYD, 1, [Increment("a")]))
    assert {client: record.used for client, record in second.load().clients.items()} == {ANN: 100, BOB: 150, CYD: 160}
    clock.now += KEY_LIFETIME - 61  # the key is 86,399 seconds old
    assert answer_of(ledger, Batch(b"d" * 16, 1, [Increment("a", key="k")])) == [Replayed(1)]
    clock.now += 2
    assert answer_of(ledger, Batch(b"e" * 16, 1, [Increment("a", key="k")])) == [4]


def test_records_that_the_ledger_forgets_are_removed_from_the_disk(
    open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    journal = open_journal()
    ledger = Ledger(journal.load(), journal)
    answer_of(ledger, Batch(ANN, 1, [Increment("a", key="k")]))
    clock.now += KEY_LIFETIME + 1
    answer_of(ledger, Batch(BOB, 1, [Increment("a")]))
    contents = journal.load()
    assert list(contents.clients) == [BOB]
    assert contents.keys == {}


# Foreign files


def refuse(path: Path) -> str:
    """Return the error message that refuses the file, after checking that it names the file."""
    with pytest.raises(StartupError) as caught:
        Journal(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", [b"no", b"not a database, but somebody's notes\n" * 1000, b"\0" * 4096])
def test_a_file_that_is_not_a_database_is_refused_and_left_alone(path: Path, tmp_path: Path, text: bytes) -> None:
    path.write_bytes(text)
    refuse(path)
    assert_left_alone(tmp_path, {path.name: text})


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE counters (name TEXT, value INTEGER)")
        other.execute("INSERT INTO counters VALUES ('a', 1)")
        other.commit()
    before = files_of(tmp_path)
    assert "not a journal" in refuse(path)
    assert_left_alone(tmp_path, before)


def left_by_a_kill(build: Callable[[sqlite3.Connection], object], path: Path) -> None:
    """Put at `path` a database whose last changes are in its log only, as a killed program leaves it."""
    original = path.with_name("original")
    with closing(sqlite3.connect(original, isolation_level=None)) as other:
        if not other.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            other.execute("PRAGMA journal_mode = WAL")
        build(other)
        for suffix in ("", "-wal"):
            shutil.copy(f"{original}{suffix}", f"{path}{suffix}")
    for file in path.parent.glob("original*"):
        file.unlink()


def test_a_database_of_another_program_that_was_killed_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    left_by_a_kill(lambda other: other.execute("CREATE TABLE precious (a)"), path)
    before = files_of(tmp_path)
    assert len(before[f"{path.name}-wal"]) > 0
    assert "not a journal" in refuse(path)
    assert_left_alone(tmp_path, before)


@pytest.mark.parametrize("version", [0, 1, 3])
def test_a_journal_of_another_format_is_refused_and_left_alone(
    open_journal: Callable[..., Journal], path: Path, tmp_path: Path, version: int
) -> None:
    journal = open_journal()
    journal.commit(some_changes())
    journal.close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA user_version = {version}")
    before = files_of(tmp_path)
    assert f"format {version}" in refuse(path)
    assert_left_alone(tmp_path, before)


def test_a_journal_of_another_format_that_was_killed_is_refused_and_left_alone(
    open_journal: Callable[..., Journal], path: Path, tmp_path: Path
) -> None:
    journal = open_journal(tmp_path / "original")
    journal.commit(some_changes())
    journal.close()
    left_by_a_kill(lambda other: other.execute("PRAGMA user_version = 3"), path)
    before = files_of(tmp_path)
    assert len(before[f"{path.name}-wal"]) > 0
    assert "format 3" in refuse(path)
    assert_left_alone(tmp_path, before)


def test_a_refused_file_is_closed_at_once(path: Path) -> None:
    """Not by the garbage collector: an error that is kept somewhere would keep the file locked."""
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE precious (a)")
        with pytest.raises(StartupError) as caught:
            Journal(path)
        other.execute("PRAGMA busy_timeout = 0")
        other.execute("INSERT INTO precious VALUES (1)")
        other.commit()
    assert str(path) in str(caught.value)


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "no-such-directory" / "journal")
    refuse(tmp_path)


def test_a_journal_in_use_by_another_connection_is_refused(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.commit(some_changes())
    impatient = partial(sqlite3.connect, timeout=0)
    monkeypatch.setattr("counter_server.journal.sqlite3.connect", impatient)
    assert "locked" in refuse(path)
    journal.commit(Changes(now=21.0, counters={"a": 2}))
    assert journal.load().counters["a"] == 2


# Damage and failure


@pytest.mark.parametrize("size", [0, 1, 100, 511])
def test_a_journal_cut_to_almost_nothing_is_not_taken_for_a_new_one(
    journal: Journal, path: Path, tmp_path: Path, size: int
) -> None:
    """SQLite takes it for a new one, and counting would silently begin again at 1."""
    journal.commit(some_changes())
    journal.close()
    path.write_bytes(path.read_bytes()[:size])
    before = files_of(tmp_path)
    assert f"{size} bytes" in refuse(path)
    assert_left_alone(tmp_path, before)


def test_a_journal_whose_tables_have_vanished_is_not_taken_for_a_new_one(journal: Journal, path: Path) -> None:
    journal.commit(some_changes())
    journal.close()
    content = bytearray(path.read_bytes())
    content[103:105] = b"\0\0"  # the number of tables
    path.write_bytes(content)
    with pytest.raises(StartupError, match=str(path)), closing(Journal(path)) as again:
        again.load()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE clients SET results = x'c1ff'",
        "UPDATE clients SET results = x''",
        "UPDATE clients SET results = x'81a16101'",
        "DROP TABLE keys",
        "ALTER TABLE counters RENAME COLUMN value TO something",
    ],
)
def test_a_damaged_journal_is_refused_by_name(open_journal: Callable[..., Journal], path: Path, damage: str) -> None:
    first = open_journal()
    first.commit(some_changes())
    first.close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(damage)
        other.commit()
    second = open_journal()
    with pytest.raises(StartupError) as caught:
        second.load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("number", [0, 199, 200, 523, 999])
def test_a_changed_row_is_named_at_every_position(
    open_journal: Callable[..., Journal], path: Path, number: int
) -> None:
    first = open_journal()
    first.commit(Changes(1.0, {f"row {each:03}": each for each in range(1000)}))
    first.close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE counters SET value = value + 1 WHERE name = ?", (f"row {number:03}",))
        other.commit()
    with pytest.raises(StartupError, match=f"a row of its counters is not what was written: 'row {number:03}'"):
        open_journal().load()


def test_a_journal_whose_pages_were_overwritten_is_refused_by_name(
    open_journal: Callable[..., Journal], path: Path
) -> None:
    first = open_journal()
    first.commit(large_changes())
    first.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xaa" * (len(content) - 4096))
    with pytest.raises(StartupError) as caught:
        open_journal().load()
    assert str(path) in str(caught.value)


def test_a_full_disk_is_a_clean_refusal_and_heals_when_there_is_room(journal: Journal, path: Path) -> None:
    journal.commit(some_changes())
    pragma(journal, f"max_page_count = {pragma(journal, 'page_count')}")
    for _ in range(2):
        with pytest.raises(StorageFull) as caught:
            journal.commit(large_changes())
        assert str(path) in str(caught.value)
        assert journal.load() == as_contents(some_changes())
    journal.commit(Changes(now=31.0, counters={"a": 2}))  # a change that needs no new page fits
    pragma(journal, "max_page_count = 100000")
    journal.commit(large_changes())
    assert len(journal.load().counters) == len(some_changes().counters) + 1000
    assert journal.load().counters["a"] == 100


def test_starts_are_counted_while_the_file_exists(open_journal: Callable[..., Journal]) -> None:
    for expected in (1, 2, 3):
        journal = open_journal()
        journal.count_start()
        assert journal.starts == expected
        assert journal.load() == Contents()
        journal.close()


def test_a_start_that_cannot_be_counted_names_the_file(journal: Journal, path: Path) -> None:
    journal.close()
    with pytest.raises(StartupError) as caught:
        journal.count_start()
    assert str(path) in str(caught.value)


def test_a_ledger_on_a_full_disk_refuses_writes_reads_on_and_heals(
    open_journal: Callable[..., Journal], journal: Journal
) -> None:
    ledger = Ledger(journal.load(), journal)
    answer_of(ledger, Batch(ANN, 1, [Set("a", 1)]))
    pragma(journal, f"max_page_count = {pragma(journal, 'page_count')}")
    many: list[Operation] = [Increment(f"{number:0200}") for number in range(500)]
    refused = answer_of(ledger, Batch(ANN, 2, [Increment("a"), Get("a"), *many]))
    assert [result.code for result in refused if isinstance(result, Refusal)] == ["storage_full"] * 501
    assert refused[1] == 1
    assert ledger.sizes[0] == 1
    pragma(journal, "max_page_count = 100000")
    assert answer_of(ledger, Batch(ANN, 3, [Increment("a"), *many])) == [2] + [1] * 500
    assert len(journal.load().counters) == 501


def test_any_other_failure_leaves_the_outcome_unknown(journal: Journal, path: Path) -> None:
    journal.commit(some_changes())
    journal.close()
    with pytest.raises(JournalFailed) as caught:
        journal.commit(large_changes())
    assert str(path) in str(caught.value)


def test_a_journal_can_be_closed_twice(journal: Journal) -> None:
    journal.commit(some_changes())
    journal.close()
    journal.close()


@pytest.mark.parametrize("suffixes", [[""], ["-wal"], ["", "-wal"]])
@pytest.mark.parametrize("how", ["removed", "replaced", "cut"])
def test_nothing_is_committed_to_files_that_are_gone(
    open_journal: Callable[..., Journal], path: Path, suffixes: list[str], how: str
) -> None:
    journal = open_journal()
    journal.commit(some_changes())
    journal.commit(some_changes())
    for suffix in suffixes:
        file = path.with_name(path.name + suffix)
        if how == "cut":
            os.truncate(file, file.stat().st_size - 1)
            continue
        file.rename(file.with_name(f"{file.name}.moved"))
        if how == "replaced":
            shutil.copy(file.with_name(f"{file.name}.moved"), file)
    for _ in range(2):
        with pytest.raises(JournalFailed, match=f"{path}.* was {how} .*while it was in use"):
            journal.commit(Changes(now=21.0, counters={"a": 2}))
