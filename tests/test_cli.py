"""The ``psnc`` command, as a user types it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from stages_for_tests import TESTS_FIRST, TESTS_PATH, wait_until

from psnc.cli import main

PIPELINE_FILE = """
import os
from psnc import Pipeline
from stages_for_tests import Discard, FailOn, Numbers, WaitFor

pipeline = Pipeline(Numbers(10), [FailOn([3, 5], mended="mended")], Discard())
healthy = Pipeline(Numbers(4), [], Discard())
kept = Pipeline(Numbers(4), [], Discard(), resume=True)
waiting = Pipeline(Numbers(60), [WaitFor(os.getcwd())], Discard())
no_sink = Pipeline(Numbers(4))
number = 3

def factory():
    return healthy

def needs_argument(count):
    return healthy
"""


@pytest.fixture(autouse=True)
def pipeline_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(TESTS_PATH))
    path = tmp_path / "numbers_file.py"
    path.write_text(PIPELINE_FILE)
    # The command line puts the file's directory on the path, and each test has its own.
    monkeypatch.delitem(sys.modules, "numbers_file", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def psnc(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; return exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        for name in ("numbers_file", "shaky"):
            sys.modules.pop(name, None)
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def the_database(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.db")
    return path


@pytest.mark.parametrize(
    "target", ["numbers_file:healthy", "numbers_file.py:healthy", "./numbers_file.py:healthy",
               "numbers_file:factory", "numbers_file.py:factory"],
)  # fmt: skip
def test_a_pipeline_is_found_by_module_file_or_factory(psnc: Command, target: str) -> None:
    code, out, _ = psnc("run", target)
    assert code == 0
    assert "4 completed, 0 failed, of 4" in out


def test_the_summary_names_failures_and_the_database(psnc: Command, tmp_path: Path) -> None:
    code, out, _ = psnc("run", "numbers_file:pipeline")
    assert code == 1
    assert "8 completed, 2 failed, of 10" in out
    assert "index 3: RuntimeError: bad item 3" in out
    assert f"database {the_database(tmp_path)}" in out
    assert f"psnc errors {the_database(tmp_path)}" in out


def test_many_failures_are_not_all_listed(psnc: Command, pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE_FILE.replace("[3, 5]", "list(range(9))"))
    _, out, _ = psnc("run", "numbers_file:pipeline")
    assert "index 4:" in out
    assert "index 5:" not in out
    assert "and 4 more" in out


def test_resume_runs_only_what_is_left(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:pipeline", "--resume", "--indices", "0-4")
    (tmp_path / "mended").touch()
    code, out, _ = psnc("run", "numbers_file:pipeline", "--resume")
    assert code == 0
    assert "6 completed, 4 completed before, 0 failed, of 10" in out


def test_without_resume_each_run_has_a_database_of_its_own(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:healthy")
    psnc("run", "numbers_file:healthy")
    assert len(list((tmp_path / "cache").glob("*.db"))) == 2


def test_retry_failed_runs_the_failed_ones_and_no_others(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:pipeline", "--resume", "--indices", "0-4")
    (tmp_path / "mended").touch()
    code, out, _ = psnc("run", "numbers_file:pipeline", "--retry-failed")
    assert code == 0
    assert "1 completed, 0 failed, of 1" in out


def test_retry_failed_within_given_indices(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:pipeline", "--resume")
    (tmp_path / "mended").touch()
    _, out, _ = psnc("run", "numbers_file:pipeline", "--retry-failed", "--indices", "4-9")
    assert "1 completed, 0 failed, of 1" in out


def test_retry_failed_needs_something_recorded(psnc: Command) -> None:
    code, _, err = psnc("run", "numbers_file:pipeline", "--retry-failed")
    assert code == 2
    assert "nothing is recorded of this pipeline" in err


@pytest.mark.parametrize(("text", "count"), [("0-3,9", 5), ("7", 1), ("0-0", 1), ("1, 2", 2)])
def test_indices_are_numbers_and_ranges(psnc: Command, text: str, count: int) -> None:
    _, out, _ = psnc("run", "numbers_file:pipeline", "--indices", text)
    assert f"of {count}, in" in out


@pytest.mark.parametrize("text", ["a", "3-1", "1,,2", "-3", "1-", ""])
def test_unreadable_indices_are_refused(psnc: Command, text: str) -> None:
    code, _, err = psnc("run", "numbers_file:pipeline", f"--indices={text}")
    assert code == 2
    assert "--indices" in err


def test_jobs_run_in_processes(psnc: Command, tmp_path: Path, query: Any) -> None:
    code, _, _ = psnc("run", "numbers_file:healthy", "-j", "2")
    assert code == 0
    pids = {row[0] for row in query(the_database(tmp_path), "SELECT pid FROM workers")}
    assert os.getpid() not in pids


def test_a_backend_can_be_chosen(psnc: Command, tmp_path: Path, query: Any) -> None:
    code, _, _ = psnc("run", "numbers_file:healthy", "-j", "2", "--backend", "thread_pool")
    assert code == 0
    pids = {row[0] for row in query(the_database(tmp_path), "SELECT pid FROM workers")}
    assert pids == {os.getpid()}


def test_the_database_can_be_placed(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:healthy", "--db-dir", tmp_path / "here")
    psnc("run", "numbers_file:healthy", "--db-file", tmp_path / "this.db")
    assert len(list((tmp_path / "here").glob("*_*.db"))) == 1
    assert (tmp_path / "this.db").exists()
    _, out, _ = psnc("run", "numbers_file:healthy", "--db-file", tmp_path / "this.db")
    assert "0 completed, 4 completed before" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["numbers_file"], "names no pipeline: write module:name"),
        (["missing_module:x"], "no module named 'missing_module'"),
        (["missing_file.py:x"], "no file"),
        (["numbers_file:helthy"], "'numbers_file' has no 'helthy'"),
        (["numbers_file:number"], "is no pipeline but of type int"),
        (["numbers_file:needs_argument"], "cannot be called without arguments"),
        (["numbers_file:Numbers"], "is no pipeline but the class Numbers"),
        (["numbers_file:no_sink"], "this pipeline has no sink"),
        (["numbers_file:healthy", "--backend", "fast"], "unknown backend 'fast': choose one of"),
        (["numbers_file:healthy", "-j", "0"], "n_jobs=0"),
        (["numbers_file:healthy", "--indices", "4"], "index 4 is out of range"),
        (["numbers_file:healthy", "-p", "no_such_plugin"], "-p no_such_plugin"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    psnc: Command, arguments: list[str], message: str
) -> None:
    code, out, err = psnc("run", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("backend", ["sequential", "thread_pool", "process_pool"])
@pytest.mark.parametrize("code", [0, None, 1, "no licence"])
def test_a_stage_that_exits_is_not_taken_for_the_end_of_the_run(
    psnc: Command, tmp_path: Path, pipeline_file: Path, backend: str, code: object
) -> None:
    pipeline_file.write_text(f"""
