"""What tests have other programs do: run Python, and ask a database."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from typing import Any

Rows = list[tuple[Any, ...]]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def query(database: str | os.PathLike[str], text: str, *arguments: Any) -> Rows:
    """Ask a database over a connection of its own, as another program would."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(text, arguments).fetchall()
