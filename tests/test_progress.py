"""What a run shows of itself: a bar on a terminal, lines in a file, nothing where unasked."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
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

COLUMNS = 100


class Terminal:
    """A program whose controlling terminal, input, output and errors are a pseudo-terminal."""

    def __init__(
        self, directory: Path, *command: object, columns: int = COLUMNS, **env: str
    ) -> None:
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.columns = columns
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
            os.chdir(directory)
            os.environ.update({"PYTHONPATH": str(TESTS), "TERM": "xterm", "LANG": "C.UTF-8", **env})
            os.execv(sys.executable, [sys.executable, *map(str, command)])
        self._settings = termios.tcgetattr(self._terminal)

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
        self.shown += self._decoder.decode(content)
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

    def lines(self) -> list[str]:
        """Return what a user sees in the end, scrolled back to the beginning."""
        return screen_lines(self.shown, self.columns)

    def is_as_it_was(self) -> bool:
        """Tell whether its settings are as before, and the next prompt has a line of its own."""
        return termios.tcgetattr(self._terminal) == self._settings and self.lines()[-1] == ""

    def close(self) -> None:
        """Leave nothing behind."""
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


def screen_lines(shown: str, columns: int) -> list[str]:
    """Lay out text as a terminal does: returns, lines that wrap, and erasing to their end."""
    lines: list[list[str]] = [[]]
    at = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", shown, re.DOTALL):
        if part == "\r":
            at = 0
        elif part == "\n":
            lines.append([])
        elif part == "\x1b[K":
            del lines[-1][at:]
        elif not part.startswith("\x1b"):
            if at == columns:
                lines.append([])
                at = 0
            lines[-1][len(lines[-1]) :] = " " * (at - len(lines[-1]))
            lines[-1][at : at + 1] = part
            at += 1
    return ["".join(line).rstrip() for line in lines]


@contextmanager
def on_terminal(
    directory: Path, *arguments: object, script: str = SCRIPT, columns: int = COLUMNS, **env: str
) -> Iterator[Terminal]:
    path = write_script(directory / "script.py", script)
    terminal = Terminal(directory, path, *arguments, columns=columns, **env)
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
        assert terminal.is_as_it_was()
        (bar, _) = terminal.lines()
        assert re.fullmatch(r"━+  20/20  [0-9,.]+/s  0:00:\d\d  2 failed", bar)


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
        assert terminal.is_as_it_was()
        assert terminal.lines()[-2] == "KeyboardInterrupt"
        assert "psnc: letting the indices at work end; Ctrl-C again ends them now" in (
            terminal.lines()
        )


def test_a_run_that_cannot_go_on_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    script = """
        from psnc import Sink, run_pipeline
        from stages_for_tests import Numbers
        class Broken(Sink):
            def prepare(self, pipeline):
                raise OSError('no room at all')
            def __call__(self, items, index):
                return []
        run_pipeline(Numbers(5).write(Broken()))
    """
    with on_terminal(tmp_path, script=script) as terminal:
        assert terminal.finish() == 1
        assert terminal.is_as_it_was()
        assert terminal.lines()[-2].endswith("no room at all")


def test_a_terminal_shows_nothing_where_that_is_asked_for(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "no", "sequential") as terminal:
        assert terminal.finish() == 0
        assert terminal.shown == ""


@pytest.mark.parametrize("columns", [9, 20, 40, 60])
def test_a_narrow_terminal_shows_what_there_is_room_for(columns: int, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "sequential", columns=columns) as terminal:
        assert terminal.finish() == 0
        (bar, _) = terminal.lines()
        assert "20/20" in bar
        assert ("2 failed" in bar) is (columns >= 20)
        assert "…" not in bar


@pytest.mark.parametrize("kind", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_redraw_is_given_plain_lines(kind: str, tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "sequential", TERM=kind) as terminal:
        assert terminal.finish() == 0
        assert "\x1b" not in terminal.shown
        (line, _) = terminal.lines()
        assert line.startswith("psnc: 20/20 indices, 2 failed, ")


def test_a_terminal_without_line_drawing_has_a_bar_of_ascii(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "sequential", PYTHONIOENCODING="ascii") as terminal:
        assert terminal.finish() == 0
        (bar, _) = terminal.lines()
        assert re.match(r"#+  20/20  ", bar)


def test_no_colour_is_used_where_none_is_wanted(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "default", "sequential", NO_COLOR="1") as terminal:
        assert terminal.finish() == 0
        assert "2 failed" in terminal.shown
        assert "\x1b[" not in terminal.shown


# --- what the program prints meanwhile --------------------------------------------------------

PRINTING = """
    import logging, os, sys
    from psnc import Filter, run_pipeline
    from stages_for_tests import Discard, Numbers

    class Print(Filter):
        def __call__(self, items):
            for item in items:
                print("printed", item, "x" * 150)
                print("no end ", end="")
                print("yet", item)
                sys.stderr.write(f"error {item}\\n")
                logging.warning("logged %d", item)
                yield item

    run_pipeline(Numbers(3).filter(Print()).write(Discard()))
    print("afterwards", type(sys.stdout).__name__, type(sys.stderr).__name__)