from psnc import Filter
from stages_for_tests import Discard, Numbers

class Leave(Filter):
    def __call__(self, items):
        raise SystemExit({code!r})

pipeline = Numbers(4).filter(Leave()).write(Discard())
""")
    ended, out, err = psnc("run", "numbers_file:pipeline", "--backend", backend, "--no-progress")
    assert (ended, out) == (2, "")
    interrupted, go_on, reason = err.splitlines()
    assert interrupted == "interrupted: 0 of 4 completed"
    assert f"--db-file {the_database(tmp_path)}" in go_on
    assert f"a stage or plugin called exit({code}), which ended the run" in reason


def test_a_factory_that_exits_is_said_in_one_line(psnc: Command, pipeline_file: Path) -> None:
    pipeline_file.write_text("def factory():\n    raise SystemExit(0)\n")
    code, out, err = psnc("run", "numbers_file:factory")
    assert (code, out) == (2, "")
    assert err == (
        "psnc: calling numbers_file:factory raised SystemExit: 0 (--debug shows where)\n"
    )


def test_a_file_that_raises_is_said_in_one_line(psnc: Command, pipeline_file: Path) -> None:
    pipeline_file.write_text("1 / 0\n")
    code, _, err = psnc("run", "numbers_file.py:pipeline")
    assert code == 2
    assert "raised ZeroDivisionError: division by zero" in err
    assert len(err.splitlines()) == 1


def test_a_missing_import_inside_the_module_is_not_taken_for_the_module(
    psnc: Command, pipeline_file: Path
) -> None:
    pipeline_file.write_text("import no_such_library\n")
    _, _, err = psnc("run", "numbers_file:pipeline")
    assert "importing numbers_file raised ModuleNotFoundError" in err
    assert "no_such_library" in err


def test_a_file_cannot_take_the_name_of_a_loaded_module(psnc: Command, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(PIPELINE_FILE)
    code, _, err = psnc("run", "json.py:healthy")
    assert code == 2
    assert "rename the file" in err


def test_debug_shows_the_traceback(run_python: Any) -> None:
    finished = run_python("-m", "psnc", "run", "numbers_file:nothing", "--debug", check=False)
    assert "Traceback" in finished.stderr
    assert finished.returncode != 0


def test_an_unwritable_database_directory_is_said(psnc: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = psnc("run", "numbers_file:healthy", "--db-dir", tmp_path / "file" / "below")
    assert code == 3
    assert "cannot make directory" in err
    assert len(err.splitlines()) == 1


def test_log_level_decides_what_is_recorded(psnc: Command, tmp_path: Path, query: Any) -> None:
    text = PIPELINE_FILE + "\nfrom stages_for_tests import Log\n"
    text += "logging_one = Pipeline(Numbers(1), [Log(10)], Discard())\n"
    (tmp_path / "numbers_file.py").write_text(text)
    # A process of its own: pytest sets logging up, and then its levels hold.
    for level, expected in (("DEBUG", 1), ("INFO", 0)):
        database = tmp_path / f"{level}.db"
        subprocess.run(
            [sys.executable, "-m", "psnc", "run", "numbers_file:logging_one",
             "--log-level", level, "--db-file", database],
            check=True, env={**os.environ, "PYTHONPATH": str(TESTS_PATH)},
        )  # fmt: skip
        assert query(database, "SELECT count(*) FROM logs") == [(expected,)]


# --- status, errors, reset ---------------------------------------------------------------------


@pytest.fixture
def database(psnc: Command, tmp_path: Path) -> Path:
    psnc("run", "numbers_file:pipeline", "--resume", "--indices", "0-5", "--no-progress")
    return the_database(tmp_path)


def test_status_says_how_far_a_run_is(psnc: Command, database: Path) -> None:
    code, out, _ = psnc("status", database)
    assert code == 0
    assert "Numbers > FailOn > Discard" in out
    assert "4 of 10 completed, 2 failed, 4 remaining" in out


def test_status_in_json_for_programs(psnc: Command, database: Path) -> None:
    _, out, _ = psnc("status", database, "--json")
    (run,) = json.loads(out)
    assert (run["completed"], run["failed"], run["remaining"], run["total"]) == (4, 2, 4, 10)


def test_nobody_is_at_an_index_that_is_completed(psnc: Command, tmp_path: Path) -> None:
    """Not the worker that was killed over it either, once another has run it."""
    command = ["run", "numbers_file:waiting", "--resume", "--no-progress"]
    process = subprocess.Popen(
        [sys.executable, "-m", "psnc", *command],
        env={**os.environ, "PYTHONPATH": str(TESTS_PATH)},
    )
    try:
        begun = f"  index 0 begun by process {process.pid} on "
        wait_until((tmp_path / "reached-0").exists)
        wait_until(lambda: begun in psnc("status", the_database(tmp_path))[1])
    finally:
        process.kill()
        process.wait()
    assert begun in psnc("status", the_database(tmp_path))[1]  # it may be another machine's
    (tmp_path / "go").touch()
    assert psnc(*command)[0] == 0
    out = psnc("status", the_database(tmp_path))[1]
    assert "60 of 60 completed" in out
    assert "begun by" not in out


def test_errors_lists_what_failed(psnc: Command, database: Path) -> None:
    code, out, _ = psnc("errors", database)
    assert code == 0
    assert out == "3: RuntimeError: bad item 3\n5: RuntimeError: bad item 5\n"


def test_errors_shows_one_index_with_its_traceback(psnc: Command, database: Path) -> None:
    _, out, _ = psnc("errors", database, "--index", "3", "--traceback")
    assert "bad item 5" not in out
    assert "index 3 failed in FailOn" in out
    assert 'raise RuntimeError(f"bad item {item}")' in out


def test_errors_of_a_healthy_run(psnc: Command, tmp_path: Path) -> None:
    psnc("run", "numbers_file:healthy")
    _, out, err = psnc("errors", the_database(tmp_path))
    assert (out, err) == ("", "no index failed\n")


def test_reset_forgets_one_index(psnc: Command, database: Path) -> None:
    assert psnc("reset", database, "--index", "0", "--yes")[0] == 0
    _, out, _ = psnc("status", database)
    assert "3 of 10 completed, 2 failed, 5 remaining" in out


def test_reset_of_an_index_that_is_named_twice_forgets_one(psnc: Command, database: Path) -> None:
    code, out, _ = psnc("reset", database, "--index", "0", "--index", "0", "--yes")
    assert (code, out) == (0, "forgot indices 0\n")


def test_reset_forgets_everything(psnc: Command, database: Path) -> None:
    _, out, _ = psnc("reset", database, "--yes")
    assert out == "forgot all 6 recorded indices\n"
    assert "0 of 10 completed, 0 failed, 10 remaining" in psnc("status", database)[1]


def test_reset_asks_on_a_terminal(database: Path) -> None:
    output, code = on_a_terminal(["reset", str(database)], answer=b"n\n")
    assert "Forget all 6 recorded indices" in output
    assert code != 0
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM index_results").fetchone() == (6,)


def test_reset_of_an_index_that_is_not_there(psnc: Command, database: Path) -> None:
    code, _, err = psnc("reset", database, "--index", "10", "--yes")
    assert code == 2
    assert "index 10 is out of range" in err


def test_of_several_runs_one_must_be_chosen(psnc: Command, tmp_path: Path) -> None:
    shared = tmp_path / "shared.db"
    psnc("run", "numbers_file:pipeline", "--db-file", shared)
    psnc("run", "numbers_file:healthy", "--db-file", shared)
    code, _, err = psnc("errors", shared)
    assert code == 2
    assert "choose a run with --run: 1, 2" in err
    assert psnc("errors", shared, "--run", "1")[1].startswith("3: RuntimeError")
    assert psnc("status", shared)[1].count("completed") == 2


def test_the_command_that_is_told_lists_the_failures_of_this_run(
    psnc: Command, tmp_path: Path
) -> None:
    shared = tmp_path / "shared.db"
    psnc("run", "numbers_file:healthy", "--db-file", shared)
    for _ in range(2):
        _, out, _ = psnc("run", "numbers_file:pipeline", "--db-file", shared)
        (command,) = re.findall(r"^more with: psnc (.*)$", out, re.MULTILINE)
        assert psnc(*shlex.split(command))[1].startswith("3: RuntimeError: bad item 3")


@pytest.mark.parametrize("command", ["status", "errors", "reset"])
def test_a_missing_database_is_not_made(psnc: Command, tmp_path: Path, command: str) -> None:
    code, _, err = psnc(command, tmp_path / "none.db")
    assert code == 3
    assert "no database at" in err
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("command", ["status", "errors", "reset"])
def test_a_foreign_file_is_refused_and_left_alone(
    psnc: Command, tmp_path: Path, command: str
) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a database, and longer than a header")
    code, _, err = psnc(command, foreign)
    assert code == 3
    assert "is no SQLite database" in err
    assert foreign.read_text() == "not a database, and longer than a header"


# --- the terminal, and Ctrl-C ------------------------------------------------------------------


def on_a_terminal(arguments: list[str], answer: bytes = b"", **env: str) -> tuple[str, int]:
    """Run a command on a pseudo-terminal; return what it printed and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "psnc", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(TESTS_PATH), "TERM": "xterm", "COLUMNS": "100", **env},
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, answer)
    output = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            output += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    return output.decode(), process.wait(timeout=60)


