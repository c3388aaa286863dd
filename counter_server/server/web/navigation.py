"""What stands on every page: links to the others, and which worker answered."""

import os
from typing import NamedTuple

from flask import Flask, current_app, request


class Link(NamedTuple):
    """A link to a page; `current` where it is the one shown."""

    endpoint: str
    title: str
    current: bool


_TITLES = {
    "pages.home": "Home",
    "lab.page": "Lab",
    "dashboard.page": "Counters",
    "pages.session": "Your own",
    "documentation.page": "API",
}


def init_app(app: Flask) -> None:
    """Give the templates `navigation()`, a link to each page that the app has, and the `pid` of this process."""
    app.context_processor(lambda: {"navigation": _navigation, "pid": os.getpid()})


def _navigation() -> list[Link]:
    return [
        Link(endpoint, title, request.endpoint == endpoint)
        for endpoint, title in _TITLES.items()
        if endpoint in current_app.view_functions
    ]
