"""The shape of the seed's answer with server-side sessions: each browser counts for itself."""

from flask import Flask, session
from flask_session import Session  # type: ignore[import-untyped]

from counter_server.caching import ManagerCache

app = Flask(__name__)
# app.config["SESSION_TYPE"] = "filesystem"
app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=ManagerCache())
Session(app)


@app.route("/")
def reset() -> dict[str, int]:
    session["counter"] = 0
    return {"counter": 0}


@app.route("/inc")
def up() -> dict[str, int]:
    session["counter"] = session.get("counter", 0) + 1
    return {"counter": session["counter"]}


@app.route("/dec")
def down() -> dict[str, int]:
    session["counter"] = session.get("counter", 0) - 1
    return {"counter": session["counter"]}


if __name__ == "__main__":
    app.run()
