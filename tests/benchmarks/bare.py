"""The least that serves: Flask and waitress, as their documents show it. Measured for how long it takes to start."""

import sys

import waitress
from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return "1"


if __name__ == "__main__":
    waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]))
