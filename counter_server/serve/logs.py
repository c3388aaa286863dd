"""What the server's processes write about themselves, to standard error: for people, or a JSON object a line."""

import logging
import os
import sys

from pythonjsonlogger.json import JsonFormatter

from ..settings import LogFormat


def configure(process: str, form: LogFormat) -> None:
    """Set the logging of this process up.

    :param process: what it is: ``supervisor``, ``manager`` or ``worker``.
    """
    handler = logging.StreamHandler(sys.stderr)
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
        handler.setFormatter(logging.Formatter(f"%(asctime)s {process}{pid} %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)  # in place of what a fork has inherited


_RESERVED = [*vars(logging.makeLogRecord({})), "asctime", "message", "taskName"]
