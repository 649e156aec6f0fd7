"""``verify``: completed indices run again whose outputs are gone or changed, and no others."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, Write, psnc, write
from other_programs import RunPython, query
from stages_for_tests import Discard, Journal, Numbers, Sum, WriteText, read_journal

from psnc import (
    Filter,
    IndexRecord,
    OutputError,
    OutputFacts,
    Pipeline,
    PipelineError,
    PluginManager,
    Run,
    RunSummary,
    Sink,
    StoreError,
    atomic_directory,
    gather_pipeline,
    hookimpl,
    run_pipeline,
)
from psnc.output_facts import LEVELS, VerifyLevel
from psnc.verification import reset_lost_indices

__all__ = ["psnc", "write"]

BACKENDS = ["sequential", "thread_pool", "process_pool"]
COUNT = 6


class Told:
    """A plugin that notes what a run begins with and ends with."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.summary: RunSummary | None = None

    @hookimpl
    def psnc_run_start(self, indices: list[int]) -> None:
        self.indices = list(indices)

    @hookimpl
    def psnc_run_done(self, summary: RunSummary) -> None:
        self.summary = summary


@pytest.fixture
def told(plugins: PluginManager) -> Told:
    told = Told()
    plugins.register(told, name="told")
    return told


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was said since it was last asked."""
    caplog.set_level(logging.INFO, "psnc.verify")

    def take() -> list[str]:
        messages = [each.getMessage() for each in caplog.records if each.name == "psnc.verify"]
        caplog.clear()
        return messages

    return take


def texts(journal: str, **fields: Any) -> Pipeline[Any]:
    """Return a pipeline that writes ``out/0.txt`` to ``out/5.txt``."""
    return Pipeline(Journal(COUNT, journal), [], WriteText("out"), db_file="run.db", **fields)


def verified(pipeline: Pipeline[Any], level: str, journal: str, **options: Any) -> list[int]:
    """Run a pipeline once more, and return the indices that ran."""
    before = len(read_journal(journal))
    run_pipeline(pipeline, verify=level, **options)  # type: ignore[arg-type]
    return sorted(read_journal(journal)[before:])


# --- what is noticed --------------------------------------------------------------------------

FILE = Path("out/3.txt")


def truncate() -> None:
    FILE.write_bytes(FILE.read_bytes()[:-1])


def change_a_byte() -> None:
    """Change it as a disk does that fails: size and times stay."""
    times = FILE.stat()
    FILE.write_text("4\n")
    os.utime(FILE, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_link_to_itself_elsewhere() -> None:
    os.rename(FILE, "elsewhere.txt")
    FILE.symlink_to(Path("elsewhere.txt").absolute())


def replace_by_broken_link() -> None:
    FILE.unlink()
    FILE.symlink_to("nowhere.txt")


DAMAGES: dict[Callable[[], Any], set[str]] = {
    FILE.unlink: {"exists", "size", "checksum"},
    replace_by_broken_link: {"exists", "size", "checksum"},
    truncate: {"size", "checksum"},
    change_a_byte: {"checksum"},
    replace_by_link_to_itself_elsewhere: set(),
    FILE.touch: set(),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_an_output_that_is_gone_or_changed_has_its_index_run_again(
    damage: Callable[[], Any], level: VerifyLevel, journal: str, told: Told
) -> None:
    run_pipeline(texts(journal), verify="checksum")
    damage()
    noticed = level in DAMAGES[damage]
    pipeline = texts(journal)
    ran = verified(pipeline, level, journal, indices=[0, 2, 4, 5, 3])
    assert ran == told.indices == ([3] if noticed else [])
    summary = told.summary
    assert summary is not None
    assert (summary.completed, summary.cached) == ((1, 4) if noticed else (0, 5))
    assert list(summary.lost_outputs) == ran
    if noticed:
        assert FILE.read_text() == "3\n"
        assert verified(texts(journal), "checksum", journal) == []


def test_what_is_no_file_any_more_is_not_opened(journal: str) -> None:
    pipeline = texts(journal)
    run_pipeline(pipeline, verify="checksum")
    for index in (1, 2, 3):
        Path(f"out/{index}.txt").unlink()
    Path("out/1.txt").mkdir()
    # Whoever opened it would wait for somebody to write.
    os.mkfifo("out/2.txt")
    Path("out/3.txt").symlink_to("3.txt")
    lost = reset_lost_indices(run_of_pipeline(pipeline), range(COUNT), "checksum")
    assert lost == {
        1: "out/1.txt has changed",
        2: "out/2.txt has changed",
        3: "out/3.txt is gone",
    }


def test_what_is_lost_is_said_in_a_line(
    journal: str, said: Callable[[], list[str]], told: Told
) -> None:
    run_pipeline(texts(journal), verify="checksum")
    assert said() == ["verify: the outputs of 0 completed indices stand"]
    Path("out/1.txt").unlink()
    Path("out/4.txt").write_text("x\n")
    verified(texts(journal), "checksum", journal)
    assert said() == [
        "verify: 2 of 6 completed indices run again: outputs of 1 are gone (index 1: out/1.txt), "
        "of 1 changed (index 4: out/4.txt)"
    ]
    assert told.summary is not None
    assert told.summary.lost_outputs == {1: "out/1.txt is gone", 4: "out/4.txt has changed"}
    shutil.rmtree("out")
    verified(texts(journal), "checksum", journal)
    (line,) = said()
    assert line.endswith(
        "6 are gone (index 0: out/0.txt, index 1: out/1.txt, index 2: out/2.txt, …)"
    )


def test_all_is_as_recorded(journal: str, said: Callable[[], list[str]]) -> None:
    run_pipeline(texts(journal), verify="checksum")
    said()
    for level in LEVELS:
        assert verified(texts(journal), level, journal) == []
        assert said() == ["verify: the outputs of 6 completed indices stand"]


def test_only_indices_that_are_asked_for_are_looked_at(journal: str) -> None:
    run_pipeline(texts(journal))
    shutil.rmtree("out")
    assert verified(texts(journal), "exists", journal, indices=[4, 1]) == [1, 4]
    assert sorted(os.listdir("out")) == ["1.txt", "4.txt"]


def test_without_verify_nothing_is_looked_at(journal: str) -> None:
    run_pipeline(texts(journal))
    shutil.rmtree("out")
    run_pipeline(texts(journal))
    assert sorted(read_journal(journal)) == list(range(COUNT))


def test_artifacts_that_are_gone_are_made_again(journal: str) -> None:
    pipeline = Pipeline(Journal(COUNT, journal), [Sum()], WriteText("out"), db_file="run.db")
    run_pipeline(pipeline)
    Path(pipeline.filter_artifacts_for_index(2)[0]["path"]).unlink()
    with pytest.raises(PipelineError):
        gather_pipeline(pipeline)
    assert verified(pipeline, "exists", journal) == [2]
    (gathered,) = gather_pipeline(pipeline)
    assert '"total": 15' in Path(gathered).read_text()


def test_names_that_are_no_text_are_found(journal: str, said: Callable[[], list[str]]) -> None:
    pipeline = Pipeline(Journal(2, journal), [], WriteText("a\udcff\nb"), db_file="run.db")
    run_pipeline(pipeline)
    assert verified(pipeline, "size", journal) == []
    said()
    Path("a\udcff\nb/1.txt").unlink()
    assert verified(pipeline, "size", journal) == [1]
    assert said()[0].endswith("(index 1: a\\udcff\\nb/1.txt)")


# --- what is known ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_sizes_are_recorded_always_and_contents_for_checksum(
    level: VerifyLevel | None, backend: str, journal: str
) -> None:
    run_pipeline(texts(journal), 2 if backend != "sequential" else 1, backend, verify=level)
    facts = query("run.db", "SELECT path, size_bytes, content_digest FROM output_files")
    assert len(facts) == COUNT
    for path, size_bytes, content_digest in facts:
        content = Path(path).read_bytes()
        assert size_bytes == len(content)
        expected = sha256(content).hexdigest() if level == "checksum" else None
        assert content_digest == expected


def test_what_is_not_known_is_said(journal: str, said: Callable[[], list[str]]) -> None:
    run_pipeline(texts(journal), indices=[0, 1], verify="checksum")
    run_pipeline(texts(journal), indices=[2, 3, 4])
    change_a_byte()
    said()
    assert verified(texts(journal), "checksum", journal, indices=range(5)) == []
    assert said()[1:] == ["verify: 3 outputs have no recorded checksum: only the size was compared"]


def test_outputs_of_which_nothing_is_known_have_to_be_there(
    journal: str, said: Callable[[], list[str]]
) -> None:
    pipeline = texts(journal)
    Path("out").mkdir()
    with_nothing = (IndexRecord(i, "completed", (f"out/{i}.txt",)) for i in range(2))
    record(pipeline, *with_nothing)
    Path("out/1.txt").write_text("anything")
    assert verified(pipeline, "size", journal, indices=[0, 1]) == [0]
    assert said()[1:] == [
        "verify: 1 output has no recorded size: only whether it is there was looked at"
    ]


def record(pipeline: Pipeline[Any], *records: IndexRecord) -> None:
    """Record indices as if they had run."""
    _ = pipeline.completed_indices
    store = run_of_pipeline(pipeline).store
    assert store is not None
    for each in records:
        store.record(each)
    store.flush()


def run_of_pipeline(pipeline: Pipeline[Any]) -> Run:
    run: Run = pipeline.__dict__["_run"]
    return run


def test_what_is_no_file_here_is_not_looked_at(journal: str, said: Callable[[], list[str]]) -> None:
    pipeline = Pipeline(Journal(3, journal), [], Discard(), db_file="run.db")
    records = (IndexRecord(i, "completed", (f"memory://out/{i}",)) for i in range(3))
    record(pipeline, *records)
    assert verified(pipeline, "checksum", journal) == []
    assert said()[1:] == ["verify: 3 outputs are URLs, which were not looked at"]


def test_paths_at_which_nothing_was_written_have_no_size() -> None:
    run_pipeline(Pipeline(Numbers(2), [], Discard(), db_file="run.db"), verify="checksum")
    facts = query("run.db", "SELECT size_bytes, content_digest FROM output_files")
    assert facts == [(None, None)] * 2


def test_nothing_is_known_of_an_index_that_failed(journal: str) -> None:
    class Fail(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            yield from items
            raise ValueError("no")

    pipeline = Pipeline(Journal(2, journal), [Fail()], WriteText("out"), db_file="run.db")
    run_pipeline(pipeline, verify="checksum")
    assert query("run.db", "SELECT * FROM output_files") == []


def test_an_untracked_pipeline_records_and_verifies_nothing(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(2), [], WriteText("out"), track_metrics=False)
    assert run_pipeline(pipeline, verify="checksum") == [["out/0.txt"], ["out/1.txt"]]
    assert os.listdir(tmp_path) == ["out"]


def test_a_fact_that_was_changed_in_the_database_is_an_error(journal: str) -> None:
    import sqlite3

    run_pipeline(texts(journal), verify="checksum")
    change_a_byte()
    with sqlite3.connect("run.db") as connection:
        digest = sha256(FILE.read_bytes()).hexdigest()
        connection.execute("UPDATE output_files SET content_digest = ? WHERE idx = 3", (digest,))
    connection.close()
    with pytest.raises(StoreError, match="index 3 is one of those"):
        run_pipeline(texts(journal), verify="checksum")


# --- directories, and outputs that indices share ----------------------------------------------


class WriteDirectory(Sink[int]):
    """Writes two files to a directory for each index."""

    def __call__(self, items: Iterator[int], index: int) -> Path:
        path = Path(f"split/{index}")
        with atomic_directory(path) as draft:
            (draft / "below").mkdir()
            (draft / "below" / "b").write_text(f"{sum(items)}")
            (draft / "a").write_text("a")
        return path


def directories(journal: str) -> Pipeline[Any]:
    return Pipeline(Journal(3, journal), [], WriteDirectory(), db_file="run.db")


INSIDE: dict[Callable[[], Any], set[str]] = {
    (lambda: shutil.rmtree("split/1")): {"exists", "size", "checksum"},
    (lambda: Path("split/1/below/b").unlink()): {"size", "checksum"},
    (lambda: Path("split/1/c").write_text("new")): {"size", "checksum"},
    (lambda: Path("split/1/below/b").write_text("2")): {"checksum"},
    (lambda: Path("split/1/a").rename("split/1/c")): {"checksum"},
    (lambda: Path("split/1/c").symlink_to("a")): {"checksum"},
    (lambda: Path("split/1/c").mkdir()): {"checksum"},
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("damage", INSIDE, ids=map(str, range(len(INSIDE))))
def test_a_directory_is_what_is_in_it(
    damage: Callable[[], Any], level: VerifyLevel, journal: str
) -> None:
    run_pipeline(directories(journal), verify="checksum")
    assert verified(directories(journal), level, journal) == []
    damage()
    assert verified(directories(journal), level, journal) == (
        [1] if level in INSIDE[damage] else []
    )


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_directories_are_looked_through_where_that_is_asked_for(
    level: VerifyLevel | None, journal: str
) -> None:
    run_pipeline(directories(journal), verify=level)
    facts = query("run.db", "SELECT size_bytes, content_digest NOTNULL FROM output_files")
    expected = {"size": (2, 0), "checksum": (2, 1)}.get(str(level), (None, 0))
    assert facts == [expected] * 3


class WriteToOneDirectory(Sink[int]):
    """Writes some files to the directory of all indices, by way of drafts that come and go."""

    def __call__(self, items: Iterator[int], index: int) -> str:
        directory = Path("together")
        directory.mkdir(exist_ok=True)
        for part in range(5):
            draft = directory / f".{index}-{part}.draft"
            draft.write_text("x")
            draft.rename(directory / f"{index}-{part}")
        return str(directory)


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_what_others_move_meanwhile_is_no_failure_of_an_index(level: VerifyLevel | None) -> None:
    pipeline = Numbers(200).write(WriteToOneDirectory())
    summary = run_pipeline(pipeline, 4, "thread_pool", verify=level, collect=False)
    assert (summary.completed, summary.failed) == (200, {})


class Append(Sink[int]):
    """Adds a line to the one file, or to a file in the one directory, for each index."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, items: Iterator[int], index: int) -> str:
        if self.path == "lines":
            os.makedirs(self.path, exist_ok=True)
        name = f"{self.path}/{index}" if self.path == "lines" else self.path
        with open(name, "a") as file:
            file.write(f"{sum(items)}\n")
        return self.path


