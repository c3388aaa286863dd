"""`python -m counter_server`: the same as the installed command `counter-server`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="counter-server")
