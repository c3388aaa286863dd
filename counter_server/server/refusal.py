"""What no request may be for waitress to take it, and how that is told: as a problem document, like all else."""

import re
from typing import Any

import msgspec
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.task import ErrorTask
from waitress.utilities import BadRequest, RequestEntityTooLarge, find_double_newline

from ..errors import Outcome
from .web.problems import Problem

LARGEST_HEAD = 2**16  # bytes
LARGEST_REQUEST = 2**20  # bytes; the application's own limit is lower

# A lone CR or LF (but for a CR at the end of what is here, whose LF may follow), and a line that begins with a space.
_MISSHAPEN = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|(?:\A|\n)[ \t\v\f]")
_FIRST_LINE = re.compile(rb"[^ ]+ (?:/|(?i:https?)://|\*(?= |\Z))[!\"$-~]*(?: HTTP/1\.[01])?")
_TRANSFER_ENCODING = re.compile(rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_ENCODING = re.compile(rb"(?:(?!chunked)[^,]+,[ \t]*)*chunked", re.IGNORECASE)  # others than chunked are a 501
_SIZE = re.compile(rb"[0-9A-Fa-f]{0,16}\r?|[0-9A-Fa-f]{1,16}\r\n")  # of a chunk, with its line's end; or its beginning
_NOTHING = re.compile(rb"\r?|\r\n")

_DETAIL = {
    413: f"the body of a request is shorter than {LARGEST_REQUEST} bytes",
    431: f"the first line and the headers of a request are shorter than {LARGEST_HEAD} bytes together",
    500: "something failed here; the log says what",
}


class Chunks(ChunkedReceiver):  # type: ignore[misc] # waitress has no types
    """A body in chunks: sizes, data, and nothing else, as programs differ in how they read the rest.

    The receiver of waitress 3.0.2 takes a lone LF after a size, empty lines, extensions and any trailer.
    """

    buf: Any
    completed: bool
    error: Any

    _rest = b""  # what came, and is not yet used
    _missing = 0  # bytes of a chunk
    _in_size = True  # the next line is a size; else it is empty
    _last = False  # the size was 0

    def received(self, s: bytes) -> int:
        """Take what belongs to the body; the number of bytes of it."""
        self._rest += s
        while not self.completed and self.error is None:
            if self._missing:
                part, self._rest = self._rest[: self._missing], self._rest[self._missing :]
                self.buf.append(part)
                self._missing -= len(part)
                if self._missing:
                    break
            line, end, behind = self._rest.partition(b"\r\n")
            if not (_SIZE if self._in_size else _NOTHING).fullmatch(line + end):
                self.error = BadRequest(
                    "a chunk is its size in hexadecimal digits, and as many bytes, on lines of CR LF"
                )
            elif not end:
                break
            else:
                self._rest = behind
                self._end_line(line)
        return len(s) - len(self._rest) if self.completed else len(s)

    def _end_line(self, line: bytes) -> None:
        if self._in_size:
            self._missing = int(line, 16)
            self._last = not self._missing
            if len(self) + self._missing >= LARGEST_REQUEST:
                self.error = RequestEntityTooLarge("")
        self.completed = self._last and not self._in_size
        self._in_size = not self._in_size


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses also what others might read in another way: where it ends, and whom it is for (RFC 9112)."""

    body_rcv: Any
    completed: bool
    error: Any
    headers: Any
    proxy_netloc: Any  # the host of a target that is a whole address
    proxy_scheme: Any

    path = ""  # of one whose first line was not read

    def received(self, data: bytes) -> int:
        """Take what belongs to the request; the number of bytes of it."""
        if self.body_rcv is None:
            head = self.header_plus + data
            end = find_double_newline(head)
            # Here, as waitress waits for its own end of the head, and strips it.
            if _MISSHAPEN.search(head, max(len(self.header_plus) - 1, 0), end if end >= 0 else len(head)):
                self.error = BadRequest(
                    "each line ends with CR LF, has neither elsewhere, and does not begin with a space"
                )
                self.completed = True
                return len(data)
        taken = int(super().received(data))
        if self.completed:  # waitress 3.0.2 would still ask for a body, and then take this for not completed
            self.expect_continue = False
        return taken

    def parse_header(self, header_plus: bytes) -> None:
        first_line, _, headers = header_plus.partition(b"\r\n")
        if not _FIRST_LINE.fullmatch(first_line):
            raise ParsingError("the first line is a method, a path or an http address, and HTTP/1.1, one space between")
        encodings = _TRANSFER_ENCODING.findall(headers)
        if len(encodings) > 1 or not all(map(_ENCODING.fullmatch, encodings)):
            raise ParsingError("there is at most one Transfer-Encoding, and chunked is its end")
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of Python's own readers of numbers and addresses
            raise ParsingError(str(error)) from None
        if encodings and ("CONTENT_LENGTH" in self.headers or self.version != "1.1"):
            raise ParsingError("Transfer-Encoding beside Content-Length, or before HTTP/1.1")
        if "," in self.headers.get("HOST", "" if self.version != "1.1" else ","):
            raise ParsingError("there is to be one Host header")
        if self.proxy_scheme:  # then its host is the one that holds (RFC 9112, 3.2.2)
            host = self.headers.setdefault("HOST", self.proxy_netloc)
            if not host or host.lower() != self.proxy_netloc.lower():
                raise ParsingError("the address has another host than the Host header")
        if self.chunked:
            self.body_rcv = Chunks(self.body_rcv.getbuf())


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
