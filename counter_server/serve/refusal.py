"""What no request may be for waitress to take it, and how that is told: as a problem document, like all else."""

import re
from typing import Any

import msgspec
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask

from ..errors import Outcome
from ..web.problems import Problem

LARGEST_HEAD = 2**16  # bytes
LARGEST_REQUEST = 2**20  # bytes; the application's own limit is lower

_TRANSFER_ENCODING = re.compile(rb"^transfer-encoding[ \t]*:(.*?)\r?$", re.IGNORECASE | re.MULTILINE)
_FOLDED = re.compile(rb"\r\n[ \t]")
_TARGET = re.compile(r"(https?)://([^/?#]+)", re.IGNORECASE | re.ASCII)
_PORTS = {"http": ":80", "https": ":443"}

_DETAIL = {
    413: f"the body of a request is shorter than {LARGEST_REQUEST} bytes",
    431: f"the first line and the headers of a request are shorter than {LARGEST_HEAD} bytes together",
    500: "something failed here; the log says what",
}


class Parser(HTTPRequestParser):  # type: ignore[misc] # waitress has no types
    """Refuses also what others might read in another way: where it ends, and whom it is for (RFC 9112, 6.1 and 3.2)."""

    def parse_header(self, header_plus: bytes) -> None:
        first_line = header_plus.partition(b"\r\n")[0]
        if first_line != first_line.rstrip() or _FOLDED.search(header_plus):
            raise ParsingError("white space after the first line, or before a header")
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of Python's own readers of numbers and addresses
            raise ParsingError(str(error)) from None
        encodings = _TRANSFER_ENCODING.findall(header_plus)
        if encodings and ("CONTENT_LENGTH" in self.headers or self.version != "1.1"):
            raise ParsingError("Transfer-Encoding beside Content-Length, or before HTTP/1.1")
        if encodings and [encoding.strip(b" \t").lower() for encoding in encodings] != [b"chunked"]:
            raise ParsingError("Transfer-Encoding is to be chunked, once")
        if "," in self.headers.get("HOST", "" if self.version != "1.1" else ","):
            raise ParsingError("there is to be one Host header")
        self._check_target()

    def _check_target(self) -> None:
        """Refuse a target that names another host than the Host header, or is no path (RFC 9112, 3.2)."""
        request: Any = self
        target = request.request_uri
        absolute = _TARGET.match(target)
        if absolute is None:
            if not target.startswith("/") and (self.command, target) != ("OPTIONS", "*"):
                raise ParsingError("the target is neither a path nor an address with http:// or https://")
            return
        default = _PORTS[absolute[1].lower()]
        host = absolute[2].lower().removesuffix(default)
        if request.headers.setdefault("HOST", host).lower().removesuffix(default) != host:
            raise ParsingError("the target names another host than the Host header")


class Refusal(ErrorTask):  # type: ignore[misc]
    """The answer to what never came to the application, or made it fail."""

    def execute(self) -> None:
        error: Any = self.request.error  # pyright: ignore[reportAttributeAccessIssue]
        detail = _DETAIL.get(error.code) or f"this is not HTTP as it is understood here: {error.body}"[:200]
        outcome: Outcome = "unknown" if error.code == 500 else "not_applied"
        body = msgspec.json.encode(Problem("about:blank", error.reason, error.code, detail, outcome))
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [
            ("Content-Type", "application/problem+json"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
