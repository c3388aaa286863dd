"""Measure how strong the tests are: change one small thing of a module, and see whether a test fails.

`python -m tests.mutants session ledger --sample 40` prints every change that no test noticed: a survivor. A change
flips a comparison or a condition, drops a lock, a commit, an assignment or an error, moves a number by one, or swaps
two steps. The tests of the module itself run first. What survives meets the fast tier and, with `--all`, everything.
"""

import ast
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

ROOT = Path(__file__).parent.parent

# The tests that most likely notice a change of a module. Running them first saves time.
FIRST = {
    "combiner": ["combiner", "state"],
    "session": ["session", "state"],
    "ledger": ["ledger", "caps"],
    "journal": ["journal", "ledger", "refused_writes"],
    "objects": ["objects", "plain", "hosting", "caps", "dicts", "children"],
    "manager/client": ["manager", "hosting", "on_demand", "borrowing", "children", "directory"],
}

SECONDS = 120  # A change that makes a test wait for so long is noticed too.

_PAIRS: list[tuple[type[ast.AST], type[ast.AST]]] = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq)]
_PAIRS += [(ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub)]
FLIPPED: dict[type[ast.AST], type[ast.AST]] = {ast.Mult: ast.Add, ast.Div: ast.Mult}
FLIPPED |= {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}

Edit = tuple[str, Callable[[Any], None]]


def _edits(node: ast.AST) -> Iterator[Edit]:
    """Yield each small change that can be made in place at one node, with a word for it."""
    match node:
        case ast.Compare(ops=[_]):
            yield "flip the comparison", lambda n: n.ops.__setitem__(0, FLIPPED[type(n.ops[0])]())
        case ast.BoolOp() | ast.BinOp() | ast.AugAssign() if type(node.op) in FLIPPED:
            yield "flip the operator", lambda n: setattr(n, "op", FLIPPED[type(n.op)]())
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.Constant):
            yield "negate the condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
        case ast.Constant(value=bool()):
            yield "flip the truth", lambda n: setattr(n, "value", not n.value)
        case ast.Constant(value=int()):
            yield "add one", lambda n: setattr(n, "value", n.value + 1)
    for field in ("body", "orelse", "finalbody"):
        steps: list[ast.stmt] = getattr(node, field, [])
        for place, step in enumerate(steps if isinstance(steps, list) else []):
            yield from _edits_of_step(field, place, step, steps[place + 1] if place + 1 < len(steps) else None)


def _edits_of_step(field: str, place: int, step: ast.AST, following: ast.AST | None) -> Iterator[Edit]:
    def replace(*new: ast.stmt) -> Callable[[Any], None]:
        return lambda n: getattr(n, field).__setitem__(slice(place, place + 1), new)

    def swap(n: ast.AST) -> None:
        steps = getattr(n, field)
        steps[place], steps[place + 1] = steps[place + 1], steps[place]

    calls = isinstance(step, ast.Expr) and isinstance(step.value, ast.Call)
    if calls or isinstance(step, ast.Raise | ast.AugAssign):
        yield f"drop: {ast.unparse(step)}", replace(ast.Pass())
    if isinstance(step, ast.Assign) and isinstance(step.targets[0], ast.Attribute | ast.Subscript):
        yield f"drop: {ast.unparse(step)}", replace(ast.Pass())
    if isinstance(step, ast.With):
        yield f"drop: with {ast.unparse(step.items[0])}", replace(*step.body)
    if calls and isinstance(following, ast.Expr | ast.Assign | ast.AugAssign | ast.Return):
        yield f"after its next step: {ast.unparse(step)}", swap
    if isinstance(step, ast.Assign | ast.AugAssign) and isinstance(following, ast.Expr):
        yield f"after its next step: {ast.unparse(step)}", swap


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield what is changed, and the source of the module with that change."""
    tree = ast.parse(source)
    ignored = set()
    for node in ast.walk(tree):
        keywords = [each.value for each in node.keywords] if isinstance(node, ast.ClassDef) else []
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None), *keywords):
            ignored |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
    for index, node in enumerate(ast.walk(tree)):
        for variant, (word, _) in enumerate([] if id(node) in ignored else list(_edits(node))):
            changed = copy.deepcopy(tree)
            copied = next(islice(ast.walk(changed), index, None))
            list(_edits(copied))[variant][1](copied)
            place = f"{getattr(node, 'lineno', 0)} {word} | {ast.unparse(node).splitlines()[0][:100]}"
            yield place, ast.unparse(ast.fix_missing_locations(changed))


class Copy:
    """A copy of the checkout, in which one module is changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
        processes = directory / "tests" / "processes.py"
        processes.write_text(processes.read_text().replace("PATIENCE = 30.0", "PATIENCE = 10.0"))
        self._environment = {**os.environ, "PYTHONPATH": str(directory)}

    def notices(self, module: str, source: str, *arguments: str) -> bool:
        """Return whether these tests fail with the module changed to `source`."""
        path = self._directory / "counter_server" / f"{module}.py"
        original = path.read_text()
        path.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        process = subprocess.Popen(
            command, cwd=self._directory, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(SECONDS) != 0
        except subprocess.TimeoutExpired:
            return True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            path.write_text(original)


@click.command()
@click.argument("modules", nargs=-1, type=click.Choice(list(FIRST)))
@click.option("--sample", type=int, help="Try only this many changes of each module.")
@click.option("--seed", default=0, show_default=True, help="Chooses the sample.")
@click.option("--own", is_flag=True, help="Run the tests of the module itself only.")
@click.option("--jobs", default=2, show_default=True, help="Try this many changes at a time.")
@click.option("--all", "everything", is_flag=True, help="Let survivors meet the slow tests too.")
def main(modules: tuple[str, ...], sample: int | None, seed: int, jobs: int, *, own: bool, everything: bool) -> None:
    """Change MODULES (by default all), and list the changes that no test notices."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(Path(directory) / str(number)))

        stages = {"own": True, "fast": not own, "all": everything}

        def noticed_by(module: str, what: str, source: str) -> str:
            files = [f"tests/test_{name}.py" for name in FIRST[module]]
            arguments = {"own": ["-n", "0", *files], "fast": [], "all": ["--all"]}
            place = copies.get()
            noticed = (stage for stage in stages if stages[stage] and place.notices(module, source, *arguments[stage]))
            outcome = next(noticed, "survived")
            copies.put(place)
            if outcome != "own":
                click.echo(f"  {outcome}: {module}:{what}")
            return outcome

        for module in modules or tuple(FIRST):
            found = list(mutants((ROOT / "counter_server" / f"{module}.py").read_text()))
            chosen = random.Random(seed).sample(found, min(sample or len(found), len(found)))
            outcomes = list(pool.map(lambda each: noticed_by(module, *each), chosen))
            counts = {word: outcomes.count(word) for word in (*stages, "survived")}
            click.echo(f"{module}: {len(chosen)} of {len(found)} changes; noticed by: {counts}")


if __name__ == "__main__":
    main()
