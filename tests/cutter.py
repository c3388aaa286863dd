"""A proxy, from a port to a socket file, that cuts connections in the middle of a reply."""

import itertools
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path


class Cutter:
    """A proxy on a free port that cuts each connection after some bytes of its answers."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._lengths = itertools.cycle([5000, 777, 8009, 90, 3001])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        self._thread = threading.Thread(target=self._accept)
        self._serving: list[threading.Thread] = []
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(os.fspath(self._target))
                except OSError:
                    client.close()
                    server.close()
                    continue
                for way in ((client, server, sys.maxsize), (server, client, next(self._lengths))):
                    thread = threading.Thread(target=self._pass, args=way)
                    thread.start()
                    self._serving.append(thread)

    def _pass(self, source: socket.socket, target: socket.socket, most: int) -> None:
        """Pass on at most `most` bytes, and then close the connection."""
        with suppress(OSError):
            while most > 0 and (data := source.recv(65536)):
                target.sendall(data[:most])
                most -= len(data)
        self.cuts += most <= 0
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # each end is closed by the thread that reads it

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for thread in self._serving:
            thread.join()
