"""Measure every page and every request of the API, with 100,000 counters.

    python -m tests.benchmarks.pages [--counters 100000] [--rounds 50]

It uses a real server, one client and one connection, and takes the routes from the application. Routes are requested in
turn and reported as medians, because machines are noisy. The exit status is 1 if one takes more than 50 ms.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from counter_server.manager.directory import DataDirectory
from counter_server.operations import LARGEST_BATCH, Batch, Set
from counter_server.server.web import create_app
from counter_server.stores import open_store
from tests.processes import PATIENCE, Server

LIMIT = 50.0  # milliseconds at the median
BROWSER = {"Accept": "text/html"}


class Request(NamedTuple):
    """A request that is repeated."""

    method: str
    path: str
    body: str = ""
    content_type: str = "application/json"


def name_of(number: int) -> str:
    return f"shop/{number % 100:02}/article {number:06}"


def fill(url: str, counters: int) -> None:
    """Create the counters, directly in the store, in as few batches as possible."""
    client = os.urandom(16)
    with closing(open_store(url)) as store:
        for sequence, first in enumerate(range(0, counters, LARGEST_BATCH), 1):
            numbers = range(first, min(first + LARGEST_BATCH, counters))
            store.apply(Batch(client, sequence, [Set(name_of(n), n) for n in numbers]), time.monotonic() + PATIENCE)


NAMING = ("/counters/delete", "/counters/detail", "/counters/detail.json")  # routes with a name in the query


def requests(counters: int) -> Iterator[Request]:
    """Yield a request for each route that reads, then the heaviest ones of dashboard and API, then writes."""
    middle = quote(name_of(counters // 2), safe="/")
    for rule in create_app({"COUNTER_SERVER_STORE": "memory://"}).url_map.iter_rules():
        if rule.methods and "GET" in rule.methods and rule.endpoint != "static":
            path = rule.rule
            for argument in rule.arguments:
                converter = path[path.index("<") : path.index(">") + 1]
                assert argument in converter, f"{rule}: more than one argument"
                path = path.replace(converter, middle)
            yield Request("GET", path + (f"?name={middle}" if path in NAMING else ""))
    for path in ("/counters", "/counters.json"):
        for query in (f"after={middle}", "q=shop/42/", "q=shop", "q=nothing", "limit=500"):
            yield Request("GET", f"{path}?{query}")
    yield Request("GET", f"/api/v1/counters?limit=1000&after={middle}")
    yield Request("POST", f"/api/v1/counters/{middle}/increment")
    yield Request("PUT", f"/api/v1/counters/{middle}", '{"value": 1}')
    yield Request("POST", "/counters/increment", f"name={middle}", "application/x-www-form-urlencoded")


def ask(connection: HTTPConnection, request: Request) -> tuple[float, int, int]:
    """Return the milliseconds until the answer was complete, its status and its size in bytes."""
    headers = {**BROWSER, **({"Content-Type": request.content_type} if request.body else {})}
    began = time.perf_counter()
    connection.request(request.method, request.path, request.body or None, headers)
    response = connection.getresponse()
    content = response.read()
    return (time.perf_counter() - began) * 1000, response.status, len(content)


def measure(url: str, wanted: list[Request], rounds: int) -> bool:
    """Print a table of all requests; return whether all were answered without error and within the limit."""
    times: dict[Request, list[float]] = {request: [] for request in wanted}
    answers: dict[Request, tuple[int, int]] = {}
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)) as connection:
        for _ in range(rounds):
            for request in wanted:
                took, *answer = ask(connection, request)
                times[request].append(took)
                answers[request] = (answer[0], answer[1])
    print(f"{'median ms':>9} {'worst ms':>9} {'status':>6} {'bytes':>8}  request")
    well = True
    for request in wanted:
        median = statistics.median(times[request])
        status, size = answers[request]
        short = "" if median <= LIMIT else f"  over {LIMIT:g} ms"
        wrong = "" if status < 400 else "  not answered"
        well = well and not short and not wrong
        print(
            f"{median:>9.1f} {max(times[request]):>9.1f} {status:>6} {size:>8}  {request.method} {request.path}"
            f"{short}{wrong}"
        )
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counters", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory) / "data"
        with Server("--data-dir", data_dir, "--workers", "2") as server:
            fill(DataDirectory(data_dir).url, options.counters)
            print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {options.counters:,} counters, ", end="")
            print(f"{options.rounds} rounds\n")
            well = measure(server.url, list(requests(options.counters)), options.rounds)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
