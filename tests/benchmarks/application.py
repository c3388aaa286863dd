"""The application of the HTTP measurements, behind the same server as ours.

    python -m tests.benchmarks.application STORE_URL --workers 2 [--plain-redis]

It is the smallest that counts. Two of them differ only in the source of the number.
"""

import argparse
import logging
import os
import signal
import socket
from typing import Any

from flask import Flask
from redis import Redis

from counter_server import SharedState
from counter_server.server.demo.runner import listen
from counter_server.server.settings import ServerSettings
from counter_server.server.worker import Worker


def create_app(url: str) -> Flask:
    """Create the app that counts with ours."""
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_START=False)
    counter = SharedState(app).counter("hot")

    @app.get("/")
    def count() -> dict[str, int]:
        return {"number": counter.increment()}

    @app.get("/value")
    def value() -> dict[str, int]:
        return {"number": counter.value}

    return app


def create_plain_app(url: str) -> Flask:
    """Create the app that counts with redis-py."""
    app = Flask(__name__)
    redis: Any = Redis.from_url(url)

    @app.get("/")
    def count() -> dict[str, int]:
        return {"number": redis.incr("plain")}

    @app.get("/value")
    def value() -> dict[str, int]:
        return {"number": int(redis.get("plain") or 0)}

    return app


def work(sock: socket.socket, app: Flask, threads: int) -> None:
    """Serve for ever, like our own workers."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    Worker(sock, ServerSettings(threads=threads), app).run(lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=ServerSettings.threads)
    parser.add_argument("--plain-redis", action="store_true")
    options = parser.parse_args()
    app = (create_plain_app if options.plain_redis else create_app)(options.url)
    # The kernel spreads connections among the workers' sockets. If they shared one socket, a single worker would often
    # accept a whole crowd, and the figures would show that effect.
    sockets = listen(0, options.workers)
    for sock in sockets:
        if os.fork() == 0:
            work(sock, app, options.threads)
    print(f"Serving on http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
