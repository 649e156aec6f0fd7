"""Tell whether a path is on a file system that other machines write to as well.

SQLite's write-ahead log keeps its index in memory that all who use the database share. On a network
file system they may be on several machines, which share none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["MOUNT_TABLE", "network_filesystem"]

MOUNT_TABLE = Path("/proc/self/mountinfo")

_NETWORK = {
    "9p",
    "acfs",
    "afs",
    "afp",
    "auristorfs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "gfs",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "panfs",
    "pvfs2",
    "smb2",
    "smb3",
    "smbfs",
    "wekafs",
}
# After "fuse.": programs that bring a file system from elsewhere. Others are of this machine.
_NETWORK_FUSE = re.compile(
    r"fuse\.(afp|beegfs|blobfuse|ceph|cifs|cvmfs|davfs|gcsfuse|geesefs|gluster|goofys|gvfsd|juicefs|"
    r"lizardfs|mfs|moosefs|mount-s3|onedata|rclone|s3fs|seaweedfs|smb|sshfs|weed|xrootd)"
)


def network_filesystem(path: Path, table: Path | None = None) -> str | None:
    """Return the type of the network file system that a path is on; ``None`` if it is on none.

    Parameters
    ----------
    path : Path
        A file or directory, there or not.
    table : Path, optional
        The mounts, in the form of Linux's ``/proc/self/mountinfo``. Where there is no such file,
        nobody can tell.
    """
    try:
        lines = (table or MOUNT_TABLE).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    place = os.path.realpath(path)
    best, found = "", ""
    for line in lines:
        mount_point, kind = _mount(line)
        # A later mount hides an earlier one at the same place.
        if _is_within(place, mount_point) and len(mount_point) >= len(best):
            best, found = mount_point, kind
    return found if found in _NETWORK or _NETWORK_FUSE.match(found) else None


def _mount(line: str) -> tuple[str, str]:
    """Return where a line of the table says that a file system is mounted, and its type."""
    # Optional fields of any number end in a lone dash.
    before, _, after = line.partition(" - ")
    fields, about = before.split(" "), after.split(" ")
    if len(fields) < 5:
        return "", ""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]), about[0]


def _is_within(place: str, mount_point: str) -> bool:
    return bool(mount_point) and (place + "/").startswith(mount_point.rstrip("/") + "/")
