"""Which process a number means, on which machine, and whether it still lives."""

from __future__ import annotations

import os
import socket
import uuid
from enum import Enum

from attrs import frozen

__all__ = ["Life", "ProcessIdentity", "own_process"]

_PROC = "/proc"


class Life(Enum):
    """What can be told of a process from here."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


@frozen
class ProcessIdentity:
    """One process, as nobody else is, even if a later one has its number.

    Attributes
    ----------
    hostname : str
        The machine's name.
    pid : int
        The process, as the processes of its machine or container know it.
    machine : str
        What tells one boot of one machine, and one container there, from all others. Empty where
        that is not known.
    process_started_at : str
        When the process began, in the words of that machine. Only ever compared.
    """

    hostname: str
    pid: int
    machine: str
    process_started_at: str

    def life(self) -> Life:
        """Tell whether the process lives, if it is one of this machine."""
        here = _machine()
        if not here or (self.machine, self.hostname) != (here, socket.gethostname()):
            return Life.UNKNOWN
        # In this order, so that one that ends in between is dead.
        started_at = _start_of(self.pid)
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return Life.DEAD
        except PermissionError:
            # Another user's, which may be hidden from this one.
            pass
        if started_at is None:
            return Life.UNKNOWN
        return Life.ALIVE if started_at == self.process_started_at else Life.DEAD


def own_process() -> ProcessIdentity:
    """Return the identity of this process."""
    pid = os.getpid()
    started_at = _start_of(pid)
    # Without it nobody could tell the process from another.
    machine = _machine() if started_at else ""
    return ProcessIdentity(socket.gethostname(), pid, machine, started_at or "")


def _machine() -> str:
    if not os.path.exists(f"{_PROC}/self/stat"):
        # Start times are moments there, and so differ from boot to boot.
        return f"{uuid.getnode():012x}"
    try:
        # Of a container that sees the processes of another by other numbers nothing can be told.
        if os.readlink(f"{_PROC}/self") != str(os.getpid()):
            return ""
        with open(f"{_PROC}/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink(f'{_PROC}/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return when a process began, ``""`` if it has ended, ``None`` if that cannot be told."""
    if not os.path.exists(f"{_PROC}/self/stat"):
        return _start_by_psutil(pid)
    try:
        with open(f"{_PROC}/{pid}/stat", "rb") as file:
            # Its name may hold anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state, started_at = fields[0], fields[19]
    # Its parent has not taken notice of its end yet.
    return "" if state in (b"Z", b"X") else started_at.decode()


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return repr(process.create_time())
    except psutil.NoSuchProcess:
        return ""
    except psutil.Error:
        return None