def test_a_terminal_gets_a_live_bar_with_rate_and_failures() -> None:
    output, code = on_a_terminal(["run", "numbers_file:pipeline"])
    assert code == 1
    assert "10/10" in output
    assert re.search(r"[\d,.]+/s", output)
    assert "2 failed" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor is shown again


def test_a_pipe_gets_plain_lines(run_python: Any) -> None:
    finished = run_python("-m", "psnc", "run", "numbers_file:healthy")
    assert "psnc: 4/4 indices, 0 failed" in finished.stderr
    assert "\x1b" not in finished.stderr + finished.stdout


def test_progress_can_be_left_out(run_python: Any) -> None:
    finished = run_python("-m", "psnc", "run", "numbers_file:healthy", "--no-progress")
    assert finished.stderr == ""


def interrupt_at_the_first_index(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Run ``waiting``, press Ctrl-C; return the exit code and what was said of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "psnc", "run", "numbers_file:waiting", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS_PATH)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until((tmp_path / "reached-0").exists)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("jobs", [["-j", "1"], ["-j", "2"]])
def test_ctrl_c_leaves_a_database_that_the_printed_command_resumes(
    tmp_path: Path, jobs: list[str], psnc: Command
) -> None:
    code, err = interrupt_at_the_first_index(tmp_path, *jobs)
    assert code == 130
    assert "interrupted:" in err
    assert "Traceback" not in err
    database = the_database(tmp_path)
    assert f"--db-file {database}" in err
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        done = {row[0] for row in connection.execute("SELECT idx FROM index_results")}
    assert 0 in done  # the index at work was let to its end
    code, out, _ = psnc("run", "numbers_file:waiting", "--db-file", database)
    assert code == 0
    assert f"{60 - len(done)} completed, {len(done)} completed before" in out


