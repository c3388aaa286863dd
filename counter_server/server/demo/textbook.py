"""The recipe's process: `python -m counter_server.server.demo.textbook STRATEGY DIRECTORY`."""

import os
import sys
from multiprocessing.managers import BaseManager
from pathlib import Path

from .some_obj import LockedObj, SomeObj


class ObjectManager(BaseManager):
    """The recipe of the documentation and of many answers: a process holds the object, and is reached over a port."""


ObjectManager.register("get_object")


def address_file(directory: Path) -> Path:
    """Where the recipe's process says its port and key."""
    return directory / "manager"


def main(strategy: str, directory: str) -> None:
    """Hold the object, and serve it for ever."""
    global_obj = SomeObj(0) if strategy == "textbook" else LockedObj(0)
    ObjectManager.register("get_object", callable=lambda: global_obj)
    key = os.urandom(16)
    server = ObjectManager(address=("127.0.0.1", 0), authkey=key).get_server()
    assert isinstance(server.address, tuple)
    file = address_file(Path(directory))
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(f"{server.address[1]} {key.hex()}")
    unfinished.rename(file)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
