"""What systemd and its like want of a service: to be told its state, and to hand it a socket.

The two protocols are those of sd_notify(3) and sd_listen_fds(3): one datagram, and two environment variables.
"""

import logging
import os
import socket
import time

from ..errors import StartupError

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
_SECONDS = 1.0  # that a service manager has to take a message


def notify(*states: str) -> None:
    """Tell the service manager, if there is one: ``READY=1``, ``STOPPING=1``, …"""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # of the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SECONDS)  # a service manager that does not read is not waited for
            sender.connect(address)
            sender.send("\n".join(states).encode())
    except OSError as error:
        log.warning("NOTIFY_SOCKET names %r, where nobody listens: %s", address, error.strerror or error)


def notify_reloading() -> None:
    """Tell that the processes are being replaced; ``READY=1`` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def inherited_socket() -> socket.socket | None:
    """The listening socket that the service manager has bound for this process, if it has.

    :raises StartupError: if it is not one that can be served on.
    """
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return None
    count = os.environ.pop("LISTEN_FDS", "0")
    if count != "1":
        raise StartupError(f"LISTEN_FDS says {count} sockets: this server listens on one; give its socket unit one")
    try:
        sock = socket.socket(fileno=_FIRST_DESCRIPTOR)
    except OSError as error:
        raise StartupError(f"LISTEN_FDS says one socket, but there is none: {error.strerror}") from error
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise StartupError("the inherited socket does not listen on TCP: give the socket unit a ListenStream of a port")
    sock.set_inheritable(False)
    return sock
