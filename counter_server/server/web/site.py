"""The blueprint that holds all pages and the API, in our own application and in any other app, and its links."""

import gzip
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, request, url_for
from jinja2 import Environment, FileSystemLoader

from ...state import open_state
from ...windows import Attempts

NAME = "counter_server"
_MOST_LINKS = 1000  # a proxy may give each request another prefix

_TITLES = {
    "pages.home": "Home",
    "lab.page": "Lab",
    "dashboard.page": "Counters",
    "pages.session": "Your counter",
    "documentation.docs": "API",
}

# Our own environment: another app's templates, filters and context processors do not meet ours.
templates = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, auto_reload=False
)


class Site(Blueprint):
    """The parent of all our blueprints. It says who is let in.

    :param allow: a function of the app that returns whether the current request may see and operate everything.
    :param is_closed: whether everyone else may not even read.
    :param keeps_sign_outs: in the data directory, for all processes; otherwise in the memory of this one.
    """

    def __init__(
        self,
        *,
        allow: Callable[[], bool] | None = None,
        is_closed: bool = False,
        keeps_sign_outs: bool = True,
        url_prefix: str | None = None,
    ) -> None:
        super().__init__(NAME, __name__, static_folder="static", url_prefix=url_prefix)
        self.allow = allow
        self.is_closed = is_closed
        self.keeps_sign_outs = keeps_sign_outs
        self.links: dict[tuple[str, str, object], str] = {}  # of our own application, where no value changes them
        self.ended: set[str] = set()  # sign-ins, if no data directory keeps them
        # Wrong tokens are counted in this process, unless a manager does so for all workers.
        self.own_attempts = open_state("memory://").object("wrong tokens", Attempts, durable=False)
        self.attempts = self.own_attempts

    def send_static_file(self, filename: str) -> Response:
        """Send one of our style sheets or scripts, compressed if the browser takes that. They hold nothing secret."""
        answer = super().send_static_file(filename)
        answer.vary.add("Accept-Encoding")
        if answer.status_code == 200 and request.accept_encodings["gzip"] > 0:
            answer.direct_passthrough = False
            answer.set_data(_compressed(answer.get_data()))
            answer.headers["Content-Encoding"] = "gzip"
            answer.set_etag(answer.get_etag()[0] or "", weak=True)  # other bytes of the same content
        return answer


@lru_cache(maxsize=64)
def _compressed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


class Links:
    """The links of the current request's site. A page makes this once, as the search for the site takes time."""

    def __init__(self) -> None:
        for name in (*request.blueprints, NAME):
            if isinstance(found := current_app.blueprints.get(name), Site):
                self._name = name  # under which the site is registered
                self.site = found
                self._prefix = request.script_root
                return
        raise RuntimeError("this request belongs to no page of counter_server")

    def link(self, endpoint: str, **values: Any) -> str:
        """Return the URL of a page of this site, such as ``dashboard.page``."""
        if self.site.is_closed or (values and endpoint != "static"):  # another app may change the URLs of each request
            return url_for(f"{self._name}.{endpoint}", **values)
        known = self.site.links
        key = (self._prefix, endpoint, values.get("filename"))
        if (found := known.get(key)) is None:
            if len(known) >= _MOST_LINKS:
                known.clear()
            found = known[key] = url_for(f"{self._name}.{endpoint}", **values)
        return found

    def root(self) -> str:
        """Return the path below which the site's pages lie, without a slash at its end: it may be empty."""
        return self.link("dashboard.page").removesuffix("/counters")

    def has_page(self, endpoint: str) -> bool:
        return f"{self._name}.{endpoint}" in current_app.view_functions

    def navigation(self) -> dict[str, str]:
        """Return the URLs and the titles of the pages that this site has."""
        return {self.link(endpoint): title for endpoint, title in _TITLES.items() if self.has_page(endpoint)}


def part() -> str:
    """Return the name of the part of the site that answers this request, such as ``api``; empty for none."""
    return (request.blueprint or "").rpartition(".")[2]


def site() -> Site:
    return Links().site


def link(endpoint: str, **values: Any) -> str:
    return Links().link(endpoint, **values)


def root() -> str:
    return Links().root()


def has_page(endpoint: str) -> bool:
    return Links().has_page(endpoint)


def render_template(template: str, **values: Any) -> str:
    """Render one of our own templates."""
    links = Links()
    return templates.get_template(template).render(links=links, link=links.link, **values)


def _size(said: str) -> str:
    """Return the class that shows a long number smaller, so that it fits on a telephone."""
    return "longest" if len(said) > 9 else "long" if len(said) > 5 else ""


templates.globals.update(pid=os.getpid, request=request, size=_size, url_for=url_for)
