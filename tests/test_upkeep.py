"""Backups can be restored, and checks find damage, with a running manager and without one."""

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from counter_server import journal
from counter_server.cli import main
from counter_server.errors import StartupError, StorageFull
from counter_server.journal import Journal, examine
from counter_server.ledger import Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import Batch, Increment, Result
from tests.journals import Committing
from tests.load import open_client
from tests.processes import Manager, fill


def cli(*arguments: str | Path) -> str:
    """Run the command, and return what it prints."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def refused(*arguments: str | Path) -> str:
    """Run the command, and return its one line of error."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# With a running manager


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the data directory of a running manager, with a counter at 3 and a key."""
    data_dir = tmp_path_factory.mktemp("upkeep") / "data"
    with Manager(data_dir) as manager, open_client(manager.url) as state:
        assert [state.counter("c").increment(key=key) for key in (None, None, "k")] == [1, 2, 3]
        yield data_dir
        assert state.counter("c").increment() == 4  # the manager keeps running


FOUND = "1 counters, 1 idempotency keys, 1 clients"


def test_a_backup_of_a_running_manager_is_one_file_that_can_be_restored(
    data_dir: Path, tmp_path: Path, stack: ExitStack
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    backup = place / "b\N{SNOWMAN} .db"
    assert str(backup) in cli("backup", backup, "--data-dir", data_dir)
    assert left_in(place) == [backup.name]
    assert backup.stat().st_mode & 0o777 == 0o600
    place.chmod(0o500)  # the copy has no log, and needs no room for one
    assert FOUND in cli("check", backup)
    assert left_in(place) == [backup.name]

    other = tmp_path / "restored"
    other.mkdir(mode=0o700)
    shutil.copy(backup, other / "journal.sqlite3")
    restored = stack.enter_context(open_client(stack.enter_context(Manager(other)).url))
    assert restored.counter("c").increment(key="k") == 3
    assert restored.counter("c").increment() == 4


def test_a_backup_never_overwrites_a_file(data_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("notes")
    assert f"{precious} is there already" in refused("backup", precious, "--data-dir", data_dir)
    assert precious.read_text() == "notes"
    for nowhere in (tmp_path / "no" / "such", Path("/proc/backup"), tmp_path / ("x" * 300)):
        assert str(nowhere) in refused("backup", nowhere, "--data-dir", data_dir)
    assert left_in(tmp_path) == [precious.name]


def test_a_backup_to_a_full_disk_fails_alone(data_dir: Path, small_disk: Path) -> None:
    fill(small_disk / "filler")
    assert "full" in refused("backup", small_disk / "b", "--data-dir", data_dir)
    assert left_in(small_disk) == ["filler"]


def test_a_running_managers_journal_is_checked_against_its_memory(data_dir: Path) -> None:
    path = data_dir / "journal.sqlite3"
    assert cli("check", "--data-dir", data_dir) == f"{path} is whole: {FOUND}; the manager's memory is the same\n"


@pytest.mark.slow
def test_counters_with_durability_none_are_not_copied_or_checked(tmp_path: Path, stack: ExitStack) -> None:
    stack.enter_context(Manager(tmp_path / "volatile", "--durability", "none"))
    for command in (["backup", tmp_path / "b"], ["check"]):
        assert "in memory only" in refused(*command, "--data-dir", tmp_path / "volatile")


def test_a_backup_beside_the_log_of_another_journal_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """SQLite would read the log's pages as the backup's."""
    cli("backup", tmp_path / "b", "--data-dir", data_dir)
    place = tmp_path / "restored"
    place.mkdir(mode=0o700)
    journal, log = place / "journal.sqlite3", place / "journal.sqlite3-wal"
    shutil.copy(data_dir / "journal.sqlite3-wal", log)
    for _ in ("without a journal", "with another one"):
        files = {path.name: path.read_bytes() for path in place.glob("journal*")}
        with pytest.raises(StartupError, match=f"{log} does not belong"):
            Journal(journal)
        assert {path.name: path.read_bytes() for path in place.glob("journal*")} == files
        shutil.copy(tmp_path / "b", journal)
    log.unlink()
    with closing(Journal(journal)) as restored:
        assert restored.load().counters == {"c": 3}


# Without one


def test_both_work_without_a_manager_and_check_changes_nothing(data_dir: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir(mode=0o700)
    for file in data_dir.glob("journal*"):  # the last commits are in the log
        shutil.copy(file, killed)
    files = {path: path.read_bytes() for path in killed.iterdir()}
    assert len(files) == 2
    assert FOUND in cli("check", "--data-dir", killed)
    assert {path: path.read_bytes() for path in files} == files
    cli("backup", tmp_path / "b", "--data-dir", killed)
    assert examine(tmp_path / "b").counters == {"c": 3}


def test_without_a_journal_nothing_is_created(tmp_path: Path) -> None:
    for command in (["backup", tmp_path / "b"], ["check"], ["check", tmp_path / "b"]):
        refused(*command, "--data-dir", tmp_path / "nowhere")
    assert left_in(tmp_path) == []


# The journal itself


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Journal]:
    kept = Journal(tmp_path / "journal", "process")
    yield kept
    kept.close()


def test_a_backup_during_commits_is_consistent(kept: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup copies one page at a time, so that many commits happen in its pauses."""
    monkeypatch.setattr(journal, "_BACKUP_PAGES", 1)
    kept.commit(Changes(1.0, counters={f"{number:0200}": number for number in range(500)}))
    ledger = Ledger(kept.load(), kept)
    stop = threading.Event()
    done = 0
    seen: list[int] = []  # number of applied batches at each pause
    pause = kept._pause

    def watched(status: int, remaining: int, total: int) -> None:
        seen.append(done)
        pause(status, remaining, total)

    monkeypatch.setattr(kept, "_pause", watched)

    def work() -> None:
        nonlocal done
        for sequence in count(1):
            if stop.is_set():
                return
            name = f"{(sequence * 7) % 500:0200}"
            ledger.perform([Batch(b"w" * 16, sequence, [Increment(name), Increment("first"), Increment("last")])])
            done = sequence

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for round_ in range(3):
            before = done
            kept.back_up(tmp_path / f"{round_}")
            after = done
            assert seen[-1] - seen[0] > 10  # the backup did not block them
            seen.clear()
            found = examine(tmp_path / f"{round_}")
            moment = found.clients[b"w" * 16].sequence
            assert before <= moment <= after + 1
            assert found.counters["first"] == found.counters["last"] == moment
            assert sum(value for name, value in found.counters.items() if len(name) == 200) == 499 * 250 + moment
    finally:
        stop.set()
        worker.join()
    ledger.show(kept.check)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE counters SET value = 2", "a row of its counters is not what was written: 'a'"),
        ("UPDATE counters SET name = 'b'", "a row of its counters"),
        ("UPDATE clients SET sequence = 8", "a row of its clients"),
        ("UPDATE keys SET value = 6", "a row of its keys"),
        ("UPDATE objects SET state = x'00'", "a row of its objects"),
        ("ALTER TABLE counters RENAME COLUMN value TO worth", "its tables are not a journal's"),
        ("CREATE TABLE another (x)", "its tables are not a journal's"),
    ],
)
def test_a_row_changed_by_another_program_is_found(kept: Journal, tmp_path: Path, statement: str, words: str) -> None:
    rows: Any = ({"a": 1}, {b"c" * 16: ClientRecord(7, [1], 2.0)}, {"k": KeyRecord(b"f" * 16, 5, 2.0)}, {"o": b"state"})
    kept.commit(Changes(2.0, *rows))
    kept.close()
    assert examine(kept.path) == Contents(*rows)
    with closing(sqlite3.connect(kept.path)) as other:
        other.execute(statement)
        other.commit()
    with pytest.raises(StartupError, match=words) as found:
        examine(kept.path)
    assert str(kept.path) in str(found.value)
    assert str(kept.path) in refused("check", kept.path)
    with pytest.raises(StartupError, match=words), closing(Journal(kept.path)) as again:
        again.load()


