"""A limit on the requests of one client to the API and the badges: one budget for all workers, in the manager.

The headers follow the IETF's draft-ietf-httpapi-ratelimit-headers-10: ``RateLimit-Policy`` says how much each
client may ask, ``RateLimit`` how much is left.
"""

from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request
from werkzeug.exceptions import TooManyRequests

from ...errors import CounterServerError, DeadlineExceeded, InvalidRequest, Unsupported
from ...extension import SharedState
from ...state import forgetful
from .site import part

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.strategies import FixedWindowRateLimiter

_LEFT = "_counter_server_rate_limit"  # in `g`: the client's requests in this window, and the seconds until it ends
_LIMITED = ("api", "badge")  # the blueprints; probes of health must never be refused
_NETWORK = 64  # bits of an IPv6 address that identify one customer of an access provider


def init_app(app: Flask, shared: SharedState) -> None:
    """Limit requests by ``COUNTER_SERVER_RATE_LIMIT``, such as ``"100/minute"``.

    :raises InvalidRequest: if it is not a limit, or the library `limits` is not installed.
    :raises Unsupported: if the store hosts no shared objects.
    """
    text = app.config.setdefault("COUNTER_SERVER_RATE_LIMIT", None)
    if text is None:
        return
    limiter = _limiter(shared)
    item = _parse(text)

    def take() -> None:
        if part() not in _LIMITED:
            return
        try:
            admitted = limiter.hit(item, client())
        except CounterServerError as error:
            if error.outcome == "unknown":  # only the budget is in doubt: the request itself has not begun
                raise DeadlineExceeded(f"the rate limit could not be read: {error}", "not_applied") from error
            raise
        if not admitted:
            _, seconds = g.get(_LEFT)
            raise TooManyRequests(
                f"more than {item} from one address; nothing was counted: try again in {seconds} s", retry_after=seconds
            )

    def add_headers(response: Response) -> Response:
        if _LEFT in g:
            taken, seconds = g.pop(_LEFT)
            response.headers["RateLimit"] = f'"client";r={max(item.amount - taken, 0)};t={seconds}'
            response.headers["RateLimit-Policy"] = f'"client";q={item.amount};w={item.get_expiry()}'
        return response

    app.before_request(take)
    app.after_request(add_headers)


def _parse(text: object) -> "RateLimitItem":
    from limits import parse_many

    with suppress(TypeError, ValueError):
        (item,) = parse_many(text)  # type: ignore[arg-type]
        if item.amount > 0 and item.get_expiry() > 0:
            return item
    raise InvalidRequest(f"a rate limit is a number of requests in a time, such as 100/minute, not {text!r}")


def _limiter(shared: SharedState) -> "FixedWindowRateLimiter":
    try:
        from ...limiting import ManagerStorage
        from ...windows import Windows
    except ImportError as error:
        raise InvalidRequest(f"a rate limit cannot be kept: {error}") from None
    from limits.storage import Storage
    from limits.strategies import FixedWindowRateLimiter

    try:
        windows = forgetful(shared.object("rate limit", Windows, durable=False))
    except Unsupported as error:
        raise Unsupported(f"a rate limit cannot be kept: {error}; use manager://, or do without the limit") from None

    class AppStorage(ManagerStorage):
        """Our storage over the application's state. One call gets the count and the seconds left."""

        def __init__(self) -> None:
            Storage.__init__(self)
            self.storage = windows

        def incr(self, key: str, expiry: float, amount: int = 1) -> int:  # noqa: ARG002 - always 1
            taken, left = windows.take(key, expiry)
            setattr(g, _LEFT, (taken, int(min(max(ceil(left), 1), expiry))))
            return taken

    return FixedWindowRateLimiter(AppStorage())


def client() -> str:
    """Return the client: its address, or the IPv6 network that belongs to one customer of an access provider."""
    try:
        address = ip_address(request.remote_addr or "")
    except ValueError:  # clients of a socket file have no addresses: they share one budget
        return "local"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((int(address), _NETWORK), strict=False))
    return str(address)
