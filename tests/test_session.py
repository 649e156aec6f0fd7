"""Many indices: which of them run, what comes back, and what a later run takes over."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import (
    Discard,
    Double,
    FailOn,
    GroupedDiscard,
    Journal,
    Numbers,
    Pairs,
    WriteText,
    grouped,
    numbers_pipeline,
    read_journal,
)

from psnc import (
    BackendError,
    Filter,
    IndexRangeError,
    PartitionError,
    Pipeline,
    PipelineError,
    Source,
    SourceError,
    StoreError,
    TrackingDisabledError,
    run_pipeline,
)
from psnc.manager import plugin_manager
from psnc.run import Run
from psnc.session import Session
from psnc.worker import WorkerTask

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Pause(Filter[int, int]):
    """Gives another worker the time to take the next index."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            time.sleep(0.01)
            yield item


class FilesIn(Source[str]):
    """One index a file of a directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __len__(self) -> int:
        return len(os.listdir(self.directory))

    def __getitem__(self, index: int) -> Iterator[str]:
        yield sorted(os.listdir(self.directory))[index]


class Groups(Journal):
    """Wants the groups that it is given, whatever indices are to run."""

    def __init__(self, count: int, journal: str, groups: Any) -> None:
        super().__init__(count, journal)
        self.groups = groups

    def partition_indices(self, indices: Sequence[int]) -> Any:
        return self.groups


class LazyGroups(Numbers):
    """Wants its indices in pairs, and says so lazily."""

    def partition_indices(self, indices: Sequence[int]) -> Any:
        return (group for group in grouped(indices, 2))


class RecordsQuestions(Pairs):
    """Writes down which indices it was asked to group."""

    def __init__(self, count: int, answers: str) -> None:
        super().__init__(count)
        self.answers = answers

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        Path(self.answers).write_text(str(list(indices)))
        return super().partition_indices(indices)


def out(*indices: int) -> list[list[str]]:
    return [[f"out/{index}-0.bin"] for index in indices]


# --- results ----------------------------------------------------------------------------------


@on_every_backend
def test_results_come_in_the_order_of_the_indices_asked_for(backend: str) -> None:
    asked = [7, -1, 2, 7, 0, -10]
    results = run_pipeline(numbers_pipeline(10), jobs(backend), backend, indices=asked)
    assert results == out(7, 9, 2, 7, 0, 0)


def test_an_index_asked_for_twice_runs_once(journal: str) -> None:
    pipeline = Journal(4, journal).write(Discard())
    assert run_pipeline(pipeline, indices=iter([3, 1, 3, -1])) == out(3, 1, 3, 3)
    assert sorted(read_journal(journal)) == [1, 3]


def test_no_indices_are_no_results() -> None:
    assert run_pipeline(numbers_pipeline(4), indices=[]) == []


@on_every_backend
def test_a_source_without_indices_gives_no_results(backend: str) -> None:
    pipeline = numbers_pipeline(0)
    assert run_pipeline(pipeline, jobs(backend), backend) == []
    summary = pipeline.summary()
    assert (summary["total"], summary["completed"], summary["remaining"]) == (0, 0, 0)


def test_a_sink_that_writes_nothing_completes_with_no_paths() -> None:
    pipeline = Numbers(3).write(Discard(files=0))
    assert run_pipeline(pipeline) == [[], [], []]
    assert pipeline.completed_indices == {0, 1, 2}


@on_every_backend
def test_a_failing_index_gives_no_paths_and_stops_no_other(backend: str) -> None:
    pipeline = Numbers(30).filter(FailOn([0, 7, 29])).write(Discard())
    results = run_pipeline(pipeline, jobs(backend), backend)
    assert results == [[] if i in (0, 7, 29) else out(i)[0] for i in range(30)]
    assert pipeline.failed_indices == {i: f"RuntimeError: bad item {i}" for i in (0, 7, 29)}
    assert pipeline.completed_indices == set(range(30)) - {0, 7, 29}


@on_every_backend
def test_a_run_in_which_every_index_fails_still_ends(backend: str) -> None:
    pipeline = Numbers(5).filter(FailOn(range(5))).write(Discard())
    assert run_pipeline(pipeline, jobs(backend), backend) == [[]] * 5
    assert set(pipeline.failed_indices) == set(range(5))


@on_every_backend
def test_on_error_raise_ends_with_the_error_of_the_stage(backend: str) -> None:
    pipeline = Numbers(6).filter(FailOn([2])).write(Discard())
    with pytest.raises(RuntimeError, match=r"^bad item 2$"):
        run_pipeline(pipeline, jobs(backend), backend, on_error="raise")
    assert pipeline.failed_indices == {2: "RuntimeError: bad item 2"}


def test_on_error_raise_starts_nothing_after_the_failure(journal: str) -> None:
    pipeline = Journal(50, journal).filter(FailOn([2])).write(Discard())
    with pytest.raises(RuntimeError):
        run_pipeline(pipeline, on_error="raise")
    assert read_journal(journal) == [0, 1, 2]


def test_a_run_that_raised_can_be_resumed(journal: str, tmp_path: Path) -> None:
    mended = tmp_path / "mended"

    def pipeline() -> Pipeline[int]:
        stages = Journal(6, journal).filter(FailOn([2], str(mended)))
        return Pipeline(stages.source, stages.filters, Discard(), resume=True, db_dir=tmp_path)

    with pytest.raises(RuntimeError):
        run_pipeline(pipeline(), on_error="raise")
    mended.touch()
    assert run_pipeline(pipeline(), on_error="raise") == out(*range(6))
    assert read_journal(journal) == [0, 1, 2, 2, 3, 4, 5]


def test_the_summary_tells_earlier_completed_and_failed_indices_apart(tmp_path: Path) -> None:
    pipeline = Numbers(6).filter(FailOn([4])).write(Discard())
    run_pipeline(pipeline, indices=[0, 1])
    summary = Session(pipeline, indices=[0, 1, 1, 2, -1, 4]).run()
    assert (summary.requested, summary.cached, summary.completed) == (5, 2, 2)
    assert summary.failed == {4: "RuntimeError: bad item 4"}
    assert summary.interrupted is False
    assert summary.db_path == str(pipeline.db_path)


# --- workers and batches ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["thread_pool", "process_pool"])
def test_thousands_of_tiny_indices_each_run_once(
    backend: str, journal: str, query: Callable[..., Any]
) -> None:
    pipeline = Journal(5000, journal).write(Discard())
    assert run_pipeline(pipeline, 2, backend) == out(*range(5000))
    assert sorted(read_journal(journal)) == list(range(5000))
    ((rows,),) = query(pipeline.db_path, "SELECT count(*) FROM index_results")
    assert rows == 5000
    assert sum(w["completed_count"] for w in pipeline.active_workers) == 5000


class Meet(Filter[int, int]):
    """Waits until as many indices are at work at the same time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        _met.wait(timeout=20)
        yield from items


