"""The benchmark command: from its options to tables, JSON and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks import bars, document
from tests.benchmarks.load import Shape
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.reasons import WHY
from tests.benchmarks.results import Place, Results
from tests.processes import ROOT

pytestmark = pytest.mark.slow

OURS, PLAIN = "ours, none", "BaseManager proxy, AF_UNIX"


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *map(str, options)], capture_output=True, text=True, cwd=ROOT
    )


def test_one_shape_is_measured_from_end_to_end(tmp_path: Path) -> None:
    peers = ("none", "AF_UNIX", "cachelib", "multiprocessing.Value")
    outcome = run("--only", "store", "--shapes", "2x2", "1x1", "--rounds", "1", "--seconds", "0.1",
                  "--output", tmp_path, "--peers", *peers)  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    for words in (
        "store: 2x2",
        "store: 1x1",
        OURS,
        PLAIN,
        "1x1 volatile: median, of the plain proxy's",
        "by 1 round only",
    ):
        assert words in outcome.stdout
    told = json.loads((tmp_path / "results.json").read_bytes())
    figures = {(one["case"], one["who"]): one["rounds"] for one in told["figures"]}
    assert {who for _, who in figures} == {
        OURS, PLAIN, "cachelib file cache", "multiprocessing.Value", "AF_UNIX ping-pong"
    }  # fmt: skip
    for case in ("2x2", "1x1"):
        for who in (OURS, PLAIN, "multiprocessing.Value", "AF_UNIX ping-pong"):
            assert figures[case, who]["wrong"] == [0]
            assert figures[case, who]["increments/s"][0] > 100
    assert figures["2x2", "cachelib file cache"]["wrong"][0] > 0  # it reads and then writes
    (bar,) = (one for one in told["bars"] if one["title"].startswith("1x1"))
    assert bar["figure"] == figures["1x1", OURS]["p50 us"][0] / figures["1x1", PLAIN]["p50 us"][0]
    for name in ("store.png", "bars.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 10


def test_a_missing_peer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    outcome = run("--only", "store", "--shapes", "1x1", "--rounds", "1", "--seconds", "0.1", "--output", tmp_path,
                  "--peers", "pymemcache", "INCR, volatile", "multiprocessing.Value")  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "missing  pymemcache incr: memcached is not installed (Debian: memcached)" in outcome.stdout
    assert "missing  redis-py INCR, volatile: redis-server is not installed (Debian: redis-server)" in outcome.stdout
    told = json.loads((tmp_path / "results.json").read_bytes())
    assert {one["who"] for one in told["figures"]} == {"multiprocessing.Value"}
    assert {one["is"] for one in told["bars"]} == {"not measured"}


def test_bars_are_ratios_of_medians() -> None:
    results = Results()
    for ours, plain in zip((10, 600, 700, 800, 99_999), (100, 100, 100, 100, 1), strict=True):
        results.add(Place("store", "2x16", OURS), {"increments/s": ours, "p99 us": 5})
        results.add(Place("store", "2x16", PLAIN), {"increments/s": plain, "p99 us": 10})
    verdicts = {verdict.bar.title: verdict for verdict in bars.judge(results)}
    verdict = verdicts[f"2x16 volatile: times {PLAIN}"]
    assert (verdict.figure, verdict.words) == (7.0, "reached")
    below = verdicts["2x16 volatile: p99, of the best networked peer's"]
    assert (below.figure, below.words) == (0.5, "reached")
    assert verdicts["2x16 durable: times SQLite WAL, FULL"].words == "not measured"
    assert not any("HTTP" in title for title in verdicts)


def test_the_document_shows_a_missed_bar_with_its_figure_and_reason(tmp_path: Path) -> None:
    results = Results()
    for _ in range(5):
        results.add(Place("store", "2x16", OURS), {"increments/s": 500})
        results.add(Place("store", "2x16", PLAIN), {"increments/s": 100})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    (picture := tmp_path / "store.png").write_bytes(b"a picture")
    for _ in range(2):  # the second time, it replaces what it wrote itself
        document.write(page, results, bars.judge(results), [picture])
    text = page.read_text()
    assert text.startswith(f"before\n{document.BEGIN}\n")
    assert text.endswith(f"{document.END}\nafter\n")
    assert "old" not in text
    assert text.count(f"| 2x16 volatile: times {PLAIN} | at least 6 | 5.00 | **short** |") == 1
    assert text.count(f"- **2x16 volatile: times {PLAIN}**: ") == 1
    assert (tmp_path / "pictures" / "store.png").read_bytes() == b"a picture"


def test_a_document_without_markers_is_not_changed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        document.write(page, Results(), [], [])
    assert page.read_text() == "nothing"


def test_each_reason_belongs_to_a_bar() -> None:
    assert set(WHY) <= {bar.title for bar in bars.BARS}


def test_rounds_alternate_in_direction_and_bars_have_more() -> None:
    assert (in_turn("abc", 0), in_turn("abc", 1)) == ("abc", "cba")
    assert (Plan().rounds(bar=False), Plan().rounds(bar=True), Plan(rounds_asked=1).rounds(bar=True)) == (3, 9, 1)
    with pytest.raises(ValueError, match="at least one process"):
        Shape.parse("0x4")
