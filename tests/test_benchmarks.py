"""The benchmark command: from its options to tables, JSON and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks import bars
from tests.benchmarks.results import Place, Results
from tests.processes import ROOT

pytestmark = pytest.mark.slow

OURS, PLAIN = "ours, none", "BaseManager proxy, AF_UNIX"
ALL_RIGHT = {OURS, PLAIN, "multiprocessing.Value", "AF_UNIX ping-pong"}


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
    assert {who for _, who in figures} == {*ALL_RIGHT, "cachelib file cache"}
    for case in ("2x2", "1x1"):
        for who in ALL_RIGHT:
            assert figures[case, who]["wrong"] == [0]
            assert figures[case, who]["increments/s"][0] > 0
    assert figures["2x2", "cachelib file cache"]["wrong"][0] > 0  # it reads and then writes
    (bar,) = (one for one in told["bars"] if one["title"].startswith("1x1"))
    assert bar["figure"] == figures["1x1", OURS]["p50 us"][0] / figures["1x1", PLAIN]["p50 us"][0]
    for name in ("store.png", "bars.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 10


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
