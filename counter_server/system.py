"""What more than one part asks of the operating system: the name of a finished file, and descriptors."""

import errno
import os
import resource
from pathlib import Path


def give_name(draft: Path, path: Path) -> None:
    """Give a finished file its name in one step, or raise `FileExistsError` if a file has that name.

    A file system without hard links has no such step. There, a file that another process makes meanwhile is replaced.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        draft.rename(path)


def room_for(connections: int, others: int) -> int:
    """Raise the limit of descriptors as needed; return how many connections the process can have, at most as asked.

    :param others: descriptors that the process needs beside them.
    """
    wanted = connections + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - others, 1)
