"""The two protocols of systemd and its like: sd_notify(3) reports our state, sd_listen_fds(3) hands us a socket."""

import logging
import os
import socket

from ..errors import StartupError

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


def notify(*states: str) -> None:
    """Send states such as ``READY=1`` or ``STOPPING=1`` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # of the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.warning("the service manager at NOTIFY_SOCKET %r cannot be notified: %s", address, error.strerror or error)


def inherited_socket() -> socket.socket | None:
    """Return the listening socket that the service manager has bound for this process, if any."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return None
    count = os.environ.pop("LISTEN_FDS", "0")
    if count != "1":
        raise StartupError(f"LISTEN_FDS passes {count} sockets, but this server listens on one: configure one")
    try:
        sock = socket.socket(fileno=_FIRST_DESCRIPTOR)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartupError(f"LISTEN_FDS is 1, but descriptor 3 is not a socket: {error.strerror}") from error
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not listens:
        raise StartupError("the inherited socket does not listen on TCP: give the socket unit a ListenStream of a port")
    sock.set_inheritable(False)
    return sock
