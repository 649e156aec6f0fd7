"""What is recorded stays recorded, whatever runs beside it or afterwards."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from stages_for_tests import Discard, Double, Journal, Numbers, numbers_pipeline, read_journal

from psnc import Filter, Pipeline, PipelineError, Sink, StoreError, hookimpl, run_pipeline
from psnc.config import Config
from psnc.manager import PluginManager, activated


class FailsLate(Filter[int, int]):
    """Lets another attempt complete the index in the meantime, and then fails."""

    def __init__(self, db_dir: str) -> None:
        self.db_dir = db_dir

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        database = next(Path(self.db_dir).glob("*.db"))
        if not os.path.exists(f"{self.db_dir}/other"):
            Path(self.db_dir, "other").touch()
            other = Pipeline(
                Numbers(1), [FailsLate(self.db_dir)], Discard(), resume=True, db_dir=self.db_dir
            )
            assert other.db_path == database
            other[0]
            raise OSError("the file system is away")
        return items


def test_a_failed_attempt_does_not_take_the_place_of_a_completed_one(tmp_path: Path) -> None:
    pipeline = Pipeline(
        Numbers(1), [FailsLate(str(tmp_path))], Discard(), resume=True, db_dir=tmp_path
    )
    run_pipeline(pipeline)
    assert pipeline.completed_indices == {0}
    assert pipeline.failed_indices == {}
    assert pipeline.output_paths_for_index(0) == ["out/0-0.bin"]


def test_an_index_that_was_recorded_before_its_worker_died_stays_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies_afterwards.py").write_text(
        textwrap.dedent(
            """
            import os
            from psnc import hookimpl

            @hookimpl(trylast=True)
            def psnc_index_done(context, record):
                # Later than the checkpoint's own, which was registered earlier.
                if record.index == 1:
                    context.run.store.flush()
                    os._exit(9)
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    manager = PluginManager(Config(plugins=("dies_afterwards",)))
    manager.load()
    pipeline = numbers_pipeline(4)
    with activated(manager):
        results = run_pipeline(pipeline, 1, "process_pool")
    assert results == [[f"out/{index}-0.bin"] for index in range(4)]
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert pipeline.failed_indices == {}


def test_resume_false_after_resume_true_begins_afresh(journal: str, tmp_path: Path) -> None:
    pipeline = Pipeline(Journal(3, journal), [], Discard(), db_dir=tmp_path)
    run_pipeline(pipeline, resume=True)
    stable = pipeline.db_path
    run_pipeline(pipeline, resume=False)
    assert pipeline.db_path != stable
    assert read_journal(journal) == [0, 1, 2] * 2
    run_pipeline(pipeline, resume=True)
    assert pipeline.db_path == stable
    assert read_journal(journal) == [0, 1, 2] * 2


def test_another_db_dir_counts_for_one_run(journal: str, tmp_path: Path) -> None:
    pipeline = Pipeline(Journal(2, journal), [], Discard(), db_dir=tmp_path / "own")
    run_pipeline(pipeline, db_dir=tmp_path / "other")
    assert pipeline.db_path.parent == tmp_path / "other"
    run_pipeline(pipeline)
    assert pipeline.db_path.parent == tmp_path / "own"


def test_a_given_db_dir_counts_though_the_pipeline_names_a_file(tmp_path: Path) -> None:
    pipeline = numbers_pipeline(2, db_file=tmp_path / "own.db")
    run_pipeline(pipeline, db_dir=tmp_path / "other")
    assert pipeline.db_path.parent == tmp_path / "other"
    assert not (tmp_path / "own.db").exists()


class Factor(Filter[int, int]):
    """Stateful: its shard is its factor."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        return items

    def flush(self, path: Path) -> None:
        path.write_text(str(self.factor))


def test_configurations_that_share_a_database_keep_their_own_shards(tmp_path: Path) -> None:
    shards = []
    for factor in (1, 100):
        pipeline = Pipeline(Numbers(1), [Factor(factor)], Discard(), db_file=tmp_path / "all.db")
        run_pipeline(pipeline)
        shards.append(Path(pipeline.filter_artifacts_for_index(0)[0]["path"]))
    assert [shard.read_text() for shard in shards] == ["1", "100"]


def test_threads_that_fork_at_once_do_not_wait_for_each_other(run_python: Any) -> None:
    code = """
        import os, threading, time
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(10)
        pipeline[0]
        stop = time.monotonic() + 2
        def fork():
            while time.monotonic() < stop:
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
        def ask():
            while time.monotonic() < stop:
                pipeline.completed_indices
        threads = [threading.Thread(target=each) for each in (fork, fork, fork, ask)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipeline[1]
        print(sorted(pipeline.completed_indices))
    """
    assert run_python("-c", textwrap.dedent(code), timeout=40).stdout == "[0, 1]\n"


def test_a_pipeline_that_is_running_is_not_run_in_another_thread_too(tmp_path: Path) -> None:
    class RunsItself(Sink[Any]):
        pipeline: ClassVar[Pipeline[Any]]

        def __call__(self, items: Iterator[Any], index: int) -> list[str]:
            list(items)
            with pytest.raises(PipelineError, match="running in another thread already"):
                run_pipeline(self.pipeline)
            return [f"{index}"]

    pipeline = RunsItself.pipeline = Numbers(2).write(RunsItself())
    assert run_pipeline(pipeline) == [["0"], ["1"]]
    assert pipeline.completed_indices == {0, 1}
    assert run_pipeline(pipeline) == [["0"], ["1"]]  # afterwards it may


def test_remaining_agrees_when_the_source_has_shrunk(tmp_path: Path) -> None:
    class Files(Numbers):
        def __len__(self) -> int:
            return 5 if (tmp_path / "shrunk").exists() else 10

    pipeline = Pipeline(Files(0), [Double()], Discard(), resume=True, db_dir=tmp_path)
    run_pipeline(pipeline, indices=[1, 7, 8, 9])
    (tmp_path / "shrunk").touch()
    summary = pipeline.summary()
    assert (summary["total"], summary["completed"], summary["remaining"]) == (5, 1, 4)
    assert pipeline.remaining_indices() == [0, 2, 3, 4]


def test_a_result_that_cannot_be_recorded_leaves_logging_as_it_was(
    plugins: PluginManager,
) -> None:
    class Full:
        @hookimpl(tryfirst=True)
        def psnc_index_done(self) -> None:
            raise StoreError("the store is full")

    plugins.register(Full())
    root = logging.getLogger()
    before = list(root.handlers), root.level
    with pytest.raises(StoreError, match="the store is full"):
        _ = numbers_pipeline(2)[0]
    assert (list(root.handlers), root.level) == before


def test_threads_that_begin_at_once_share_one_plugin_manager(run_python: Any) -> None:
    code = """
        import threading
        from psnc.manager import plugin_manager
        barrier, seen = threading.Barrier(8), []
        def first_use():
            barrier.wait()
            seen.append(id(plugin_manager()))
        threads = [threading.Thread(target=first_use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(set(seen)))
    """
    assert run_python("-c", textwrap.dedent(code)).stdout == "1\n"
