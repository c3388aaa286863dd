"""Counters and keys move through files and between stores, or nothing is changed and one line says why."""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from counter_server.cli import main
from counter_server.errors import DeadlineExceeded, Disconnected, InvalidRequest, StartupError, StorageFull
from counter_server.ledger import KEY_LIFETIME, Contents, KeyRecord, Ledger
from counter_server.moving import StillChanging, contents_of, move, write
from counter_server.operations import LARGEST, SMALLEST, Batch, Increment, Keep, Refusal, Replayed, Result, Set
from counter_server.portable import Advance, Format, digest_of, new_file, read
from counter_server.portable import write as write_file
from counter_server.settings import Caps
from counter_server.store import Store
from counter_server.stores import open_store
from counter_server.stores.memory import MemoryStore
from counter_server.testing import NAMES
from tests.load import at_once
from tests.processes import PATIENCE, ROOT
from tests.test_documentation import examples

FORMATS: list[Format] = ["json", "csv"]
STEP = Increment("orders", 1, key="k")
ODD = [
    "=1+1",
    "-1",
    "@x",
    "a,b",
    'a"b',
    "'",
    " a ",
    "a;b",
    "\\n",
    "a\\",
    "null",
    "kind",
    "checksum",
    "\ufeffx",
    "x" * 255,
]


def sample() -> Contents:
    """Return counters with every kind of name and value, and keys."""
    names = dict(enumerate(dict.fromkeys([*NAMES, *ODD])))
    edges = [SMALLEST, LARGEST, 0, -1, 2**53 + 1]
    counters = {name: edges[number % len(edges)] for number, name in names.items()}
    keys = {
        f"k-{number}": KeyRecord(Increment("c", number + 1).fingerprint(), value, 0.0)
        for number, value in enumerate(edges)
    }
    return Contents(counters, keys={**keys, "=key,": KeyRecord(STEP.fingerprint(), 5, 0.0)})


def exported(contents: Contents, form: Format) -> bytes:
    file = io.BytesIO()
    write_file(contents, file, form, lambda _records: None)
    return file.getvalue()


def shown(contents: Contents) -> tuple[dict[str, int], dict[str, tuple[bytes, int]]]:
    return contents.counters, {key: record[:2] for key, record in contents.keys.items()}


def apply(store: Store, *operations: Increment | Set | Keep) -> list[Result]:
    return store.apply(Batch(os.urandom(16), 1, list(operations)), time.monotonic() + PATIENCE)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"sqlite:///{tmp_path}/target.db")) as target:
        yield target


# Files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("contents", [sample(), Contents()], ids=["all", "empty"])
def test_a_file_has_everything_and_always_the_same_bytes(form: Format, contents: Contents) -> None:
    content = exported(contents, form)
    turned = Contents(dict(reversed(contents.counters.items())), keys=dict(reversed(contents.keys.items())))
    assert exported(turned, form) == content
    found, digest = read(io.BytesIO(content), form, "x")
    assert shown(found) == shown(contents)
    assert digest == digest_of(contents)
    assert digest.encode() in content.splitlines()[-1]


