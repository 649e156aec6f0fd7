"""What stateful filters gathered is that of the completed indices, whatever happened on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from command_line import Psnc, Write, psnc, write
from drivers import BACKENDS, Driver, Start, jobs, start, wait_for_end, write_script
from stages_for_tests import Discard, Double, FailOn, Numbers, Sum, read_journal, wait_until

from psnc import (
    Filter,
    OutputError,
    Pipeline,
    PipelineError,
    Sink,
    StageError,
    TrackingDisabledError,
    atomic_write,
    gather_pipeline,
    run_pipeline,
)
from psnc.testing import check_sink

__all__ = ["psnc", "start", "write"]

Run = Callable[..., subprocess.CompletedProcess[str]]


class List(Filter[int, int]):
    """Stateful: lists the items; merging keeps the order in which it is given the shards."""

    def __init__(self, output: str | os.PathLike[str] | None = "list.txt") -> None:
        self.output = output
        self.seen: list[int] = []

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            self.seen.append(item)
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(" ".join(map(str, self.seen)))

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        output.write_text(" ".join(shard.read_text() for shard in shards))


def listed(path: str | os.PathLike[str] = "list.txt") -> list[int]:
    return [int(word) for word in Path(path).read_text().split()]


# --- which indices ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_every_order_of_running_gives_the_same(backend: str, order: str) -> None:
    indices = list(range(40))
    if order == "backwards":
        indices.reverse()
    elif order == "shuffled":
        random.Random(7).shuffle(indices)
    pipeline = Numbers(40, items=2).filter(List()).filter(Double()).filter(Sum()).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend, indices=indices)
    list_file, sum_file = gather_pipeline(pipeline)
    assert list_file == "list.txt"
    assert listed() == [number for number in range(40) for _ in range(2)]
    assert json.loads(Path(sum_file).read_text()) == {"count": 80, "total": 3120}


def test_indices_that_failed_or_did_not_run_are_left_out_until_they_are_completed() -> None:
    pipeline = Pipeline(
        Numbers(6), [List(), FailOn([1, 4], mended="mended")], Discard(), resume=True, db_dir="db"
    )
    run_pipeline(pipeline, indices=range(5))
    assert gather_pipeline(pipeline) == ["list.txt"]
    assert listed() == [0, 2, 3]
    Path("mended").touch()
    run_pipeline(pipeline, indices=range(5))
    gather_pipeline(pipeline)
    assert listed() == [0, 1, 2, 3, 4]
    assert pipeline[5]
    gather_pipeline(pipeline)
    assert listed() == [0, 1, 2, 3, 4, 5]


def test_an_index_that_is_reset_does_not_count_and_one_that_runs_again_counts_once() -> None:
    pipeline = Numbers(5).filter(List()).write(Discard())
    run_pipeline(pipeline)
    pipeline.reset_index(2)
    gather_pipeline(pipeline)
    assert listed() == [0, 1, 3, 4]
    assert pipeline[2]
    for _ in range(2):
        gather_pipeline(pipeline)
        assert listed() == [0, 1, 2, 3, 4]
    pipeline.reset()
    assert pipeline[3]
    gather_pipeline(pipeline)
    assert listed() == [3]


def test_files_that_are_not_on_record_do_not_count() -> None:
    pipeline = Numbers(3).filter(List()).write(Discard())
    run_pipeline(pipeline, indices=[0, 2])
    (shard,) = pipeline.filter_artifacts_for_index(0)
    # As of a worker that was killed before it could record its index.
    Path(shard["path"]).with_name("1").write_text("1")
    gather_pipeline(pipeline)
    assert listed() == [0, 2]


class Shrinking(Numbers):
    """Has as many indices as a file says, which is no part of its configuration."""

    def __init__(self) -> None:
        super().__init__(int(Path("length").read_text()))


def test_indices_that_the_source_does_not_have_any_more_do_not_count() -> None:
    for length in (5, 3):
        Path("length").write_text(str(length))
        pipeline = Pipeline(Shrinking(), [List()], Discard(), resume=True, db_dir="db")
        run_pipeline(pipeline)
        gather_pipeline(pipeline)
        assert listed() == list(range(length))


def test_an_index_whose_filter_flushed_nothing_adds_nothing() -> None:
    class ListOdd(List):
        def flush(self, path: Path) -> None:
            if self.seen[0] % 2:
                super().flush(path)

    pipeline = Numbers(4).filter(ListOdd()).write(Discard())
    run_pipeline(pipeline)
    assert gather_pipeline(pipeline) == ["list.txt"]
    assert listed() == [1, 3]
    pipeline.reset_index(1)
    pipeline.reset_index(3)
    # What is left kept nothing, so that the earlier file would say too much.
    assert gather_pipeline(pipeline) == []
    assert not Path("list.txt").exists()


def test_the_filter_itself_stays_as_it_was_constructed() -> None:
    class Remembers(List):
        def merge(self, shards: Sequence[Path], output: Path) -> None:
            self.seen.append(len(shards))
            super().merge(shards, output)

    filter = Remembers()
    pipeline = Numbers(3).filter(filter).write(Discard())
    run_pipeline(pipeline)
    gather_pipeline(pipeline)
    assert filter.seen == []


# --- where ------------------------------------------------------------------------------------


def test_without_an_output_the_file_lies_beside_the_database(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(3), [List(None), Sum()], Discard(), db_file="runs/a.db")
    run_pipeline(pipeline)
    directory = tmp_path / "runs/a.gathered" / pipeline.config_hash[:16]
    files = [str(directory / "1-List"), str(directory / "2-Sum.json")]
    assert gather_pipeline(pipeline) == files
    assert listed(files[0]) == [0, 1, 2]


def test_it_lies_beside_the_database_of_the_latest_run(tmp_path: Path) -> None:
    pipeline = Numbers(3).filter(Sum()).write(Discard())
    for directory in ("one", "two"):
        run_pipeline(pipeline, db_dir=directory)
        (file,) = gather_pipeline(pipeline)
        assert Path(file).is_relative_to(tmp_path / directory)


def test_an_output_can_be_an_argument_that_is_kept_under_another_name() -> None:
    class Keeps(List):
        def __init__(self, output: Path) -> None:
            super().__init__(None)
            self.destination = output

    class Derives(List):
        def __init__(self, directory: str) -> None:
            super().__init__(Path(directory) / "derived.txt")

    pipeline = Numbers(2).filter(Keeps(Path("a/b/kept.txt"))).filter(Derives("c")).write(Discard())
    run_pipeline(pipeline)
    assert gather_pipeline(pipeline) == ["a/b/kept.txt", "c/derived.txt"]
    assert listed("a/b/kept.txt") == listed("c/derived.txt") == [0, 1]


def test_an_output_that_is_no_path_is_something_else() -> None:
    class HasAMethod(List):
        def __init__(self) -> None:
            super().__init__()
            del self.output

        def output(self) -> str:  # type: ignore[override]
            return "list.txt"

    pipeline = Numbers(2).filter(HasAMethod()).write(Discard())
    run_pipeline(pipeline)
    (file,) = gather_pipeline(pipeline)
    assert Path(file).name == "1-HasAMethod"


def test_the_home_directory_can_be_written_as_a_tilde() -> None:
    pipeline = Numbers(2).filter(List("~/list.txt")).write(Discard())
    run_pipeline(pipeline)
    assert gather_pipeline(pipeline) == [str(Path.home() / "list.txt")]


# --- what is refused --------------------------------------------------------------------------


def test_a_pipeline_without_such_filters_has_nothing_to_gather() -> None:
    pipeline = Numbers(2).filter(Double()).write(Discard())
    run_pipeline(pipeline)
    assert gather_pipeline(pipeline) == []


def test_no_completed_index_is_an_error_and_leaves_files_alone() -> None:
    pipeline = Pipeline(Numbers(2), [List(), FailOn([0, 1])], Discard(), db_file="a.db")
    Path("list.txt").write_text("earlier")
    with pytest.raises(
        PipelineError, match=r"^no index of \S*a\.db is completed: run the pipeline"
    ):
        gather_pipeline(pipeline)
    run_pipeline(pipeline)
    with pytest.raises(PipelineError, match="no index of"):
        gather_pipeline(pipeline)
    assert Path("list.txt").read_text() == "earlier"


def test_a_shard_that_is_gone_is_named_and_so_is_the_way_out(psnc: Psnc) -> None:
    pipeline = Pipeline(Numbers(5), [List()], Discard(), db_file="a.db")
    run_pipeline(pipeline)
    gather_pipeline(pipeline)
    for index in (1, 3):
        (shard,) = pipeline.filter_artifacts_for_index(index)
        os.unlink(shard["path"])
    (shard,) = pipeline.filter_artifacts_for_index(1)
    with pytest.raises(PipelineError) as caught:
        gather_pipeline(pipeline)
    database = Path("a.db").absolute()
    assert str(caught.value) == (
        f"index 1: what List flushed is recorded, but {shard['path']} is not there (and those of 1 "
        f"more): put it back, or say psnc reset {database} --index 1 and resume"
    )
    # Nothing was written meanwhile.
    assert listed() == [0, 1, 2, 3, 4]
    assert psnc("reset", str(database), "--index", "1", "--yes").code == 0
    with pytest.raises(PipelineError, match=r"^index 3: .* is not there: put it back"):
        gather_pipeline(pipeline)
    pipeline.reset_index(3)
    run_pipeline(pipeline)
    gather_pipeline(pipeline)
    assert listed() == [0, 1, 2, 3, 4]


def test_a_pipeline_that_records_nothing_has_the_usual_error() -> None:
    pipeline = Pipeline(Numbers(2), [List()], Discard(), track_metrics=False)
    with pytest.raises(TrackingDisabledError, match=r"gather_pipeline\(\) needs a database"):
        gather_pipeline(pipeline)


class OnlyFlushes(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        return items

    def flush(self, path: Path) -> None:
        path.touch()


def test_filters_that_cannot_be_gathered_are_refused_before_anything_is_written() -> None:
    cases: list[tuple[list[Filter[Any, Any]], str]] = [
        ([List(), OnlyFlushes()], r"^OnlyFlushes has flush\(\) and no merge\(\)"),
        (
            [List(), Double(), List(Path("../there/list.txt"))],
            r"^List \(filter 1\) and List \(filter 3\) have the same output, \.\./there/list.txt",
        ),
    ]
    Path("there").mkdir()
    os.chdir("there")
    for filters, message in cases:
        pipeline = Pipeline(Numbers(2), filters, Discard())
        run_pipeline(pipeline)
        with pytest.raises(StageError, match=message):
            gather_pipeline(pipeline)
        assert os.listdir() == []


def test_a_merge_that_does_not_write_its_file_is_an_error_and_leaves_the_earlier_one() -> None:
    class WritesNothing(List):
        def merge(self, shards: Sequence[Path], output: Path) -> None: ...

    class Breaks(List):
        def merge(self, shards: Sequence[Path], output: Path) -> None:
            output.write_text("half")
            raise RuntimeError("no more")

    class WritesArrays(List):
        def merge(self, shards: Sequence[Path], output: Path) -> None:
            np.savez(output, a=[1, 2])

    cases: list[tuple[List, type[Exception], str]] = [
        (WritesNothing(), StageError, r"^WritesNothing.merge\(\) did not write the file"),
        (Breaks(), RuntimeError, "^no more$"),
        (WritesArrays(), StageError, r"with '.npz' added .* end its output in '.npz'"),
    ]
    Path("list.txt").write_text("earlier")
    for filter, error, message in cases:
        pipeline = Pipeline(Numbers(2), [filter], Discard(), db_dir="db")
        run_pipeline(pipeline)
        with pytest.raises(error, match=message):
            gather_pipeline(pipeline)
        assert Path("list.txt").read_text() == "earlier"
        assert sorted(os.listdir()) == ["db", "list.txt"]


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    Path("list.txt").mkdir()
    pipeline = Numbers(2).filter(List("list.txt/a")).filter(List()).write(Discard())
    run_pipeline(pipeline)
    with pytest.raises(OutputError, match=r"list\.txt cannot be written: "):
        gather_pipeline(pipeline)


# --- sinks ------------------------------------------------------------------------------------


class JoinParts(Sink[int]):
    """Writes a part for each index, and joins them to one file."""

    def __init__(self, directory: str = "parts", output: str = "joined.txt") -> None:
        self.directory, self.output = Path(directory), output

    def __call__(self, items: Iterator[int], index: int) -> str:
        self.directory.mkdir(exist_ok=True)
        path = self.directory / str(index)
        with atomic_write(path, "w") as file:
            file.write(" ".join(map(str, items)))
        return str(path)

    def gather(self, indices: Sequence[int]) -> list[Path]:
        with atomic_write(self.output, "w") as file:
            file.write(" ".join((self.directory / str(index)).read_text() for index in indices))
        return [Path(self.output)]


def joined() -> list[int]:
    return listed("joined.txt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_gathers_the_completed_indices_of_every_backend(backend: str) -> None:
    pipeline = Numbers(20, items=2).filter(List()).write(JoinParts())
    run_pipeline(pipeline, jobs(backend), backend, indices=[7, 3, 11, 5])
    # A file of an index that is not on record, as of a worker that was killed.
    Path("parts/4").write_text("4 4")
    assert gather_pipeline(pipeline) == ["list.txt", "joined.txt"]
    assert joined() == listed() == [3, 3, 5, 5, 7, 7, 11, 11]
    run_pipeline(pipeline, jobs(backend), backend)
    for _ in range(2):
        assert gather_pipeline(pipeline) == ["list.txt", "joined.txt"]
        assert joined() == [number for number in range(20) for _ in range(2)]


def test_a_sink_gathers_what_a_resumed_run_completes_and_a_mended_index_too() -> None:
    def made() -> Pipeline[Any]:
        filters = [FailOn([1, 4], mended="mended")]
        return Pipeline(Numbers(6), filters, JoinParts(), resume=True, db_dir="db")

    run_pipeline(made(), indices=range(5))
    # By a sink that has neither prepared nor written anything.
    assert gather_pipeline(made()) == ["joined.txt"]
    assert joined() == [0, 2, 3]
    Path("mended").touch()
    run_pipeline(made())
    gather_pipeline(made())
    assert joined() == [0, 1, 2, 3, 4, 5]
    pipeline = made()
    pipeline.reset_index(3)
    gather_pipeline(pipeline)
    assert joined() == [0, 1, 2, 4, 5]


def test_a_sink_is_not_called_where_no_index_is_completed() -> None:
    pipeline = Pipeline(Numbers(2), [FailOn([0, 1])], JoinParts(), db_file="a.db")
    run_pipeline(pipeline)
    with pytest.raises(PipelineError, match=r"^no index of \S*a\.db is completed"):
        gather_pipeline(pipeline)
    assert not Path("joined.txt").exists()


def test_what_a_sink_may_return_when_it_gathers() -> None:
    class Returns(JoinParts):
        def __init__(self, what: Any) -> None:
            super().__init__()
            self.what = what

        def gather(self, indices: Sequence[int]) -> Any:
            return self.what

    for returned, paths in (
        (None, []),
        ([], []),
        ("a", ["a"]),
        (Path("a"), ["a"]),
        (("a", "b"), ["a", "b"]),
    ):
        pipeline = Numbers(2).write(Returns(returned))
        run_pipeline(pipeline)
        assert gather_pipeline(pipeline) == paths
    pipeline = Numbers(2).write(Returns(7))
    run_pipeline(pipeline)
    with pytest.raises(StageError, match=r"^Returns returned int: a sink returns the paths"):
        gather_pipeline(pipeline)


def test_an_error_of_a_sink_that_gathers_is_its_own() -> None:
    class Breaks(JoinParts):
        def gather(self, indices: Sequence[int]) -> None:
            raise RuntimeError("no more")

    pipeline = Numbers(2).filter(List()).write(Breaks())
    run_pipeline(pipeline)
    with pytest.raises(RuntimeError, match=r"^no more$"):
        gather_pipeline(pipeline)
    assert listed() == [0, 1]


JOINING = """
from pathlib import Path
from psnc import Pipeline
from stages_for_tests import Discard, FailOn, Numbers
from test_gather import JoinParts