@pytest.mark.parametrize(
    "place",
    [["--db-dir", "kept"], ["--db-dir=kept"], ["--store", "kept.db"], ["--store=kept.db"]],
    ids=" ".join,
)
def test_the_printed_command_names_one_place_and_goes_on_there(
    tmp_path: Path, place: list[str], psnc: Command
) -> None:
    _, err = interrupt_at_the_first_index(tmp_path, *place)
    (command,) = re.findall(r"^go on with: psnc (.*)$", err, re.MULTILINE)
    code, out, err = psnc(*shlex.split(command))
    assert (code, "completed before, 0 failed, of 60" in out) == (0, True), err


# --- what is odd -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["²", "0-999999999999"])
def test_odd_indices_end_in_one_line(psnc: Command, text: str) -> None:
    code, _, err = psnc("run", "numbers_file:healthy", "--indices", text)
    assert code == 2
    assert "Traceback" not in err


def test_indices_that_are_not_there_leave_no_database(psnc: Command, tmp_path: Path) -> None:
    assert psnc("run", "numbers_file:healthy", "--indices", "4")[0] == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "def pipeline(): raise OSError('no mount')",
            "calling numbers_file:pipeline raised OSError",
        ),
        ("raise ImportError('first\\nsecond')", "raised ImportError: first second"),
        ("import sys; sys.exit(0)", "called exit(0): put what it runs under"),
    ],
)
def test_a_module_or_factory_that_fails_is_said_in_one_line(
    psnc: Command, pipeline_file: Path, text: str, complaint: str
) -> None:
    pipeline_file.write_text(text)
    code, _, err = psnc("run", "numbers_file:pipeline")
    assert code == 2
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_reset_without_a_terminal_wants_to_be_told(
    psnc: Command, database: Path, run_python: Any
) -> None:
    finished = run_python("-m", "psnc", "reset", database, check=False)
    assert finished.returncode == 2
    assert "--yes" in finished.stderr
    assert "4 of 10 completed" in psnc("status", database)[1]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = on_a_terminal(["run", "numbers_file:healthy"], TERM="dumb")
    assert "psnc: 4/4 indices, 0 failed" in output
    assert "\x1b" not in output


