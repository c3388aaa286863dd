"""The shape of the seed's answer with a cache: made in a module of its own, used wherever it is imported."""

from common import cache  # type: ignore[import-not-found]
from flask import Flask

app = Flask(__name__)
# cache.init_app(app=app, config={"CACHE_TYPE": "FileSystemCache", "CACHE_DIR": "/tmp"})
cache.init_app(app=app, config={"CACHE_TYPE": "counter_server.caching.ManagerCache"})


@app.route("/set/<int:value>")
def store(value: int) -> dict[str, object]:
    return {"stored": cache.set("my_value", {"value": value})}


@app.route("/get")
def load() -> dict[str, object]:
    return {"found": cache.get("my_value")}


if __name__ == "__main__":
    app.run()