class Nothing(Discard):
    def gather(self, indices):
        return None

joining = Pipeline(Numbers(4), [FailOn([1], mended="mended")], JoinParts())
bad = Pipeline(Numbers(2), [FailOn([0, 1])], JoinParts())
silent = Pipeline(Numbers(2), [], JoinParts(), track_metrics=False)
nothing = Pipeline(Numbers(2), [], Nothing())
"""


def test_a_run_has_its_sink_gather_and_says_what_came_of_it(psnc: Psnc, write: Write) -> None:
    write("joining.py", JOINING)
    said = psnc("run", "joining.py:joining", "--db-file", "a.db", "--no-gather")
    assert gathered_lines(said.out) == []
    assert not Path("joined.txt").exists()
    said = psnc("gather", "joining.py:joining", "--db-file", "a.db")
    assert said.out == "gathered joined.txt of 3 of 4 indices\n"
    assert joined() == [0, 2, 3]
    Path("mended").touch()
    said = psnc("run", "joining.py:joining", "--db-file", "a.db", "--retry-failed")
    assert gathered_lines(said.out) == ["gathered joined.txt of 4 of 4 indices"]
    assert joined() == [0, 1, 2, 3]
    for name in ("bad", "silent", "nothing"):
        said = psnc("run", f"joining.py:{name}", "--db-file", f"{name}.db")
        assert gathered_lines(said.out) == []
    said = psnc("gather", "joining.py:bad", "--db-file", "bad.db")
    assert said.out == "nothing to gather: no index is completed\n"
    said = psnc("gather", "joining.py:nothing", "--db-file", "nothing.db")
    assert said.out == "nothing to gather: the stages kept nothing\n"


def test_of_all_shards_the_one_that_completes_the_last_index_has_its_sink_gather(
    psnc: Psnc, write: Write
) -> None:
    write("joining.py", JOINING)
    Path("mended").touch()
    for shard in ("2/3", "1/3"):
        said = psnc("run", "joining.py:joining", "--db-file", "a.db", "--shard", shard)
        assert said.out.splitlines()[-1].startswith("not gathered: ")
        assert not Path("joined.txt").exists()
    said = psnc("run", "joining.py:joining", "--db-file", "a.db", "--shard", "3/3")
    assert gathered_lines(said.out) == ["gathered joined.txt of 4 of 4 indices"]
    assert joined() == [0, 1, 2, 3]


class Appends(JoinParts):
    """Adds to what it made before."""

    def gather(self, indices: Sequence[int]) -> Any:
        with open(self.output, "a") as file:
            file.write(f"{len(indices)}\n")
        return self.output


class MakesNothing(JoinParts):
    """Names a file that is not there."""

    def gather(self, indices: Sequence[int]) -> Any:
        return self.directory / "nowhere"


def test_the_check_of_sinks_knows_those_that_gather() -> None:
    def within(kind: type[JoinParts]) -> Callable[[Path], JoinParts]:
        return lambda directory: kind(str(directory / "parts"), str(directory / "joined"))

    check_sink(within(JoinParts), [[1], [2, 3], []])
    with pytest.raises(AssertionError, match=r"gather\(\) leaves other files when it is called"):
        check_sink(within(Appends), [[1], [2, 3]])
    with pytest.raises(AssertionError, match=r"gather\(\) returns .*, which does not exist"):
        check_sink(within(MakesNothing), [[1], [2, 3]])


# --- kills ------------------------------------------------------------------------------------

TOTAL = 60

CRASHING = f"""
import os, sys, time
from pathlib import Path
from psnc import Pipeline, gather_pipeline, run_pipeline
from stages_for_tests import Discard, Journal, Sum
from test_gather import List

