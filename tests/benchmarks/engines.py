"""Our stores on other people's engines, each beside that engine's own way to count, in one run.

    python -m tests.benchmarks.engines [--rounds 3] [--seconds 1]

As in `store`: rounds are interleaved, medians are told, and every value that comes back is checked.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from redis import Redis

from tests.benchmarks.store import Increment, Peer, compare, open_ours
from tests.engines import RedisServer

SHAPES = [(2, 16)]
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def open_redis(url: str) -> Increment:
    client = Redis.from_url(url)
    return lambda: int(client.incr("plain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, settings in (("volatile", ()), ("fsync always", DURABLE)):
            url = stack.enter_context(RedisServer(root / name.replace(" ", "-"), *settings)).url
            peers = [
                Peer(f"redis-py INCR, {name}", open_redis, url),
                Peer(f"ours on Redis, {name}", open_ours, url),
            ]
            compare(peers, SHAPES, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