_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_met = threading.Barrier(_CPUS)


def test_minus_one_job_means_a_worker_for_every_cpu() -> None:
    count = _met.parties
    pipeline = Numbers(count).filter(Meet(count)).write(Discard())
    assert run_pipeline(pipeline, n_jobs=-1, backend="thread_pool") == out(*range(count))


def test_one_job_runs_in_this_process_and_several_run_in_others() -> None:
    one, several = numbers_pipeline(8), numbers_pipeline(8)
    run_pipeline(one)
    run_pipeline(several, n_jobs=2)
    assert {worker["pid"] for worker in one.active_workers} == {os.getpid()}
    assert os.getpid() not in {worker["pid"] for worker in several.active_workers}


def test_the_workers_of_one_call_share_an_invocation_id(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(12), [Pause()], Discard(), resume=True, db_dir=tmp_path)
    run_pipeline(pipeline, n_jobs=2, backend="thread_pool", indices=range(6))
    run_pipeline(pipeline, n_jobs=2, backend="process_pool")
    by_call: dict[str, list[int]] = {}
    for worker in pipeline.active_workers:
        by_call.setdefault(worker["invocation_id"], []).append(worker["completed_count"])
    assert [sum(counts) for counts in by_call.values()] == [6, 6]


@on_every_backend
def test_after_a_run_every_worker_is_idle(backend: str) -> None:
    pipeline = Numbers(9).filter(FailOn([8])).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend)
    workers = pipeline.active_workers
    assert workers
    assert [worker["current_index"] for worker in workers] == [None] * len(workers)
    assert sum(worker["completed_count"] for worker in workers) == 8


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [0, -2, 1.5, "2", None])
def test_a_number_of_jobs_that_is_none_is_refused(n_jobs: Any) -> None:
    with pytest.raises(BackendError, match="n_jobs="):
        run_pipeline(numbers_pipeline(), n_jobs=n_jobs)