def test_errors_of_an_index_that_did_not_fail(psnc: Command, database: Path) -> None:
    assert psnc("errors", database, "--index", "0")[1:] == ("", "0 did not fail\n")


def test_two_places_for_the_database_are_refused(psnc: Command) -> None:
    code, _, err = psnc("run", "numbers_file:healthy", "--db-dir", "a", "--db-file", "b.db")
    assert code == 2
    assert "give one of them" in err


def test_a_file_of_a_package_is_loaded_as_its_module(psnc: Command, tmp_path: Path) -> None:
    package = tmp_path / "energies" / "raw"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "stages.py").write_text("from stages_for_tests import Discard, Numbers\n")
    text = "from .stages import Discard, Numbers\npipeline = Numbers(3).write(Discard())\n"
    (package / "flow.py").write_text(text)
    code, out, _ = psnc("run", "energies/raw/flow.py:pipeline", "-j", "2")
    assert code == 0
    assert "3 completed" in out


def test_what_nothing_could_record_has_a_traceback_and_an_exit_code_of_its_own(
    psnc: Command, pipeline_file: Path
) -> None:
    pipeline_file.write_text(
        "from stages_for_tests import Discard, Numbers\n"
        "class Broken(Numbers):\n"
        "    def __len__(self): raise OSError('no mount')\n"
        "pipeline = Broken(3).write(Discard())\n"
    )
    code, _, err = psnc("run", "numbers_file:pipeline")
    assert code == 70
    assert "Traceback" in err
    assert err.rstrip().endswith("OSError: no mount")


