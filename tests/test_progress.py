"""What a run shows of itself: a bar on a terminal, lines in a file, nothing where unasked."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from drivers import BACKENDS, TESTS, write_script
from stages_for_tests import Discard, FailOn, Numbers, numbers_pipeline

from psnc import run_pipeline

Run = Callable[..., subprocess.CompletedProcess[str]]

SCRIPT = """
import sys
from pathlib import Path
from psnc import run_pipeline
from stages_for_tests import Discard, FailOn, Numbers, WaitFor

progress, backend = {"yes": True, "no": False, "default": None}[sys.argv[1]], sys.argv[2]
waiting = [int(each) for each in sys.argv[3:]]
stages = Numbers(20).filter(FailOn([3, 4])).filter(WaitFor(str(Path.cwd()), waiting))
run_pipeline(stages.write(Discard()), 1 if backend == "sequential" else 2, backend,
             progress=progress)
"""

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A program whose controlling terminal, input, output and errors are a pseudo-terminal."""

    def __init__(self, directory: Path, *command: object) -> None:
        self.shown = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.environ.update(PYTHONPATH=str(TESTS), TERM="xterm", COLUMNS="100", LINES="30")
            os.execv(sys.executable, [sys.executable, *map(str, command)])
        self.settings = termios.tcgetattr(self._terminal)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def read(self, timeout_s: float) -> bool:
        """Read what has been shown by now; false once the program is gone."""
        if not select.select([self._terminal], [], [], timeout_s)[0]:
            return True
        try:
            content = os.read(self._terminal, 65536)
        except OSError:  # what Linux says of a terminal that nobody has open any more
            return False
        self.shown += content.decode()
        return bool(content)

    def read_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Read on until something holds, as long as the program runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.shown
            assert self.read(0.05), self.shown

    def finish(self, timeout_s: float = 30.0) -> int:
        """Read to the end and return the exit status."""
        deadline = time.monotonic() + timeout_s
        while self.read(0.05):
            assert time.monotonic() < deadline, self.shown
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return self._status

    def close(self) -> None:
        """Leave nothing behind."""
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextmanager
def on_terminal(directory: Path, *arguments: object) -> Iterator[Terminal]:
    script = write_script(directory / "script.py", SCRIPT)
    terminal = Terminal(directory, script, *arguments)
    try:
        yield terminal
    finally:
        terminal.close()


# --- a terminal -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_terminal_shows_a_bar_with_counts_and_failures(backend: str, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", backend) as terminal:
        assert terminal.finish() == 0
        assert "20/20" in terminal.shown
        assert "2 failed" in terminal.shown
        assert "━" in terminal.shown


def test_the_bar_moves_while_indices_run(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "thread_pool", 10, 15) as terminal:
        terminal.read_until((tmp_path / "reached-10").exists)
        terminal.read_until(lambda: re.search(r"(?<!\d)1?[1-9]/20", terminal.shown) is not None)
        assert "20/20" not in terminal.shown
        (tmp_path / "go").touch()
        assert terminal.finish() == 0
        assert "20/20" in terminal.shown


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_terminal_is_left_as_it_was(backend: str, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", backend) as terminal:
        assert terminal.finish() == 0
        assert terminal.shown.count(HIDE_CURSOR) == terminal.shown.count(SHOW_CURSOR)
        assert terminal.shown.rfind(SHOW_CURSOR) > terminal.shown.rfind(HIDE_CURSOR)
        assert terminal.shown.endswith(("\n", SHOW_CURSOR))


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_the_terminal_as_it_was(times: int, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "process_pool", 10, 11, 12) as terminal:
        terminal.read_until(lambda: any(tmp_path.glob("reached-*")))
        terminal.type("\x03")
        terminal.read_until(lambda: "Ctrl-C again" in terminal.shown)
        if times == 2:
            terminal.type("\x03")
        else:
            (tmp_path / "go").touch()
        assert terminal.finish() == -signal.SIGINT
        assert terminal.shown.rfind(SHOW_CURSOR) > terminal.shown.rfind(HIDE_CURSOR)
        assert terminal.shown.rstrip().endswith("KeyboardInterrupt")


def test_a_run_that_cannot_go_on_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "from psnc import Sink, run_pipeline\n"
        "from stages_for_tests import Numbers\n"
        "class Broken(Sink):\n"
        "    def prepare(self, pipeline):\n"
        "        raise OSError('no room at all')\n"
        "    def __call__(self, items, index):\n"
        "        return []\n"
        "run_pipeline(Numbers(5).write(Broken()))\n"
    )
    terminal = Terminal(tmp_path, script)
    try:
        assert terminal.finish() == 1
        assert terminal.shown.rfind(SHOW_CURSOR) >= terminal.shown.rfind(HIDE_CURSOR)
        assert terminal.shown.rstrip().endswith("no room at all")
    finally:
        terminal.close()


def test_a_terminal_shows_nothing_where_that_is_asked_for(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "no", "sequential") as terminal:
        assert terminal.finish() == 0
        assert terminal.shown == ""


# --- a pipe or a file -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pipe_is_given_nothing_unless_asked(
    backend: str, tmp_path: Path, run_python: Run
) -> None:
    script = write_script(tmp_path / "script.py", SCRIPT)
    finished = run_python(script, "default", backend)
    assert (finished.stdout, finished.stderr) == ("", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pipe_is_given_plain_lines_with_counts_and_failures(
    backend: str, tmp_path: Path, run_python: Run
) -> None:
    script = write_script(tmp_path / "script.py", SCRIPT)
    finished = run_python(script, "yes", backend)
    assert finished.stdout == ""
    assert "\x1b" not in finished.stderr
    assert "\r" not in finished.stderr
    lines = finished.stderr.splitlines()
    assert lines[-1].startswith("psnc: 20/20 indices, 2 failed, ")


def test_earlier_results_count_as_progress(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = numbers_pipeline(10)
    run_pipeline(pipeline, indices=range(7))
    run_pipeline(pipeline, progress=True)
    assert capfd.readouterr().err.startswith("psnc: 10/10 indices, 0 failed")


def test_a_run_with_nothing_left_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = numbers_pipeline(3)
    run_pipeline(pipeline)
    run_pipeline(pipeline, progress=True)
    assert capfd.readouterr().err == ""


def test_a_long_run_says_in_between_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from psnc.builtin import progress

    # Seconds later is at once: what is shown is the subject, not when.
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "_LAST_INTERVAL_S", 0.0)
    run_pipeline(Numbers(4).filter(FailOn([1])).write(Discard()), progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" indices, ")[0] for line in lines[:4]] == [
        f"psnc: {i}/4" for i in range(1, 5)
    ]
    assert [" 1 failed" in line for line in lines[:4]] == [False, True, True, True]


def test_progress_goes_to_standard_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    run_pipeline(numbers_pipeline(3), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
