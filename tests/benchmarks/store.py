"""The level of the store: increments per second and their latency, of ours and of the peers."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.load import Shape, measure
from tests.benchmarks.peers import CONTESTANTS, start_all
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results

SHAPES = [Shape(1, 1), Shape(4, 1), Shape(4, 4), Shape(2, 16), Shape(2, 64)]
BARS = (Shape(1, 1), Shape(2, 16))  # for the bars


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Measure all contestants in turn, round by round, shape by shape."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("starting the peers")
        peers, missing = start_all([one for one in CONTESTANTS if plan.wants(one.name)], stack, root)
        results.missing.update(missing)
        for shape in plan.shapes or SHAPES:
            for number in range(plan.rounds(bar=shape in BARS)):
                for peer in in_turn(peers, number):
                    say(f"store {shape}, round {number + 1}: {peer.name}")
                    results.add(Place("store", str(shape), peer.name), measure(peer, shape, plan.seconds))
