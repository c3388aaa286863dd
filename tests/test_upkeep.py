"""Backups can be restored, and checks find damage, with a running manager and without one."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

import pytest

from counter_server import State, journal
from counter_server.errors import StartupError, StorageFull
from counter_server.journal import Journal, examine
from counter_server.ledger import Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import Batch, Increment, Result
from tests.journals import Committing
from tests.load import open_client
from tests.processes import PATIENCE, ROOT, Manager, fill

StartManager = Callable[..., Manager]


class Done:
    """One run of the command, with its exit status and output."""

    def __init__(self, *arguments: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "counter_server", *arguments],
            cwd=ROOT,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            text=True,
        )
        self.status, self.output, self.errors = done.returncode, done.stdout, done.stderr
        assert "Traceback" not in self.errors


@pytest.fixture
def state(start_manager: StartManager, stack: ExitStack) -> State:
    """Return the state of a running manager, with a counter at 3 and a key."""
    state = stack.enter_context(open_client(start_manager().url))
    assert [state.counter("c").increment(key=key) for key in (None, None, "k")] == [1, 2, 3]
    return state


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Online


def test_a_backup_of_a_running_manager_is_one_file_that_can_be_restored(
    state: State, start_manager: StartManager, data_dir: Path, tmp_path: Path, stack: ExitStack
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    backup = place / "b\N{SNOWMAN} .db"
    done = Done("backup", backup, "--data-dir", data_dir)
    assert (done.status, done.errors) == (0, "")
    assert str(backup) in done.output
    assert left_in(place) == [backup.name]
    assert backup.stat().st_mode & 0o777 == 0o600
    assert state.counter("c").increment() == 4  # the manager keeps running
    place.chmod(0o500)  # the copy has no log, and needs no room for one
    assert "1 counters, 1 idempotency keys, 1 clients" in Done("check", backup).output
    assert left_in(place) == [backup.name]

    other = tmp_path / "restored"
    other.mkdir(mode=0o700)
    shutil.copy(backup, other / "journal.sqlite3")
    restored = stack.enter_context(Manager(other))
    again = stack.enter_context(open_client(restored.url))
    assert again.counter("c").increment(key="k") == 3
    assert again.counter("c").increment() == 4


def test_a_backup_never_overwrites_a_file(state: State, data_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("notes")
    before = left_in(tmp_path)
    done = Done("backup", precious, "--data-dir", data_dir)
    assert done.status == 1
    assert f"{precious} is there already" in done.errors
    assert precious.read_text() == "notes"
    for nowhere in (tmp_path / "no" / "such", Path("/proc/backup"), tmp_path / ("x" * 300)):
        done = Done("backup", nowhere, "--data-dir", data_dir)
        assert done.status == 1
        assert str(nowhere) in done.errors
        assert len(done.errors.splitlines()) == 1
    assert left_in(tmp_path) == before
    assert state.counter("c").increment() == 4


def test_a_backup_to_a_full_disk_fails_alone(state: State, data_dir: Path, small_disk: Path) -> None:
    fill(small_disk / "filler")
    done = Done("backup", small_disk / "b", "--data-dir", data_dir)
    assert done.status == 1
    assert "full" in done.errors
    assert left_in(small_disk) == ["filler"]
    assert state.counter("c").increment() == 4


def test_a_running_managers_journal_is_checked_against_its_memory(state: State, data_dir: Path) -> None:
    done = Done("check", "--data-dir", data_dir)
    assert (done.status, done.errors) == (0, "")
    assert done.output == (
        f"{data_dir / 'journal.sqlite3'} is whole: 1 counters, 1 idempotency keys, 1 clients;"
        " the manager's memory is the same\n"
    )
    assert state.counter("c").increment() == 4


def test_counters_with_durability_none_can_neither_be_copied_nor_checked(
    start_manager: StartManager, data_dir: Path, tmp_path: Path
) -> None:
    start_manager("--durability", "none")
    for command in (["backup", tmp_path / "b"], ["check"]):
        done = Done(*command, "--data-dir", data_dir)
        assert done.status == 1
        assert "in memory only" in done.errors


def test_a_backup_beside_the_log_of_another_journal_is_refused(state: State, data_dir: Path, tmp_path: Path) -> None:
    """SQLite would read the log's pages as the backup's."""
    assert Done("backup", tmp_path / "b", "--data-dir", data_dir).status == 0
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


# Offline


def test_both_work_without_a_manager_and_check_changes_nothing(
    state: State, stack: ExitStack, start_manager: StartManager, data_dir: Path, tmp_path: Path
) -> None:
    stack.close()  # kills the manager: the last commits are in the log
    files = {path.name: path.read_bytes() for path in data_dir.glob("journal*")}
    assert len(files) == 2
    done = Done("check", "--data-dir", data_dir)
    assert (done.status, done.errors) == (0, "")
    assert "1 counters, 1 idempotency keys, 1 clients" in done.output
    assert {name: (data_dir / name).read_bytes() for name in files} == files
    done = Done("backup", tmp_path / "b", "--data-dir", data_dir)
    assert (done.status, done.errors) == (0, "")
    assert examine(tmp_path / "b").counters == {"c": 3}


def test_without_a_journal_nothing_is_created(data_dir: Path, tmp_path: Path) -> None:
    for command in (["backup", tmp_path / "b"], ["check"], ["check", tmp_path / "b"]):
        done = Done(*command, "--data-dir", data_dir)
        assert done.status == 1
        assert len(done.errors.splitlines()) == 1
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
    kept.commit(some_changes())
    assert examine_closed(kept) == Contents(
        {"a": 1}, {b"c" * 16: ClientRecord(7, [1], 2.0)}, {"k": KeyRecord(b"f" * 16, 5, 2.0)}, {"o": b"state"}
    )
    with closing(sqlite3.connect(kept.path)) as other:
        other.execute(statement)
        other.commit()
    with pytest.raises(StartupError, match=words) as found:
        examine(kept.path)
    assert str(kept.path) in str(found.value)
    done = Done("check", kept.path)
    assert done.status == 1
    assert (str(kept.path) in done.errors, len(done.errors.splitlines())) == (True, 1)
    with pytest.raises(StartupError, match=words), closing(Journal(kept.path)) as again:
        again.load()


def some_changes() -> Changes:
    return Changes(
        now=2.0,
        counters={"a": 1},
        clients={b"c" * 16: ClientRecord(7, [1], 2.0)},
        keys={"k": KeyRecord(b"f" * 16, 5, 2.0)},
        objects={"o": b"state"},
    )


def examine_closed(kept: Journal) -> Contents:
    kept.close()
    return examine(kept.path)


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
