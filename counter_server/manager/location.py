"""Where a data directory lies: in a release, on a container's layer, or on a network file system."""

import logging
import os
import re
from pathlib import Path

from ..errors import StartupError
from ..os_errors import ELSEWHERE
from ..store import Finding
from .directory import DataDirectory

log = logging.getLogger(__name__)

_LAYERS = {"overlay", "aufs", "fuse.fuse-overlayfs"}
_NETWORKS = {
    *("nfs", "nfs4", "cifs", "smb3", "afs", "9p", "virtiofs", "vboxsf", "prl_fs"),
    *("ceph", "lustre", "gfs2", "ocfs2", "gpfs", "beegfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs"),
}
# On these, `flock` holds on one machine only.
_OWN_LOCKS = {
    *("fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.goofys", "fuse.mountpoint-s3"),
    *("fuse.blobfuse", "fuse.blobfuse2", "fuse.davfs", "fuse.curlftpfs"),
}
_OWN_LOCKS_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl"}


def findings(directory: DataDirectory) -> list[Finding]:
    """Return the risks of the place of a data directory."""
    kind, options = _file_system(directory.path)
    found = []
    if link := _release(directory):
        found.append(
            f"{directory} lies in a release ({link}): the next release begins again at 1; {ELSEWHERE}, which all"
            " releases share"
        )
    if kind in _LAYERS:
        found.append(
            f"{directory} lies on a container's own layer ({kind}), and is lost with the container: mount a volume"
            f" there, or {ELSEWHERE}"
        )
    if kind in _OWN_LOCKS or (kind in _NETWORKS and options & _OWN_LOCKS_OPTIONS):
        return [
            Finding(
                "problem",
                f"{directory} lies on a network file system ({kind}) on which each machine has its own locks, so two"
                f" managers could return the same numbers; nothing was counted or lost; {ELSEWHERE}, on a local disk",
            )
        ]
    if kind in _NETWORKS:
        found.append(
            f"{directory} lies on a network file system ({kind}): only the processes of one machine can share it, and"
            f" its locks and syncs may promise too much; {ELSEWHERE}, on a local disk"
        )
    return [Finding("may lose", sentence) for sentence in found]


def check(directory: DataDirectory) -> None:
    """Log the risks when a manager starts; raise `StartupError` if two managers could start there."""
    for finding in findings(directory):
        if finding.level == "problem":
            raise StartupError(finding.sentence)
        log.warning("%s", finding.sentence)


def _release(directory: DataDirectory) -> str:
    """Return why a directory seems to belong to one release of a program; an empty string if it does not."""
    given = [directory.given]
    shell = Path(os.environ.get("PWD", "/nowhere"))  # the working directory with its links, as a shell knows it
    if directory.path.is_relative_to(shell.resolve()):
        given.append(shell / directory.path.relative_to(shell.resolve()))
    for path in given:
        link = next((place for place in reversed(path.parents) if place.is_symlink()), None)
        if link is None or link.parent == Path("/"):  # those at the root are the system's
            continue
        target = link.resolve()
        leads_to_release = link != path.parent or target.is_relative_to(link.parent.resolve())  # not to data alone
        if leads_to_release and directory.path.is_relative_to(target):  # no link below leads out again
            return f"the symbolic link {link} leads there"
    for place in directory.path.parents:
        if place.name == "releases":
            return f"below {place}"
    return ""


def _file_system(path: Path) -> tuple[str, set[str]]:
    """Return the type of the file system of `path`, and its mount's options; see proc_pid_mountinfo(5)."""
    found: tuple[str, set[str]] = "", set()
    deepest = -1
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        place = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4]))
        if path.is_relative_to(place) and len(place.parts) >= deepest:  # a later mount hides an earlier one
            deepest = len(place.parts)
            kind, _, options = after.split()[:3]
            found = kind, {*options.split(","), *before.split()[5].split(",")}
    return found
