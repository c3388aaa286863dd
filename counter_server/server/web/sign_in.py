"""The form by which an operator signs in with the server's token, and out again."""

import re

from flask import Blueprint, make_response, redirect, render_template, request, url_for
from werkzeug.exceptions import Forbidden, HTTPException, TooManyRequests
from werkzeug.wrappers import Response

from . import operators
from .access import is_right_token, wants_page, why_not, wrong_token

# Of this site, whatever a browser makes of it: some take a backslash for a slash, and "//" begins another host's name.
_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]*")


def blueprint() -> Blueprint:
    pages = Blueprint("sign_in", __name__)

    @pages.get("/sign-in")
    def page() -> str:
        """The form; for one who is signed in, the button to sign out."""
        return _page()

    @pages.post("/sign-in")
    def enter() -> Response:
        if not operators.has_token():
            raise Forbidden(why_not() or "this server has no token to sign in with: everybody may set and delete")
        error: HTTPException = wrong_token()
        try:
            if is_right_token(request.form.get("token", "")):
                response = make_response(redirect(_next(), 303))
                operators.sign_in(response)
                return response
        except TooManyRequests as too_many:
            error = too_many
        if not wants_page():
            raise error
        response = make_response(_page(wrong=error.description or ""), error.code)
        told = error.get_response().headers
        response.headers.update({name: told[name] for name in ("Retry-After", "WWW-Authenticate") if name in told})
        return response

    @pages.post("/sign-out")
    def leave() -> Response:
        response = make_response(redirect(_next(), 303))
        operators.sign_out(response)
        return response

    return pages


def _page(*, wrong: str = "") -> str:
    return render_template("sign_in.html", wrong=wrong, next=_next(), seconds=operators.SIGNED_IN_SECONDS)


def _next() -> str:
    """The path to go on to: the one asked for, if it is one of this site, else home."""
    path = request.values.get("next", "")
    return path if _LOCAL.fullmatch(path) else url_for("pages.home")
