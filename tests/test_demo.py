"""`counter-server demo`: its verdicts, its picture, and its cleaning up."""

import json
import re
import signal
import socket
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner, Result

from counter_server.cli import main
from counter_server.errors import InvalidRequest
from counter_server.server.demo.report import NEVER, ONCE, SEVERAL, draw
from counter_server.server.demo.runner import PAIRS, Outcome, Pair, Reply, chosen, judge, run
from counter_server.server.strategies import STRATEGIES
from tests.processes import Program, eventually
from tests.test_prove import at_a_terminal, kill_processes_of, processes_of

pytestmark = pytest.mark.slow

CLIENTS = 24
# Other tests run these pairs, or their server and their strategy in two other pairs.
ELSEWHERE = {"development/global", "threaded/global", "processes/global", "waitress/global", "waitress/lock"}
ELSEWHERE |= {"gunicorn/global", "gunicorn/value", "waitress/session"}


def outcome_of(pair: Pair, *numbers: int | None) -> Outcome:
    """Return the outcome of a round in which clients got these numbers."""
    return Outcome(pair, [judge([Reply(number, 0.1) for number in numbers])])


def demo(*options: str | Path, without: tuple[str, ...] = ()) -> Result:
    """Run the command, without some packages."""
    with pytest.MonkeyPatch.context() as patch:
        for name in without:
            patch.setitem(sys.modules, name, None)
        return CliRunner().invoke(main, ["demo", *map(str, options)])


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a directory for temporary files, with a name short enough for gunicorn's sockets."""
    with TemporaryDirectory() as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)
        kill_processes_of(Path(directory))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.name not in ELSEWHERE], ids=lambda pair: pair.name)
def test_each_pair_is_right_or_wrong_as_its_sentence_says(pair: Pair, files: Path) -> None:
    (outcome,) = run([pair], lambda _: None, clients=CLIENTS, rounds=1, port=0)
    assert outcome.left_out == ""
    (only,) = outcome.rounds
    assert only.right == (pair.expected == "right")
    assert outcome.sentence.startswith(pair.why)
    assert len(only.numbers) == CLIENTS
    if STRATEGIES[pair.strategy].killed:
        assert only.killed_after is not None
        assert 0 < only.killed_after < CLIENTS
    else:
        assert only.killed_after is None
        assert only.unanswered == 0
    assert processes_of(files) == {}
    assert list(files.iterdir()) == []


def test_the_replies_of_a_round_are_counted() -> None:
    for numbers, *counts in [
        ((1, 2), 2, 0, 0, 0),
        ((2, 3), 2, 0, 1, 0),  # the question's own
        ((1, 1), 1, 1, 1, 0),
        ((1, None), 1, 0, 1, 1),
    ]:
        (shown,) = outcome_of(PAIRS[0], *numbers).rounds
        assert [shown.unique, shown.duplicates, shown.skipped, shown.unanswered] == counts
        assert shown.right == (numbers == (1, 2))


def test_one_wrong_round_makes_the_outcome_wrong_and_luck_is_not_explained() -> None:
    racy, ours = next(pair for pair in PAIRS if pair.expected == "wrong"), PAIRS[-1]
    right, wrong = (outcome_of(ours, *numbers).rounds[0] for numbers in ((1, 2), (1, 1)))
    outcome = Outcome(ours, [right, wrong, right])
    assert outcome.verdict == "wrong"
    assert outcome.failed
    assert outcome.shown is wrong
    assert "Right in 2 of 3 rounds." in outcome.sentence
    assert "1 was given 2 times" in outcome.sentence
    assert "luck" in outcome_of(racy, 1, 2).sentence
    assert "report" in outcome_of(ours, 1, 1).sentence
    failed = Outcome(ours, [judge([Reply(1, 0.1), Reply(None, 0.1, "503 Service Unavailable")])])
    assert "503 Service Unavailable" in failed.sentence


def test_pairs_are_selected_by_server_strategy_or_both() -> None:
    assert chosen([]) == PAIRS
    assert {pair.server for pair in chosen(["waitress"])} == {"waitress"}
    assert {pair.strategy for pair in chosen(["ours"])} == {"ours"}
    assert [pair.name for pair in chosen(["waitress/ours", "threaded/lock"])] == ["threaded/lock", "waitress/ours"]
    with pytest.raises(InvalidRequest, match=r"'redis' is none of development, .*ours"):
        chosen(["redis"])


def test_a_server_that_does_not_start_is_left_out_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "waitress.py").write_text("raise SystemExit('no room for waitress')")
    (outcome,) = run(chosen(["waitress/session"]), lambda _: None, clients=2, rounds=1, port=0)
    assert outcome.verdict == "left out"
    assert "it ended with status 1: no room for waitress" in outcome.left_out
    assert processes_of(files) == {}


