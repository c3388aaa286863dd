"""Run the fuzzers: with atheris, from the seeds beside them, for a fixed number of inputs.

A failing input is written to the working directory as `crash-…`; give it as an argument to repeat it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"


def fuzz(name: str, target: Callable[[bytes], None], prepare: Callable[[Path], None] = lambda _directory: None) -> None:
    """Run `target` on new inputs until one makes it raise; exit with status 0 otherwise.

    :param prepare: is called first, with a temporary directory.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{name}")
    parser.add_argument("--runs", type=int, default=20_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=1, help="of the random inputs")
    parser.add_argument("input", nargs="*", help="try only these files")
    arguments = parser.parse_args()
    try:
        atheris = import_module("atheris")
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None) as place:
        found = Path(place, "found")
        found.mkdir()
        # The fuzzer ends its process without cleaning up.
        if (child := os.fork()) == 0:
            prepare(Path(place))
            where = arguments.input or [str(found), str(SEEDS / name)]
            options = [f"-runs={1 if arguments.input else arguments.runs}", f"-seed={arguments.seed}", "-max_len=4096"]
            atheris.Setup([sys.argv[0], *options, *where], target)
            atheris.Fuzz()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status)


def instrumented(names: list[str]) -> None:
    """Import modules so that the fuzzer, if installed, sees which of their lines are reached."""
    try:
        atheris = import_module("atheris")
    except ImportError:
        return
    with atheris.instrument_imports(include=["counter_server"]):
        for name in names:
            import_module(name)
