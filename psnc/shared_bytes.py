"""Bytes that other processes of this machine can read, without a file that could be left behind."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SharedBytes", "read_shared"]


class SharedBytes:
    """Bytes in the memory of this process, for others that it tells where they are.

    They may hold secrets, so that they are in no file: they are gone when this process is. Where
    the system has no such memory, they are told as they are.

    Attributes
    ----------
    told : Path or bytes
        What :func:`read_shared` needs in another process.
    """

    def __init__(self, content: bytes) -> None:
        self._file: int | None = None
        self.told: Path | bytes = content
        if not hasattr(os, "memfd_create"):
            return
        self._file = os.memfd_create("psnc")
        with open(self._file, "wb", closefd=False) as file:
            file.write(content)
        path = Path(f"/proc/{os.getpid()}/fd/{self._file}")
        if os.access(path, os.R_OK):
            self.told = path
        else:
            self.close()

    def close(self) -> None:
        """Free them; nobody can read them any more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_shared(told: Path | bytes) -> bytes:
    """Return the bytes of another process."""
    return told if isinstance(told, bytes) else told.read_bytes()
