"""Fuzz what the manager reads from its socket: frames, calls and batches, by the code that serves a connection.

    python -m tests.fuzz.wire [--runs N]

Every input is served or closes the connection, only valid batches change anything, and every answer can be read.
"""

import socket
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

from tests.fuzz.fuzzing import fuzz, instrumented

instrumented(["counter_server.manager.server", "counter_server.operations", "counter_server.ledger"])

from msgspec import MsgspecError, msgpack  # noqa: E402 - after the instrumentation

from counter_server.ledger import Ledger  # noqa: E402
from counter_server.manager.server import Hosted, StateServer  # noqa: E402
from counter_server.manager.wire import Connection, largest_frame  # noqa: E402
from counter_server.operations import LARGEST, SMALLEST, check_name  # noqa: E402


def serve(data: bytes) -> tuple[Ledger, bytes]:
    """Send `data` to the server of a fresh ledger; return the ledger and the answers."""
    ledger = Ledger()
    theirs, ours = socket.socketpair()
    connection = Connection(ours)
    processes = {connection.pid: SimpleNamespace(clients=set())}
    hosted = {"ledger": Hosted(ledger, "epoch")}
    server = cast(Any, SimpleNamespace(hosted=hosted, _processes=processes, _largest_frame=largest_frame()))
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            StateServer.serve_client(server, connection)
        except (EOFError, OSError, MsgspecError, ValueError):
            pass  # `handle_request` closes the connection on these
        finally:
            connection.close()
        theirs.setblocking(False)  # noqa: FBT003 - its only argument
        answers = b""
        with suppress(ConnectionResetError):  # the server closed before it had read everything
            while chunk := theirs.recv(65536):
                answers += chunk
    return ledger, answers


def try_one(data: bytes) -> None:
    """Serve one input. Its first byte says whether the rest is a stream of frames or one message without its length."""
    kind, rest = data[:1], data[1:]
    ledger, answers = serve(rest if kind < b"\x80" else len(rest).to_bytes(4, "big") + rest)
    while answers:
        end = 4 + int.from_bytes(answers[:4], "big")
        kind_of_answer, _ = msgpack.decode(answers[4:end])
        assert kind_of_answer in ("#RETURN", "#ERROR")
        answers = answers[end:]
    for name, value in ledger.show(lambda _contents: None).counters.items():
        check_name(name)
        assert SMALLEST <= value <= LARGEST


if __name__ == "__main__":
    fuzz("wire", try_one)