def test_an_unknown_backend_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(BackendError, match=r"'quantum'.*process_pool, sequential, thread_pool"):
        run_pipeline(numbers_pipeline(), backend="quantum")


@on_every_backend
def test_an_option_that_a_backend_does_not_know_is_refused(backend: str) -> None:
    with pytest.raises(BackendError, match=rf"'{backend}'.*colour"):
        run_pipeline(numbers_pipeline(), jobs(backend), backend, colour="red")


def test_several_jobs_are_refused_where_there_is_one() -> None:
    with pytest.raises(BackendError, match=r"sequential.*one job, not 3"):
        run_pipeline(numbers_pipeline(), n_jobs=3, backend="sequential")


@pytest.mark.parametrize("index", [4, -5, 10**30])
def test_an_index_out_of_range_is_refused_before_anything_runs(index: int, journal: str) -> None:
    pipeline = Journal(4, journal).write(Discard())
    with pytest.raises(IndexRangeError, match=f"index {index} .*Journal has 4 indices"):
        run_pipeline(pipeline, indices=[0, index])
    assert read_journal(journal) == []


@pytest.mark.parametrize("index", ["1", 1.0, None])
def test_an_index_that_is_no_integer_is_refused(index: Any) -> None:
    with pytest.raises(PipelineError, match="indexed by integers"):
        run_pipeline(numbers_pipeline(), indices=[index])


@pytest.mark.parametrize("thing", [Numbers(3), "module:pipeline", None, Pipeline])
def test_what_is_no_pipeline_is_refused(thing: Any) -> None:
    with pytest.raises(PipelineError, match="no pipeline"):
        run_pipeline(thing)


def test_a_pipeline_without_a_sink_is_refused() -> None:
    with pytest.raises(PipelineError, match="no sink"):
        run_pipeline(Numbers(3).filter(Double()))


def test_an_unknown_way_to_treat_errors_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"on_error='ignore'.*'continue' or 'raise'"):
        run_pipeline(numbers_pipeline(), on_error="ignore")  # type: ignore[arg-type]


# --- resuming ---------------------------------------------------------------------------------


@on_every_backend
def test_a_resume_runs_only_what_failed_or_is_missing(
    backend: str, journal: str, tmp_path: Path
) -> None:
    mended = tmp_path / "mended"

    def run(**arguments: Any) -> list[list[str]]:
        filters = [FailOn([3], str(mended))]
        pipeline = Pipeline(Journal(8, journal), filters, Discard(), resume=True, db_dir=tmp_path)
        return run_pipeline(pipeline, jobs(backend), backend, **arguments)

    first = run(indices=range(6))
    assert first == [[] if i == 3 else out(i)[0] for i in range(6)]
    assert sorted(read_journal(journal)) == [0, 1, 2, 3, 4, 5]
    mended.touch()
    assert run() == out(*range(8))
    assert sorted(read_journal(journal)) == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert run(indices=[-1, 3]) == out(7, 3)
    assert len(read_journal(journal)) == 9


