"""Programs in processes of their own, to be watched, interrupted and killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from stages_for_tests import wait_until

TESTS = Path(__file__).parent

BACKENDS = ("sequential", "thread_pool", "process_pool")

# A shell may have started the tests with SIGINT ignored, which a child would inherit.
_PRELUDE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def jobs(backend: str) -> int:
    """Return as many workers as a test wants of a backend."""
    return 1 if backend == "sequential" else 2


def write_script(path: Path, source: str) -> Path:
    """Write a Python script from indented text; one that was started before reads its own."""
    draft = path.with_suffix(".draft")
    draft.write_text(_PRELUDE + textwrap.dedent(source), encoding="utf-8")
    return draft.replace(path)


class Driver:
    """A Python script that runs in a process group of its own, as a shell would start it."""

    def __init__(self, script: Path, *arguments: object, stderr: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=script.parent,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Send SIGINT to the whole process group, as Ctrl-C on a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL to the script's process alone."""
        self.process.kill()
        self.process.wait()

    def descendants(self) -> list[psutil.Process]:
        """Return every process that the script has started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self, timeout: float = 120) -> tuple[int, str, str]:
        """Wait for the end; return the exit status and what was printed."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def clean_up(self) -> None:
        """Leave nothing behind, whatever happened."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait()


Start = Callable[..., Driver]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start scripts in ``tmp_path``; whatever is left of them after the test is killed."""
    drivers: list[Driver] = []

    def start_script(source: str, *arguments: object, **options: Any) -> Driver:
        script = write_script(tmp_path / "script.py", source)
        drivers.append(Driver(script, *arguments, **options))
        return drivers[-1]

    yield start_script
    for driver in drivers:
        driver.clean_up()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for part of the records."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def leave_room(disk: Path, blocks: int) -> None:
    """Fill a file system with ``ballast``, but for some blocks of 4096 bytes."""
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        with suppress(OSError):
            while ballast.write(bytes(4096)) == 4096:
                pass
        size = os.fstat(ballast.fileno()).st_size
        ballast.truncate(max(size - blocks * 4096, 0))


def wait_for_end(processes: Sequence[psutil.Process], timeout_s: float = 60.0) -> None:
    """Return once none of the processes runs any more."""

    def running(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    wait_until(lambda: not any(running(process) for process in processes), timeout_s)


def integrity(database: str | os.PathLike[str]) -> str:
    """Return what SQLite says of a database's integrity: ``ok`` for a sound one."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        ((verdict,),) = connection.execute("PRAGMA integrity_check").fetchall()
    return str(verdict)


def only_database(directory: Path) -> Path:
    """Return the one database in a directory."""
    (database,) = directory.glob("*.db")
    return database
