"""Run the manager alone, from a checkout: the same as `counter-server manager`."""

import sys

if __name__ == "__main__":
    from counter_server.cli import main  # here, because child processes import this file too

    main(["manager", *sys.argv[1:]], prog_name="counter-server")
