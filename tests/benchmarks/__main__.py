"""Measure everything in one run:  python -m tests.benchmarks

Measures store, HTTP, one thread, growth, start-up and pages, side by side and interleaved. Starts every peer that is
installed. Prints tables and the missed bars; writes JSON and pictures. The exit status is 1 if ours returned a wrong
number.
"""

import argparse
import os
import sys
from pathlib import Path

from tests.benchmarks import growth, in_one_thread, over_http, painting, startup, store
from tests.benchmarks.load import Shape
from tests.benchmarks.plan import Plan
from tests.benchmarks.results import Results
from tests.processes import ROOT

LEVELS = {
    "store": store.run,
    "http": over_http.run,
    "thread": in_one_thread.run,
    "growth": growth.run,
    "startup": startup.run,
    "pages": painting.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=LEVELS, action="append", help="a level; may be repeated")
    parser.add_argument("--rounds", type=int, help="of each measurement (default: 3, or 9 if a bar depends on it)")
    parser.add_argument(
        "--seconds", type=float, default=Plan.seconds, help="of each measurement (default: %(default)s)"
    )
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=[], help="processes x threads, such as 2x16")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME", help="measure only names that contain NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks", help="a directory")
    parser.add_argument("--document", action="store_true", help="write the results into docs/performance.md")
    options = parser.parse_args()
    plan = Plan(rounds_asked=options.rounds, seconds=options.seconds, shapes=options.shapes, peers=options.peers)
    results = Results()
    for level in options.only or LEVELS:
        LEVELS[level](plan, results, _say)
    _say("")
    return _report(results, options.output, document=options.document)


def _say(what: str) -> None:
    """Show progress on one line of a terminal; print nothing into a file."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        print(f"\r{what[: width - 1]:<{width - 1}}", end="\r" if not what else "", file=sys.stderr, flush=True)


def _report(results: Results, output: Path, *, document: bool) -> int:
    # Imported here, because the processes of the load import this module and need none of these.
    from tests.benchmarks import bars, pictures, report
    from tests.benchmarks.document import write

    verdicts = bars.judge(results)
    report.print_tables(results, verdicts)
    drawn = pictures.draw(results, verdicts, output)
    (output / "results.json").write_bytes(report.as_json(results, verdicts))
    print(f"JSON and pictures: {output}")
    if document:
        write(ROOT / "docs" / "performance.md", results, verdicts, drawn)
    return 1 if any(place.who.startswith("ours") for place in results.wrong()) else 0


if __name__ == "__main__":
    sys.exit(main())
