"""The processes of a server, told apart from outside by what they have open, as Linux's /proc shows it."""

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def group_members(group: int) -> list[int]:
    """The processes of a process group that are not zombies."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


def children(supervisor: int, kind: str) -> list[int]:
    """The pids of the children of a supervisor that leads its process group: those that are a "worker" or "manager"."""
    ours = _opened(supervisor)
    return [pid for pid in group_members(supervisor) if pid != supervisor and _kind(pid, ours) == kind]


def _opened(pid: int) -> set[str]:
    """What a process has open, but for its standard streams; nothing, if it has gone."""
    opened = set()
    with suppress(FileNotFoundError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed; the process lives on
                if int(link.name) > 2:
                    opened.add(os.readlink(link))
    return opened


def _kind(pid: int, supervisors: set[str]) -> str:
    """A manager holds the lock; a worker shares one socket with the supervisor, on which both listen."""
    opened = _opened(pid)
    if any(name.endswith("manager.lock") for name in opened):
        return "manager"
    shared = [name for name in opened & supervisors if name.startswith("socket:")]
    return "worker" if len(shared) == 1 else "other"  # with more of them it is a fork that has yet to become itself
