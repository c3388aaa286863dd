"""The lab: the seed question's bug, and its cure, before everybody's eyes."""

from typing import NoReturn

import msgspec
from flask import Blueprint, Flask, Response, render_template, request, url_for
from werkzeug.exceptions import NotFound

from ....errors import InvalidRequest, Unsupported
from ....extension import SharedState
from ....settings import default_data_dir
from ..security import is_loopback
from . import runs
from .strategies import Strategy, strategies

_MOST_CLIENTS = 100


def init_app(app: Flask, shared: SharedState) -> None:
    """Give `app` the lab at `/lab`; where it is off, a page that says how to turn it on.

    ``COUNTER_SERVER_LAB`` says whether it is on; where that says nothing, it is if only this machine can connect.
    """
    app.config.setdefault("COUNTER_SERVER_DATA_DIR", default_data_dir(app.instance_path))
    app.register_blueprint(_on(shared, app) if _is_on(app) else _off())


def _is_on(app: Flask) -> bool:
    wanted = app.config.get("COUNTER_SERVER_LAB")
    return is_loopback(app) if wanted is None else bool(wanted)


def _off() -> Blueprint:
    lab = Blueprint("lab", __name__, url_prefix="/lab")

    @lab.route("", defaults={"path": ""}, methods=["GET", "POST", "DELETE"])
    @lab.route("/<path:path>", methods=["GET", "POST", "DELETE"])
    def off(path: str) -> NoReturn:  # noqa: ARG001 - whatever it is
        raise NotFound(
            "the lab is off, as it gives wrong answers on purpose: turn it on with counter-server run --lab, or with"
            " COUNTER_SERVER_LAB = True in the app's configuration"
        )

    return lab


def _on(shared: SharedState, app: Flask) -> Blueprint:
    lab = Blueprint("lab", __name__, url_prefix="/lab")
    with app.app_context():
        known = strategies(shared, shared.state.store)

    @lab.get("")
    def page() -> str:
        """The form. Its choices may be in the query, as a browser without scripts sends them."""
        chosen = _strategy(known, request.args.get("strategy", "global"))
        clients = _clients(request.args.get("clients", str(_MOST_CLIENTS)))
        return render_template(
            "lab.html", strategies=known.values(), chosen=chosen, clients=clients, most=_MOST_CLIENTS
        )

    @lab.post("/runs")
    def begin() -> Response:
        """Begin a run, of the form's choices; the answer says where its clients are to ask."""
        strategy = _strategy(known, request.form.get("strategy", ""))
        clients = _clients(request.form.get("clients", ""))
        if strategy.missing:
            raise Unsupported(f"{strategy.title} cannot be shown here: {strategy.missing}")
        strategy.tidy()
        run_id = runs.begin(strategy.name)
        strategy.begin(runs.find(run_id))
        where = url_for("lab.end", run_id=run_id)
        return _json(
            {
                "run": where,
                "ask": url_for("lab.client", run_id=run_id),
                "clients": clients,
                **{word: getattr(strategy, word) for word in ("title", "place", "right", "wrong")},
            },
            201,
            {"Location": where},
        )

    @lab.post("/runs/<run_id>/clients")
    def client(run_id: str) -> Response:
        """One client of a run: it is given a number, as the run's strategy counts."""
        run = runs.find(run_id)
        return _json(known[run.strategy].count(run))

    @lab.delete("/runs/<run_id>")
    def end(run_id: str) -> Response:
        """End a run: what is kept for it goes now, and not only in a while."""
        run = runs.find(run_id)
        known[run.strategy].end(run)
        return Response(status=204)

    return lab


def _strategy(known: dict[str, Strategy], name: str) -> Strategy:
    if name not in known:
        raise InvalidRequest(f"strategy is one of {', '.join(known)}")
    return known[name]


def _clients(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= _MOST_CLIENTS):
        raise InvalidRequest(f"clients is a number from 1 to {_MOST_CLIENTS}")
    return int(text)


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, content_type="application/json")