class Slow(List):
    def __call__(self, items):
        for item in super().__call__(items):
            time.sleep(0.004)
            yield item

pipeline = Pipeline(
    Journal({TOTAL}, str(Path("journal.txt").absolute())),
    [Slow(str(Path("list.txt").absolute())), Sum()],
    Discard(),
    resume=True,
    db_dir="db",
)
backend = sys.argv[1]
run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)
print(gather_pipeline(pipeline)[1])
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_any_number_of_kills_and_resumes_it_is_that_of_a_clean_run(
    backend: str, tmp_path: Path, start: Start
) -> None:
    chosen = random.Random(f"kills of {backend}")
    journal = tmp_path / "journal.txt"
    kills = 0
    while len(set(read_journal(journal))) < TOTAL:
        driver = start(CRASHING, backend)
        _let_run(driver, journal, chosen)
        workers = driver.descendants() if driver.process.poll() is None else []
        if workers and chosen.random() < 0.5:
            with suppress(psutil.NoSuchProcess):
                chosen.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
            _let_run(driver, journal, chosen)
        driver.kill()
        kills += 1
        wait_for_end(workers)
    status, printed, errors = start(CRASHING, backend).finish()
    assert (status, errors) == (0, "")
    assert kills >= 3
    assert listed() == list(range(TOTAL))
    total = {"count": TOTAL, "total": sum(range(TOTAL))}
    assert json.loads(Path(printed.strip()).read_text()) == total


