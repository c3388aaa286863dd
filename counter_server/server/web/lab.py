"""The lab: shows the bug of the seed question, and its fix, in the browser.

A run is begun by one worker, known to all of them, and over after a minute. Its name contains when it began, so that
the data of old runs can be found and removed.
"""

import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import msgspec
from cachetools import TTLCache
from flask import Blueprint, Flask, Response, current_app, request
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from werkzeug.exceptions import Gone, NotFound, ServiceUnavailable

from ...errors import InvalidRequest, StartupError, Unsupported
from ...extension import SharedState
from ...manager.directory import DataDirectory
from ..strategies import JOIN, STRATEGIES, Run, Take
from .api import read_integer
from .security import is_loopback
from .site import Site, link, render_template

_MOST_CLIENTS = 100
_SECONDS = 60  # that a run may last
FORGOTTEN = 2 * _SECONDS  # after its begin no client of a run asks, or waits for an answer
_MOST_RUNS = 100  # whose numbers a worker keeps in its memory
_MEMORY = "memory:// is each worker process's own: in none did a number come twice, but each began at 0."
_OURS = "store"  # the strategy that is shown beside each wrong one
_RUNS = "lab/"  # the prefix of their counters, and their directory
_NAME = re.compile(r"([0-9]{1,12})-[0-9a-f]{16}")


def init_app(app: Flask, site: Site, shared: SharedState) -> None:
    """Add the lab at `/lab` to the site of `app`; if it is off, a page that says how to turn it on.

    ``COUNTER_SERVER_LAB`` says whether it is on; by default it is if only this machine can connect.
    """
    wanted = app.config.get("COUNTER_SERVER_LAB")
    lab = Blueprint("lab", __name__, url_prefix="/lab")
    if is_loopback(app) if wanted is None else wanted:
        _Lab(app, shared, lab)
    else:
        for path in ("", "/<path:_path>"):
            lab.add_url_rule(path, view_func=_off, methods=["GET", "POST", "DELETE"])
    site.register_blueprint(lab)


def _off(_path: str = "") -> NoReturn:
    raise NotFound(
        "the lab is off, because it gives wrong answers on purpose: turn it on with counter-server run --lab, or with"
        " COUNTER_SERVER_LAB = True in the app's configuration"
    )


