"""Backups can be restored, and checks find damage, with a running manager and without one."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from counter_server.cli import main
from counter_server.errors import StartupError
from counter_server.journal import Journal, read_checked
from counter_server.ledger import Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import Batch, Increment
from tests.load import open_client
from tests.processes import Manager, fill


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def cli(*arguments: str | Path) -> str:
    """Run the command, and return what it prints."""
    status, printed, errors = run(*arguments)
    assert (status, errors) == (0, "")
    return printed


def refused(*arguments: str | Path) -> str:
    """Run the command, and return its one line of error."""
    status, printed, errors = run(*arguments)
    assert (status, printed) == (1, "")
    (line,) = errors.splitlines()
    return line


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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


@pytest.mark.slow
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
    assert read_checked(tmp_path / "b").counters == {"c": 3}


def test_without_a_journal_nothing_is_created(tmp_path: Path) -> None:
    for command in (["backup", tmp_path / "b"], ["check"], ["check", tmp_path / "b"]):
        refused(*command, "--data-dir", tmp_path / "nowhere")
    assert left_in(tmp_path) == []


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Journal]:
    kept = Journal(tmp_path / "journal", "process")
    yield kept
    kept.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE counters SET value = 2", "a row of its counters is not what was written: 'a'"),
        ("UPDATE counters SET name = 'b'", "a row of its counters"),
        ("UPDATE clients SET sequence = 8", "a row of its clients"),
        ("UPDATE keys SET value = 6", "a row of its keys"),
        ("UPDATE objects SET state = x'00'", "a row of its objects"),
    ],
)
def test_a_row_changed_by_another_program_is_found(kept: Journal, tmp_path: Path, statement: str, words: str) -> None:
    rows: Any = ({"a": 1}, {b"c" * 16: ClientRecord(7, [1], 2.0)}, {"k": KeyRecord(b"f" * 16, 5, 2.0)}, {"o": b"state"})
    kept.commit(Changes(2.0, *rows))
    kept.close()
    assert read_checked(kept.path) == Contents(*rows)
    with closing(sqlite3.connect(kept.path)) as other:
        other.execute(statement)
        other.commit()
    with pytest.raises(StartupError, match=f"{kept.path}.*{words}"), closing(Journal(kept.path)) as again:
        again.load()
    line = refused("check", kept.path)
    assert str(kept.path) in line
    assert words in line


def test_a_difference_between_memory_and_disk_is_found(kept: Journal) -> None:
    ledger = Ledger(kept.load(), kept)
    client = os.urandom(16)
    ledger.perform([Batch(client, 1, [Increment("a"), Increment("b", key="k")])])
    ledger.show(kept.check)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"counters": {"a": 2, "b": 1}}, r"its counters have \[1\] for 'a', and the memory 2"),
        ({"counters": {"a": 1, "b": 1, "c": 1}}, "it has 2 counters, and the memory 3"),
        ({"clients": {}}, "it knows a client at batch 1 that the memory does not"),
        ({"clients": {client: ClientRecord(1, [1, 2], 0.0)}}, "other results of a client's batch 1"),
        ({"keys": {}}, "its keys have .* for 'k'"),
    ]
    for wrong, words in cases:
        with pytest.raises(StartupError, match=words):
            kept.check(replace(ledger.show(lambda _: None), **wrong))
