"""Who may do what: allowed hosts, the same-origin rule, protective headers, and operators with their token.

Anyone may read and count; operators, who know the server's token, may also set and delete. A server without a token
treats every client as an operator if only this machine can connect, and otherwise refuses to set and delete.
"""

import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from ipaddress import ip_address
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Flask, Response, current_app, redirect, render_template, request, session, url_for
from flask.sessions import SecureCookieSessionInterface
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import BadRequest, Forbidden, MisdirectedRequest, TooManyRequests, Unauthorized
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.sansio.utils import host_is_trusted
from werkzeug.wrappers import Response as AnyResponse

from ...errors import NotHosted, StartupError, StorageFull, Unsupported
from ...extension import SharedState
from ...journal import sync
from ...manager.directory import DataDirectory
from ...state import forgetful, open_state
from ...windows import Attempts
from .rate_limit import client

log = logging.getLogger(__name__)

sign_in = Blueprint("sign_in", __name__)

SIGNED_IN_SECONDS = 12 * 3600
_TOKEN = "COUNTER_SERVER_TOKEN"  # noqa: S105 - the name of the setting
_SHORTEST_TOKEN = 16  # characters: long enough to resist guessing over a network
_CLOCK_JUMP = 48 * 3600  # seconds by which the clock may be set back without reviving an ended sign-in
_HOST = re.compile(r"\.?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|\[?[0-9a-f]*:[0-9a-f:]+\]?", re.ASCII)
# A path on this site. Some browsers take a backslash for a slash, and "//" starts the name of another host.
_ON_THIS_SITE = re.compile(r"/(?![/\\])")
_LOCAL_PATH = re.compile(_ON_THIS_SITE.pattern + r"[!-\[\]-~]*")
_HEADERS = {
    # Scripts, styles and pictures are our own files: nothing inline, nothing from other sites, no frames.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

# Keys of an app's `extensions`, of a session, and of a request's environment.
_HOSTS = "counter_server.trusted_hosts"
_ATTEMPTS = "counter_server.wrong_tokens"
_ENDED = "counter_server.ended_sign_ins"
_SIGN_IN = "counter_server_operator"
_VERDICT = "counter_server.right_token"


def init_app(app: Flask, shared: SharedState) -> None:
    """Protect `app`, and give its templates `may_operate`, `why_not` and `way_back`.

    :raises StartupError: if the configuration is invalid, or the data directory cannot be written.
    """
    _configure_hosts(app)
    app.before_request(_refuse_other_hosts)
    app.before_request(_refuse_other_prefixes)
    app.before_request(_refuse_other_sites)
    app.after_request(_add_headers)
    token = app.config.setdefault(_TOKEN, os.environ.get(_TOKEN))  # not an option: command lines are public
    if token is not None:
        if not (isinstance(token, str) and re.fullmatch(r"[!-~]+", token) and len(token) >= _SHORTEST_TOKEN):
            raise StartupError(
                f"{_TOKEN} is not a token: it must have {_SHORTEST_TOKEN} or more ASCII characters without spaces;"
                " make one with `openssl rand -hex 32`"
            )
        attempts = own = open_state("memory://").object("wrong tokens", Attempts, durable=False)
        try:
            attempts = forgetful(shared.object("wrong tokens", Attempts, durable=False))
        except Unsupported as error:
            log.info("wrong tokens are counted in each process: %s", error)
        app.extensions[_ATTEMPTS] = attempts, own
    app.context_processor(lambda: {"may_operate": may_operate, "why_not": why_not, "way_back": way_back})
    store, data_dir = app.config["COUNTER_SERVER_STORE"], app.config["COUNTER_SERVER_DATA_DIR"]
    app.session_interface = Sessions()
    directory = _directory(store, data_dir)
    app.extensions[_ENDED] = set() if directory is None else directory.path / "signed-out"
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = signing_key(store, data_dir)


# Hosts and sites


def _configure_hosts(app: Flask) -> None:
    app.config.setdefault("COUNTER_SERVER_HOST", None)
    names = app.config["TRUSTED_HOSTS"] or ()
    if not isinstance(names, list | tuple | set):
        raise StartupError(f"TRUSTED_HOSTS must be a list of host names, not {names!r}")
    for name in names:
        if not (isinstance(name, str) and _HOST.fullmatch(name.lower())):
            raise StartupError(f"{name!r} is not a host name: give it as browsers send it, without scheme and port")
    hosts = [name.lower() for name in names]
    app.extensions[_HOSTS] = [f"[{host.strip('[]')}]" if ":" in host else host for host in hosts]
    app.config["TRUSTED_HOSTS"] = None  # or Flask itself refuses loopback addresses, capitals and IPv6, by 400
    proxies = app.config.setdefault("COUNTER_SERVER_TRUSTED_PROXIES", 0)
    if not isinstance(proxies, int) or isinstance(proxies, bool) or proxies < 0:
        raise StartupError(f"COUNTER_SERVER_TRUSTED_PROXIES must be a number of proxies, 0 or more, not {proxies!r}")
    if proxies:
        headers = dict.fromkeys(("x_for", "x_proto", "x_host", "x_prefix"), proxies)
        app.wsgi_app = ProxyFix(app.wsgi_app, **headers)  # type: ignore[method-assign]


def is_loopback(app: Flask) -> bool:
    """Return whether only this machine can connect: the server is bound to loopback, and no proxy is declared."""
    host = app.config["COUNTER_SERVER_HOST"]
    return host is not None and _is_loopback_host(host) and not app.config["COUNTER_SERVER_TRUSTED_PROXIES"]


def _is_loopback_host(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_other_hosts() -> None:
    """Check the Host header against DNS rebinding: another site may point its own name at 127.0.0.1.

    A server that other machines reach accepts every name, unless names were configured.
    """
    trusted = current_app.extensions[_HOSTS]
    if not trusted and not is_loopback(current_app):
        return
    given = request.host.lower() if "Host" in request.headers else ""  # Werkzeug makes it empty if it is malformed
    address = given if given.endswith("]") else given.rpartition(":")[0] or given
    is_trusted = address in trusted or _is_loopback_host(address.strip("[]"))  # Werkzeug does not compare IPv6
    if not is_trusted and not host_is_trusted(given, [*trusted, "localhost"]):
        raise MisdirectedRequest(
            "the Host header names another server: to allow this name, start with --allow-host NAME"
        )


def _refuse_other_prefixes() -> None:
    """Check that the URL prefix that a proxy declares leads to this site: links and redirects begin with it."""
    if request.script_root and not _ON_THIS_SITE.match(request.script_root):
        raise BadRequest("X-Forwarded-Prefix must be a path that begins with one slash")


def _own_origin() -> str:
    return f"{request.scheme}://{request.host}".lower()


def _refuse_other_sites() -> None:
    """Apply the rule of Go's `net/http.CrossOriginProtection`: another site's page changes nothing here.

    Browsers send one of two headers, and curl neither. `Sec-Fetch-Site` is right behind any proxy.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin", _own_origin()).lower()
    if site not in ("same-origin", "none") and (site is not None or origin != _own_origin()):
        raise Forbidden("requests from other sites' pages change nothing here")


def _add_headers(response: Response) -> Response:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    return response


# Operators


def may_operate() -> bool:
    """Return whether the sender of this request may set and delete."""
    if not current_app.config[_TOKEN]:
        return is_loopback(current_app)
    token = _bearer()
    if token is None:
        return _is_signed_in()
    if _VERDICT not in request.environ:  # a request is one attempt, even if this is called again
        request.environ[_VERDICT] = False  # also if there were too many attempts
        with suppress(Unauthorized):
            _check_token(token)
            request.environ[_VERDICT] = True
    return bool(request.environ[_VERDICT])


def why_not() -> str:
    """Return why this request may not set and delete, and what to do; empty if it may."""
    if may_operate():
        return ""
    if current_app.config[_TOKEN]:
        return "set and delete are for operators: sign in, or send the server's token as Authorization: Bearer"
    return (
        "set and delete are off: other machines may reach this server, and it has no token; start it with a token in"
        f" the environment variable {_TOKEN}, or bound to 127.0.0.1"
    )


def operators_only(view: Callable[..., Any]) -> Callable[..., Any]:
    """Let only operators call a view: others get a problem document, or in a browser the form to sign in."""

    @wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if may_operate():
            return view(*args, **kwargs)
        if not current_app.config[_TOKEN]:
            raise Forbidden(why_not())
        if _bearer() is not None:
            raise _wrong_token()
        if wants_page():
            return redirect(url_for("sign_in.page", next=way_back()), 303)
        raise Unauthorized(why_not(), www_authenticate=WWWAuthenticate("bearer", {"realm": "counter_server"}))

    return guarded


def wants_page() -> bool:
    """Return whether the client is a browser, which names HTML among the types that it accepts."""
    return request.accept_mimetypes.best_match(["application/problem+json", "text/html"]) == "text/html"


def _bearer() -> str | None:
    # Werkzeug's own parser misreads a token that contains "=".
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else None


def _check_token(given: str) -> None:
    """Compare a token in constant time, and limit wrong tokens, per address and in total.

    The manager counts them for all workers; if it does not host this count, each worker counts its own.

    :raises TooManyRequests: if there were too many wrong tokens, whether this token is right or not.
    """
    right = hmac.compare_digest(given.encode(errors="replace"), current_app.config[_TOKEN].encode())
    attempts, own = current_app.extensions[_ATTEMPTS]
    try:
        seconds = ceil(attempts.note(client(), right))
    except NotHosted as error:
        log.warning("wrong tokens are counted in each process: %s", error)
        seconds = ceil(own.note(client(), right))
    if seconds:
        raise TooManyRequests(f"too many wrong tokens: try again in {seconds} s", retry_after=seconds)
    if not right:
        raise _wrong_token()


def _wrong_token() -> Unauthorized:
    challenge = WWWAuthenticate("bearer", {"realm": "counter_server", "error": "invalid_token"})
    return Unauthorized("that is not this server's token", www_authenticate=challenge)


def way_back() -> str | None:
    """Return the path of this page, or of the page with the form that was sent."""
    if request.method == "GET":
        query = quote(request.query_string, safe="&=+%/")
        return quote(request.script_root + request.path) + (f"?{query}" if query else "")
    path = (request.referrer or "").removeprefix(_own_origin())
    return path if path.startswith("/") else None


# Signing in


@sign_in.get("/sign-in")
def page(wrong: str = "") -> str:
    return render_template("sign_in.html", wrong=wrong, next=_next(), seconds=SIGNED_IN_SECONDS)


@sign_in.post("/sign-in")
def enter() -> AnyResponse:
    if not current_app.config[_TOKEN]:
        raise Forbidden(why_not() or "this server has no token to sign in with: everyone may set and delete")
    try:
        _check_token(request.form.get("token", ""))
    except (Unauthorized, TooManyRequests) as error:
        if not wants_page():
            raise
        answer = error.get_response()
        answer.set_data(page(error.description or ""))
        return answer
    session[_SIGN_IN] = (secrets.token_hex(16), int(time.time()), _proof())
    session.permanent = True  # the cookie outlasts the browser's window; the server ends the sign-in
    return redirect(_next(), 303)


@sign_in.post("/sign-out")
def leave() -> AnyResponse:
    if name := _sign_in_id():
        _end(name)
        for key in (_SIGN_IN, "_permanent"):
            session.pop(key, None)
    return redirect(_next(), 303)


def _next() -> str:
    path = request.values.get("next", "")
    return path if _LOCAL_PATH.fullmatch(path) else url_for("pages.home")


def _is_signed_in() -> bool:
    name = _sign_in_id()
    if name is None or not 0 <= time.time() - session[_SIGN_IN][1] < SIGNED_IN_SECONDS:
        return False
    ended: set[str] | Path = current_app.extensions[_ENDED]
    return name not in ended if isinstance(ended, set) else not (ended / name).exists()


def _sign_in_id() -> str | None:
    """Return the id of the session's sign-in, even an ended one, if it was made with the current token."""
    name, _, proof = session.get(_SIGN_IN, ("", 0, ""))
    return name if current_app.config[_TOKEN] and hmac.compare_digest(proof, _proof()) else None


def _proof() -> str:
    """Return a keyed digest of the token: a new token or key signs everyone out, and the cookie reveals neither."""
    key = current_app.secret_key or b""
    text = f"{_SIGN_IN} {current_app.config[_TOKEN]}".encode()
    return hmac.new(key if isinstance(key, bytes) else key.encode(), text, "sha256").hexdigest()


class Sessions(SecureCookieSessionInterface):
    """Flask's sessions. The cookie is Secure if the request came by https, and its path is the URL prefix.

    Below a prefix, another app of the same host has a cookie of the same name.
    """

    def get_cookie_path(self, app: Flask) -> str:
        return request.script_root or super().get_cookie_path(app)

    def get_cookie_secure(self, app: Flask) -> bool:
        return super().get_cookie_secure(app) or request.is_secure


def signing_key(store: str, data_dir: str) -> bytes:
    """Return the key that signs cookies for the app of a store: the same for all workers, and after a restart.

    :param data_dir: keeps the key of a store without a data directory.
    :raises StartupError: if the directory cannot be made or written.
    """
    directory = _directory(store, data_dir)
    if directory is None:
        return secrets.token_bytes(32)
    directory.make()
    return directory.key("session")


def _directory(store: str, data_dir: str) -> DataDirectory | None:
    if store == "memory://":
        return None
    return DataDirectory.from_url(store, data_dir) if store.startswith("manager:") else DataDirectory(data_dir)


def _end(name: str) -> None:
    """End a sign-in at all workers and for good: a file in the data directory outlasts every restart.

    :raises StorageFull: if the file cannot be written; then the sign-in is not ended.
    """
    ended: set[str] | Path = current_app.extensions[_ENDED]
    if isinstance(ended, set):
        ended.add(name)
        return
    DataDirectory(ended.parent).make()
    try:
        ended.mkdir(mode=0o700, exist_ok=True)
        for file in ended.iterdir():
            with suppress(FileNotFoundError):  # another worker removed it
                if time.time() - file.stat().st_mtime > SIGNED_IN_SECONDS + _CLOCK_JUMP:
                    file.unlink()
        (ended / name).touch(mode=0o600)
        for directory in (ended, ended.parent):
            sync(directory)
    except OSError as error:
        raise StorageFull(
            f"the sign-in was not ended: {ended} cannot be written: {error.strerror}; make room and sign out again, or"
            " start the server with another token"
        ) from error
