"""Programs that are killed: each life is a process, forked from one that has imported psnc already.

A life does one thing of psnc's (`ACTS`) in a directory, as a script or a command would, and ends as
a script does. It has a session of its own, so that whatever it starts can be found and killed.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from machine_pipeline import pipeline_at
from stages_for_tests import TESTS_FIRST, Log, Numbers, Sum, wait_until

from psnc import Filter, Pipeline, Sink, atomic_directory, atomic_write, gather_pipeline
from psnc import run_pipeline as run
from psnc.builtin.checkpoint.merge import merge
from psnc.builtin.checkpoint.recover import recover
from psnc.builtin.checkpoint.set_aside import recover_in_place
from psnc.cli import main as main_of_psnc

# Ten times as long as anything takes on a machine that is slow.
LONGEST_S = 120

HERE = Path(__file__).parent


# --- the pipeline -----------------------------------------------------------------------------


class FailAtFirst(Filter[int, int]):
    """Fails the first attempt at every seventh item, whichever process makes it."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item % 7 == 3:
                tried = f"tried/{item}"
                if not os.path.exists(tried):
                    Path(tried).touch()
                    raise ConnectionError("try again")
            yield item


class WriteSeveral(Sink[int]):
    """Writes two files an index, and for every fifth one a directory."""

    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        values = list(items)
        paths = []
        for path, content in contents(index).items():
            with atomic_write(path, "w") as file:
                # In two parts, so that a draft can be cut off.
                file.write(content[:3])
                file.flush()
                file.write(content[3:])
            paths.append(path)
        if index % 5 == 0:
            with atomic_directory(f"out/{index}") as draft:
                for value in values:
                    (draft / f"{value}.txt").write_text(f"{value}")
            paths.append(f"out/{index}")
        return paths


def contents(index: int) -> dict[str, str]:
    """Return what the files of an index hold, by path; of some more than a database does."""
    lines = 300_000 if index % 10 == 7 else 300
    return {
        f"out/{index}-first.txt": f"the number {index}\n" * 5,
        f"out/{index}-second.txt": f"{index * index}\n" * lines,
    }


def pipeline_of(count: int) -> Pipeline[int]:
    """Return the pipeline of the current directory."""
    return Pipeline(
        source=Numbers(count, items=3),
        filters=[Log(30), FailAtFirst(), Sum()],
        sink=WriteSeveral(),
        resume=True,
        db_file="run.db",
    )


# --- what a life does -------------------------------------------------------------------------


def run_all(count: int, backend: str, start_method: str | None = None) -> None:
    """Run or resume, gather, and leave the results."""
    options = {} if start_method is None else {"start_method": start_method}
    jobs = 1 if backend == "sequential" else 2
    pipeline = pipeline_of(count)
    results = run(pipeline, jobs, backend, retries=1, retry_delay=0, **options)
    if not pipeline.failed_indices:
        gather_pipeline(pipeline)
    Path("results.json").write_text(json.dumps(results))


def run_one(count: int) -> None:
    """Have a database made, and one index in it."""
    _ = pipeline_of(count)[0]


def run_some(directory: str, indices: list[int]) -> None:
    """Run some indices of the state machine's pipeline."""
    run(pipeline_at(Path(directory), "run"), indices=indices)


def command(*arguments: str) -> None:
    """Do what a command line says."""
    main_of_psnc(list(arguments))


def merge_all() -> None:
    """Merge two databases."""
    merge([Path("a.db"), Path("b.db")], Path("merged.db"))


def recover_aside() -> None:
    """Salvage a damaged database into a new file."""
    recover(Path("run.db"), Path("new.db"))


def recover_here() -> None:
    """Salvage a damaged database in its place."""
    recover_in_place(Path("run.db"))


ACTS: dict[str, Callable[..., None]] = {
    act.__name__: act
    for act in (run_all, run_one, run_some, command, merge_all, recover_aside, recover_here)
}


# --- steps ------------------------------------------------------------------------------------

# What Python tells its audit hooks of before it is done, and leaves a trace on the disk.
_EVENTS = {
    *("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"),
    *("fcntl.flock", "sqlite3.connect", "shutil.copyfile", "os.fork", "os.truncate"),
}
# So many instructions of SQLite's virtual machine are a step, too.
_INSTRUCTIONS = 150
_connect = sqlite3.connect


class Steps:
    """Counts the steps of a process on its way through files and SQL, and dies at one of them.

    Parameters
    ----------
    where : {"driver", "worker"}
        Which process it is that dies: the life itself, or the first that it forks and gets so far.
    last : int
        The step; 0 for none.
    """

    def __init__(self, where: str, last: int) -> None:
        self.count = 0
        self._here = where == "driver"
        self._where = where
        self._last = last
        self._inside = threading.local()
        sys.addaudithook(self._audit)
        sqlite3.connect = self._connect
        os.register_at_fork(after_in_child=self._begin_in_worker)

    def _begin_in_worker(self) -> None:
        self.count = 0
        self._here = self._where == "worker"

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self._step()

    def _connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        """Connect as ever, and hear of every statement and of SQLite's way through it."""
        connection = _connect(*arguments, **options)
        connection.set_trace_callback(self._step)
        connection.set_progress_handler(self._step, _INSTRUCTIONS)
        return connection

    def _step(self, _: object = None) -> int:
        if not self._here or getattr(self._inside, "is_set", False):
            return 0
        self._inside.is_set = True
        self.count += 1
        if self.count == self._last and _is_first(self._where):
            os.kill(os.getpid(), signal.SIGKILL)
        self._inside.is_set = False
        return 0


