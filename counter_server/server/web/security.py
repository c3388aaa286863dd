"""Who may do what: allowed hosts, the same-origin rule, protective headers, and operators with their token.

In our own application, anyone may read and count; operators, who know the server's token, may also set and delete. A
server without a token treats every client as an operator if only this machine can connect, and otherwise refuses to set
and delete. In another app, only operators may do anything: those who know the token, and those whom the app lets in.
"""

import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, wraps
from ipaddress import ip_address
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Flask, Request, Response, current_app, redirect, request
from flask.blueprints import BlueprintSetupState
from flask.sansio.scaffold import Scaffold
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionMixin
from itsdangerous import BadSignature, URLSafeTimedSerializer
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, MisdirectedRequest, TooManyRequests, Unauthorized
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.sansio.utils import get_host, host_is_trusted
from werkzeug.wrappers import Response as AnyResponse

from ...errors import NotHosted, StartupError, StorageFull, Unsupported
from ...extension import SharedState
from ...journal import sync
from ...manager.directory import DataDirectory
from ...state import forgetful
from ...windows import Attempts
from .rate_limit import client
from .site import Site, link, part, render_template, root, site, templates

log = logging.getLogger(__name__)

shared = SharedState()  # of the current app
sign_in = Blueprint("sign_in", __name__)

