"""The application of the HTTP measurements, behind the same server as ours.

    python -m tests.benchmarks.application bare|ours|redis-py [--store URL] [--workers 2] [--threads 8]

It is the smallest that counts, with the paths and the answers of our API. The three differ only in the source of the
number: a global under a lock, which is wrong with several workers; our counter; or Redis.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from flask import Flask
from redis import Redis

from counter_server import SharedState
from counter_server.server.settings import ServerSettings
from counter_server.server.worker import Worker, announce, listen

PATH = "/api/v1/counters/hot"
SOURCES = ("bare", "ours", "redis-py")

value = 0
lock = threading.Lock()


def increment() -> int:
    global value
    with lock:
        value += 1
        return value


def current() -> int:
    return value


def create_app(source: str, url: str) -> Flask:
    """Create the app that takes its numbers from `source`, one of `SOURCES`."""
    app = Flask(__name__)
    take: Callable[[], int] = increment
    read: Callable[[], int] = current
    if source == "ours":
        app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_START=False)
        counter = SharedState(app).counter("hot")
        take, read = counter.increment, lambda: counter.value
    elif source == "redis-py":
        redis: Any = Redis.from_url(url)
        take, read = lambda: redis.incr("plain"), lambda: int(redis.get("plain") or 0)

    @app.post(f"{PATH}/increment")
    def count() -> dict[str, object]:
        return {"counter": "hot", "value": take()}

    @app.get(PATH)
    def total() -> dict[str, object]:
        return {"counter": "hot", "value": read()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--store", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=ServerSettings.threads)
    options = parser.parse_args()
    app = create_app(options.source, options.store)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    settings = ServerSettings(port=0, threads=options.threads)
    sock = listen(settings)
    connections = multiprocessing.RawArray("i", options.workers)
    for place in range(options.workers):
        if os.fork() == 0:
            Worker(sock, settings, app, connections, place).run(lambda: None)  # for ever
    announce(sock)
    signal.pause()


if __name__ == "__main__":
    main()
