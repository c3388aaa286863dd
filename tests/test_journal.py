"""The journal: every commit survives the process, and foreign files are left alone."""

import errno
import logging
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from counter_server import journal as module
from counter_server.errors import BatchRefused, StartupError, StorageFull
from counter_server.journal import Journal, JournalFailed, read_checked, refusal
from counter_server.ledger import Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import (
    LARGEST,
    SMALLEST,
    Batch,
    Get,
    Increment,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Set,
)

ANN, BOB, CYD = b"ann".ljust(16), b"bob".ljust(16), b"cyd".ljust(16)
RESULTS: list[Result] = [1, SMALLEST, LARGEST, True, False, None, Replayed(3), Refusal("limit", "too much")]
RESULTS += [Page([("a", 1), ("\u4e2d", -1)], more=True)]
SOME = Changes(
    now=20.0,
    counters={"a": 1, "\u4e2d": SMALLEST, "b": LARGEST, "zero": 0},
    clients={
        ANN: ClientRecord(7, RESULTS, 20.0),
        BOB: ClientRecord(LARGEST, [2], 10.5),
        CYD: ClientRecord(1, [1], 11.0, "object"),
    },
    keys={"k": KeyRecord(b"\0" * 16, 5, 20.0), "l": KeyRecord(b"\xff" * 16, LARGEST, 3.25)},
    objects={"object": b"state"},
)
# More than fits into a few pages; the first one would fit.
MANY = Changes(now=30.0, counters={"a": 100, **{f"{number:0200}": number for number in range(1000)}})

Open = Callable[..., Journal]


def contents() -> Contents:
    return Contents(dict(SOME.counters), dict(SOME.clients), dict(SOME.keys), dict(SOME.objects))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def mark(path: Path) -> Path:
    """Return the file that names the least size of the log."""
    return path.with_name("in-use.journal")


@pytest.fixture
def open_journal(path: Path, stack: ExitStack) -> Open:
    return lambda at=path, durability="commit", **options: stack.enter_context(
        closing(Journal(at, durability, **options))
    )


@pytest.fixture
def journal(open_journal: Open) -> Journal:
    return open_journal()


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def left_by_a_kill(path: Path, place: Path) -> Path:
    """Copy the files of an open journal as they are on the disk now, and return the copy's path."""
    shutil.copytree(path.parent, place, ignore=lambda *_: [place.name])
    return place / path.name


