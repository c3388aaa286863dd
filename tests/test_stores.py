"""The contract of a store, the same for each of them, and for one that somebody else wrote."""

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from counter_server import StoreOptions, open_state
from counter_server.errors import Disconnected, InvalidRequest, StateLost
from counter_server.operations import Batch, Increment
from counter_server.store import Store
from counter_server.stores import open_store
from counter_server.testing import StoreContract
from tests.processes import PATIENCE, ROOT, Manager


def urls(*fast: str, slow: list[str]) -> list[Any]:
    return [*fast, *(pytest.param(url, marks=pytest.mark.slow) for url in slow)]


@pytest.fixture(scope="module", params=urls("memory", "manager", "sqlite", slow=["redis", "postgresql", "mariadb"]))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a store whose server runs until the last test of its kind."""
    kind: str = request.param
    directory = tmp_path_factory.mktemp(kind)
    if kind in ("memory", "sqlite"):
        yield "memory://" if kind == "memory" else f"sqlite:///{directory}/counters.db"
    elif kind == "manager":
        with Manager(directory / "data") as manager:
            yield manager.url
    else:
        from tests.engines import start

        with start(kind, directory) as server:
            yield server.url


class TestStores(StoreContract):
    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        with closing(open_store(url)) as store:
            yield store

    @pytest.fixture
    def stores(self, url: str, store: Store, stack: ExitStack) -> list[Store]:
        others = [] if url == "memory://" else [stack.enter_context(closing(open_store(url))) for _ in range(3)]
        return [store, *others]


@pytest.mark.parametrize("url", urls("manager://{}", slow=["unix://{}", "postgresql:///db?host={}", "memcached://{}"]))
def test_a_store_that_is_not_there_was_sent_nothing(url: str, tmp_path: Path) -> None:
    store = open_store(url.format(tmp_path / "nothing"), StoreOptions(start=False))
    with pytest.raises(Disconnected) as error:
        store.apply(Batch(b"c" * 16, 1, [Increment("x")]), time.monotonic() + 0.2)
    assert not error.value.sent


@pytest.mark.parametrize("kind", urls("sqlite", "manager", slow=["postgresql", "mariadb", "memcached"]))
def test_a_store_says_whether_it_was_made_and_a_look_makes_nothing(
    kind: str, tmp_path: Path, on_demand: str, stack: ExitStack
) -> None:
    url = on_demand if kind == "manager" else f"sqlite:///{tmp_path}/new.db"
    if kind not in ("sqlite", "manager"):
        from tests.engines import start

        url = stack.enter_context(start(kind, tmp_path)).url
    for number in range(2):  # a second state looks at what the first one made, or did not make
        with open_state(url, deadline=PATIENCE) as state:
            assert [state.exists(), state.exists()] == [False, False], number
            if kind != "manager":  # which would start
                assert (state.counter("x").value, state.exists()) == (0, False), number
                if kind != "memcached":  # which cannot list
                    assert (state.counters().counters, state.exists()) == ([], False), number
    assert list(tmp_path.glob("*.db*")) == []
    with open_state(url, deadline=PATIENCE) as state, open_state(url, deadline=PATIENCE) as other:
        assert state.counter("x").increment() == 1
        assert (state.exists(), other.exists()) == (True, True)


@pytest.mark.parametrize("kind", urls("sqlite", slow=["postgresql", "mariadb"]))
def test_a_loss_is_told_once_by_a_look_that_makes_nothing(kind: str, tmp_path: Path, stack: ExitStack) -> None:
    file: Path = tmp_path / "new.db"
    server: Any = None
    if kind != "sqlite":
        from tests.engines import start

        server = stack.enter_context(start(kind, tmp_path))
    url = server.url if server else f"sqlite:///{file}"
    one, other = (stack.enter_context(open_state(url, deadline=PATIENCE)) for _ in range(2))
    assert [one.counter("x").increment(), other.counter("x").value] == [1, 1]
    if server is None:
        for each in tmp_path.glob("new.db*"):
            each.unlink()
    else:
        server.query(
            "DROP TABLE counter_server_meta, counter_server_counters, counter_server_clients, counter_server_keys"
        )
    newcomer = stack.enter_context(open_state(url, deadline=PATIENCE))
    assert newcomer.counter("x").value == 0
    for state in (one, other):
        with pytest.raises(StateLost):
            _ = state.counter("x").value
        assert (state.counter("x").value, state.exists()) == (0, False)
    assert not file.exists()
    assert [each.counter("x").increment() for each in (one, other, newcomer)] == [1, 2, 3]


REFUSED = [
    *("redis://[bad", "redis://u:[secret]@h", "redis://:se\u2100cret@h", "postgresql://u:secret@h:port/d"),
    *("redis://localhost:port", "redis://localhost/?prefix=", "redis://localhost/?prefix={x}", "redis://h/?no_such=1"),
    *("postgresql", "postgresql://host:port/db", "postgresql://h/db?no_such=1", "mysql://host:port/db"),
    *("mariadb://h/db?no_such=1", "memcached://", "memcached:///", "memcached:path", "memcached://host/path"),
    *("memcached://host:70000", "memcached://user:secret@host", "memcached://user:secret@host:port"),
    *("memcached://host?option=1", "memcached://host?prefix=", "memcached://host?prefix=a:b", "memcached://h#fragment"),
]


@pytest.mark.parametrize("url", urls("sqlite://", "sqlite:///:memory:", "sqlite:///x.db?mode=ro", slow=REFUSED))
def test_an_impossible_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        open_store(url)
    assert "secret" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@example.org:1234/5?prefix=shop", "redis://example.org:1234/5?prefix=shop"),
        ("postgresql:///shop?host=/run/x&user=user&password=secret", "postgresql:///shop?host=/run/x"),
        ("mysql://user:secret@example.org/shop?charset=utf8mb4", "mysql://example.org/shop"),
    ],
)
def test_the_password_in_a_url_is_never_shown(url: str, shown: str) -> None:
    assert unquote(str(open_store(url))) == shown


# A store of somebody else

MY_STORES = """
import os
from counter_server.operations import Batch
from counter_server.stores.memory import MemoryStore as MyStore