class AppendAsShared(Append):
    shares_outputs = True


@pytest.mark.parametrize("path", ["lines.txt", "lines"])
@pytest.mark.parametrize("sink", [Append, AppendAsShared])
def test_outputs_that_indices_share_only_have_to_be_there(
    sink: type[Append], path: str, journal: str, said: Callable[[], list[str]]
) -> None:
    pipeline = Pipeline(Journal(3, journal), [], sink(path), db_file="run.db")
    run_pipeline(pipeline, verify="checksum")
    said()
    for level in ("size", "checksum"):
        assert verified(pipeline, level, journal) == []
        assert said()[1:] == [
            "verify: of outputs that indices share, only whether they are there was looked at"
        ]
    shutil.rmtree(path) if path == "lines" else os.unlink(path)
    assert verified(pipeline, "exists", journal) == [0, 1, 2]


def test_nothing_is_recorded_of_outputs_that_a_sink_says_are_shared(journal: str) -> None:
    sink = AppendAsShared("lines.txt")
    run_pipeline(Pipeline(Journal(1, journal), [], sink, db_file="run.db"), verify="checksum")
    assert query("run.db", "SELECT size_bytes, content_digest FROM output_files") == [(None, None)]


class LayOut(WriteText):
    """Makes what is missing before the first index."""

    def prepare(self, pipeline: Pipeline[Any]) -> None:
        for index in range(COUNT):
            path = Path(f"out/{index}.txt")
            path.parent.mkdir(exist_ok=True)
            path.touch()