SIGNED_IN_SECONDS = 12 * 3600
_SENTENCE_SECONDS = 60  # for a browser to ask for the next page
_TOKEN = "COUNTER_SERVER_TOKEN"  # noqa: S105 - the name of the setting
_SHORTEST_TOKEN = 16  # characters: long enough to resist guessing over a network
_LARGEST_BODY = 16 * 1024  # bytes; the largest valid body has under 200
_MOST_DECIDED = 64  # hosts and origins whose decision is kept: a client may send others, of 64 KiB each
_CLOCK_JUMP = 48 * 3600  # seconds by which the clock may be set back without reviving an ended sign-in
_HOST = re.compile(r"\.?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|\[?[0-9a-f]*:[0-9a-f:]+\]?", re.ASCII)
# A path on this site. Some browsers take a backslash for a slash, and "//" starts the name of another host.
_ON_THIS_SITE = re.compile(r"/(?![/\\])")
_LOCAL_PATH = re.compile(_ON_THIS_SITE.pattern + r"[!-\[\]-~]*")
_HEADERS = {
    name.lower(): (name, value)
    for name, value in (
        # Scripts, styles and pictures are our own files: nothing inline, nothing from other sites, no frames.
        (
            "Content-Security-Policy",
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
            " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),  # our files have their own
    )
}

# Keys of an app's `extensions`, and of a request's environment; names of cookies.
_HOSTS = "counter_server.trusted_hosts"
_KEY = "counter_server.key"
_VERDICT = "counter_server.right_token"
_ALLOWED = "counter_server.allowed"
_SIGN_IN, _SENTENCE = "counter_server_sign_in", "counter_server_sentence"


def protect(scaffold: Scaffold) -> None:
    """Apply the rules that hold everywhere to an app, or to a blueprint and nothing else of its app."""
    scaffold.before_request(_check_request)
    if isinstance(scaffold, Flask):
        scaffold.response_class = ProtectedResponse
    else:
        scaffold.after_request(_add_headers)


def protect_app(app: Flask) -> None:
    """Protect an application of our own, which has no other pages.

    :raises StartupError: if the configuration is invalid.
    """
    _configure_hosts(app)
    protect(app)
    app.config.setdefault(_TOKEN, os.environ.get(_TOKEN))
    token_of(app.config)
    app.session_interface = Sessions()


def close(guarded: Site) -> None:
    """Let nobody use a site in another app, unless a token or the app lets in."""
    protect(guarded)
    guarded.record(_check_configuration)
    guarded.before_request(_turn_away)


def _check_configuration(state: BlueprintSetupState) -> None:
    token_of(state.app.config)


def count_together(guarded: Site, declaring: SharedState) -> None:
    """Count wrong tokens in the manager, for all workers together."""
    try:
        guarded.attempts = forgetful(declaring.object("wrong tokens", Attempts, durable=False))
    except Unsupported as error:
        log.info("wrong tokens are counted in each process: %s", error)


def token_of(config: Mapping[str, Any]) -> str | None:
    """Return the token of operators, from an app's configuration, else from the environment.

    It is not an option of a command: command lines are public.

    :raises StartupError: if it is not a token.
    """
    token = config.get(_TOKEN, os.environ.get(_TOKEN))
    if token is None or (isinstance(token, str) and re.fullmatch(rf"[!-~]{{{_SHORTEST_TOKEN},}}", token)):
        return token
    raise StartupError(
        f"{_TOKEN} is not a token: it must have {_SHORTEST_TOKEN} or more ASCII characters without spaces;"
        " make one with `openssl rand -hex 32`"
    )


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
    app.config["TRUSTED_HOSTS"] = None  # or Flask itself refuses loopback addresses, capitals and IPv6, by 400
    proxies = app.config.setdefault("COUNTER_SERVER_TRUSTED_PROXIES", 0)
    if not isinstance(proxies, int) or isinstance(proxies, bool) or proxies < 0:
        raise StartupError(f"COUNTER_SERVER_TRUSTED_PROXIES must be a number of proxies, 0 or more, not {proxies!r}")
    if proxies:
        headers = dict.fromkeys(("x_for", "x_proto", "x_host", "x_prefix"), proxies)
        app.wsgi_app = ProxyFix(app.wsgi_app, **headers)  # type: ignore[method-assign]
    app.extensions[_HOSTS] = frozenset(f"[{host.strip('[]')}]" if ":" in host else host for host in hosts)


def is_loopback(app: Flask) -> bool:
    """Return whether only this machine can connect: the server is bound to loopback, and no proxy is declared."""
    host = app.config["COUNTER_SERVER_HOST"]
    return host is not None and _is_loopback_host(host) and not app.config["COUNTER_SERVER_TRUSTED_PROXIES"]


@lru_cache(_MOST_DECIDED)
def _is_loopback_host(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_request() -> None:
    """Check where a request comes from and goes to, by a few headers: each combination of them is decided once."""
    given: Request = request._get_current_object()  # type: ignore[attr-defined] # each use of the proxy costs time
    given.max_content_length = _LARGEST_BODY
    environ = given.environ
    if not environ["PATH_INFO"].isascii():
        _check_path(environ["PATH_INFO"])
    changes = given.method not in ("GET", "HEAD", "OPTIONS")
    hosts = current_app.extensions.get(_HOSTS)
    if not hosts and hosts is not None and not is_loopback(current_app):
        hosts = None  # a server that other machines reach accepts every name, unless names were configured
    refusal = _refusal_of(
        hosts,
        environ.get("SCRIPT_NAME", ""),
        environ["wsgi.url_scheme"],
        environ.get("HTTP_HOST"),
        given.server,
        (environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")) if changes else None,
    )
    if refusal is not None:
        kind, reason = refusal
        raise kind(reason)


def _check_path(path: str) -> None:
    try:
        path.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise BadRequest("the path is not valid UTF-8") from None


@lru_cache(_MOST_DECIDED)
def _refusal_of(
    hosts: frozenset[str] | None,
    prefix: str,
    scheme: str,
    host: str | None,
    server: tuple[str, int | None] | None,
    source: tuple[str | None, str | None] | None,
) -> tuple[type[HTTPException], str] | None:
    """Return the error of a request with these headers, and its reason; None if it may go on.

    :param hosts: the names of this server; None for any.
    :param source: `Sec-Fetch-Site` and `Origin` of a request that may change something.
    """
    if hosts is not None and not _is_trusted(get_host(scheme, host, server).lower() if host else "", hosts):
        return (
            MisdirectedRequest,
            "the Host header names another server: to allow this name, start with --allow-host NAME",
        )
    if not prefix_leads_here(prefix.rstrip("/")):
        return BadRequest, "X-Forwarded-Prefix must be a path that begins with one slash"
    # The rule of Go's `net/http.CrossOriginProtection`. Browsers send one of two headers, and curl neither.
    # `Sec-Fetch-Site` is right behind any proxy.
    if source is not None:
        site, origin = source
        is_own = origin is None or origin.lower() == f"{scheme}://{get_host(scheme, host, server)}".lower()
        if site not in ("same-origin", "none") and (site is not None or not is_own):
            return Forbidden, "requests from other sites' pages change nothing here"
    return None


def _is_trusted(host: str, hosts: frozenset[str]) -> bool:
    """Return whether a Host header names this server: another site may point its own name at 127.0.0.1.

    :param host: empty if there is none, or if it is malformed.
    """
    address = host if host.endswith("]") else host.rpartition(":")[0] or host
    is_ours = address in hosts or _is_loopback_host(address.strip("[]"))  # Werkzeug does not compare IPv6
    return is_ours or host_is_trusted(host, [*hosts, "localhost"])


def prefix_leads_here(prefix: str) -> bool:
    """Return whether a URL prefix that a proxy declares leads to this site: links and redirects begin with it."""
    return not prefix or _ON_THIS_SITE.match(prefix) is not None


class ProtectedResponse(Response):
    """A response that gets the protective headers as it is sent, all at once.

    A response of another app's class gets them one by one.
    """

    def get_wsgi_response(self, environ: Any) -> Any:
        content, status, headers = super().get_wsgi_response(environ)
        given = {name.lower() for name, _ in headers}
        return content, status, headers + [header for name, header in _HEADERS.items() if name not in given]


def _add_headers(response: Response) -> Response:
    if not isinstance(response, ProtectedResponse):
        for name, value in _HEADERS.values():
            response.headers.setdefault(name, value)
    return response


# Operators


def may_operate() -> bool:
    """Return whether the sender of this request may set and delete; in another app, whether they may do anything."""
    if _app_lets_in():
        return True
    if token_of(current_app.config) is None:
        return not site().is_closed and is_loopback(current_app)
    token = _bearer()
    if token is None:
        return is_signed_in()
    if _VERDICT not in request.environ:  # a request is one attempt, even if this is called again
        request.environ[_VERDICT] = False  # also if there were too many attempts
        with suppress(Unauthorized):
            _check_token(token)
            request.environ[_VERDICT] = True
    return bool(request.environ[_VERDICT])


def _app_lets_in() -> bool:
    """Ask the app's function, once for a request.

    :raises TypeError: if it returns no bool: a coroutine, or the object of a user, would let everyone in.
    """
    allow = site().allow
    if allow is None:
        return False
    if _ALLOWED not in request.environ:
        verdict = current_app.ensure_sync(allow)()
        if not isinstance(verdict, bool):
            raise TypeError(f"allow of shared.blueprint() must return True or False, not {verdict!r}")
        request.environ[_ALLOWED] = verdict
    return bool(request.environ[_ALLOWED])


def _has_token() -> bool:
    return token_of(current_app.config) is not None


def why_not() -> str:
    """Return why this request may not set and delete, and what to do; empty if it may."""
    if may_operate():
        return ""
    if token_of(current_app.config):
        what = "these pages" if site().is_closed else "set and delete"
        return f"{what} are for operators: sign in, or send the server's token as Authorization: Bearer"
    if site().allow is not None:
        return f"the app does not let this request in, and there is no token: {_TOKEN} in its configuration sets one"
    if site().is_closed:
        return (
            f"these pages are closed: set {_TOKEN} in the app's configuration or in the environment, or name a function"
            " of the app that lets requests in, shared.blueprint(allow=…)"
        )
    cause, cure = "other machines may reach this server", "or bound to 127.0.0.1"
    if current_app.config["COUNTER_SERVER_TRUSTED_PROXIES"]:
        cause, cure = (
            "it is behind a proxy, which other machines may reach",
            "or without --trusted-proxy, bound to 127.0.0.1",
        )
    return (
        f"set and delete are off: {cause}, and it has no token; start it with a token in the environment variable"
        f" {_TOKEN}, {cure}"
    )


def operators_only(view: Callable[..., Any]) -> Callable[..., Any]:
    """Let only operators call a view: others get a problem document, or in a browser the form to sign in."""

    @wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return _refusal() or view(*args, **kwargs)

    return guarded


def _refusal() -> AnyResponse | None:
    """Return None to an operator, and the way to the form to another browser; raise an error for anyone else."""
    if may_operate():
        return None
    if not token_of(current_app.config):
        raise Forbidden(why_not())
    if _bearer() is not None:
        raise _wrong_token()
    if wants_page():
        return redirect(link("sign_in.page", next=way_back()), 303)
    raise Unauthorized(why_not(), www_authenticate=WWWAuthenticate("bearer", {"realm": "counter_server"}))


def _turn_away() -> AnyResponse | None:
    """Let only operators use anything except the form to sign in, where there is one, and our style sheets."""
    is_static = (request.endpoint or "").rpartition(".")[2] == "static"
    is_form = part() == sign_in.name
    if is_static or (is_form and token_of(current_app.config)):
        return None
    return _refusal()


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
    right = hmac.compare_digest(given.encode(errors="replace"), (token_of(current_app.config) or "").encode())
    try:
        seconds = ceil(site().attempts.note(client(), right))
    except NotHosted as error:
        log.warning("wrong tokens are counted in each process: %s", error)
        seconds = ceil(site().own_attempts.note(client(), right))
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
    path = (request.referrer or "").removeprefix(f"{request.scheme}://{request.host}".lower())
    return path if path.startswith("/") else None


# Signing in: signed cookies of our own, because another app's sessions are not ours


@sign_in.get("/sign-in")
def page(wrong: str = "") -> str:
    return render_template("sign_in.html", wrong=wrong, next=_next(), seconds=SIGNED_IN_SECONDS)


@sign_in.post("/sign-in")
def enter() -> AnyResponse:
    if not token_of(current_app.config):
        raise Forbidden(why_not() or "this server has no token to sign in with: everyone may set and delete")
    try:
        _check_token(request.form.get("token", ""))
    except (Unauthorized, TooManyRequests) as error:
        if not wants_page():
            raise
        answer = error.get_response()
        answer.set_data(page(error.description or ""))
        return answer
    return _with_cookie(redirect(_next(), 303), _SIGN_IN, secrets.token_hex(16), SIGNED_IN_SECONDS)


@sign_in.post("/sign-out")
def leave() -> AnyResponse:
    answer = redirect(_next(), 303)
    if name := _sign_in_id():
        _end(name)
        _with_cookie(answer, _SIGN_IN, "", 0)
    return answer


def _next() -> str:
    path = request.values.get("next", "")
    return path if _LOCAL_PATH.fullmatch(path) else f"{root()}/"


def is_signed_in() -> bool:
    name = _sign_in_id()
    if name is None:
        return False
    ended = _ended()
    return name not in ended if isinstance(ended, set) else not (ended / name).exists()


def _sign_in_id() -> str | None:
    """Return the id of the browser's sign-in, even an ended one, if it was made with the current token."""
    return _cookie(_SIGN_IN, SIGNED_IN_SECONDS) if token_of(current_app.config) else None


def keep_sentence(answer: AnyResponse, sentence: str) -> AnyResponse:
    """Show a sentence on the next page of this browser; an empty one ends that."""
    return _with_cookie(answer, _SENTENCE, sentence, _SENTENCE_SECONDS if sentence else 0)


def kept_sentence() -> str:
    return _cookie(_SENTENCE, _SENTENCE_SECONDS) or ""


def _with_cookie(answer: AnyResponse, name: str, text: str, seconds: int) -> AnyResponse:
    """Give the browser a cookie for this site alone, or with 0 seconds take it back."""
    value = str(_signer(name).dumps(text)) if seconds else ""
    path = root() or "/"
    answer.set_cookie(name, value, seconds, path=path, secure=request.is_secure, httponly=True, samesite="Lax")
    return answer


def _cookie(name: str, seconds: int) -> str | None:
    value = request.cookies.get(name)
    with suppress(BadSignature):
        return str(_signer(name).loads(value, max_age=seconds)) if value else None
    return None


def _signer(name: str) -> URLSafeTimedSerializer:
    """A new token or key ends every sign-in, and a cookie reveals neither."""
    if not (key := current_app.secret_key or current_app.extensions.get(_KEY)):
        _ = shared.state  # completes the configuration
        config = current_app.config
        key = signing_key(config["COUNTER_SERVER_STORE"], config["COUNTER_SERVER_DATA_DIR"])
        key = current_app.extensions.setdefault(_KEY, key)
    return URLSafeTimedSerializer(key, salt=f"{name} {token_of(current_app.config)}")


class Sessions(SecureCookieSessionInterface):
    """Flask's sessions. The cookie is Secure if the request came by https, and its path is the URL prefix.

    Below a prefix, another app of the same host has a cookie of the same name.
    """

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        if app.secret_key and self.get_cookie_name(app) not in request.environ.get("HTTP_COOKIE", ""):
            return self.session_class()  # without a signer, which takes time to make
        return super().open_session(app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        if session.accessed or session.modified or session:
            super().save_session(app, session, response)

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


def _ended() -> set[str] | Path:
    """Return the ended sign-ins, or the directory with a file for each of them."""
    if not site().keeps_sign_outs:
        return site().ended
    _ = shared.state  # completes the configuration
    config = current_app.config
    directory = _directory(config["COUNTER_SERVER_STORE"], config["COUNTER_SERVER_DATA_DIR"])
    return site().ended if directory is None else directory.path / "signed-out"


def _end(name: str) -> None:
    """End a sign-in at all workers and for good: a file in the data directory outlasts every restart.

    :raises StorageFull: if the file cannot be written; then the sign-in is not ended.
    """
    ended = _ended()
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


templates.globals.update(
    may_operate=may_operate, why_not=why_not, has_token=_has_token, way_back=way_back, is_signed_in=is_signed_in
)