def _is_first(where: str) -> bool:
    """Tell whether no other process has died: of workers one is enough."""
    if where == "driver":
        return True
    try:
        os.close(os.open("died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# --- the process that lives are forked from ---------------------------------------------------


def main() -> None:
    """Fork a life for every line of standard input, and say how each ended when asked."""
    for line in sys.stdin:
        request = json.loads(line)
        if "modules" in request:
            answer: Any = [_imported(name) for name in request["modules"]].count(True)
        elif "wait_for" in request:
            _, status = os.waitpid(request["wait_for"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            # No thread runs here, and nothing of psnc's is open.
            answer = os.fork()
            if answer == 0:
                _live(**request)
                return
        print(json.dumps(answer), flush=True)


def _imported(name: str) -> bool:
    with suppress(Exception):
        importlib.import_module(name)
        return True
    return False


def _live(
    directory: str,
    act: str,
    where: str,
    last: int,
    largest: int | None,
    tell: bool,
    arguments: list[Any],
) -> None:
    os.setsid()
    os.chdir(directory)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # Before that, a signal to the session would have gone to nobody.
    Path("began").touch()
    # Log entries are for the database.
    logging.getLogger().addHandler(logging.NullHandler())
    if largest is not None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, most))
    faulthandler.register(signal.SIGUSR1)
    steps = Steps(where, last) if last >= 0 else None
    try:
        ACTS[act](*arguments)
    finally:
        if steps is not None:
            Path("steps").write_text(str(steps.count))
        if tell:
            Path("modules").write_text(json.dumps(sorted(sys.modules)))


# --- for the tests ----------------------------------------------------------------------------


class Life:
    """One process that was forked to do one thing."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.began = time.monotonic()
        self.status: int | None = None

    def is_over(self) -> bool:
        """Tell whether it has ended by itself, or was killed."""
        return not _is_alive(self.pid)

    def processes(self) -> list[int]:
        """Return all living processes of its session but itself."""
        return [pid for pid in _session(self.pid) if pid != self.pid]

    def workers(self, start_method: str | None) -> list[int]:
        """Return its worker processes, and not the server that they may be forked from."""
        found = []
        for pid in self.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                forked_by_driver = process.ppid() == self.pid
                if start_method == "forkserver":
                    # The driver's own children are servers, which for a moment look as it does.
                    is_worker = not forked_by_driver
                else:
                    is_worker = "multiprocessing" not in " ".join(process.cmdline())
                if is_worker:
                    found.append(pid)
        return found

    def kill(self) -> bool:
        """Kill it alone; tell whether that was its end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def kill_all(self) -> bool:
        """Kill it with all that it has started; tell whether that was its end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Wait for the end; return the exit code, or the signal's number below zero."""
        if self.status is None:
            try:
                wait_until(self.is_over, timeout_s=LONGEST_S)
            except TimeoutError:
                self._tell_where()
                raise
            self.status = self._nursery.ask(wait_for=self.pid)
        return self.status

    def _tell_where(self) -> None:
        """Have its processes say where they are, in the file that holds what was said."""
        for pid in _session(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.5)

    def wait_for_orphans(self) -> None:
        """Return once nothing is alive of what it has started."""
        wait_until(lambda: not self.processes(), timeout_s=60)


def _session(leader: int) -> list[int]:
    members = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader and _is_alive(pid):
                members.append(pid)
    return members


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment(path: str) -> dict[str, str]:
    """Return an environment in which nothing is written but what psnc and the stages write.

    What measures coverage would write a file as the process ends, and say on standard error that it
    cannot; compiled modules would be files beside the others.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return {**others, **own, "PSNC_DISABLE_INSTALLED_PLUGINS": "1"}


class Nursery:
    """The process that lives are forked from."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE), TESTS_FIRST])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import lives; lives.main()"],
            env=_environment(path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lives: list[Life] = []

    def ask(self, **request: Any) -> Any:
        """Send a request, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def fork(
        self,
        directory: Path,
        act: str,
        *arguments: Any,
        where: str = "driver",
        last: int = -1,
        largest: int | None = None,
        tell: bool = True,
    ) -> Life:
        """Begin a life that dies at a step by itself, if ``last`` is more than 0.

        With 0 it counts its steps, and with -1 it does not even do that. No file that it writes can
        become larger than ``largest`` bytes. If it is to ``tell``, it leaves what :meth:`warm_up`
        needs.
        """
        (directory / "began").unlink(missing_ok=True)
        request = {"act": act, "where": where, "last": last, "largest": largest, "tell": tell}
        life = Life(self, self.ask(directory=str(directory), arguments=arguments, **request))
        self._lives.append(life)
        wait_until(lambda: (directory / "began").exists() or life.is_over(), timeout_s=60)
        life.began = time.monotonic()
        return life

    def warm_up(self, directory: Path) -> None:
        """Import what an earlier life in a directory has imported, so that later ones need not."""
        self.ask(modules=json.loads((directory / "modules").read_text()))

    def close(self) -> None:
        """End everything, whatever happened."""
        for life in self._lives:
            if life.status is None:
                with suppress(ProcessLookupError):
                    os.killpg(life.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Have a process to fork lives from."""
    opened = Nursery()
    try:
        yield opened
    finally:
        opened.close()
