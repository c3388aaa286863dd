"""What an error of the operating system means on the way to a manager: start one, wait, or report it at once."""

import errno
import os
import pwd
from contextlib import suppress
from pathlib import Path

from .errors import StartupError
from .settings import DATA_DIR_VARIABLE, RUNTIME_DIR_VARIABLE

_ABSENT = FileNotFoundError, ConnectionRefusedError
_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE),
    *(errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE),  # the manager has just gone
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # a full disk
}
ELSEWHERE = f"name another data directory, with --data-dir or {DATA_DIR_VARIABLE}"
_NO_LOCKS = f"its file system has no locks: {ELSEWHERE}, on a local file system"
NO_SOCKETS = f"its file system may have no sockets: name a directory on a local one with {RUNTIME_DIR_VARIABLE}"
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, and start again"),
    errno.ELOOP: f"its symbolic links lead in a circle: repair them, or {ELSEWHERE}",
    errno.ENAMETOOLONG: f"{ELSEWHERE}, with a shorter name",
    errno.EROFS: f"mount it writable, or {ELSEWHERE}",
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP), _NO_LOCKS),
}


def is_absent(error: OSError) -> bool:
    """Return whether no process listens, so that a manager can be started."""
    return isinstance(error, _ABSENT)


def can_pass(error: BaseException | None) -> bool:
    """Return whether the same attempt may succeed later. (An error without a number is our own, of the wire.)"""
    return isinstance(error, OSError) and (error.errno is None or error.errno in _PASSING or is_absent(error))


def not_ours(uid: int, path: Path, advice: str = "") -> str:
    """Return whose `path` is, who this process is, and what to do.

    :param advice: what else helps, if it is not to give `path` to this user.
    """
    owner, own = _name(uid), _name(os.geteuid())
    if not advice and os.geteuid() != 0:
        advice = f"let root give it to {own} (chown -R {own} {path})"
    return (
        f"{path} belongs to another user ({owner}, uid {uid}), and this process runs as {own} (uid {os.geteuid()});"
        f" nothing was counted or lost; run it as {owner} (sudo -u {owner} ...),{advice and f' {advice},'}"
        f" or {ELSEWHERE}"
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"  # as sudo takes it


def explain(error: OSError, failure: str, directory: Path, name: str = "", advice: str = "") -> StartupError:
    """Return the error of a system call in one line: the failure, its reason, whose the place is and what to do.

    :param name: of the file in the data directory.
    :param advice: what to do, unless the directory is another user's.
    """
    return StartupError(f"{failure}: {error.strerror or error}; {_advice(error, directory, name, advice)}")


def _advice(error: OSError, directory: Path, name: str, given: str) -> str:
    advice = given or _CURES.get(error.errno or 0, ELSEWHERE)
    if error.errno in (errno.EACCES, errno.EPERM):
        place, owner = _lowest_seen(directory / name)
        if owner != os.geteuid():
            return not_ours(owner, place, "" if place.is_relative_to(directory) else "let this user enter and write it")
        advice = given or f"{place} belongs to this user: correct its mode or attributes, or {ELSEWHERE}"
    return f"nothing was counted or lost; {advice}"


def _lowest_seen(path: Path) -> tuple[Path, int]:
    """Return the lowest directory or file on the way to `path` that can be seen, and its owner."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return place, place.stat().st_uid
    return path, os.geteuid()
