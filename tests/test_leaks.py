"""What a soak goes by: real processes that leak are told from one that does not."""

from contextlib import ExitStack

import pytest

from tests.leaks import MEBIBYTE, Bounds, Growth, Life, Sample, Watch
from tests.processes import Program, eventually

BOUNDS = Bounds(memory=8 * MEBIBYTE, descriptors=8, threads=8)

PROGRAM = """
import os, threading, time

kept = []
while True:
    time.sleep(0.01)
    passing = bytearray(2**20), open(os.devnull)
    {leak}
"""

LEAKS = {
    "nothing": "passing[1].close()",
    "memory": "kept.append(bytearray(os.urandom(2**18))) if len(kept) < 1000 else None",
    "descriptors": "kept.append(passing) if len(kept) < 500 else None; del passing",
    "threads": "kept.append(threading.Thread(target=time.sleep, args=(60,), daemon=True)); kept[-1].start()",
}


@pytest.mark.slow
def test_a_process_that_leaks_is_told_from_one_that_does_not() -> None:
    with ExitStack() as stack:
        programs = {
            stack.enter_context(Program("-c", PROGRAM.format(leak=leak))).pid: what for what, leak in LEAKS.items()
        }
        with Watch(lambda: programs, interval=0.03) as watch:
            eventually(
                lambda: len(watch.lives) == 4 and all(len(life.samples) > 50 for life in watch.lives), "long lives"
            )
    growths = [growth for life in watch.lives if (growth := life.growth(warm_up=10)) is not None]
    found = {growth.kind: growth.over(BOUNDS) for growth in growths}
    assert found["nothing"] == []
    for what in ("memory", "descriptors", "threads"):
        assert any(line.startswith(f"{what} of") for line in found[what]), found
    assert not any(line.startswith(("descriptors", "threads")) for line in found["memory"])


@pytest.mark.parametrize(("work", "over"), [(0, True), (99, True), (100, False)])
def test_what_has_to_be_kept_for_work_that_was_done_is_no_leak(work: int, over: bool) -> None:  # noqa: FBT001
    first = Sample(memory=10 * MEBIBYTE, descriptors=5, threads=2)
    last = Sample(memory=10 * MEBIBYTE + 1100, descriptors=5, threads=2, work=work)
    growth = Growth(kind="manager", pid=1, samples=100, first=first, last=last)
    assert bool(growth.over(Bounds(memory=100, descriptors=0, threads=0, per_work=10))) is over


def test_a_short_life_is_not_judged_and_a_beginning_not_either() -> None:
    small, large = (Sample(memory=memory, descriptors=1, threads=1) for memory in (1, 1000))
    life = Life(kind="worker", pid=1, samples=[small] * 5 + [large] * 15)
    assert life.growth(warm_up=5) is None
    life.samples.append(large)
    growth = life.growth(warm_up=5)
    assert growth is not None
    assert growth.over(Bounds(memory=0, descriptors=0, threads=0)) == []