def test_what_a_sink_lays_out_anew_is_not_taken_for_what_was_written(journal: str) -> None:
    pipeline = Pipeline(Journal(COUNT, journal), [], LayOut("out"), db_file="run.db")
    run_pipeline(pipeline)
    shutil.rmtree("out")
    assert verified(pipeline, "exists", journal) == list(range(COUNT))
    assert FILE.read_text() == "3\n"


# --- when things fail -------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_an_error_and_forgets_nothing(
    journal: str, told: Told
) -> None:
    class Empty(Sink[int]):
        def __call__(self, items: Iterator[int], index: int) -> str:
            list(items)
            Path(f"{index}.bin").touch()
            return f"{index}.bin"

    pipeline = Pipeline(Journal(3, journal), [], Empty(), db_file="run.db")
    run_pipeline(pipeline, verify="checksum")
    Path("0.bin").unlink()
    Path("1.bin").unlink()
    # The system says that it is an empty file, and does not let anybody read it, root included.
    Path("1.bin").symlink_to("/proc/self/mem")
    told.indices = [-1]
    with pytest.raises(OutputError, match=r"^1\.bin cannot be verified \(.*\): see that it can"):
        run_pipeline(pipeline, verify="checksum")
    assert told.summary is not None
    assert told.summary.interrupted
    assert told.indices == []
    assert pipeline.completed_indices == {0, 1, 2}