def _let_run(driver: Driver, journal: Path, chosen: random.Random) -> None:
    """Wait until some more indices have begun, or the program has ended."""
    until = len(read_journal(journal)) + chosen.randint(1, 9)
    wait_until(lambda: len(read_journal(journal)) >= until or driver.process.poll() is not None)


MERGING = """
import sys, time
from pathlib import Path
from psnc import Pipeline, gather_pipeline, run_pipeline
from stages_for_tests import Discard, Numbers
from test_gather import List

class Waits(List):
    def merge(self, shards, output):
        output.write_text("half")
        if sys.argv[1] == "wait":
            Path("merging").touch()
            time.sleep(60)
        super().merge(shards, output)

pipeline = Pipeline(Numbers(4), [Waits("out/list.txt")], Discard(), resume=True, db_dir="db")
run_pipeline(pipeline)
gather_pipeline(pipeline)
"""


def test_a_kill_while_merging_leaves_the_earlier_file_and_the_next_call_nothing_else(
    tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "list.txt").write_text("earlier")
    driver = start(MERGING, "wait")
    wait_until((tmp_path / "merging").exists)
    driver.kill()
    assert (out / "list.txt").read_text() == "earlier"
    assert len(os.listdir(out)) > 1
    assert start(MERGING, "go").finish()[0] == 0
    assert listed(out / "list.txt") == [0, 1, 2, 3]
    assert os.listdir(out) == ["list.txt"]