class Forgetful(MyStore):
    def apply(self, batch, deadline):  # a batch that is sent again is a new one
        return super().apply(Batch(os.urandom(16), min(batch.sequence, 1), batch.operations), deadline)
"""
ANY_APP = (ROOT / "docs" / "any-app.md").read_text()
EXAMPLES = re.findall(r"(?:^ {4}.*\n\n?)+", ANY_APP.partition("## A store of your own\n")[2], re.MULTILINE)


def test_the_contract_passes_a_right_store_and_fails_a_wrong_one(tmp_path: Path) -> None:
    """The files of tests are the example of docs/any-app.md."""
    (tmp_path / "my_stores.py").write_text(MY_STORES)
    example = textwrap.dedent(EXAMPLES[0])
    (tmp_path / "test_right.py").write_text(example)
    (tmp_path / "test_wrong.py").write_text(example.replace("import MyStore", "import Forgetful as MyStore"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert set(re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)) == {
        "test_wrong.py::TestMyStore::test_a_batch_sent_again_has_its_results_again",
        "test_wrong.py::TestMyStore::test_a_batch_out_of_turn_is_refused",
        "test_wrong.py::TestMyStore::test_random_batches_have_the_results_of_the_reference",
    }
    assert "assert [[1, 6], [7, 12]] == [[1, 6], [1, 6]]" in done.stdout  # with the values


def test_the_example_of_the_checker_is_true() -> None:
    program, _, shown = EXAMPLES[1].rpartition("  # ")
    head, _, last = textwrap.dedent(program).rpartition("\n")
    names: dict[str, object] = {}
    exec(head, names)  # noqa: S102 - the example of our own document
    assert repr(eval(last, names)) == shown.strip()  # noqa: S307