def test_the_order_is_that_of_code_points() -> None:
    lines = exported(sample(), "json").splitlines()[1:-1]
    rows = [json.loads(line) for line in lines]
    assert rows == sorted(rows, key=lambda row: (row["kind"], row["name"]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_is_refused_or_means_the_same(form: Format) -> None:
    contents = Contents({"a,b": 17, "é": -3}, keys={"k": KeyRecord(STEP.fingerprint(), 17, 0.0)})
    content = exported(contents, form)
    for length in range(len(content) - 1):  # without the last line's end it is still whole
        with pytest.raises(InvalidRequest, match=r"^x, line \d+: .*; nothing was changed$"):
            read(io.BytesIO(content[:length]), form, "x")
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            try:
                found, _ = read(io.BytesIO(damaged), form, "x")
            except InvalidRequest:
                continue
            assert shown(found) == shown(contents), damaged


HEAD, HEAD_CSV = '{"kind":"counter_server","version":1}\n', "kind,name,value,fingerprint\n"
COUNTER = '{"kind":"counter","name":"a","value":1}\n'
KEY = f'{{"kind":"key","name":"k","value":1,"fingerprint":"{"0" * 32}"}}\n'


WRONG: list[tuple[Format, str, str]] = [
    ("json", "", "line 1: this is not an export"),
    ("json", "notes\n", "line 1: "),
    ("json", COUNTER, "line 1: this is not an export"),
    ("json", HEAD.replace("1", "2"), "line 1: the format has version 2, and this version of the program reads 1"),
    ("json", HEAD + COUNTER, "line 2: the checksum is missing"),
    ("json", HEAD + COUNTER + HEAD, "line 3: it begins a second time"),
    ("json", HEAD + COUNTER + COUNTER, "line 3: 'a' is there twice"),
    ("json", HEAD + KEY + KEY, "line 3: 'k' is there twice"),
    ("json", HEAD + COUNTER.replace('"a"', '"e\u0301"'), "line 2: .*NFC"),
    ("json", HEAD + COUNTER.replace('"a"', '"a\\n"'), "line 2: .* control characters"),
    ("json", HEAD + COUNTER.replace('"a"', '""'), "line 2: .* empty"),
    ("json", HEAD + COUNTER.replace('"a"', f'"{"x" * 256}"'), "line 2: .* 256 bytes"),
    ("json", HEAD + COUNTER.replace('"a"', f'"{"x" * 20000}"'), "line 2: "),
    *(
        ("json", HEAD + COUNTER.replace("1", wrong), "line 2: ")
        for wrong in ("1.0", "true", '"1"', "null", str(2**63), str(-(2**63) - 1), "9" * 5000)
    ),
    ("json", HEAD + KEY.replace('"k"', '"a b"'), "line 2: .* without spaces"),
    ("json", HEAD + KEY.replace("0" * 32, "0" * 31), "line 2: .*fingerprint"),
    ("json", HEAD + COUNTER.replace('"value"', '"count"'), "line 2: .*count"),
    ("json", exported(sample(), "json").decode() + COUNTER, "something follows the checksum"),
    ("csv", "", "line 1: the columns are not kind,name,value,fingerprint or name,value"),
    ("csv", "name;value\na;1\n", "line 1: the columns are not"),
    ("csv", "name,value\na,1\n", "line 2: the checksum is missing"),
    ("csv", HEAD_CSV + "counter,a\n", "line 2: 2 columns instead of 4"),
    ("csv", HEAD_CSV + "dict,a,1,\n", "line 2: 'dict' is not counter, key or checksum"),
    ("csv", HEAD_CSV + "counter,a,1,ff\n", "line 2: 'counter' is not .* fingerprint"),
    ("csv", HEAD_CSV + 'counter,"a\nb",1,\n', "line 3: .* control characters"),
    ("csv", HEAD_CSV + 'counter,"a,1,\n', "line 2: "),
    *(
        ("csv", HEAD_CSV + f"counter,a,{wrong},\n", "line 2: ")
        for wrong in ("1.0", "1e3", "9.22E+18", " 1", "1_0", "", "٣", str(2**63), "9" * 5000)
    ),
]


@pytest.mark.parametrize(("form", "text", "says"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_with_its_line(form: Format, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^x, {says}" if says.startswith("line") else says):
        read(io.BytesIO(text.encode()), form, "x")


@pytest.mark.parametrize("form", FORMATS)
def test_another_programs_spelling_of_a_file_is_taken(form: Format) -> None:
    """Everything quoted, a byte order mark, other ends of lines, empty lines."""
    file = io.BytesIO()
    digest = write_file(sample(), file, form, lambda _records: None)
    text = file.getvalue()
    if form == "csv":
        quoted = io.StringIO()
        csv.writer(quoted, quoting=csv.QUOTE_ALL).writerows(csv.reader(io.StringIO(text.decode(), newline="")))
        text = quoted.getvalue().encode()
    contents, found = read(io.BytesIO(b"\xef\xbb\xbf" + text + b"\r\n\n"), form, "x")
    assert (found, shown(contents)) == (digest, shown(sample()))


def test_a_table_of_a_spreadsheet_is_taken_if_told() -> None:
    text = '\ufeffname,value\r\nvisits,3\r\n"a,b",-5\r\n=1+1,0\r\n'
    found, _ = read(io.BytesIO(text.encode()), "csv", "x", unchecked=True)
    assert found.counters == {"visits": 3, "a,b": -5, "=1+1": 0}
    # A checksum that is there has to be right all the same, however a program spelled the rest.
    content = exported(sample(), "csv")
    respelled = content.replace(b"\n", b"\r\n").replace(b"counter,", b'"counter",')
    assert shown(read(io.BytesIO(respelled), "csv", "x")[0]) == shown(sample())
    with pytest.raises(InvalidRequest, match="the checksum does not match"):
        read(io.BytesIO(content.replace(b"counter,@x,", b"counter,@y,")), "csv", "x", unchecked=True)


def test_a_new_file_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with suppress(ZeroDivisionError), new_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StartupError, match="is there already"), new_file(path):
        pytest.fail("it is refused before the work")
    with new_file(path, overwrite=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(StartupError, match="cannot be written: No such file"), new_file(tmp_path / "no" / "x"):
        pytest.fail("there is no such directory")
    assert [each.name for each in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_pipe_is_written_to_and_a_link_is_followed(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for overwrite in (False, True):
        with new_file(pipe, overwrite=overwrite) as file:
            file.write(b"through")
        assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    link.symlink_to("real")
    with new_file(link) as file:
        file.write(b"one")
    with pytest.raises(StartupError, match="is there already"), new_file(link):
        pytest.fail("it is refused before the work")
    with new_file(link, overwrite=True) as file:
        file.write(b"two")
    assert (link.is_symlink(), (tmp_path / "real").read_bytes()) == (True, b"two")


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_system_without_hard_links_takes_a_new_file_too(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(StartupError, match="is there already"), new_file(path):
        path.write_bytes(b"meanwhile")
    assert path.read_bytes() == b"meanwhile"
    path.unlink()
    with new_file(path) as file:
        file.write(b"whole")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("x.jsonl", b"whole")]


# Into a store


def test_counters_and_keys_are_written_once_and_keys_answer(target: Store) -> None:
    contents = sample()
    moved = write(contents, target)
    assert (moved.counters, moved.keys) == (len(contents.counters), len(contents.keys))
    again = write(contents, target)
    assert (again.counters, again.keys) == (0, 0)
    assert (again.counters_before, again.keys_before) == (len(contents.counters), len(contents.keys))
    assert shown(contents_of(target)) == shown(contents)
    same, other = Increment("orders", 1, key="=key,"), Increment("orders", 2, key="=key,")
    results = apply(target, same, other)
    assert results[0] == Replayed(5)
    assert isinstance(results[1], Refusal)
    assert results[1].code == "key_reused"


def test_a_target_with_other_values_is_refused_and_unchanged_unless_told(target: Store) -> None:
    contents = Contents({"a": 1, "b": 2}, keys={"k": KeyRecord(STEP.fingerprint(), 5, 0.0)})
    cases: list[tuple[list[Set | Keep], str]] = [
        ([Set("a", 7)], r"1 counters with another value \('a'\)"),
        ([Set("a", 1), *(Set(f"x{number}", 0) for number in range(5))], r"5 counters that .* \('x0', 'x1', 'x2', …\)"),
        ([Keep("k", STEP.fingerprint(), 6)], r"1 keys of another request or result \('k'\)"),
        ([Keep("k", b"f" * 16, 5)], r"1 keys of another request or result \('k'\)"),
    ]
    for wrong, says in cases:
        with closing(MemoryStore()) as store:
            apply(store, *wrong)
            before = contents_of(store)
            with pytest.raises(StartupError, match=says):
                write(contents, store)
            assert contents_of(store) == before
    apply(target, Set("a", 7), Set("mine", 3), Keep("k", b"f" * 16, 6), Keep("own", b"f" * 16, 6))
    write(contents, target, overwrite=True)
    found = contents_of(target)
    assert found.counters == {"a": 1, "b": 2, "mine": 3}
    assert {key: record[:2] for key, record in found.keys.items()} == {
        "k": (STEP.fingerprint(), 5),
        "own": (b"f" * 16, 6),
    }


def test_what_does_not_fit_is_said_and_the_same_call_continues() -> None:
    contents = Contents({f"c{number:04d}": number + 1 for number in range(2500)})
    contents.keys = {f"k{number:04d}": KeyRecord(STEP.fingerprint(), number, 0.0) for number in range(10)}
    for caps, room in [(Caps(counters=1500), "--max-counters"), (Caps(keys=5), "--max-keys")]:
        small = MemoryStore(caps=caps)
        with pytest.raises(StorageFull, match=rf"{room}.*; [\d,]+ were written before.* again continues"):
            write(contents, small)
        there = contents_of(small)
        assert 1000 < len(there.counters) + len(there.keys) < 2510
        larger = MemoryStore(there)
        moved = write(contents, larger)
        assert moved.counters + moved.counters_before == 2500
        assert moved.counters_before >= 1500
        assert shown(contents_of(larger)) == shown(contents)


def at_the_bar(work: Callable[[], object]) -> Callable[[str, int], AbstractContextManager[Advance]]:
    """Return a bar that does something while records are written."""
    return lambda _what, _records: nullcontext(lambda _done: work() and None)


def test_a_source_that_counts_meanwhile_is_found_out() -> None:
    source, target = MemoryStore(), MemoryStore()
    apply(source, Set("a", 1), Set("b", 2), Set("zero", 0))
    counting = at_the_bar(lambda: apply(source, Increment("a"), Increment("new", key="k")))
    with pytest.raises(StillChanging, match=r"^2 counters and 1 keys of memory:// changed .* \('a', 'new'\): stop"):
        move(source, target, bar=counting)
    with pytest.raises(StartupError, match=r"1 counters with another value \('a'\)"):
        move(source, target)
    move(source, target, overwrite=True)
    assert shown(contents_of(target)) == shown(contents_of(source))


def test_nothing_is_written_over_what_others_count_in_the_target_meanwhile() -> None:
    contents, target = Contents({f"c{number:04d}": number + 1 for number in range(2000)}), MemoryStore()
    taken: list[int] = []

    def count() -> None:
        if not taken:
            taken.extend(result for result in apply(target, Increment("c1999")) if isinstance(result, int))

    with pytest.raises(StillChanging, match="'c1999' is 1"):
        write(contents, target, bar=at_the_bar(count))
    assert taken == [1]
    assert contents_of(target).counters["c1999"] == 1


def test_what_others_count_in_what_was_written_is_found_out() -> None:
    contents, target = Contents({"a": 1, "b": 0}), MemoryStore()
    counting = at_the_bar(lambda: apply(target, Increment("a")))
    with pytest.raises(StillChanging, match=r"^1 counters and 0 keys of memory:// are not what was written .* \('a'\)"):
        write(contents, target, bar=counting)
    assert contents_of(target).counters == {"a": 2, "b": 0}


def test_two_at_once_agree_or_say_that_they_do_not(tmp_path: Path) -> None:
    one = Contents({f"c{number:04d}": number + 1 for number in range(3000)})
    other = Contents({name: value + 1 for name, value in one.counters.items()})
    for turn, second in enumerate((one, other)):
        todo = [one, second]

        def load(turn: int = turn, todo: list[Contents] = todo) -> str:
            with closing(open_store(f"sqlite:///{tmp_path}/{turn}.db")) as store:
                try:
                    write(todo.pop(), store)
                except (StillChanging, StartupError) as error:
                    return str(error)
                return ""

        outcomes = at_once(2, load)
        with closing(open_store(f"sqlite:///{tmp_path}/{turn}.db")) as store:
            found = contents_of(store).counters
        assert found.keys() <= one.counters.keys()
        assert all(value in (one.counters[name], second.counters[name]) for name, value in found.items())
        if second is one:
            assert found == one.counters
        else:
            assert any(outcomes)


def test_an_expired_key_stays_behind() -> None:
    now = 2 * KEY_LIFETIME
    ledger = Ledger(Contents({"a": 1}, keys={"old": KeyRecord(b"f" * 16, 1, 1.0), "new": KeyRecord(b"f" * 16, 1, now)}))
    assert list(ledger.copied().keys) == ["new"]


def test_a_store_where_nothing_was_counted_is_not_made(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/x.db", f"manager://{tmp_path}/data"):
        with closing(open_store(url)) as store, pytest.raises(StartupError, match="nothing was ever counted"):
            contents_of(store)
    assert list(tmp_path.iterdir()) == []


# The commands


def run(*arguments: str | Path, given: bytes = b"") -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=given)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_file_goes_out_and_in(tmp_path: Path, target: Store, name: str) -> None:
    write(sample(), target)
    file, url, other = tmp_path / name, str(target), f"sqlite:///{tmp_path}/other.db"
    status, printed, errors = run("export", file, "--store", url)
    assert (status, errors) == (0, "")
    assert f"{digest_of(sample())}\n" in printed
    content = file.read_bytes()
    assert content == exported(sample(), "csv" if name.endswith("csv") else "json")
    status, _, errors = run("export", file, "--store", url)
    assert (status, errors.count("\n")) == (1, 1)
    assert "is there already" in errors
    assert run("export", file, "--store", url, "--overwrite")[0] == 0
    status, _, errors = run("export", "-", "--store", url, "--format", "json")
    assert status == 0, errors
    assert run("import", file, "--store", other)[0] == 0
    status, printed, errors = run("import", "-", "--format", "csv", "--store", other, given=exported(sample(), "csv"))
    assert (status, errors) == (0, "")
    counters, keys = len(sample().counters), len(sample().keys)
    assert printed.startswith(
        f"0 counters and 0 keys were written to {other}; {counters} and {keys} were there already;"
    )
    with closing(open_store(other)) as store:
        assert shown(contents_of(store)) == shown(sample())
    status, printed, errors = run("migrate", "--from", url, "--to", f"sqlite:///{tmp_path}/third.db")
    assert (status, errors) == (0, "")
    assert printed.startswith(f"{counters} counters and {keys} keys were written")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "x", "--store", "memory://"], "memory:// ends with this command"),
        (["export", "x", "--store", "sqlite:////nowhere/x.db"], "nothing was ever counted"),
        (["import", "nothing.jsonl", "--store", "sqlite:////nowhere/x.db"], "cannot be read: No such file"),
        (["migrate", "--from", "sqlite:////nowhere/x.db", "--to", "memory://"], "memory:// ends"),
        (["migrate", "--from", "postgres://u:secret@h/x", "--to", "memory://"], "no store is called 'postgres://'"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, errors = run(*arguments)
    assert (status, printed, errors.count("\n")) == (1, "", 1)
    assert says in errors
    assert "secret" not in errors
    assert list(tmp_path.iterdir()) == []


def test_urls_come_from_the_environment_too(tmp_path: Path, target: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(sample(), target)
    monkeypatch.setenv("COUNTER_SERVER_MIGRATE_FROM", str(target))
    monkeypatch.setenv("COUNTER_SERVER_MIGRATE_TO", f"sqlite:///{tmp_path}/other.db")
    assert run("migrate")[0] == 0
    with closing(open_store(f"sqlite:///{tmp_path}/other.db")) as store:
        assert shown(contents_of(store)) == shown(sample())


def test_the_file_that_the_page_shows_is_one() -> None:
    (text,) = (block for block in examples(ROOT / "docs" / "moving.md") if block.startswith('{"kind":"counter_server"'))
    found, _ = read(io.BytesIO(text.encode()), "json", "the page")
    record = KeyRecord(Increment("visits", key="order-17").fingerprint(), 3, 0.0)
    assert (found.counters, found.keys) == ({"visits": 3}, {"order-17": record})
    assert exported(found, "json").decode() == text


class Away(MemoryStore):
    """A store that does not answer when it is asked for its contents at these times, counted from 1."""

    def __init__(self, *times: int) -> None:
        super().__init__()
        self._times, self.asked = times, 0

    def contents(self, deadline: float) -> Contents:
        self.asked += 1
        if self.asked in self._times:
            raise Disconnected("it is busy", sent=False)
        return super().contents(deadline)


def test_a_store_that_does_not_answer_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Away(1, 3, 4), Away(1, 3)
    write(Contents({"a": 1}), source)
    contents, moved = move(source, target)
    assert (contents.counters, moved.counters, target.contents(PATIENCE).counters) == ({"a": 1}, 1, {"a": 1})
    monkeypatch.setattr("counter_server.moving.DEFAULT_DEADLINE", 0.0)
    with pytest.raises(DeadlineExceeded, match="it is busy; nothing was changed"):
        write(Contents({"a": 1}), Away(1))
    with pytest.raises(DeadlineExceeded, match="it is busy; everything was written, and not compared: run the same"):
        write(Contents({"a": 1}), Away(2))


class Mute(MemoryStore):
    """Applies writes, and its answers do not arrive."""

    def apply(self, batch: Batch, deadline: float = 0.0, /) -> list[Result]:
        results = super().apply(batch, deadline)
        if batch.sequence:
            raise Disconnected("the cable is cut", sent=True)
        return results


def test_what_may_have_been_written_is_not_said_to_be_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counter_server.moving.LONGEST_DEADLINE", 0.0)
    with pytest.raises(DeadlineExceeded, match=r"counted, at most once; the same command again continues$") as error:
        write(Contents({"a": 1}), Mute())
    assert error.value.outcome == "unknown"