def test_somebody_else_s_pool_gathers_the_same(tmp_path: Path, run_python: Run) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from psnc import Pipeline, gather_pipeline
        from stages_for_tests import Discard, Numbers
        from test_gather import List, listed

        if __name__ == "__main__":
            pipeline = Pipeline(Numbers(12), [List()], Discard(), db_dir="db")
            with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
                list(pool.map(pipeline.__getitem__, reversed(range(12))))
            gather_pipeline(pipeline)
            assert listed() == list(range(12))
            print("done")
        """,
    )
    assert run_python(script).stdout == "done\n"


# --- the command line -------------------------------------------------------------------------

PIPELINES = """
from psnc import Pipeline
from stages_for_tests import Discard, Double, FailOn, Numbers, Sum
from test_gather import List, OnlyFlushes

numbers = Pipeline(Numbers(4), [List(), FailOn([1], mended="mended")], Discard())
both = Pipeline(Numbers(4), [List("a.txt"), List("b.txt")], Discard())
bad = Pipeline(Numbers(2), [List(), FailOn([0, 1])], Discard())
silent = Pipeline(Numbers(2), [List()], Discard(), track_metrics=False)
plain = Pipeline(Numbers(2), [Double()], Discard())
flushing = Pipeline(Numbers(2), [OnlyFlushes()], Discard())
untracked = Pipeline(Numbers(2), [OnlyFlushes()], Discard(), track_metrics=False)
"""


@pytest.fixture
def pipelines(write: Write) -> None:
    write("pipelines.py", PIPELINES)


def gathered_lines(printed: str) -> list[str]:
    return [
        line for line in printed.splitlines() if line.startswith(("gathered", "nothing to gather"))
    ]


@pytest.mark.usefixtures("pipelines")
def test_a_run_gathers_at_its_end_and_says_of_how_many(psnc: Psnc) -> None:
    said = psnc("run", "pipelines.py:numbers", "--db-file", "a.db")
    assert said.code == 1
    assert gathered_lines(said.out) == ["gathered list.txt of 3 of 4 indices"]
    assert listed() == [0, 2, 3]
    Path("mended").touch()
    said = psnc("run", "pipelines.py:numbers", "--retry-failed", "--db-file", "a.db")
    assert said.code == 0
    assert gathered_lines(said.out) == ["gathered list.txt of 4 of 4 indices"]
    assert listed() == [0, 1, 2, 3]


@pytest.mark.usefixtures("pipelines")
def test_a_run_names_each_file_and_counts_what_was_completed_before(psnc: Psnc) -> None:
    psnc("run", "pipelines.py:both", "--db-file", "a.db", "--indices", "0-1", "--no-gather")
    said = psnc("run", "pipelines.py:both", "--db-file", "a.db", "--indices", "3")
    assert said.code == 0
    assert gathered_lines(said.out) == [
        "gathered a.txt of 3 of 4 indices",
        "gathered b.txt of 3 of 4 indices",
    ]
    assert listed("a.txt") == listed("b.txt") == [0, 1, 3]


@pytest.mark.usefixtures("pipelines")
def test_a_run_can_leave_it(psnc: Psnc) -> None:
    for name in ("numbers", "both", "flushing"):
        said = psnc("run", f"pipelines.py:{name}", "--no-gather")
        assert gathered_lines(said.out) == []
    assert [name for name in os.listdir() if name.endswith(".txt")] == []


@pytest.mark.usefixtures("pipelines")
def test_a_run_without_a_completed_index_says_so(psnc: Psnc) -> None:
    said = psnc("run", "pipelines.py:bad", "--no-progress")
    assert (said.code, said.err) == (1, "")
    assert gathered_lines(said.out) == ["nothing to gather: no index is completed"]


@pytest.mark.usefixtures("pipelines")
def test_a_run_that_has_nothing_to_gather_says_nothing_of_it(psnc: Psnc) -> None:
    for name in ("silent", "plain", "untracked"):
        said = psnc("run", f"pipelines.py:{name}", "--no-progress")
        assert (said.code, said.err) == (0, "")
        assert gathered_lines(said.out) == []


@pytest.mark.usefixtures("pipelines")
def test_what_cannot_be_gathered_is_said_before_anything_runs(psnc: Psnc) -> None:
    said = psnc("run", "pipelines.py:flushing", "--db-file", "a.db")
    assert said.error.startswith("OnlyFlushes has flush() and no merge()")
    assert said.error.endswith("or do without (psnc run --no-gather)")
    assert not Path("a.db").exists()


@pytest.mark.usefixtures("pipelines")
def test_a_file_that_cannot_be_written_ends_with_one_line_and_a_code_of_its_own(
    psnc: Psnc,
) -> None:
    Path("list.txt").mkdir()
    said = psnc("run", "pipelines.py:numbers", "--no-progress")
    assert said.code == 74
    assert "3 completed, 1 failed, of 4" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("psnc: ")
    assert line.endswith("list.txt cannot be written: it is a directory")


def test_an_interrupted_run_gathers_nothing(tmp_path: Path, start: Start) -> None:
    source = """
        import os, sys
        from psnc import Pipeline
        from psnc.cli import main
        from stages_for_tests import Discard, Numbers, WaitFor
        from test_gather import List

        pipeline = Pipeline(Numbers(40), [WaitFor(os.getcwd()), List()], Discard())
        if __name__ == "__main__":
            main(["run", "script.py:pipeline", "--db-file", "a.db", *sys.argv[1:]])
    """
    driver = start(source)
    wait_until((tmp_path / "reached-0").exists)
    driver.interrupt()
    (tmp_path / "go").touch()
    status, printed, errors = driver.finish()
    assert status == 130
    assert "interrupted: 1 of 40 completed" in errors
    assert printed == ""
    assert not (tmp_path / "list.txt").exists()
    status, printed, _ = start(source).finish()
    assert status == 0
    assert gathered_lines(printed) == ["gathered list.txt of 40 of 40 indices"]
    assert listed(tmp_path / "list.txt") == list(range(40))


@pytest.mark.usefixtures("pipelines")
def test_the_command_gathers_what_is_recorded(psnc: Psnc) -> None:
    psnc("run", "pipelines.py:numbers", "--no-gather", "--resume")
    psnc(
        "run", "pipelines.py:numbers", "--no-gather", "--db-dir", "db", "--indices", "2", "--resume"
    )
    psnc("run", "pipelines.py:numbers", "--no-gather", "--db-file", "a.db", "--indices", "0,2")
    for options, indices in (
        ([], [0, 2, 3]),
        (["--db-dir", "db"], [2]),
        (["--db-file", "a.db"], [0, 2]),
        (["--store", "a.db"], [0, 2]),
    ):
        said = psnc("gather", "pipelines.py:numbers", *options)
        assert (said.code, said.err) == (0, "")
        assert said.out == f"gathered list.txt of {len(indices)} of 4 indices\n"
        assert listed() == indices


@pytest.mark.usefixtures("pipelines")
def test_the_command_says_what_it_does_not_find(psnc: Psnc) -> None:
    assert psnc("gather", "pipelines.py:numbers").error.startswith(
        "psnc gather: nothing is recorded of this pipeline at "
    )
    assert psnc("gather", "pipelines.py:silent").error.startswith(
        "psnc gather: nothing is recorded"
    )
    assert psnc("gather", "pipelines.py:missing").error.startswith("pipelines.py:missing: ")
    psnc("run", "pipelines.py:bad", "--db-file", "a.db", "--no-gather")
    # Another pipeline's database, which is left as it is.
    assert psnc("gather", "pipelines.py:numbers", "--db-file", "a.db").error.startswith(
        "psnc gather: nothing is recorded of this pipeline at "
    )
    assert json.loads(psnc("status", "a.db", "--json").out)[0]["total"] == 2
    assert len(json.loads(psnc("status", "a.db", "--json").out)) == 1
    said = psnc("gather", "pipelines.py:bad", "--db-file", "a.db")
    assert (said.code, said.out) == (0, "nothing to gather: no index is completed\n")
    psnc("run", "pipelines.py:plain", "--db-file", "b.db")
    said = psnc("gather", "pipelines.py:plain", "--db-file", "b.db")
    assert said.out == "nothing to gather: no stage of this pipeline keeps anything for it\n"
    said = psnc("gather", "pipelines.py:plain", "--db-file", "b.db", "--store", "b.db")
    assert said.code == 2
    assert "give one of them" in said.err
