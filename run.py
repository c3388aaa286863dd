"""Run the server from a checkout: the same as `counter-server run`."""

import sys

from counter_server.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]], prog_name="counter-server")