def test_a_difference_between_memory_and_disk_is_found(kept: Journal) -> None:
    ledger = Ledger(kept.load(), kept)
    client = os.urandom(16)
    ledger.perform([Batch(client, 1, [Increment("a"), Increment("b", key="k")])])
    ledger.show(kept.check)
    for counters, clients, keys, words in [
        ({"a": 2, "b": 1}, None, None, r"its counters have \[1\] for 'a', and the memory 2"),
        ({"a": 1, "b": 1, "c": 1}, None, None, "it has 2 counters, and the memory 3"),
        (None, {}, None, "it knows a client at batch 1 that the memory does not"),
        (None, {client: ClientRecord(1, [1, 2], 0.0)}, None, "other results of a client's batch 1"),
        (None, None, dict[str, KeyRecord](), "its keys have .* for 'k'"),
    ]:
        seen = ledger.show(lambda _contents: None)
        wrong = Contents(
            counters if counters is not None else seen.counters,
            clients if clients is not None else seen.clients,
            keys if keys is not None else seen.keys,
        )
        with pytest.raises(StartupError, match=words):
            kept.check(wrong)


def test_refusals_remembered_only_in_memory_are_not_damage(kept: Journal) -> None:
    def commit(changes: Changes) -> None:
        if full:
            raise StorageFull("no room")
        kept.commit(changes)

    ledger = Ledger(kept.load(), Committing(commit))
    client = os.urandom(16)
    full = False
    answers: list[Result] = []
    for sequence in (1, 2):
        (results,) = ledger.perform([Batch(client, sequence, [Increment("a")])])
        assert isinstance(results, list)
        answers += results
        full = True
    ledger.perform([Batch(os.urandom(16), 1, [Increment("a")])])
    assert answers[0] == 1
    ledger.show(kept.check)
