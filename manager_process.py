"""Run the manager alone, from a checkout: the same as `counter-server manager`."""

import sys

from counter_server.cli import main

if __name__ == "__main__":
    main(["manager", *sys.argv[1:]], prog_name="counter-server")
