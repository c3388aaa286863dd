"""The application of the HTTP measurements, behind the same server as ours.

    python -m tests.benchmarks.application STORE_URL --workers 2 [--plain-redis]

It is the smallest that counts. Two of them differ only in the source of the number.
"""

import argparse
import logging
import os
import signal
from typing import Any

from flask import Flask
from redis import Redis

from counter_server import SharedState
from counter_server.server.demo.runner import listen
from counter_server.server.settings import ServerSettings
from counter_server.server.worker import Worker


def create_app(url: str, *, plain_redis: bool) -> Flask:
    """Create the app that counts with ours, or with redis-py."""
    app = Flask(__name__)
    if plain_redis:
        redis: Any = Redis.from_url(url)
        app.add_url_rule("/", "count", lambda: {"number": redis.incr("plain")})
        app.add_url_rule("/value", "value", lambda: {"number": int(redis.get("plain") or 0)})
    else:
        app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_START=False)
        counter = SharedState(app).counter("hot")
        app.add_url_rule("/", "count", lambda: {"number": counter.increment()})
        app.add_url_rule("/value", "value", lambda: {"number": counter.value})
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=ServerSettings.threads)
    parser.add_argument("--plain-redis", action="store_true")
    options = parser.parse_args()
    app = create_app(options.url, plain_redis=options.plain_redis)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # The kernel spreads connections among the workers' sockets. If they shared one socket, a single worker would often
    # accept a whole crowd, and the figures would show that effect.
    sockets = listen(0, options.workers)
    for sock in sockets:
        if os.fork() == 0:
            Worker(sock, ServerSettings(threads=options.threads), app).run(lambda: None)  # for ever
    print(f"Serving on http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