def test_the_report_and_the_picture_contain_every_number(tmp_path: Path) -> None:
    """All servers use one port, in turn."""
    picture = tmp_path / "race.svg"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    only = ("--only", "development", "--only", "threaded/global", "--port", port)
    done = demo("--json", *only, "--clients", "7", "--rounds", "2", "--picture", picture)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    outcome, racy = report["outcomes"]
    assert outcome["verdict"] == "right"
    assert [sorted(each["numbers"]) for each in outcome["rounds"]] == [list(range(1, 8))] * 2
    # One after the other, with the yield in each.
    assert outcome["rounds"][outcome["shown"]]["slowest_seconds"] >= 7 * 0.01
    assert sys.version.split()[0] in report["machine"]
    assert {"flask", "waitress", "gunicorn", "gevent"} <= set(report["versions"])
    given = Counter(racy["rounds"][racy["shown"]]["numbers"])
    cells = dict(
        identity.removeprefix("threaded/global/").split("=")
        for element in ElementTree.parse(picture).iter()  # noqa: S314 - our own
        if (identity := element.get("id", "")).startswith("threaded/global/")
    )
    assert cells == {str(number): str(given[number]) for number in range(1, 8)}
    assert all(f"fill: {colour.lower()}" in picture.read_text() for colour in (ONCE, SEVERAL, NEVER))
    assert list(tmp_path.iterdir()) == [picture]


def test_a_terminal_shows_a_bar_and_then_a_table_of_verdicts_and_reasons() -> None:
    table, shown = at_a_terminal("demo", "--only", "development", "--only", "processes/global", "--clients", "10")
    assert re.search(r"━{12}\S* \S*[01]/2\S* \S*0:00:\d\d\S* 10 clients: development server, ", shown)
    assert "wrong     development server, processes=10 · a global" in shown
    lines = [re.sub(" +", " ", line).strip() for line in table.splitlines()]
    assert lines[0] == "10 clients at once unique duplicates skipped slowest"
    assert any(line.startswith("✓ right development server, one") and " 10 0 0 " in line for line in lines)
    assert any(line.startswith("✗ wrong development server") and " 1 9 9 " in line for line in lines)
    assert "The number 1 was given 10 times." in " ".join(lines)


def error_of(*options: str | Path, status: int = 1, without: tuple[str, ...] = ()) -> str:
    """Run the command, which must fail before anything starts, and return its last line."""
    done = demo(*options, without=without)
    assert done.exit_code == status
    assert "starting" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_what_makes_it_impossible_is_reported_before_anything_starts(tmp_path: Path) -> None:
    for missing, options in {"rich": (), "matplotlib": ("--json", "--picture", "race.png")}.items():
        line = error_of(*options, without=(missing,))
        assert line == f"Error: {missing} is not installed, and nothing was started: pip install 'counter-server[demo]'"
    for file, what in {"race.gif": "neither in .png nor in .svg", "no/race.png": "written in"}.items():
        assert what in error_of("--picture", tmp_path / file, status=2)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        line = error_of("--port", str(port), "--only", "waitress/ours")
    assert line.startswith(f"Error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another")


def test_json_needs_no_rich_and_missing_packages_are_named() -> None:
    """The exit status is 1 if ours was left out."""
    only = [word for name in ("gevent/global", "cachelib", "stash") for word in ("--only", name)]
    without = ("rich", "gevent", "cachelib", "gunicorn.dirty")
    done = demo("--json", *only, without=without)
    assert done.exit_code == 0, done.stderr
    reasons = {outcome["name"]: outcome.get("reason", "") for outcome in json.loads(done.stdout)["outcomes"]}
    assert reasons == {
        "gevent/global": "gevent not installed: pip install 'counter-server[demo]'",
        "waitress/cachelib": "cachelib not installed: pip install 'counter-server[demo]'",
        "gunicorn/stash": "the installed gunicorn is too old for it: upgrade it",
    }
    assert demo("--json", "--only", "gevent-4/ours", without=without).exit_code == 1


def test_ctrl_c_while_it_draws_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(part: Path, _whole: Path) -> None:
        assert part.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw([outcome_of(PAIRS[0], 1, 2)], tmp_path / "race.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [("", signal.SIGINT), ("", signal.SIGKILL), ("24 clients: ", signal.SIGINT), ("killed after ", signal.SIGKILL)],
)
def test_ctrl_c_and_kill_9_leave_no_process_and_no_file(
    moment: str, number: signal.Signals, stack: ExitStack, files: Path
) -> None:
    command = ("-m", "counter_server", "demo", "--clients", str(CLIENTS), "--rounds", "100", "--only", "waitress/ours")
    program = stack.enter_context(Program(*command))
    eventually(lambda: any(files.iterdir()) or not program.running, "the start of the server")
    eventually(lambda: any(moment in line for line in program.errors) or not program.running, "the moment")
    assert program.running, program.errors
    program.send_signal(number)
    status = program.wait()
    if number is signal.SIGINT:
        assert status == 130
        assert program.errors[-1] == "Stopped. All processes and files are removed."
        assert "Traceback" not in "\n".join(program.errors)
        assert processes_of(files) == {}  # it waits for that
    eventually(lambda: not processes_of(files), "the end of all its processes")
    assert list(files.iterdir()) == []