def test_without_resume_each_pipeline_object_runs_everything(journal: str, tmp_path: Path) -> None:
    for _ in range(2):
        pipeline = Pipeline(Journal(3, journal), sink=Discard(), db_dir=tmp_path / "db")
        run_pipeline(pipeline)
        assert pipeline.completed_indices == {0, 1, 2}
    assert len(read_journal(journal)) == 6
    assert len(list((tmp_path / "db").glob("*.db"))) == 2


def test_the_same_pipeline_object_does_not_run_an_index_again(journal: str) -> None:
    pipeline = Journal(3, journal).write(Discard())
    assert pipeline[1] == out(1)[0]
    assert run_pipeline(pipeline) == run_pipeline(pipeline) == out(0, 1, 2)
    assert read_journal(journal) == [1, 0, 2]


def test_resume_and_db_dir_can_be_given_to_the_run(journal: str, tmp_path: Path) -> None:
    directory = tmp_path / "elsewhere"
    first = Journal(5, journal).write(Discard())
    run_pipeline(first, indices=[0, 1], resume=True, db_dir=directory)
    assert first.completed_indices == {0, 1}
    assert first.db_path.parent == directory
    second = Journal(5, journal).write(Discard())
    assert run_pipeline(second, resume=True, db_dir=str(directory)) == out(*range(5))
    assert sorted(read_journal(journal)) == [0, 1, 2, 3, 4]
    assert second.summary()["completed"] == 5
    assert second.db_path == first.db_path
    assert [path.suffix for path in directory.iterdir()].count(".db") == 1


def test_a_run_that_is_told_not_to_resume_starts_afresh(journal: str, tmp_path: Path) -> None:
    pipeline = Pipeline(Journal(3, journal), sink=Discard(), resume=True, db_dir=tmp_path)
    run_pipeline(pipeline)
    run_pipeline(pipeline, resume=False)
    assert read_journal(journal) == [0, 1, 2, 0, 1, 2]


@on_every_backend
def test_a_source_that_has_grown_runs_what_is_new(backend: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()

    def run(names: str) -> Pipeline[str]:
        for name in names:
            (data / name).touch()
        sink = WriteText(str(tmp_path / "out"))
        pipeline = Pipeline(FilesIn(str(data)), sink=sink, resume=True, db_dir=tmp_path)
        assert all(run_pipeline(pipeline, jobs(backend), backend))
        return pipeline

    run("abc")
    pipeline = run("de")
    assert pipeline.summary()["total"] == pipeline.summary()["completed"] == 5
    assert (tmp_path / "out" / "4.txt").read_text() == "e\n"
    assert pipeline.remaining_indices() == []


def test_a_resume_where_relative_paths_mean_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> Pipeline[str]:
        sink = WriteText(str(tmp_path / "out"))
        return Pipeline(FilesIn("data"), sink=sink, resume=True, db_dir=tmp_path / "db")

    for place in ("here", "there"):
        (tmp_path / place / "data").mkdir(parents=True)
        (tmp_path / place / "data" / f"of-{place}").touch()
    monkeypatch.chdir(tmp_path / "here")
    run_pipeline(pipeline())
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(StoreError, match="relative path 'data'") as refused:
        run_pipeline(pipeline())
    assert str(tmp_path / "here") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "out" / "0.txt").read_text() == "of-here\n"


