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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import waitress
from flask import Flask, Response, request

fault, file, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
kept = json.loads(file.read_text()) if file.exists() else {"values": {}, "keys": {}}
values: dict[str, int] = kept["values"]
keys: dict[str, int] = kept["keys"]
lock: Any = nullcontext() if fault == "duplicates" else threading.Lock()
app = Flask(__name__)


@app.post("/api/v1/counters/<name>/increment")
def increment(name: str) -> dict[str, int]:
    key = request.headers["Idempotency-Key"]
    with lock:
        if fault == "keyless" or key not in keys:
            value = values.get(name, 0) + 1
            time.sleep(0.0001)
            values[name] = keys[key] = value
            if fault == "hasty" and value == 100:
                file.with_suffix(".part").write_text(json.dumps(kept))
                file.with_suffix(".part").rename(file)
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


listening = socket.create_server(("127.0.0.1", port), backlog=128)
print(f"Serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
waitress.serve(app, sockets=[listening])