class _Lab:
    def __init__(self, app: Flask, shared: SharedState, lab: Blueprint) -> None:
        with app.app_context():
            scheme = str(shared.state.store).partition("://")[0]  # the whole URL is for operators only
        self._app = app
        self._shared = shared
        self._memory = Memory()
        self._strategies = {name: strategy for name, strategy in STRATEGIES.items() if strategy.about}
        has_manager = scheme == "manager"
        ours, place = self._strategies[_OURS], "the manager" if has_manager else f"the store, {scheme}://"
        words = {"about": ours.about.format(place=place), "right": ours.right.format(place=place)}
        wrong = _MEMORY if scheme == "memory" else ours.wrong
        self._strategies[_OURS] = msgspec.structs.replace(ours, place=place, wrong=wrong, **words)
        url, default = app.config["COUNTER_SERVER_STORE"], app.config["COUNTER_SERVER_DATA_DIR"]
        # Without a manager, the files are beside the app's keys.
        self._data = DataDirectory.from_url(url, default) if has_manager else DataDirectory(default)
        lab.get("")(self.page)
        lab.post("/runs")(self.begin)
        lab.post("/runs/<run_id>/clients")(self.client)
        lab.delete("/runs/<run_id>")(self.end)

    def page(self) -> str:
        """Show the form. The query may contain its choices, as a link to a run does."""
        wrong = {name: strategy for name, strategy in self._strategies.items() if name != _OURS}
        return render_template(
            "lab.html",
            wrong=wrong,
            ours=self._strategies[_OURS],
            ours_name=_OURS,
            chosen=_one_of(wrong, request.args.get("strategy", "global")),
            clients=_clients(request.args.get("clients", str(_MOST_CLIENTS))),
            most=_MOST_CLIENTS,
        )

    def begin(self) -> tuple[dict[str, Any], int, dict[str, str]]:
        """Begin a run with the form's choices, and return where its clients ask."""
        name = _one_of(self._strategies, request.form.get("strategy", ""))
        strategy, clients = self._strategies[name], _clients(request.form.get("clients", ""))
        run_id = _signer().dumps([name, secrets.token_hex(8)])  # signed, so that every worker knows it
        if name == "file":
            self._make_directory_and_remove_old_ones(self._find(run_id)[1])
        if name == _OURS:
            _delete_old_counters(self._shared)
        links = {"run": link("lab.end", run_id=run_id), "ask": link("lab.client", run_id=run_id)}
        words = {word: getattr(strategy, word) for word in ("title", "place", "right", "wrong")}
        return {**links, "clients": clients, **words}, 201, {"Location": links["run"]}

    def client(self, run_id: str) -> dict[str, Any]:
        name, run = self._find(run_id)
        join = partial(JOIN[name], run)
        take = self._memory.take_of(run.name, join) if self._strategies[name].memory else join()
        try:
            return msgspec.structs.asdict(take())
        except FileNotFoundError:
            raise Gone("this run has ended: start another") from None

    def end(self, run_id: str) -> Response:
        name, run = self._find(run_id)
        self._memory.forget(run.name)
        if name == _OURS:
            self._shared.counter(run.name).delete()
        # A late client may still be writing there: the rest is removed when the next run begins.
        shutil.rmtree(run.directory, ignore_errors=True)
        return Response(status=204)

    def _find(self, run_id: str) -> tuple[str, Run]:
        """Find a run and the name of its strategy, if this server began it and it is not over."""
        try:
            (strategy, nonce), began = _signer().loads(run_id, max_age=_SECONDS, return_timestamp=True)
        except SignatureExpired:
            raise Gone(f"this run began more than {_SECONDS} seconds ago and is over: start another") from None
        except BadSignature:
            raise NotFound("this run does not exist: start one") from None
        name = f"{_RUNS}{began.timestamp():.0f}-{nonce}"
        return strategy, Run(name, self._app, self._shared, self._data.path / name, link("lab.page"))

    def _make_directory_and_remove_old_ones(self, run: Run) -> None:
        self._data.make()
        runs = run.directory.parent
        if runs.is_symlink():
            raise StartupError(f"{runs} is a link to another directory: remove it")
        DataDirectory(runs).make()
        for directory in runs.iterdir():
            if is_over(directory.name):
                shutil.rmtree(directory, ignore_errors=True)
        run.directory.mkdir(0o700)  # one that exists was not made for this run, and is an error


def _signer() -> URLSafeTimedSerializer:
    assert current_app.secret_key is not None
    return URLSafeTimedSerializer(current_app.secret_key, salt="counter_server lab run")


def _one_of(strategies: Collection[str], name: str) -> str:
    if name not in strategies:
        raise InvalidRequest(f"strategy is one of {', '.join(strategies)}")
    return name


def _clients(text: str) -> int:
    return read_integer("clients", text, 1, _MOST_CLIENTS)


class Memory:
    """Keeps the number of each run in one worker process, until the run is over."""

    def __init__(self) -> None:
        self._kept: TTLCache[str, Take] = TTLCache(_MOST_RUNS, FORGOTTEN, time.monotonic)
        self._lock = threading.Lock()

    def take_of(self, run: str, join: Callable[[], Take]) -> Take:
        """Return the function that `join` returned at the run's first client.

        :raises ServiceUnavailable: if there are too many runs. No run is forgotten to make room: its numbers would be
            wrong for a reason that the lab does not show.
        """
        with self._lock:
            if run not in self._kept and len(self._kept) >= _MOST_RUNS:
                raise ServiceUnavailable("too many runs are under way in the lab: nothing was counted; retry later")
            return self._kept.setdefault(run, self._kept.get(run) or join())

    def forget(self, run: str) -> None:
        with self._lock:
            self._kept.pop(run, None)


def is_over(name: str) -> bool:
    """Whether this is the name of a run whose data is not needed any more."""
    match = _NAME.fullmatch(name)
    return match is not None and int(match[1]) + FORGOTTEN < time.time()


def _delete_old_counters(shared: SharedState) -> None:
    with suppress(Unsupported):  # memcached lists no counters; it evicts old ones when it needs the room
        for name, _ in shared.counters(after=_RUNS).counters:  # the oldest first
            if name.startswith(_RUNS) and is_over(name.removeprefix(_RUNS)):
                shared.counter(name).delete()
