"""A limit on how often one client may ask the API and the badges: one budget for all workers, kept in the manager.

Answers tell it in the headers of the IETF's draft-ietf-httpapi-ratelimit-headers-10: ``RateLimit-Policy`` what may be
asked, ``RateLimit`` what is left of it.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request
from werkzeug.exceptions import TooManyRequests

from ...errors import CounterServerError, DeadlineExceeded, InvalidRequest, Unsupported
from ...extension import SharedState
from ...state import forgetful

if TYPE_CHECKING:
    from limits import RateLimitItem

    from ...limiting import Windows

_NAME = "counter_server.rate_limit"  # in an app's `extensions`
_HEADER = "_counter_server_rate_limit"  # in `g`
_LIMITED = ("api", "badge")  # the blueprints; health is asked for by those who must never be refused
_POLICY = '"client"'
_NETWORK = 64  # bits of an IPv6 address: whoever has one has all that begin like it


@dataclass(frozen=True)
class _Limit:
    item: "RateLimitItem"
    windows: "Windows"

    @property
    def policy(self) -> str:
        return f"{_POLICY};q={self.item.amount};w={self.item.get_expiry()}"

    def take(self) -> None:
        """Take the request that is being answered from its client's budget.

        :raises TooManyRequests: if there is nothing left.
        """
        window = self.item.get_expiry()
        try:
            taken, left = self.windows.take(self.item.key_for(client()), window)
        except CounterServerError as error:
            if error.outcome == "unknown":  # that is of the budget; what was asked for has not begun
                raise DeadlineExceeded(f"the rate limit could not be had: {error}", "not_applied") from error
            raise
        seconds = min(max(ceil(left), 1), window)
        setattr(g, _HEADER, f"{_POLICY};r={max(self.item.amount - taken, 0)};t={seconds}")
        if taken > self.item.amount:
            raise TooManyRequests(f"more than {self.item} from one address; nothing was counted", retry_after=seconds)


def init_app(app: Flask, shared: SharedState) -> None:
    """Limit requests as ``COUNTER_SERVER_RATE_LIMIT`` says, such as ``"100/minute"``; without it they are not.

    :raises InvalidRequest: if it is no limit, or what it needs is not installed.
    :raises Unsupported: if the store hosts no shared objects.
    """
    text = app.config.setdefault("COUNTER_SERVER_RATE_LIMIT", None)
    if text is None:
        return
    try:
        from ...limiting import Windows
    except ImportError as error:
        raise InvalidRequest(f"a rate limit cannot be kept: {error}") from None
    item = _parse(text)
    try:
        windows = forgetful(shared.object("rate limit", Windows))
    except Unsupported as error:
        raise Unsupported(f"a rate limit cannot be kept: {error}; use manager://, or do without the limit") from None
    app.extensions[_NAME] = limit = _Limit(item, windows)

    def take() -> None:
        if is_limited(app, request.endpoint):
            limit.take()

    def tell(response: Response) -> Response:
        if (left := g.pop(_HEADER, None)) is not None:
            response.headers["RateLimit"] = left
            response.headers["RateLimit-Policy"] = limit.policy
        return response

    app.before_request(take)
    app.after_request(tell)


def is_limited(app: Flask, endpoint: str | None) -> bool:
    """Whether requests for an endpoint are limited."""
    return _NAME in app.extensions and endpoint is not None and endpoint.partition(".")[0] in _LIMITED


def _parse(text: object) -> "RateLimitItem":
    from limits import parse_many

    try:
        items = parse_many(text) if isinstance(text, str) else []
    except ValueError:
        items = []
    if len(items) != 1 or items[0].amount < 1 or items[0].get_expiry() < 1:
        raise InvalidRequest(f"a rate limit is a number of requests in a time, such as 100/minute, not {text!r}")
    return items[0]


def client() -> str:
    """Return who asks: an address, or the network that belongs to one customer of an access provider."""
    try:
        address = ip_address(request.remote_addr or "")
    except ValueError:  # a socket file has no addresses: all who ask there are one
        return "local"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((int(address), _NETWORK), strict=False))
    return str(address)
