"""How an operator proves to be one: by the server's token, or in a browser by the cookie that stands for it."""

import hmac
import os
import re
import secrets
from hashlib import sha256

from flask import Flask, Response, current_app, request
from itsdangerous import BadSignature, TimestampSigner

from ...errors import StartupError
from .signing import Ended

SIGNED_IN_SECONDS = 12 * 3600  # after which an operator signs in again
COOKIE = "counter_server_operator"
_CONFIGURED = "COUNTER_SERVER_TOKEN"
_SHORTEST = 16  # characters; so many random ones are not guessed over a network
_ENDED = "counter_server.ended_sign_ins"  # in an app's `extensions`


def init_app(app: Flask) -> None:
    """Take the token from the configuration or the environment. It is never an option: all see command lines.

    :raises StartupError: if it is too short, or cannot be sent in a header.
    """
    token = app.config.setdefault(_CONFIGURED, os.environ.get(_CONFIGURED))
    if token is not None and not (
        isinstance(token, str) and re.fullmatch(r"[!-~]+", token) and len(token) >= _SHORTEST
    ):
        raise StartupError(
            f"{_CONFIGURED} is set, but to no token: it has {_SHORTEST} characters or more, of ASCII and no spaces;"
            " `openssl rand -hex 32` makes one"
        )
    app.extensions[_ENDED] = Ended(app, SIGNED_IN_SECONDS)


def configured(app: Flask) -> bool:
    """Return whether `app` has a token."""
    return app.config[_CONFIGURED] is not None


def has_token() -> bool:
    """Whether this server has a token, by which operators are told."""
    return _token() is not None


def is_token(given: str) -> bool:
    """Whether that is the token; how long it takes to say does not tell how much of it is right."""
    token = _token()
    return token is not None and hmac.compare_digest(given.encode(errors="replace"), token.encode())


def bearer() -> str | None:
    """The token that the request gives in its Authorization header, which werkzeug misreads if there is a "=" in it."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else None


def is_signed_in() -> bool:
    """Return whether the request has a cookie of a sign-in with today's token that has not expired or been ended."""
    name = _signed_in(max_age=SIGNED_IN_SECONDS)
    return name is not None and name not in _ended()


def _signed_in(max_age: int | None = None) -> str | None:
    """Return the name of the sign-in of the request's cookie, if we signed it with today's token."""
    if not has_token():
        return None
    try:
        # Of a sign-in only a digest is written, so that the data directory holds no cookie.
        return sha256(_signer().unsign(request.cookies.get(COOKIE, ""), max_age=max_age)).hexdigest()
    except BadSignature:
        return None


def _ended() -> Ended:
    ended: Ended = current_app.extensions[_ENDED]
    return ended


def sign_in(response: Response) -> None:
    """Give the browser the cookie."""
    sessions = current_app.session_interface
    response.set_cookie(
        COOKIE,
        _signer().sign(secrets.token_urlsafe(16)).decode("ascii"),
        max_age=SIGNED_IN_SECONDS,
        path=sessions.get_cookie_path(current_app),
        secure=sessions.get_cookie_secure(current_app),
        httponly=True,
        samesite="Lax",
    )


def sign_out(response: Response) -> None:
    """End the sign-in of the request's cookie, copies of it included, and take the cookie from the browser.

    :raises StorageFull: if the end cannot be written; then nothing is ended.
    """
    name = _signed_in()
    if name is not None:
        _ended().add(name)
    sessions = current_app.session_interface
    response.delete_cookie(
        COOKIE,
        path=sessions.get_cookie_path(current_app),
        secure=sessions.get_cookie_secure(current_app),
        httponly=True,
        samesite="Lax",
    )


def _token() -> str | None:
    token: str | None = current_app.config[_CONFIGURED]
    return token


def _signer() -> TimestampSigner:
    """Its key is made of the app's and the token: a new token signs everybody out."""
    key = current_app.secret_key
    assert key is not None  # see `signing`
    salt = b"counter_server sign-in " + sha256((_token() or "").encode()).digest()
    return TimestampSigner(key, salt=salt, key_derivation="hmac", digest_method=sha256)
