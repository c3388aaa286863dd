"""By which address and names this server is reached: bound to loopback or not, the Host header, declared proxies."""

import re
from collections.abc import Iterable
from ipaddress import ip_address

from flask import Flask, current_app, request
from werkzeug.exceptions import MisdirectedRequest
from werkzeug.middleware.proxy_fix import ProxyFix

from ...errors import StartupError

_NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:]+", re.ASCII)


def init_app(app: Flask) -> None:
    """Take the configuration, and have requests by other names refused.

    :raises StartupError: if the configuration cannot be.
    """
    app.config.setdefault("COUNTER_SERVER_HOST", None)
    names = app.config.setdefault("COUNTER_SERVER_ALLOWED_HOSTS", ())
    app.config["COUNTER_SERVER_ALLOWED_HOSTS"] = _checked(names)
    proxies = app.config.setdefault("COUNTER_SERVER_TRUSTED_PROXIES", 0)
    if not isinstance(proxies, int) or isinstance(proxies, bool) or proxies < 0:
        raise StartupError(f"COUNTER_SERVER_TRUSTED_PROXIES is a number of proxies, 0 or more, not {proxies!r}")
    if proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=proxies)  # type: ignore[method-assign]
    app.before_request(_refuse_other_names)


def is_loopback(app: Flask) -> bool:
    """Whether only this machine reaches the app: it is bound to loopback, and no proxy is declared before it."""
    host = app.config["COUNTER_SERVER_HOST"]
    return host is not None and _is_loopback_name(host) and not app.config["COUNTER_SERVER_TRUSTED_PROXIES"]


def _checked(names: object) -> frozenset[str]:
    """Hosts' names in lower case, IPv6 addresses without brackets."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise StartupError(f"COUNTER_SERVER_ALLOWED_HOSTS is a list of names, not {names!r}")
    found = set()
    for given in names:
        name = given.lower().strip("[]") if isinstance(given, str) else ""
        if not _NAME.fullmatch(name):
            raise StartupError(f"{given!r} is not a host's name: give it as browsers send it, without scheme and port")
        found.add(name)
    return frozenset(found)


def _refuse_other_names() -> None:
    """A site of any name may point it at 127.0.0.1, and its pages are then of one origin with ours (DNS rebinding).

    Only the Host header tells. Bound elsewhere, everybody reaches us anyhow: there it is checked if names were given.
    """
    allowed = current_app.config["COUNTER_SERVER_ALLOWED_HOSTS"]
    if not allowed and not is_loopback(current_app):
        return
    name = _name_of(request.host) if "Host" in request.headers else ""
    if name not in allowed and not _is_loopback_name(name):
        raise MisdirectedRequest("this server does not go by that name: if it should, start it with --allow-host NAME")


def _name_of(host: str) -> str:
    """The name in a Host header that werkzeug found well formed, or in the empty text that it gives for others."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.strip("[]").lower()


def _is_loopback_name(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