"""


def test_what_is_printed_stands_whole_above_the_bar(tmp_path: Path) -> None:
    with on_terminal(tmp_path, script=PRINTING) as terminal:
        assert terminal.finish() == 0
        *printed, bar, afterwards, end = terminal.lines()
    assert "3/3" in bar
    assert (afterwards, end) == ("afterwards TextIOWrapper TextIOWrapper", "")
    expected = []
    for item in range(3):
        long = f"printed {item} {'x' * 150}"
        expected += [long[:COLUMNS], long[COLUMNS:], f"no end yet {item}", f"error {item}"]
        expected += [f"WARNING:root:logged {item}"]
    assert printed == expected


def test_what_is_printed_to_a_file_stays_in_that_file(tmp_path: Path) -> None:
    script = write_script(tmp_path / "printing.py", PRINTING)
    shell = f"""
        import os, subprocess, sys
        with open("out.txt", "w") as out:
            subprocess.run([sys.executable, {str(script)!r}], stdout=out, check=True)
    """
    with on_terminal(tmp_path, script=shell) as terminal:
        assert terminal.finish() == 0
        assert "printed" not in terminal.shown
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert lines == [
        *(
            line
            for item in range(3)
            for line in (f"printed {item} {'x' * 150}", f"no end yet {item}")
        ),
        "afterwards TextIOWrapper TextIOWrapper",
    ]


@pytest.mark.parametrize("ask", ["input('who? ')", "input(print('who? ', end='') or '')"])
def test_a_question_is_not_written_over(ask: str, tmp_path: Path) -> None:
    script = f"""
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        class Ask(Filter):
            def __call__(self, items):
                print("hello", {ask})
                return items

        run_pipeline(Numbers(1).filter(Ask()).write(Discard()))
        print(input.__name__)
    """
    with on_terminal(tmp_path, script=script) as terminal:
        terminal.read_until(lambda: "who? " in terminal.shown)
        asked = len(terminal.shown)
        # Longer than it takes the bar to be drawn again.
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            assert terminal.read(0.05)
        assert terminal.shown[asked:] == ""
        terminal.type("ada\n")
        assert terminal.finish() == 0
        question, answer, bar, afterwards, _ = terminal.lines()
        assert (question, answer, afterwards) == ("who? ada", "hello ada", "input")
        assert "1/1" in bar


def test_a_child_that_a_stage_forks_can_print(tmp_path: Path) -> None:
    script = """
        import os, sys
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        class Fork(Filter):
            def __call__(self, items):
                for item in items:
                    child = os.fork()
                    if not child:
                        # In one piece, between those that the bar is drawn in.
                        sys.stdout.write(f"child of {item} {type(sys.stdout).__name__}\\n")
                        sys.stdout.flush()
                        os._exit(0)
                    assert os.waitpid(child, 0)[1] == 0
                    yield item

        run_pipeline(Numbers(20).filter(Fork()).write(Discard()), on_error="raise")
    """
    with on_terminal(tmp_path, script=script) as terminal:
        assert terminal.finish() == 0
        children = [line for line in terminal.lines() if line.startswith("child")]
        assert children == [f"child of {item} TextIOWrapper" for item in range(20)], terminal.shown


def test_a_run_within_a_run_leaves_the_bar_alone(tmp_path: Path) -> None:
    script = """
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers, numbers_pipeline

        class Nest(Filter):
            def __call__(self, items):
                run_pipeline(numbers_pipeline(7))
                run_pipeline(numbers_pipeline(5), progress=True)
                return items

        run_pipeline(Numbers(1).filter(Nest()).write(Discard()), on_error="raise")
    """
    with on_terminal(tmp_path, script=script) as terminal:
        assert terminal.finish() == 0
        inner, bar, _ = terminal.lines()
        assert inner.startswith("psnc: 5/5 indices")
        assert "1/1" in bar


def test_another_plugin_can_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "from psnc import hookimpl\n"
        "@hookimpl\n"
        "def psnc_index_reported(record):\n"
        "    print('mine:', record.index, file=sys.stderr)\n"
    )
    (tmp_path / "numbers_to_run.py").write_text(
        "from stages_for_tests import numbers_pipeline\npipeline = numbers_pipeline(3)\n"
    )
    command = ["run", "numbers_to_run.py:pipeline", "-p", "no:progress", "-p", "mine"]
    path = os.pathsep.join([str(tmp_path), str(TESTS)])
    terminal = Terminal(tmp_path, "-m", "psnc", *command, PYTHONPATH=path)
    try:
        assert terminal.finish() == 0
        assert terminal.lines()[:3] == ["mine: 0", "mine: 1", "mine: 2"]
        assert "━" not in terminal.shown
    finally:
        terminal.close()


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


def test_a_full_disk_for_the_lines_fails_no_run(tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        from psnc import Config, activate, plugin_manager, run_pipeline
        from stages_for_tests import numbers_pipeline
        activate(Config(strict_plugins=True))
        print(len(run_pipeline(numbers_pipeline(3), progress=True)), plugin_manager().errors)
        """,
    )
    with open("/dev/full", "w") as full:
        said = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE, stderr=full, text=True,
        ).stdout  # fmt: skip
    assert said == "3 {}\n"


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
    assert [line.split(" indices, ")[0] for line in lines] == [f"psnc: {i}/4" for i in range(1, 5)]
    assert [" 1 failed" in line for line in lines] == [False, True, True, True]
    assert [line.endswith(" left") for line in lines] == [True, True, True, False]


def test_progress_goes_to_standard_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    run_pipeline(numbers_pipeline(3), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
