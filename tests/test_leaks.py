"""What a soak goes by: real processes that leak are told from one that does not."""

from contextlib import ExitStack

import pytest

from tests.leaks import MEBIBYTE, Bounds, Watch
from tests.processes import Program, eventually

pytestmark = pytest.mark.slow

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


def test_a_process_that_leaks_is_told_from_one_that_does_not(stack: ExitStack) -> None:
    programs = {stack.enter_context(Program("-c", PROGRAM.format(leak=LEAKS[what]))).pid: what for what in LEAKS}
    with Watch(lambda: programs, interval=0.03) as watch:
        eventually(lambda: len(watch.lives) == 4 and all(len(life.samples) > 50 for life in watch.lives), "long lives")
    growths = [growth for life in watch.lives if (growth := life.growth(warm_up=10)) is not None]
    found = {growth.kind: growth.over(Bounds(memory=8 * MEBIBYTE, descriptors=8, threads=8)) for growth in growths}
    assert found["nothing"] == []
    for what in ("memory", "descriptors", "threads"):
        assert any(line.startswith(f"{what} of") for line in found[what]), found
    assert not any(line.startswith(("descriptors", "threads")) for line in found["memory"])
    assert watch.lives[0].growth(warm_up=len(watch.lives[0].samples)) is None  # too short a life
