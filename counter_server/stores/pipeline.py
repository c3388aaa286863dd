"""A connection to PostgreSQL by libpq's pipeline mode: what is sent together is one round trip, under a deadline.

Over libpq itself, because in `psycopg.Connection` nothing ends by the clock when a server is frozen.
"""

import math
import select
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import pq

Value = str | None
Row = tuple[Value, ...]
Statement = tuple[str, Sequence[Value]]


class Pipeline:
    """A connection in pipeline mode. What it raises leaves it unusable, except an error of the server's.

    :param conninfo: as libpq takes it.
    :param deadline: of what is done next, in `time.monotonic` seconds.
    :raises psycopg.Error: what libpq or the server says.
    :raises TimeoutError: past the deadline.
    """

    def __init__(self, conninfo: bytes, deadline: float) -> None:
        self.deadline = deadline
        self._libpq = pq.PGconn.connect_start(conninfo)
        try:
            self._finish_connecting()
            self._libpq.nonblocking = 1
            self._libpq.enter_pipeline_mode()
        except BaseException:
            self.close()
            raise

    def _finish_connecting(self) -> None:
        waiting = {pq.PollingStatus.READING: select.POLLIN, pq.PollingStatus.WRITING: select.POLLOUT}
        while (status := self._libpq.connect_poll()) != pq.PollingStatus.OK:
            if status not in waiting or self._libpq.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError(self._libpq.get_error_message())
            self._wait(waiting[pq.PollingStatus(status)])

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._libpq.socket, events)
        remaining = self.deadline - time.monotonic()
        if not poll.poll(max(0, math.ceil(remaining * 1000))):
            raise TimeoutError("no answer in time")

    def usable(self) -> bool:
        """Whether nothing came since the last answer: what comes unasked is the end."""
        poll = select.poll()
        poll.register(self._libpq.socket, select.POLLIN)
        return not poll.poll(0)

    def exchange(self, *statements: Statement) -> list[list[Row]]:
        """The rows of each statement, in one round trip, and in one transaction if none is open."""
        libpq = self._libpq
        for statement, values in statements:  # without names: the next transaction may be in another session
            libpq.send_query_params(statement.encode(), [None if value is None else value.encode() for value in values])
        libpq.pipeline_sync()
        return self._answers()

    def _answers(self) -> list[list[Row]]:
        """All until the end of the pipeline: only there the server has committed."""
        libpq = self._libpq
        answers: list[list[Row]] = []
        refused: Exception | None = None
        unsent = libpq.flush()
        while True:
            if libpq.is_busy():
                self._wait(select.POLLIN | (select.POLLOUT if unsent else 0))
                unsent = libpq.flush() if unsent else 0
                libpq.consume_input()
                continue
            result = libpq.get_result()
            if result is None:  # the end of one statement's
                if libpq.status == pq.ConnStatus.BAD:
                    raise refused or psycopg.OperationalError(libpq.get_error_message())
            elif result.status == pq.ExecStatus.PIPELINE_SYNC:
                break
            elif result.status == pq.ExecStatus.FATAL_ERROR:
                refused = refused or psycopg.errors.error_from_result(result)
            elif result.status == pq.ExecStatus.TUPLES_OK:
                answers.append(_rows(result))
            elif result.nfields == 0 and result.command_status:
                answers.append([])
        if refused is not None:
            raise refused
        return answers

    def restart(self) -> None:
        """Go on after an error."""
        self._libpq.send_query_params(b"ROLLBACK", None)
        self._libpq.pipeline_sync()
        self._answers()

    def parameter(self, name: bytes) -> bytes | None:
        """What the server has told of itself by that name."""
        return self._libpq.parameter_status(name)

    def close(self) -> None:
        """Let go of it, whatever it is doing."""
        self._libpq.finish()


def _rows(result: Any) -> list[Row]:
    value, columns = result.get_value, range(result.nfields)
    return [
        tuple(None if (found := value(row, column)) is None else found.decode() for column in columns)
        for row in range(result.ntuples)
    ]
