"""`counter-server demo`: its verdicts, its picture, and its cleaning up."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image

from counter_server.errors import InvalidRequest
from counter_server.server.demo.report import NEVER, ONCE, SEVERAL, draw
from counter_server.server.demo.runner import (
    OURS,
    PAIRS,
    Outcome,
    Pair,
    Reply,
    chosen,
    judge,
    run,
    run_server,
    visit_at_once,
)
from counter_server.server.strategies import STRATEGIES
from tests.processes import ROOT, Program, eventually

pytestmark = pytest.mark.slow

CLIENTS = 24
CERTAIN = {"waitress/global", "waitress/ours"}  # shown in several rounds
BEFORE = "import sys; {}; from counter_server.cli import main; main()"


def outcome_of(pair: Pair, *numbers: int | None) -> Outcome:
    """Return the outcome of a round in which clients got these numbers."""
    return Outcome(pair, [judge([Reply(number, 0.1) for number in numbers])])


def demo(*options: str | Path, before: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the command to its end; `before` is run first in its process."""
    command = ["-c", BEFORE.format(before), "demo"] if before else ["-m", "counter_server", "demo"]
    return subprocess.run(
        [sys.executable, *command, *map(str, options)], capture_output=True, text=True, check=False, cwd=ROOT
    )


def processes_of(directory: Path) -> list[int]:
    """Return the processes whose temporary files go into this directory, or below."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name not in ("self", str(os.getpid()))
                and f"TMPDIR={directory}".encode() in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for the temporary files of the demonstration, with a name short enough for gunicorn's sockets."""
    with TemporaryDirectory() as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)
        for pid in processes_of(Path(directory)):  # of a test that failed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_each_pair_is_right_or_wrong_as_its_sentence_says(pair: Pair, files: Path) -> None:
    rounds = 2 if pair.name in CERTAIN else 1
    told: list[str] = []
    (outcome,) = run([pair], told.append, clients=CLIENTS, rounds=rounds, port=0)
    assert outcome.left_out == ""
    assert [each.right for each in outcome.rounds] == [pair.expected == "right"] * rounds
    assert outcome.sentence.startswith(pair.why)
    assert processes_of(files) == []
    assert list(files.iterdir()) == []
    for each in outcome.rounds:
        assert len(each.numbers) == CLIENTS
        if STRATEGIES[pair.strategy].killed:
            assert each.killed_after is not None
            assert 0 < each.killed_after < CLIENTS
        else:
            assert each.killed_after is None
            assert each.unanswered == 0


def test_another_manager_continues_after_a_killed_one(files: Path) -> None:
    with run_server("waitress", OURS) as running:
        assert [reply.number for reply in visit_at_once(running.port, 1)] == [1]
        first = running.manager()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert [reply.number for reply in visit_at_once(running.port, 1)] == [2]
        assert running.manager() not in (None, first)
        assert processes_of(files)
    assert processes_of(files) == []
    assert list(files.iterdir()) == []


def test_the_replies_of_a_round_are_counted() -> None:
    for numbers, *counts in [
        ((1, 2), 2, 0, 0, 0),
        ((2, 3), 2, 0, 1, 0),  # the question's own
        ((1, 1), 1, 1, 1, 0),
        ((2, 2), 1, 1, 1, 0),
        ((1, None), 1, 0, 1, 1),
        ((None, None), 0, 0, 2, 2),
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
    assert processes_of(files) == []


def test_the_report_and_the_picture_contain_every_number(tmp_path: Path) -> None:
    picture = tmp_path / "race.svg"
    only = ("--only", "development", "--only", "threaded/global")
    done = demo("--json", *only, "--clients", "7", "--rounds", "2", "--picture", picture)
    assert done.returncode == 0, done.stderr
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
    assert list(tmp_path.iterdir()) == [picture]


def test_the_table_shows_verdicts_and_reasons() -> None:
    done = demo("--only", "development", "--only", "processes/global", "--clients", "10")
    assert done.returncode == 0, done.stderr
    lines = [re.sub(" +", " ", line).strip() for line in done.stdout.splitlines()]
    assert lines[0] == "10 clients at once unique duplicates skipped slowest"
    assert any(line.startswith("✓ right development server, one") and " 10 0 0 " in line for line in lines)
    assert any(line.startswith("✗ wrong development server") and " 1 9 9 " in line for line in lines)
    assert "The number 1 was given 10 times." in " ".join(lines)


def test_a_terminal_of_80_columns_shows_a_bar() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "counter_server", "demo", "--only", "processes/global", "--clients", "100"]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment, cwd=ROOT) as process:
        os.close(theirs)
        with open(ours, "rb") as terminal:
            shown = b""
            with suppress(OSError):  # how Linux reports the end of a terminal
                while part := terminal.read1():
                    shown += part
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(r"━{12}\S* \S*0/1\S* \S*0:00:\d\d\S* 100 clients: development server, proc", text)
    assert "wrong     development server, processes=10 · a global" in text