def test_a_resume_from_another_directory_works_with_absolute_paths(
    tmp_path: Path, journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> Pipeline[int]:
        sink = WriteText(str(tmp_path / "out"))
        return Pipeline(Journal(3, journal), sink=sink, resume=True, db_dir=tmp_path / "db")

    first = run_pipeline(pipeline(), indices=[0, 1])
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert run_pipeline(pipeline())[:2] == first
    assert read_journal(journal) == [0, 1, 2]


# --- without a database -----------------------------------------------------------------------


@on_every_backend
def test_without_metrics_a_run_gives_the_same_results_and_writes_no_database(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
    stages = Numbers(12).filter(FailOn([5]))
    pipeline = Pipeline(stages.source, stages.filters, Discard(), track_metrics=False)
    session = Session(pipeline, n_jobs=jobs(backend), backend=backend)
    summary = session.run()
    assert session.results() == [[] if i == 5 else out(i)[0] for i in range(12)]
    assert (summary.completed, summary.failed) == (11, {5: "RuntimeError: bad item 5"})
    assert summary.db_path is None
    assert not (tmp_path / "cache").exists()
    with pytest.raises(TrackingDisabledError, match="track_metrics=True"):
        _ = pipeline.completed_indices


@on_every_backend
def test_without_metrics_on_error_raise_still_raises(backend: str) -> None:
    pipeline = Pipeline(Numbers(4), [FailOn([1])], Discard(), track_metrics=False)
    with pytest.raises(RuntimeError, match="bad item 1"):
        run_pipeline(pipeline, jobs(backend), backend, on_error="raise")


# --- partitions -------------------------------------------------------------------------------


def _workers_of(pipeline: Pipeline[Any], query: Callable[..., Any]) -> dict[int, str]:
    return dict(query(pipeline.db_path, "SELECT idx, worker_id FROM index_results"))


@pytest.mark.parametrize("backend", ["thread_pool", "process_pool"])
@pytest.mark.parametrize(
    ("source", "sink", "size"),
    [
        pytest.param(Pairs(12), Discard(), 2, id="source"),
        pytest.param(Numbers(12), GroupedDiscard(3), 3, id="sink"),
        # 2 and 3 are a pair of the source's, and so join two blocks of the sink's.
        pytest.param(Pairs(12), GroupedDiscard(3), 6, id="both"),
    ],
)
def test_indices_that_belong_together_run_in_one_worker(
    source: Any, sink: Any, size: int, backend: str, query: Callable[..., Any]
) -> None:
    pipeline = source.filter(Pause()).write(sink)
    run_pipeline(pipeline, 2, backend)
    worker = _workers_of(pipeline, query)
    assert len(worker) == 12
    for group in grouped(range(12), size):
        assert len({worker[index] for index in group}) == 1, group
    assert len(set(worker.values())) == 2
    order = query(pipeline.db_path, "SELECT idx FROM index_results ORDER BY completed_at")
    for group in grouped(range(12), size):
        assert [index for (index,) in order if index in group] == group


def test_a_group_runs_in_the_order_that_its_stage_gave(journal: str) -> None:
    source = Groups(6, journal, [[5, 3, 1], [4, 0, 2]])
    assert run_pipeline(source.write(Discard())) == out(*range(6))
    assert read_journal(journal) == [4, 0, 2, 5, 3, 1]


def test_only_indices_that_are_to_run_are_asked_to_be_grouped(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    pipeline = RecordsQuestions(6, str(answers)).write(Discard())
    run_pipeline(pipeline, indices=[1, 4])
    assert answers.read_text() == "[1, 4]"
    run_pipeline(pipeline, indices=[5, 4, 0])
    assert answers.read_text() == "[0, 5]"


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([[0, 1]], "leaves out index 2"),
        ([[0, 1], [2, 3, 4]], "index 4, which is not to be run"),
        ([[0, 1], [1, 2, 3]], "index more than once"),
        ([0, 1, 2, 3], "Groups.partition_indices"),
        ([["0", "1"], ["2", "3"]], "Groups.partition_indices"),
    ],
)
def test_groups_that_are_none_are_refused(groups: Any, complaint: str, journal: str) -> None:
    pipeline = Groups(4, journal, groups).write(Discard())
    with pytest.raises(PartitionError, match=complaint) as refused:
        run_pipeline(pipeline)
    assert "\n" not in str(refused.value)
    assert read_journal(journal) == []


def test_groups_that_come_lazily_run_whole() -> None:
    assert run_pipeline(LazyGroups(6).write(Discard())) == out(*range(6))


# --- output that is gone ----------------------------------------------------------------------


class Knowing(WriteText):
    """Notices, when it gets ready, which of its files are gone."""

    def prepare(self, pipeline: Pipeline[Any]) -> None:
        for index in pipeline.completed_indices:
            if not Path(self.output_dir, f"{index}.txt").exists():
                pipeline.reset_index(index)


@on_every_backend
def test_a_sink_can_have_completed_indices_run_again_whose_output_is_gone(
    backend: str, journal: str
) -> None:
    def pipeline() -> Pipeline[int]:
        return Pipeline(Journal(4, journal), sink=Knowing("out"), resume=True)

    paths = run_pipeline(pipeline(), jobs(backend), backend)
    for index in (1, 3):
        Path(f"out/{index}.txt").unlink()
    session = Session(pipeline(), n_jobs=jobs(backend), backend=backend)
    summary = session.run()
    assert (summary.completed, summary.cached) == (2, 2)
    assert session.results() == paths
    assert sorted(read_journal(journal)[4:]) == [1, 3]
    assert all(Path(path).exists() for [path] in paths)


def test_a_sink_is_asked_too_where_one_index_is(journal: str) -> None:
    first = Pipeline(Journal(2, journal), sink=Knowing("out"), resume=True)
    paths = list(first)
    Path("out/1.txt").unlink()
    again = Pipeline(Journal(2, journal), sink=Knowing("out"), resume=True)
    assert list(again) == paths
    assert read_journal(journal) == [0, 1, 1]


class CannotGetReady(Discard):
    def prepare(self, pipeline: Pipeline[Any]) -> None:
        if Path("gone").exists():
            raise OSError("the output is gone")


def test_a_sink_that_cannot_get_ready_fails_an_index_that_is_on_record() -> None:
    assert Pipeline(Numbers(1), sink=CannotGetReady(), resume=True)[0] == out(0)[0]
    Path("gone").touch()
    again = Pipeline(Numbers(1), sink=CannotGetReady(), resume=True)
    with pytest.raises(OSError, match="the output is gone"):
        _ = again[0]
    assert again.completed_indices == {0}


# --- indices that move ------------------------------------------------------------------------


class Named(FilesIn):
    """Says which file an index is."""

    def index_name(self, index: int) -> str | None:
        return sorted(os.listdir(self.directory))[index]


@on_every_backend
def test_a_run_is_not_resumed_where_completed_indices_have_moved(backend: str) -> None:
    def run() -> list[list[str]]:
        return run_pipeline(
            Pipeline(Named("in"), sink=WriteText("out"), resume=True), jobs(backend), backend
        )

    Path("in").mkdir()
    for name in ("b", "c"):
        Path("in", name).touch()
    assert run() == [["out/0.txt"], ["out/1.txt"]]
    Path("in/d").touch()
    assert len(run()) == 3
    Path("in/a").touch()
    with pytest.raises(SourceError, match=r"index 0 is a now, and was b when .* psnc reset") as no:
        run()
    assert "\n" not in str(no.value)
    pipeline = Pipeline(Named("in"), sink=WriteText("out"), resume=True)
    with pytest.raises(SourceError, match="index 0 is a now"):
        _ = pipeline[3]
    assert pipeline.completed_indices == {0, 1, 2}
    pipeline.reset()
    assert len(pipeline[3]) == 1


def test_a_name_that_is_no_text_fails_its_index() -> None:
    class Odd(Numbers):
        def index_name(self, index: int) -> Any:
            return index

    pipeline = Pipeline(Odd(1), sink=Discard())
    assert run_pipeline(pipeline) == [[]]
    assert "index_name of Odd returned int" in pipeline.failed_indices[0]


# --- side by side -----------------------------------------------------------------------------


def test_two_runs_of_one_configuration_at_once_share_a_database(tmp_path: Path) -> None:
    def run(indices: range) -> None:
        pipeline = numbers_pipeline(200, resume=True, db_dir=tmp_path)
        results.append(run_pipeline(pipeline, indices=indices))

    results: list[list[list[str]]] = []
    threads = [threading.Thread(target=run, args=(r,)) for r in (range(90), range(90, 200))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [out(*range(90)), out(*range(90, 200))]
    again = numbers_pipeline(200, resume=True, db_dir=tmp_path)
    assert again.completed_indices == set(range(200))


def test_one_index_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"indices=3: give a list or a range"):
        run_pipeline(numbers_pipeline(4), indices=3)  # type: ignore[arg-type]


# --- batches that take longer than expected ---------------------------------------------------


class SlowAfter(Filter[int, int]):
    """Is instant for the first items and takes its time with all others."""

    def __init__(self, first_slow: int, seconds: float) -> None:
        self.first_slow = first_slow
        self.seconds = seconds

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item >= self.first_slow:
                time.sleep(self.seconds)
            yield item


def handed_back(pipeline: Pipeline[Any], group_ends: frozenset[int] | None) -> list[int]:
    """Return which of a batch of all indices a worker does before it hands it back."""
    run = Run(pipeline, plugin_manager())
    run.open_store(create=True)
    task = WorkerTask(run, stop_on_error=False, group_ends=group_ends)
    done = [record.index for record in task(range(len(pipeline))).records]
    run.close()
    return done


def test_a_batch_that_takes_long_is_handed_back_unfinished() -> None:
    pipeline = Numbers(60).filter(SlowAfter(20, 0.1)).write(Discard())
    done = handed_back(pipeline, None)
    # Two of the slow ones take as long as two batches should.
    assert done == list(range(len(done)))
    assert 1 <= len(done) <= 22


def test_a_group_is_not_handed_back_half_done() -> None:
    pipeline = Numbers(60).filter(SlowAfter(0, 0.1)).write(Discard())
    assert handed_back(pipeline, frozenset(range(3, 60, 4))) == [0, 1, 2, 3]


@on_every_backend
def test_what_was_handed_back_is_done_all_the_same(backend: str, journal: str) -> None:
    # The first are so fast that all of the slow ones are one batch.
    pipeline = Journal(300, journal).filter(SlowAfter(270, 0.05)).write(Discard())
    assert run_pipeline(pipeline, jobs(backend), backend) == out(*range(300))
    assert sorted(read_journal(journal)) == list(range(300))


@on_every_backend
def test_groups_run_whole_and_in_one_worker_however_long_they_take(backend: str) -> None:
    pipeline = Pairs(40).filter(SlowAfter(20, 0.05)).write(Discard())
    assert run_pipeline(pipeline, jobs(backend), backend) == out(*range(40))
    store = pipeline.__dict__["_run"].store
    rows = store.read("SELECT idx / 2, count(DISTINCT worker_id) FROM index_results GROUP BY 1")
    assert {count for _, count in rows[0]} == {1}


class CircularError(Filter[int, int]):
    """Raises errors that are each other's cause."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            first, second = ValueError(f"first {item}"), ValueError("second")
            first.__cause__, second.__cause__ = second, first
            raise first
        yield 0


@on_every_backend
def test_errors_that_are_each_others_cause_do_not_hang_the_run(backend: str) -> None:
    pipeline = Numbers(3).filter(CircularError()).write(Discard())
    assert run_pipeline(pipeline, jobs(backend), backend) == [[], [], []]
    assert pipeline.failed_indices == {i: f"ValueError: first {i}" for i in range(3)}