def _without_a_reader(*arguments: str, stream: str = "stdout") -> tuple[int, str]:
    """Run a command with a pipe that nobody reads; return its exit code, and what else it said."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    finished = subprocess.run(
        [sys.executable, "-m", "psnc", *arguments],
        env={**os.environ, "PYTHONPATH": TESTS_FIRST},
        text=True,
        check=False,
        **streams,  # type: ignore[call-overload]
    )
    os.close(writer)
    return finished.returncode, finished.stderr or ""


@pytest.mark.parametrize("command", ["run", "status", "errors", "--help", "run --help", "stages"])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(
    database: Path, command: str
) -> None:
    target = {"run": ["numbers_file:healthy", "--no-progress"]}.get(command, [str(database)])
    takes_target = command in ("run", "status", "errors")
    code, err = _without_a_reader(*command.split(), *(target if takes_target else ()))
    assert (code, err) == (141, "")


def test_all_is_recorded_though_nobody_reads_the_output(tmp_path: Path, database: Path) -> None:
    recorded = str(tmp_path / "unread.db")
    code, _ = _without_a_reader("run", "numbers_file:healthy", "--db-file", recorded)
    assert code == 141
    with closing(sqlite3.connect(recorded)) as connection:
        statuses = connection.execute("SELECT DISTINCT status FROM index_results").fetchall()
    assert statuses == [("completed",)]


def test_errors_that_nobody_reads_end_the_command_quietly(tmp_path: Path) -> None:
    code, _ = _without_a_reader("status", str(tmp_path / "missing.db"), stream="stderr")
    assert code == 141


def test_a_broken_pipe_of_a_plugins_own_is_told_with_its_traceback(
    psnc: Command, tmp_path: Path
) -> None:
    (tmp_path / "piping.py").write_text(
        "import click, psnc\n@click.command()\ndef pipe():\n    raise BrokenPipeError('its own')\n"
        "@psnc.hookimpl\ndef psnc_add_commands(cli):\n    cli.add_command(pipe)\n"
    )
    code, _, err = psnc("-p", "piping", "pipe")
    assert code == 70
    assert err.rstrip().endswith("BrokenPipeError: its own")


@pytest.mark.parametrize("command", ["run", "status"])
def test_a_full_disk_for_the_output_is_said_in_one_line(database: Path, command: str) -> None:
    target = database if command == "status" else "numbers_file:healthy"
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "psnc", command, str(target)],
            env={**os.environ, "PYTHONPATH": TESTS_FIRST},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert finished.returncode == 74
    said = finished.stderr.splitlines()[-1]
    assert said == "psnc: cannot write the output (No space left on device)"
    assert "Traceback" not in finished.stderr


def test_strict_plugins_fail_a_run_whose_summary_is_said_all_the_same(
    psnc: Command, tmp_path: Path
) -> None:
    (tmp_path / "careless.py").write_text(
        "import psnc\n@psnc.hookimpl\ndef psnc_index_done():\n    raise ValueError('never')\n"
    )
    arguments = ("run", "numbers_file:healthy", "-p", "careless")
    assert psnc(*arguments)[0] == 0
    code, out, err = psnc(*arguments, "--strict-plugins")
    assert code == 2
    assert " completed, 0 failed, of " in out
    assert f"database {tmp_path}" in out
    assert "careless: psnc_index_done" in err.splitlines()[-1]


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.35, 0.5, 0.65, 0.8])
def test_ctrl_c_while_workers_start_is_an_interrupt_like_any_other(
    tmp_path: Path, pipeline_file: Path, delay: float
) -> None:
    # Loaded: from here on it is psnc's to say what an interrupt means.
    pipeline_file.write_text(PIPELINE_FILE + "open('loaded', 'w').close()\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "psnc", "run", "numbers_file:waiting", "-j", "2"],
        env={**os.environ, "PYTHONPATH": str(TESTS_PATH)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until((tmp_path / "loaded").exists)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


# --- retries and limits -----------------------------------------------------------------------

FLAKY = """
import os
from pathlib import Path
from stages_for_tests import Die, Discard, FailOn, Numbers
from psnc import Filter