def test_the_exit_status_is_1_if_ours_was_wrong() -> None:
    """Here the plain global counts as ours. (It is 0 in `test_the_table_shows_verdicts_and_reasons`.)"""
    before = "import counter_server.server.demo.runner as runner; runner.OURS = 'global'"
    assert demo("--only", "processes/global", "--clients", "2", "--json", before=before).returncode == 1


def test_a_busy_port_is_reported_in_one_line_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        done = demo("--port", str(port), "--only", "waitress/ours")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == (
        f"Error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port, or omit"
        " it to use free ports"
    )


def test_a_port_serves_one_server_after_the_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pairs = chosen(["development", "threaded/lock"])
    outcomes = list(run(pairs, lambda _: None, clients=2, rounds=2, port=port))
    assert [outcome.verdict for outcome in outcomes] == ["right", "right"]


@pytest.mark.parametrize(("missing", "options"), [("rich", ()), ("matplotlib", ("--json", "--picture", "race.png"))])
def test_a_missing_extra_is_reported_in_one_line_before_anything_starts(missing: str, options: tuple[str, ...]) -> None:
    done = demo(*options, before=f"sys.modules[{missing!r}] = None")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"Error: {missing} is not installed, and nothing was started: pip install 'counter-server[demo]'"


def test_json_needs_no_rich_and_missing_packages_are_named() -> None:
    before = "; ".join(f"sys.modules[{name!r}] = None" for name in ("rich", "gevent", "cachelib", "gunicorn.dirty"))
    done = demo("--json", "--only", "gevent/global", "--only", "cachelib", "--only", "stash", before=before)
    assert done.returncode == 0, done.stderr
    reasons = {outcome["name"]: outcome.get("reason", "") for outcome in json.loads(done.stdout)["outcomes"]}
    assert reasons == {
        "gevent/global": "gevent not installed: pip install 'counter-server[demo]'",
        "waitress/cachelib": "cachelib not installed: pip install 'counter-server[demo]'",
        "gunicorn/stash": "the installed gunicorn is too old for it: upgrade it",
    }


def test_the_exit_status_is_1_if_ours_was_left_out() -> None:
    assert demo("--json", "--only", "gevent-4/ours", before="sys.modules['gevent'] = None").returncode == 1


@pytest.mark.parametrize(("file", "what"), [("race.gif", "neither in .png nor in .svg"), ("no/race.png", "written in")])
def test_an_impossible_picture_is_reported_before_anything_starts(file: str, what: str, tmp_path: Path) -> None:
    done = demo("--picture", tmp_path / file)
    assert done.returncode == 2
    assert what in done.stderr
    assert "starting" not in done.stderr