KILLED = """
import os, signal
from stages_for_tests import Journal, WriteText
from psnc import Filter, Pipeline, run_pipeline

class Kill(Filter[int, int]):
    def __call__(self, items):
        if os.path.exists("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from items

pipeline = Pipeline(Journal(6, "journal.txt"), [Kill()], WriteText("out"), db_file="run.db")
run_pipeline(pipeline, verify="exists")
"""


def test_a_kill_before_an_index_has_run_again_leaves_it_to_be_run(
    run_python: RunPython, tmp_path: Path, journal: str
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    run_python("killed.py")
    for index in (2, 4):
        Path(f"out/{index}.txt").unlink()
    Path("kill").touch()
    finished = run_python("killed.py", check=False)
    assert finished.returncode == -signal.SIGKILL
    assert query("run.db", "SELECT idx FROM index_results ORDER BY idx") == [(0,), (1,), (3,), (5,)]
    Path("kill").unlink()
    before = len(read_journal(journal))
    run_python("killed.py")
    assert read_journal(journal)[before:] == [2, 4]
    assert [Path(f"out/{index}.txt").read_text() for index in range(6)] == [
        f"{index}\n" for index in range(6)
    ]


@pytest.mark.parametrize("level", ["", "sizes", True, 1, ["size"]])
def test_another_level_is_refused(level: Any) -> None:
    with pytest.raises(PipelineError, match=r"verify=.*: choose 'exists', 'size' or 'checksum'"):
        run_pipeline(Numbers(1).write(WriteText("out")), verify=level)


# --- how much it takes ------------------------------------------------------------------------


def recorded(count: int) -> Run:
    """Return the run of a pipeline with so many completed indices of one file each."""
    pipeline = Pipeline(Numbers(count), [], WriteText("out"), db_file=f"{count}.db")
    facts = (OutputFacts(1),)
    Path("out").mkdir(exist_ok=True)
    paths = [f"out/{index % 7}.txt" for index in range(count)]
    for path in paths[:7]:
        Path(path).write_text("1")
    records = (
        IndexRecord(i, "completed", (path,), output_facts=facts) for i, path in enumerate(paths)
    )
    record(pipeline, *records)
    return run_of_pipeline(pipeline)


@pytest.mark.parametrize("level", LEVELS)
def test_memory_does_not_grow_with_the_number_of_indices(level: VerifyLevel) -> None:
    def peak(count: int) -> int:
        run = recorded(count)
        tracemalloc.start()
        assert reset_lost_indices(run, range(count), level) == {}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # Both are read in several portions. The lesser of two, since Python's table of interned strings
    # may be made anew at any moment, but not twice in so short a time.
    assert min(peak(12_000), peak(12_000)) < 1.5 * min(peak(3_000), peak(3_000))


def test_many_indices_are_forgotten(journal: str) -> None:
    run = recorded(3_000)
    for path in ("out/2.txt", "out/5.txt"):
        Path(path).unlink()
    lost = reset_lost_indices(run, range(1, 2_999, 2), "size")
    expected = {index for index in range(1, 2_999, 2) if index % 7 in (2, 5)}
    assert lost.keys() == expected
    assert run.pipeline.completed_indices == set(range(3_000)) - expected


# --- the command ------------------------------------------------------------------------------

WRITES = """
from stages_for_tests import Numbers, WriteText

pipeline = Numbers(1200).write(WriteText("out"))
"""


def test_the_command_says_what_runs_again(run_python: RunPython, write: Write) -> None:
    write("writes.py", WRITES)
    command = ("-m", "psnc", "run", "writes.py:pipeline", "--no-progress", "--db-file", "run.db")
    run_python(*command, "--verify", "checksum")
    for index in (4, 5):
        Path(f"out/{index}.txt").unlink()
    Path("out/9.txt").write_text("x\n")
    said = run_python(*command, "--verify", "checksum")
    assert said.stdout.startswith("3 completed, 1197 completed before, 0 failed, of 1200, in ")
    assert said.stderr == (
        "verify: 3 of 1,200 completed indices run again: outputs of 2 are gone "
        "(index 4: out/4.txt, index 5: out/5.txt), of 1 changed (index 9: out/9.txt)\n"
    )
    assert run_python(*command, "--verify", "checksum").stderr == ""


def test_the_command_refuses_another_level(psnc: Psnc) -> None:
    said = psnc("run", "three.py:pipeline", "--verify", "sizes")
    assert said.code == 2
    assert "'sizes' is not one of 'exists', 'size', 'checksum'" in said.err
