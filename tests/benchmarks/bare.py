"""The smallest server: Flask and waitress, as their documents show it. Its start is measured."""

import sys

import waitress
from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return "1"


if __name__ == "__main__":
    waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]))
