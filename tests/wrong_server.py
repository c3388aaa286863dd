"""A server with the same API that counts wrongly: `python wrong_server.py FAULT FILE PORT`.

duplicates   two threads can read the same value before either writes it
keyless      every increment is right, but the same key counts again
hasty        it answers at once, and keeps what it answered only once, at 100
"""

import json
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import waitress
from flask import Flask, Response, request


def wrong_app(fault: str, file: Path) -> Flask:
    app = Flask(__name__)
    kept = json.loads(file.read_text()) if file.exists() else {"values": {}, "keys": {}}
    values: dict[str, int] = kept["values"]
    keys: dict[str, int] = kept["keys"]
    lock: AbstractContextManager[object] = nullcontext() if fault == "duplicates" else threading.Lock()

    @app.post("/api/v1/counters/<name>/increment")
    def increment(name: str) -> dict[str, int]:
        key = request.headers["Idempotency-Key"]
        with lock:
            if fault == "keyless" or key not in keys:
                value = values.get(name, 0) + 1
                time.sleep(0.0001)
                values[name] = keys[key] = value
                if fault == "hasty" and value == 100:
                    whole = file.with_suffix(".part")
                    whole.write_text(json.dumps({"values": values, "keys": keys}))
                    whole.rename(file)
            return {"value": keys[key]}

    @app.get("/api/v1/counters/<name>")
    def get(name: str) -> dict[str, int]:
        return {"value": values.get(name, 0)}

    @app.delete("/api/v1/counters/<name>")
    def delete(name: str) -> Response:
        if request.headers.get("Authorization") != "Bearer right":
            return Response(json.dumps({"detail": "only with the token"}), 401, content_type="application/json")
        del values[name]
        return Response(status=204)

    return app


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", int(sys.argv[3])), backlog=128)
    print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    waitress.serve(wrong_app(sys.argv[1], Path(sys.argv[2])), sockets=[listening])