class NoTimeError(OSError):
    pass

class Flaky(Filter):
    def __call__(self, items):
        for item in items:
            marker = Path(f"asked-{item}")
            if item in (1, 2) and not marker.exists():
                marker.touch()
                raise NoTimeError(f"not yet {item}")
            yield item

flaky = Numbers(4).filter(Flaky()).write(Discard(0))
deadly = Numbers(4).filter(Die([2], exit_code=9)).write(Discard(0))
hopeless = Numbers(400).filter(FailOn(range(400))).write(Discard(0))
"""


def test_run_tries_again_and_says_so(psnc: Command, tmp_path: Path) -> None:
    (tmp_path / "shaky.py").write_text(FLAKY)
    code, out, _ = psnc("run", "shaky.py:flaky", "--retries", "1", "--retry-delay", "0")
    assert code == 0
    assert out.startswith("4 completed, 0 failed, of 4")
    assert "\n2 attempts failed and had another\n" in out


@pytest.mark.parametrize(
    ("name", "failed"), [("OSError", 0), ("shaky:NoTimeError", 0), ("ValueError", 2)]
)
def test_run_tries_again_after_the_errors_that_are_named(
    name: str, failed: int, psnc: Command, tmp_path: Path
) -> None:
    (tmp_path / "shaky.py").write_text(FLAKY)
    options = ("--retries", "1", "--retry-delay", "0", "--retry-on", name)
    _, out, _ = psnc("run", "shaky.py:flaky", *options)
    assert f"{failed} failed" in out


def test_run_names_an_index_that_ends_its_worker_each_time(psnc: Command, tmp_path: Path) -> None:
    (tmp_path / "shaky.py").write_text(FLAKY)
    options = ("-j", "2", "--retries", "2", "--retry-delay", "0")
    code, out, _ = psnc("run", "shaky.py:deadly", *options)
    assert code == 1
    assert "index 2 ended its worker each of 3 times, and was set aside\n" in out


def test_run_ends_after_so_many_failures(psnc: Command, tmp_path: Path) -> None:
    (tmp_path / "shaky.py").write_text(FLAKY)
    code, out, err = psnc("run", "shaky.py:hopeless", "--max-failures", "3", "--no-progress")
    assert code == 1
    match = re.fullmatch(r"psnc: (\d+) indices failed, and max_failures=3: .*\n", err)
    assert match is not None
    assert 3 <= int(match[1]) <= 5
    assert out.startswith(f"0 completed, {match[1]} failed, of 400")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--retry-on", "OSErorr"), "'OSErorr' is no class of exceptions"),
        (("--retry-on", "KeyboardInterrupt"), "'KeyboardInterrupt' is no class of exceptions"),
        (("--retry-on", "nowhere:Error"), "no module named 'nowhere'"),
        (("--retries", "-1"), "retries=-1: give a number of attempts"),
        (("--timeout", "0"), "timeout=0.0: give seconds, more than 0"),
        (("--timeout", "5", "--backend", "sequential"), "backend 'sequential' cannot end an index"),
    ],
)
def test_run_refuses_limits_that_make_no_sense(
    options: tuple[str, ...], complaint: str, psnc: Command, tmp_path: Path
) -> None:
    (tmp_path / "shaky.py").write_text(FLAKY)
    code, _, err = psnc("run", "shaky.py:flaky", *options)
    assert code == 2
    assert err.startswith(f"psnc: {complaint}")
    assert err.count("\n") == 1