def pragma(journal: Journal, name: str) -> int | str:
    """Return a setting of the journal's own connection, which locks all others out."""
    value: int | str = journal._connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def sql(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        connection.execute(statement)


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("made by a test")
    error.sqlite_errorcode = code
    return error


def no_quota(*_: object) -> int:
    raise OSError(errno.EDQUOT, "no quota")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the SQLite errors of statements, by their beginning. A write that finds out why exceeds a quota."""
    codes: dict[str, int] = {}

    class Cursor(sqlite3.Cursor):
        def execute(self, statement: str, *values: Any) -> Any:
            for start, code in codes.items():
                if statement.startswith(start):
                    raise sqlite_error(code)
            return super().execute(statement, *values)

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = None) -> Any:
            return super().cursor(factory or Cursor)

        def execute(self, statement: str, *values: Any) -> Any:
            return self.cursor().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    monkeypatch.setattr(os, "pwrite", no_quota)
    return codes


@pytest.mark.parametrize(("durability", "synchronous"), [("commit", 2), ("process", 1)])
def test_commits_are_synced_where_they_were_promised_to_be(
    open_journal: Open, path: Path, mark: Path, tmp_path: Path, durability: str, synchronous: int
) -> None:
    """FULL is 2 and NORMAL is 1; in WAL mode FULL syncs at each commit."""
    first = open_journal(path, durability)
    assert (first.load(), first.starts, len(first.epoch)) == (Contents(), 0, 32)
    first.commit(Changes(now=1.0))
    locked: list[bool] = []
    first._connection.set_trace_callback(lambda _: locked.append(first._committing.locked()))
    with ThreadPoolExecutor(1) as another_thread:
        another_thread.submit(first.commit, SOME).result()
    first._connection.set_trace_callback(None)
    assert locked == [True] * 12
    assert first.load() == contents()
    assert first.size == path.stat().st_size + log_of(path).stat().st_size
    assert int(mark.read_text()) == log_of(path).stat().st_size > 0
    second = open_journal(left_by_a_kill(path, tmp_path / "elsewhere"), durability)
    for journal in (first, second):
        assert (journal.load(), journal.epoch) == (contents(), first.epoch)
        assert (pragma(journal, "synchronous"), pragma(journal, "journal_mode")) == (synchronous, "wal")
    assert log_of(second.path).stat().st_size == 0  # written again, as the last sync may have failed
    later = Changes(
        now=30.0,
        counters={"a": 2, "b": None, "never-there": None},
        clients={ANN: ClientRecord(8, [9], 30.0), BOB: None},
        keys={"k": None, "m": KeyRecord(b"m" * 16, 6, 30.0)},
        objects={"object": b"new"},
    )
    first.commit(later)
    first.close()
    first.close()
    with pytest.raises(JournalFailed, match=str(path)):
        first.commit(MANY)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "journal"]
    assert path.read_bytes()[68:72] == b"CTSR"
    again = open_journal()
    assert again.epoch == first.epoch != open_journal(tmp_path / "another").epoch
    assert again.load() == Contents(
        {"a": 2, "\u4e2d": SMALLEST, "zero": 0},
        {CYD: ClientRecord(1, [1], 11.0, "object"), ANN: ClientRecord(8, [9], 30.0)},
        {"l": KeyRecord(b"\xff" * 16, LARGEST, 3.25), "m": KeyRecord(b"m" * 16, 6, 30.0)},
        {"object": b"new"},
    )


def test_clients_and_keys_are_loaded_in_the_order_of_their_last_use(journal: Journal) -> None:
    used = {ANN: 3.0, BOB: 1.0, CYD: 2.0}
    clients: dict[bytes, ClientRecord | None] = {who: ClientRecord(1, [1], time) for who, time in used.items()}
    keys: dict[str, KeyRecord | None] = {who.decode().strip(): KeyRecord(b"f" * 16, 1, used[who]) for who in used}
    journal.commit(Changes(now=3.0, clients=clients, keys=keys))
    journal.commit(Changes(now=4.0, clients={BOB: ClientRecord(2, [1], 4.0)}))
    found = journal.load()
    assert (list(found.clients), list(found.keys)) == ([CYD, ANN, BOB], ["bob", "cyd", "ann"])


def test_starts_are_counted_while_the_file_exists(open_journal: Open, path: Path) -> None:
    for expected in (1, 2, 3):
        journal = open_journal()
        journal.count_start()
        assert (journal.starts, journal.load()) == (expected, Contents())
        journal.close()
    with pytest.raises(StartupError, match=str(path)):
        journal.count_start()


def test_a_new_journal_and_a_backup_reach_the_disk_before_their_names(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int, bytes]] = []
    target, kept = tmp_path / "backup", module.sync

    def sync(file: Path) -> None:
        named = path.exists() + target.exists()
        before = len(os.listdir("/proc/self/fd"))
        kept(file)
        assert len(os.listdir("/proc/self/fd")) == before
        synced.append((file.name, named, file.read_bytes()[18:19] if file.is_file() else b""))
        assert file == tmp_path or stat.S_IMODE(file.parent.stat().st_mode) == 0o700

    fsyncs: list[int] = []
    monkeypatch.setattr(module, "sync", sync)
    monkeypatch.setattr(os, "fsync", fsyncs.append)
    left = path.with_name(".journal.new")
    left.mkdir()
    (left / path.name).write_text("left by a killed process")
    with closing(Journal(path)) as journal:
        assert not left.exists()
        # The parent's names, the new file in WAL mode, and its name.
        assert synced == [(tmp_path.name, 0, b""), ("journal", 0, b"\2"), (tmp_path.name, 1, b"")]
        assert len(fsyncs) == 3
        journal.commit(SOME)
        assert journal.back_up(target) == target.stat().st_size
        assert [(named, mode) for _, named, mode in synced[3:]] == [(1, b"\1"), (2, b"")]  # one file has it all
        assert (synced[4][0], stat.S_IMODE(target.stat().st_mode)) == (tmp_path.name, 0o600)
        for wrong, reason in ((target, "is there already"), (tmp_path / "none" / "x", "no backup can be written")):
            with pytest.raises(StartupError, match=reason):
                journal.back_up(wrong)
        assert not list(tmp_path.glob(".*"))
    synced.clear()
    assert read_checked(target) == contents()
    with closing(Journal(target)) as restored:
        assert (restored.load(), restored.epoch) == (contents(), journal.epoch)
        assert (pragma(restored, "journal_mode"), synced[0][0]) == ("wal", "backup")
        assert not list(tmp_path.glob("*-shm"))  # the directory's lock replaces SQLite's


def test_commits_go_on_between_the_parts_of_a_backup(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.commit(MANY)
    made: list[int] = []

    def pause(_seconds: float) -> None:
        assert not journal._committing.locked()
        made.append(len(made))
        journal.commit(Changes(now=31.0, counters={"during": len(made)}))

    monkeypatch.setattr(module, "_BACKUP_PAGES", 20)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    journal.back_up(tmp_path / "backup")
    assert (len(made) > 2, journal._committing.locked()) == (True, False)
    assert read_checked(tmp_path / "backup").counters == {**MANY.counters, "during": len(made)}


def answer_of(ledger: Ledger, batch: Batch) -> list[Result]:
    (answer,) = ledger.perform([batch])
    assert not isinstance(answer, BatchRefused), answer
    return answer


def test_a_ledger_on_a_full_disk_refuses_writes_reads_on_and_heals(open_journal: Open, path: Path) -> None:
    with closing(open_journal(most=1)) as journal:
        assert pragma(journal, "max_page_count") == pragma(journal, "page_count")
    journal = open_journal(most=1_000_000)
    assert pragma(journal, "max_page_count") == 244
    ledger = Ledger(journal.load(), journal)
    answer_of(ledger, Batch(ANN, 1, [Set("a", 1)]))
    pragma(journal, f"max_page_count = {pragma(journal, 'page_count')}")
    many: list[Operation] = [Increment(f"{number:0200}") for number in range(500)]
    refused = answer_of(ledger, Batch(ANN, 2, [Increment("a"), Get("a"), *many]))
    assert [result.code for result in refused if isinstance(result, Refusal)] == ["storage_full"] * 501
    assert (refused[1], ledger.sizes[0]) == (1, 1)
    ledger.show(journal.check)  # an answer that was refused for lack of space is in memory alone
    for _ in range(2):
        with pytest.raises(StorageFull, match=f"{path} .*full, or it has reached --max-journal-bytes"):
            journal.commit(MANY)
        assert journal.load().counters == {"a": 1}
    assert answer_of(ledger, Batch(ANN, 3, [Increment("a")])) == [2]  # a change that needs no new page fits
    pragma(journal, "max_page_count = 100000")
    assert answer_of(ledger, Batch(ANN, 4, [Increment("a"), *many])) == [3] + [1] * 500
    assert len(journal.load().counters) == 501


# Foreign and damaged files


def foreign(path: Path) -> None:
    sql(path, "CREATE TABLE counters (name TEXT, value INTEGER)")


def killed(path: Path, *statements: str) -> None:
    """Leave a database whose last changes are in its log only."""
    with closing(sqlite3.connect(path.with_name("original"), isolation_level=None)) as other:
        if path.exists():
            with closing(sqlite3.connect(path)) as source:
                source.backup(other)
        for statement in ("PRAGMA journal_mode = WAL", *statements):
            other.execute(statement)
        for suffix in ("", "-wal"):
            shutil.copy(path.with_name(f"original{suffix}"), f"{path}{suffix}")
    path.with_name("original").unlink()


def hot(path: Path, *statements: str) -> None:
    """Leave a database with half a transaction, which the file beside it undoes, as a backup that is opened first."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        names = ("PRAGMA journal_mode = DELETE", *statements, "PRAGMA cache_size = 1", "BEGIN")
        for statement in (*names, "CREATE TABLE filler AS SELECT zeroblob(300000)"):
            other.execute(statement)
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", path.with_name(f"kept{suffix}"))
    for suffix in ("", "-journal"):
        path.with_name(f"kept{suffix}").rename(f"{path}{suffix}")


def ours(path: Path, left: Callable[[Path], None] = lambda _: None, changes: Changes = SOME) -> None:
    """Write a journal, and do what `left` does to it."""
    with closing(Journal(path)) as journal:
        journal.commit(changes)
    left(path)


def without_its_journal(path: Path, put: Callable[[Path], object]) -> None:
    with closing(Journal(path)) as journal:
        journal.commit(SOME)
        log = log_of(path).read_bytes()
        journal.back_up(path.with_name("backup"))
    path.unlink()
    put(path)
    log_of(path).write_bytes(log)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes": (lambda path: path.write_bytes(b"somebody's notes\n" * 1000), "file is not a database"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 4096), ""),
    "another program's": (foreign, "not a journal"),
    "another program's, killed": (lambda path: killed(path, "CREATE TABLE precious (a)"), "not a journal"),
    "another program's, half written": (hot, "cannot be used"),
    "an older format": (partial(ours, left=lambda path: sql(path, "PRAGMA user_version = 1")), "format 1"),
    "a newer format": (partial(ours, left=lambda path: sql(path, "PRAGMA user_version = 3")), "format 3"),
    "format 3, killed": (partial(ours, left=lambda path: killed(path, "PRAGMA user_version = 3")), "format 3"),
    "cut to 0": (partial(ours, left=lambda path: os.truncate(path, 0)), "cut to 0 bytes"),
    "cut to 511": (partial(ours, left=lambda path: os.truncate(path, 511)), "cut to 511 bytes"),
    "cut to 512": (partial(ours, left=lambda path: os.truncate(path, 512)), "cannot be used"),
    "a directory": (Path.mkdir, "cannot be used"),
    "a log alone": (partial(without_its_journal, put=lambda _: None), "does not belong to"),
    "a log beside a backup": (
        partial(without_its_journal, put=lambda path: path.with_name("backup").rename(path)),
        "does not belong to",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_foreign_file_is_refused_by_name_and_left_alone(
    path: Path, tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(StartupError, match=f"{path}.*{reason}|{reason}.*{path}"):
        Journal(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_a_refused_file_is_closed_at_once(path: Path, tmp_path: Path) -> None:
    """Not by the garbage collector: an error that is kept somewhere would keep the file locked."""
    ours(path)
    sql(path, "DELETE FROM meta")
    with pytest.raises(StartupError, match="it has no epoch") as caught:
        Journal(path)
    sql(path, "INSERT INTO meta VALUES ('epoch', 'e')")
    assert caught.value.__cause__
    with pytest.raises(StartupError, match="cannot be used"):
        Journal(tmp_path / "no-such-directory" / "journal")


def test_a_half_opened_backup_is_opened_again(path: Path, open_journal: Open) -> None:
    ours(path)
    hot(path)
    journal = open_journal()
    assert journal.load() == contents()
    journal.close()
    hot(path, "PRAGMA user_version = 3")
    with pytest.raises(StartupError, match="format 3"):
        Journal(path)


def test_a_journal_in_use_by_another_connection_is_refused(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.commit(MANY)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with pytest.raises(StartupError, match=f"{path}.*locked"):
        Journal(path)
    journal.commit(SOME)
    assert journal.load().counters == {**MANY.counters, **SOME.counters}


def overwrite(path: Path, start: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(new)


def add_page(path: Path) -> None:
    pages = path.stat().st_size // 4096 + 1
    os.truncate(path, pages * 4096)
    overwrite(path, 28, pages.to_bytes(4, "big"))  # in the header


DAMAGED: list[tuple[str | Callable[[Path], None], str]] = [
    ("UPDATE clients SET results = x'c1ff'", "a row of its clients"),
    ("DROP TABLE keys", ""),
    ("ALTER TABLE counters RENAME COLUMN value TO something", "its tables are not a journal's"),
    ("CREATE TABLE more (name)", "its tables are not a journal's"),
    (lambda path: overwrite(path, 103, b"\0\0"), ""),  # without tables: the number of cells of the first page
    (lambda path: overwrite(path, 4096, b"\xaa" * (path.stat().st_size - 4096)), ""),
    (add_page, "never used"),
    *(
        (f"UPDATE counters SET value = value + 1 WHERE name = '{row}'", f"a row of its counters .*'{row}'")  # noqa: S608
        for row in ("row 000", "row 199", "row 200", "row 523", "row 999")
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGED)
def test_a_damaged_journal_is_refused_by_name(path: Path, damage: str | Callable[[Path], None], reason: str) -> None:
    ours(path, changes=replace(SOME, counters={f"row {number:03}": number for number in range(1000)}))
    sql(path, damage) if isinstance(damage, str) else damage(path)
    shutil.copy(path, copy := path.with_name("journal-copy"))
    with pytest.raises(StartupError, match=f"{path}.*{reason}"), closing(Journal(path)) as again:
        again.load()
    with pytest.raises(StartupError, match=f"{copy}.*{reason}"):
        read_checked(copy)


def test_a_damaged_index_is_found_by_a_thorough_check_alone(path: Path, open_journal: Open) -> None:
    ours(path)
    with closing(sqlite3.connect(path)) as other:
        ((page,),) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_objects_1'")
    overwrite(path, path.read_bytes().index(b"object", (page - 1) * 4096), b"abject")
    with pytest.raises(StartupError, match="index"):
        read_checked(path)
    journal = open_journal()
    assert journal.load() == contents()
    with pytest.raises(StartupError, match="index"):
        journal.check(contents())
    foreign(path.with_name("other"))
    with pytest.raises(StartupError, match="is not a journal of counter_server"):
        read_checked(path.with_name("other"))


def test_the_file_is_compared_with_the_memory(journal: Journal) -> None:
    journal.check(Contents())
    journal.commit(SOME)
    journal.check(contents())
    right = contents()
    clients, known = right.clients, right.clients[ANN]
    journal.check(replace(right, clients={**clients, ANN: known._replace(sequence=8, results=[1]), b"d" * 16: known}))
    journal.check(replace(right, clients={ANN: clients[ANN], BOB: clients[BOB]}))  # the object has its own
    for wrong, reason in (
        (replace(right, counters={**right.counters, "a": 2}), r"its counters have \[1\] for 'a', and the memory 2"),
        (replace(right, counters={**right.counters, "new": 2}), "it has 4 counters, and the memory 5"),
        (replace(right, keys={"k": right.keys["k"]}), "its keys have .* for 'l', and the memory None"),
        (replace(right, keys={**right.keys, "m": right.keys["k"]}), "it has 2 keys, and the memory 3"),
        (replace(right, clients={ANN: known}), "it knows a client at batch"),
        (replace(right, clients={**clients, ANN: known._replace(sequence=6)}), "it knows a client at batch 7"),
        (replace(right, clients={**clients, ANN: known._replace(results=[1])}), "other results of a client's batch 7"),
    ):
        with pytest.raises(StartupError, match=reason):
            journal.check(wrong)


# Failing writes, and files that are gone


@pytest.mark.parametrize(
    ("code", "rolls_back", "reason"),
    [
        (sqlite3.SQLITE_FULL, True, "its disk is full, or"),
        (sqlite3.SQLITE_IOERR_WRITE, True, "no quota; nothing was counted"),
        (sqlite3.SQLITE_CANTOPEN, True, None),
        (sqlite3.SQLITE_FULL, False, None),
    ],
)
def test_a_failed_commit_is_undone_or_its_outcome_is_unknown(
    path: Path, faults: dict[str, int], code: int, reason: str | None, *, rolls_back: bool
) -> None:
    with closing(Journal(path)) as journal:
        faults["REPLACE INTO keys"] = code
        if not rolls_back:
            faults["ROLLBACK"] = sqlite3.SQLITE_IOERR
        with pytest.raises(StorageFull if reason else JournalFailed, match=f"{path}.*{reason or ''}"):
            journal.commit(SOME)
        faults.clear()
        if reason:
            assert journal.load() == Contents()
            journal.commit(SOME)


@pytest.mark.parametrize(
    ("statement", "code", "is_ignored"),
    [
        ("PRAGMA wal_checkpoint", sqlite3.SQLITE_FULL, True),
        ("PRAGMA wal_checkpoint", sqlite3.SQLITE_CANTOPEN, False),
        ("REPLACE INTO meta", sqlite3.SQLITE_FULL, True),
        ("UPDATE meta", sqlite3.SQLITE_FULL, True),
        ("PRAGMA journal_mode", sqlite3.SQLITE_CANTOPEN, False),
    ],
)
def test_a_start_goes_on_where_only_its_writes_are_refused(
    path: Path, mark: Path, faults: dict[str, int], statement: str, code: int, *, is_ignored: bool
) -> None:
    ours(path)
    mark.write_text("100")
    faults[statement] = code
    if is_ignored:
        with closing(Journal(path)) as journal:
            journal.count_start()
            assert (journal.starts, journal.load()) == (1, contents())
            assert mark.exists() is (statement == "UPDATE meta")  # the next start needs a new epoch, too
    else:
        with pytest.raises(StartupError, match="free some space") as refused:
            Journal(path)
        assert cast(OSError, refused.value.__cause__).errno == errno.EDQUOT


def test_why_a_write_was_refused_is_found_by_another_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, unopened = sqlite_error(sqlite3.SQLITE_IOERR_WRITE), sqlite_error(sqlite3.SQLITE_CANTOPEN_ISDIR)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        assert refusal(error := OSError(number, ""), path) is error
    for other in (OSError(errno.EIO, ""), ValueError(), sqlite_error(sqlite3.SQLITE_IOERR), failed):
        assert refusal(other, path) is None
    tried: list[tuple[int, int]] = []

    def pwrite(_file: int, data: bytes, offset: int) -> int:
        tried.append((offset, len(data)))
        return len(data) - (1000 if len(tried) == 1 else 0)  # a partial write

    monkeypatch.setattr(os, "pwrite", pwrite)
    for sizes, start in (((), 0), ((7,), 7), ((7, 70), 70)):
        for size, file in zip(sizes, (path, log_of(path)), strict=False):
            file.write_bytes(bytes(size))
        tried.clear()
        assert refusal(failed, path) is None
        assert tried == [(start, 65536), (start + 64536, 1000)]
    monkeypatch.setattr(os, "pwrite", no_quota)
    for reported, is_commit, found in ((failed, True, True), (unopened, False, True), (unopened, True, False)):
        refused = refusal(reported, path, committing=is_commit)
        assert (refused is not None and refused.errno == errno.EDQUOT) is found


@pytest.mark.parametrize("suffixes", [[""], ["-wal"], ["", "-wal"]], ids=["journal", "log", "both"])
@pytest.mark.parametrize("how", ["removed", "replaced", "cut"])
def test_nothing_is_committed_to_files_that_are_gone(
    open_journal: Open, path: Path, mark: Path, suffixes: list[str], how: str
) -> None:
    journal = open_journal()
    journal.commit(SOME)
    journal.commit(SOME)
    journal.look_after_files()
    assert not journal._committing.locked()
    for suffix in suffixes:
        file = path.with_name(path.name + suffix)
        if how == "cut":
            os.truncate(file, file.stat().st_size - 1)
            continue
        file.rename(file.with_name(f"{file.name}.moved"))
        if how == "replaced":
            shutil.copy(file.with_name(f"{file.name}.moved"), file)
    with journal._committing:
        journal.look_after_files()  # a commit under way does it
    for act in (journal.look_after_files, lambda: journal.commit(MANY), lambda: journal.commit(SOME)):
        with pytest.raises(JournalFailed, match=f"{path}.* was {how} .*while it was in use") as failed:
            act()
        assert ("nothing is lost" in str(failed.value)) is (how == "removed" and suffixes == ["-wal"])
    assert mark.exists() is (how != "removed" or suffixes != ["-wal"])
    if how != "removed":
        assert mark.read_text() == str(LARGEST)
    journal.close()
    if suffixes == ["-wal"]:
        again = open_journal()
        assert (again.epoch == journal.epoch) is (how == "removed")
        assert how != "removed" or again.load() == contents()


@pytest.mark.parametrize("lost", ["log", "a byte of the log", "journal and log", "journal, for a backup", "nothing"])
def test_a_rollback_while_no_process_looked_begins_a_new_epoch(
    open_journal: Open, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    journal = open_journal()
    journal.commit(SOME)
    copy = left_by_a_kill(path, tmp_path / "copy")
    log, mark = log_of(copy), copy.with_name("in-use.journal")
    if lost == "a byte of the log":
        os.truncate(log, log.stat().st_size - 1)
    elif lost != "nothing":
        log.unlink()
        if lost != "log":
            copy.unlink()
        if lost.endswith("backup"):
            journal.back_up(copy)
    is_lost = lost not in ("nothing", "journal, for a backup")
    with caplog.at_level(logging.ERROR):
        again = open_journal(copy)
    assert ("acknowledged increments are lost" in caplog.text) is is_lost
    assert ((again.epoch != journal.epoch), len(again.epoch), mark.exists()) == (is_lost, 32, False)
    again.close()
    mark.write_text("not a number")
    third = open_journal(copy)
    assert third.epoch == again.epoch
    mark.unlink()
    mark.mkdir()  # cannot be written
    third.commit(SOME)
    mark.rmdir()
    third.commit(MANY)
    assert int(mark.read_text()) == log.stat().st_size
    os.truncate(log, 100)
    third.close()  # finds the cut log, and leaves the mark
    assert open_journal(copy).epoch != third.epoch
