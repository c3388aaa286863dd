"""What the server's processes write about themselves, to standard error: for people, or a JSON object a line."""

import logging
import os
import sys
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

from ..output import protect
from ..settings import LogFormat


class _Handler(logging.StreamHandler[TextIO]):
    def flush(self) -> None:
        """Leave the lines to the stream, which waits for nobody."""


class _OneLine(logging.Formatter):
    """Text in which nothing that was logged can look like another line: control characters are escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of the standard library
        return _escaped(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Indent the lines of a traceback, as an exception's text may be of anybody's making."""
        record.exc_text = None  # another formatter's
        first, *others = super().format(record).split("\n")
        return "\n    ".join([first, *map(_escaped, others)])


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def configure(process: str, form: LogFormat, level: int = logging.INFO) -> None:
    """Set the logging of this process up.

    :param process: what it is: ``supervisor``, ``manager`` or ``worker``.
    :param level: the least that is logged.
    """
    protect()
    handler = _Handler(sys.stderr)
    if form == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                reserved_attrs=[attr for attr in _RESERVED if attr not in ("levelname", "name")],
                static_fields={"process": process, "pid": os.getpid()},
                timestamp="time",
            )
        )
    else:
        pid = "" if process == "supervisor" else f" {os.getpid()}"
        handler.setFormatter(_OneLine(f"%(asctime)s {process}{pid} %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)  # in place of what a fork has inherited


_RESERVED = [*vars(logging.makeLogRecord({})), "asctime", "message", "taskName"]