def test_the_picture_has_its_size_and_its_colours(tmp_path: Path) -> None:
    pairs = [PAIRS[0], PAIRS[1]]
    right = outcome_of(pairs[0], *range(1, 101))
    wrong = outcome_of(pairs[1], *[2 * (number // 2) + 1 for number in range(99)], 100)
    draw([right, wrong], tmp_path / "race.png")
    with Image.open(tmp_path / "race.png") as opened:
        assert opened.format == "PNG"
        picture = opened.convert("RGB")
    assert picture.size == (520, 400)
    panels = [picture.crop((left, 100, left + 260, 400)) for left in (0, 260)]
    in_the_right, in_the_wrong = map(by_colour, panels)
    cell = in_the_right[ONCE] / 100
    assert cell > 16 * 16  # pixels, less its edge and its sign
    assert in_the_right == pytest.approx({ONCE: 100 * cell, SEVERAL: 0, NEVER: 0}, abs=cell)
    assert in_the_wrong == pytest.approx({ONCE: 2 * cell, SEVERAL: 49 * cell, NEVER: 49 * cell}, rel=0.2)


def by_colour(picture: Image.Image) -> dict[str, int]:
    """Count the pixels that have the colours of cells."""
    colours: Any = picture.getcolors(maxcolors=2**24)
    found = {f"#{red:02X}{green:02X}{blue:02X}": count for count, (red, green, blue) in colours}
    return {colour: found.get(colour, 0) for colour in (ONCE, SEVERAL, NEVER)}


def says(what: str) -> Callable[[Program, Path], bool]:
    return lambda program, _: any(what in line for line in program.errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda _, files: any(files.iterdir()), id="while the server starts"),
        pytest.param(says("24 clients"), id="with all clients on their way"),
        pytest.param(says("killed after"), id="without a manager"),
    ],
)
def test_ctrl_c_and_kill_9_leave_no_process_and_no_file(
    moment: Callable[[Program, Path], bool], number: signal.Signals, stack: ExitStack, files: Path
) -> None:
    command = ("-m", "counter_server", "demo", "--clients", str(CLIENTS), "--rounds", "100", "--only", "waitress/ours")
    program = stack.enter_context(Program(*command))
    eventually(lambda: moment(program, files) or not program.running, "the moment")
    assert program.running, program.errors
    program.send_signal(number)
    status = program.wait()
    if number is signal.SIGINT:
        assert status == 130
        assert program.errors[-1] == "Stopped. All processes and files are removed."
        assert "Traceback" not in "\n".join(program.errors)
        assert processes_of(files) == []  # it waits for that
    eventually(lambda: not processes_of(files), "the end of all its processes")
    assert list(files.iterdir()) == []


def test_ctrl_c_while_it_draws_leaves_no_file(stack: ExitStack, files: Path, tmp_path: Path) -> None:
    picture = tmp_path / "race.png"
    options = ("--only", "development", "--clients", "100", "--picture", picture)

    def interrupted() -> bool:
        """Whether the signal came before the picture was complete: drawing takes only a moment."""
        program = stack.enter_context(Program("-m", "counter_server", "demo", *options))
        eventually(lambda: says("drawing")(program, files) or not program.running, "the drawing")
        program.send_signal(signal.SIGINT)
        status = program.wait()
        if picture.exists():
            assert status in (0, -signal.SIGINT)  # it met a program that had done all, or was ending
            picture.unlink()
            return False
        assert status == 130
        return True

    assert any(interrupted() for _ in range(10))
    assert list(tmp_path.iterdir()) == []
    assert list(files.iterdir()) == []


def test_the_tables_of_the_documents_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    files = ["README.md", "docs/race.md"]
    for file in files:
        shutil.copy(ROOT / file, tmp_path / file)
    options = ("--only", "development", "--only", "processes/global", "--clients", "5")
    subprocess.run([sys.executable, "docs/demo.py", tmp_path, *options], check=True, cwd=ROOT, capture_output=True)
    for file, rows in zip(files, (1, 2), strict=True):
        before, after = (re.split("<!--.*-->", (path / file).read_text()) for path in (ROOT, tmp_path))
        assert [before[0], before[2]] == [after[0], after[2]]
        lines = after[1].split("\n")
        assert lines[1:3] == [
            "| server | the number is in |  | unique | duplicates | skipped | slowest | why |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        ]
        assert lines[3].startswith("| development server, one thread | a global | **right** | 5 | 0 | 0 | ")
        assert sum(line.startswith("| development") for line in lines) == rows
        assert f"{sys.version.split()[0]}; counter-server" in after[1]


@pytest.mark.parametrize(("file", "rows"), [("README.md", 5), ("docs/race.md", len(PAIRS))])
def test_the_readme_shows_five_pairs_and_the_race_page_all(file: str, rows: int) -> None:
    shown = re.split("<!--.*-->", (ROOT / file).read_text())[1]
    assert sum(line.count("**right**") + line.count("**wrong**") for line in shown.splitlines()) == rows
