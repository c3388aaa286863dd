"""The app of the question: it flashes the next number, and shows it."""

import os
from pathlib import Path

from flask import Flask, flash, render_template_string

from .some_obj import pause
from .taking import BEGIN

PAGE = "{{ get_flashed_messages() | join }}"


def create_app(strategy: str, directory: str) -> Flask:
    """The app, with its numbers taken as `strategy` says.

    :param directory: for the files that it keeps.
    """
    app = Flask(__name__)
    app.secret_key = os.urandom(16)
    take = BEGIN[strategy](app, Path(directory))

    @app.get("/")
    def home() -> str:
        flash(str(take()))
        return render_template_string(PAGE)

    @app.get("/ready")
    def ready() -> str:
        """Which process this is. It takes its time, so that the others get their share of simultaneous requests."""
        pause()
        return str(os.getpid())

    return app
