"""Servers that are started from Python: `python -m counter_server.server.demo.serving SERVER FD STRATEGY DIRECTORY`."""

import socket
import sys

from .app import create_app


def main(server: str, descriptor: str, strategy: str, directory: str) -> None:
    """Serve the app on a listening socket that was inherited, for ever."""
    app = create_app(strategy, directory)
    if server == "waitress":
        import waitress

        waitress.serve(app, sockets=[socket.socket(fileno=int(descriptor))], _quiet=True)
    else:
        from werkzeug.serving import make_server

        threaded, processes = server == "threaded", 10 if server == "processes" else 1
        # What app.run(threaded=..., processes=...) does.
        make_server("127.0.0.1", 0, app, threaded, processes, fd=int(descriptor)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
