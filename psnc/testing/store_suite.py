"""The rules of a checkpoint store, as tests that every store can run."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import attrs
import pytest

from psnc import driver_claim
from psnc.claims import Claim
from psnc.code_versions import code_version
from psnc.config import Config
from psnc.errors import DriverConflictError, StoreError
from psnc.manager import PluginManager, activated
from psnc.pipeline import Pipeline
from psnc.processes import own_process
from psnc.records import ArtifactRecord, IndexRecord, OutputFacts, StageRecord, utc_timestamp
from psnc.run import Run
from psnc.session import run_pipeline
from psnc.store import CheckpointStore, RecordedFile, open_store
from psnc.testing.store_workplace import (
    LARGE,
    SPAWN,
    FailOn,
    Log,
    OpenedStores,
    StoreWorkplace,
    Sum,
    a_claim,
    a_log,
    a_worker,
    completed,
    contents,
    failed,
    fork_among_threads,
    fork_while_recording,
    in_another_process,
    messages,
    paths_of,
    record_as_told,
    run_one_by_one,
    wait_until,
    without_id,
)

__all__ = ["StoreSuite"]


class StoreSuite:
    """The rules of a checkpoint store as tests, for a store to inherit.

    Derive a test class, and say in a fixture ``store_url``, there or in ``conftest.py``, where a
    store is::

        # test_my_store.py
        import pytest
        from psnc.testing import StoreSuite

        class TestMyStore(StoreSuite):
            @pytest.fixture
            def store_url(self, tmp_path):
                return f"mystore://{tmp_path}"

    Each test calls for a place of its own, in which nothing is recorded yet. The plugin that opens
    the store is found as any other, by its entry point; one that is not installed is named in
    :attr:`plugins`. Tests start processes, which have to find it too.

    Everything is tested by what psnc and its users call: pipelines, and the methods of
    :class:`psnc.store.CheckpointStore`. A test that fails names the rule that the store breaks.
    For assertions that show what they compare, have pytest know this module before it is imported,
    in ``conftest.py``::

        pytest.register_assert_rewrite("psnc.testing.store_suite")

    Attributes
    ----------
    holds_many_runs : bool
        Whether one URL is the place of many runs, as that of a database server is. The path of a
        file names one run, and pipelines that are told to begin afresh share it.
    keeps_claims : bool
        Whether it keeps the claims of drivers, which is optional: one that does not refuses no
        second driver.
    plugins : tuple of str
        Plugins to load besides the installed ones, as ``-p`` takes them.
    keeps_code : bool
        Whether the store keeps which code each index ran with.
    """

    holds_many_runs: ClassVar[bool] = True
    keeps_claims: ClassVar[bool] = True
    plugins: ClassVar[tuple[str, ...]] = ()
    keeps_code: ClassVar[bool] = True

    # --- fixtures -----------------------------------------------------------------------------

    @pytest.fixture
    def workplace(
        self, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[StoreWorkplace]:
        """Work in a directory of one's own, and close all stores in the end."""
        monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        opened = OpenedStores()
        manager = PluginManager(Config(plugins=self.plugins))
        manager.load()
        manager.register(opened, name="opened-stores")
        with activated(manager):
            yield StoreWorkplace(store_url, manager)
        for store in opened.stores:
            # A test may have left something that cannot be written any more.
            with contextlib.suppress(StoreError):
                store.close()
        manager.close()

    @pytest.fixture
    def pipeline(self, workplace: StoreWorkplace) -> Pipeline[Any]:
        """Return a pipeline of ten indices."""
        return workplace.pipeline()

    @pytest.fixture
    def store(self, workplace: StoreWorkplace, pipeline: Pipeline[Any]) -> CheckpointStore:
        """Return a store that has begun to record that pipeline."""
        return workplace.open(pipeline)

    @pytest.fixture
    def other(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any], store: CheckpointStore
    ) -> CheckpointStore:
        """Return a second store on the same run, as another process has one."""
        return workplace.open(pickle.loads(pickle.dumps(pipeline)), create=False)

    # --- which run ----------------------------------------------------------------------------

    def test_a_store_that_is_not_there_is_refused_unless_it_may_be_made(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any]
    ) -> None:
        for _ in range(2):  # looking does not make one
            with pytest.raises(StoreError) as caught:
                workplace.open(pipeline, create=False)
            assert "\n" not in str(caught.value)
        workplace.open(pipeline)
        assert len(workplace.open(pipeline, create=False).runs()) == 1

    def test_a_run_is_described(self, store: CheckpointStore, pipeline: Pipeline[Any]) -> None:
        (row,) = store.runs()
        assert isinstance(row.run_id, int)
        assert row.config_hash == pipeline.config_hash
        assert row.config_json == pipeline.config_json
        assert datetime.fromisoformat(row.started_at).utcoffset() is not None
        assert row.run_dir == os.getcwd()
        assert row.total_indices == 10

    def test_a_resumed_pipeline_finds_the_run_of_its_configuration(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        store.record(completed(3))
        store.flush()
        again = workplace.open(workplace.pipeline())
        assert again.completed_indices() == {3}
        assert len(again.runs()) == 1

    def test_a_pipeline_that_begins_afresh_has_a_run_of_its_own_where_there_can_be_many(
        self, workplace: StoreWorkplace
    ) -> None:
        first, second = (workplace.open(workplace.pipeline(resume=False)) for _ in range(2))
        first.record(completed(3))
        first.flush()
        expected: set[int] = set() if self.holds_many_runs else {3}
        assert second.completed_indices() == expected
        assert len(second.runs()) == (2 if self.holds_many_runs else 1)

    def test_where_a_run_was_recorded_matters_to_whoever_goes_on_with_it(
        self, workplace: StoreWorkplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def go_to(name: str) -> None:
            (tmp_path / name).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / name)

        go_to("here")
        run_pipeline(workplace.pipeline(journal="journal", resume=False), indices=[0])
        go_to("there")
        if self.holds_many_runs:
            fresh = workplace.pipeline(journal="journal", resume=False)
            run_pipeline(fresh, indices=[0])
            assert fresh.completed_indices == {0}
            go_to("here")
        with pytest.raises(StoreError, match="relative path"):
            workplace.pipeline(journal="journal").summary()

    def test_a_resumed_pipeline_finds_the_latest_of_several_runs(
        self, workplace: StoreWorkplace
    ) -> None:
        stores = [workplace.open(workplace.pipeline(resume=False)) for _ in range(3)]
        for index, store in enumerate(stores):
            store.record(completed(index))
            store.flush()
        expected = {2} if self.holds_many_runs else {0, 1, 2}
        assert workplace.open(workplace.pipeline()).completed_indices() == expected

    @pytest.mark.parametrize("resume", [False, True])
    def test_copies_of_a_pipeline_share_its_run(
        self, workplace: StoreWorkplace, resume: bool
    ) -> None:
        pipeline = workplace.pipeline(resume=resume)
        store = workplace.open(pipeline)
        copy = workplace.open(pickle.loads(pickle.dumps(pipeline)), create=False)
        copy.record(completed(4))
        copy.flush()
        assert store.completed_indices() == {4}
        assert len(store.runs()) == 1

    def test_a_pipeline_object_keeps_its_run(self, workplace: StoreWorkplace) -> None:
        pipeline = workplace.pipeline(resume=False)
        store = workplace.open(pipeline)
        store.record(completed(1))
        store.close()
        assert workplace.open(pipeline).completed_indices() == {1}

    def test_another_configuration_has_a_run_of_its_own(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        store.record(completed(1))
        another = workplace.open(workplace.pipeline(20))
        another.record(completed(2))
        another.flush()
        store.flush()
        assert store.completed_indices() == {1}
        assert another.completed_indices() == {2}
        assert [row.total_indices for row in store.runs()] == [10, 20]

    def test_the_run_says_how_long_the_source_was_when_it_last_ran(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any], store: CheckpointStore
    ) -> None:
        longer = workplace.pipeline()
        object.__setattr__(longer.source, "count", 12)
        assert longer.config_hash == pipeline.config_hash
        workplace.open(longer)
        assert [row.total_indices for row in store.runs()] == [12]

    def test_one_can_look_at_every_run(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        store.record(completed(1))
        store.flush()
        another = workplace.open(workplace.pipeline(20))
        another.record(failed(2))
        another.flush()
        looking = open_store(workplace.url)
        assert looking is not None
        with pytest.raises(StoreError):
            looking.completed_indices()
        seen = []
        for row in looking.runs():
            looking.select(row.run_id)
            seen.append((looking.completed_indices(), set(looking.failed_indices())))
        looking.close()
        assert seen == [({1}, set()), (set(), {2})]

    def test_processes_that_begin_at_once_begin_one_run(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any]
    ) -> None:
        with ProcessPoolExecutor(4, mp_context=SPAWN) as pool:
            paths = list(pool.map(pipeline.__getitem__, range(4)))
        assert paths == [paths_of(index) for index in range(4)]
        assert pipeline.completed_indices == {0, 1, 2, 3}
        assert len(workplace.open(pipeline).runs()) == 1

    # --- recording ----------------------------------------------------------------------------

    def test_everything_of_a_completed_index_is_recorded(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        record = completed(5)
        store.record(record)
        store.flush()
        assert other.lookup(5) == record.output_paths
        assert other.output_paths(5) == list(record.output_paths)
        assert other.completed_outputs() == {5: list(record.output_paths)}
        assert other.artifacts() == {
            5: [{"path": "sums/5.txt", "filter_name": "Sum", "filter_order": 1}]
        }
        assert list(other.stage_rows()) == [
            (5, 0, "Numbers", 100),
            (5, 1, "Sum", 205),
            (5, 2, "TwoPaths", 300),
        ]
        (row,) = other.index_rows()
        assert (row.index, row.status, row.error) == (5, "completed", None)
        assert (row.completed_at, row.wall_time_ns) == (record.completed_at, record.wall_time_ns)
        assert (row.peak_memory_bytes, row.gpu_memory_bytes) == (2**30 + 5, 5)

    def test_log_entries_are_recorded(self, store: CheckpointStore, other: CheckpointStore) -> None:
        record = completed(5)
        store.record(record)
        store.flush()
        assert record.worker is not None
        expected = [
            {**attrs.asdict(log), "worker_id": record.worker.worker_id, "idx": 5}
            for log in record.logs
        ]
        assert [without_id(entry) for entry in other.logs(5)] == expected
        assert [without_id(entry) for entry in other.logs()] == expected
        assert other.logs(4) == []

    def test_everything_of_a_failed_index_is_recorded(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        store.record(failed(5, "ValueError: no"))
        store.flush()
        assert other.failed_indices() == {5: "ValueError: no"}
        assert other.completed_indices() == set()
        assert other.completed_outputs() == {}
        assert other.lookup(5) is None
        assert other.output_paths(5) == []
        (row,) = other.index_rows()
        assert (row.status, row.error) == ("error", "ValueError: no")
        assert (row.peak_memory_bytes, row.gpu_memory_bytes) == (None, None)
        assert messages(other, 5) == ["index 5 failed"]

    def test_attempts_are_counted_until_the_index_is_reset(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        def attempts() -> list[int | None]:
            store.flush()
            return [row.attempts for row in other.index_rows()]

        store.record(failed(5, "ValueError: no"))
        assert attempts() == [1]
        store.record(failed(5, "ValueError: no"))
        store.record(completed(6))
        assert attempts() == [2, 1]
        store.record(completed(5))
        assert attempts() == [3, 1]
        store.reset_index(5)
        store.record(completed(5))
        assert attempts() == [1, 1]

    def test_which_code_ran_is_recorded(
        self, pipeline: Pipeline[Any], store: CheckpointStore, other: CheckpointStore
    ) -> None:
        if not self.keeps_code:
            assert (store.code_versions(), store.other_code("0" * 16)) == ({}, [])
            return
        own = code_version(pipeline)
        assert store.code_versions() == {own.digest: own}
        for index, digest in ((5, own.digest), (3, own.digest), (4, "0" * 16), (6, None)):
            store.record(attrs.evolve(completed(index), code_digest=digest))
        store.record(attrs.evolve(failed(7), code_digest=own.digest))
        store.flush()
        assert other.other_code(own.digest) == ["0" * 16]
        assert other.other_code("0" * 16) == [own.digest]
        assert other.other_code("f" * 16) == sorted(["0" * 16, own.digest])
        assert other.indices_of_code(own.digest) == [3, 5]
        assert other.indices_of_code("f" * 16) == []

    def test_an_index_of_which_little_is_known_is_recorded(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        # As the driver records what a worker died over, and what a sink wrote nothing for.
        store.record(IndexRecord(1, "error", error="WorkerDiedError: killed"))
        store.record(IndexRecord(2, "completed"))
        store.flush()
        assert other.failed_indices() == {1: "WorkerDiedError: killed"}
        assert other.completed_outputs() == {2: []}
        assert other.lookup(2) == ()
        assert other.workers() == []

    def test_output_paths_keep_the_order_of_the_sink(self, store: CheckpointStore) -> None:
        paths = [f"{number * 7919 % 1000:03}" for number in range(1000)] + ["twice", "twice"]
        store.record(completed(0, output_paths=tuple(paths)))
        assert store.lookup(0) == tuple(paths)
        store.flush()
        assert store.lookup(0) == tuple(paths)
        assert store.output_paths(0) == paths
        assert store.completed_outputs() == {0: paths}

    def test_a_completed_index_is_found_before_it_is_flushed(self, store: CheckpointStore) -> None:
        assert store.lookup(5) is None
        store.record(completed(5))
        store.record(failed(6))
        assert store.lookup(5) == tuple(paths_of(5))
        assert store.lookup(6) is None
        store.flush()
        assert store.lookup(5) == tuple(paths_of(5))
        assert store.lookup(6) is None

    def test_what_is_flushed_is_there_for_others(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for index in range(100):
            store.record(completed(index))
            store.flush()
            assert other.lookup(index) == tuple(paths_of(index))
        assert contents(other) == contents(store)

    def test_with_durability_by_index_a_record_is_there_when_it_is_made(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any], other: CheckpointStore
    ) -> None:
        for durability in ("index", "full"):
            manager = PluginManager(Config(plugins=self.plugins, durability=durability))
            manager.load()
            run = Run(pipeline, manager)
            run.open_store(create=False)
            assert run.store is not None
            for index in range(3):
                other.reset_index(index)
                run.store.record(completed(index))
                assert other.lookup(index) == tuple(paths_of(index))
            run.close()
            manager.close()

    # --- recording again ----------------------------------------------------------------------

    @pytest.mark.parametrize("flushed", [False, True])
    def test_a_completion_takes_the_place_of_an_error(
        self, store: CheckpointStore, other: CheckpointStore, flushed: bool
    ) -> None:
        store.record(failed(5, logs=(a_log("first"),)))
        if flushed:
            store.flush()
        store.record(completed(5, logs=(a_log("second", 1),)))
        store.flush()
        for each in (store, other):
            assert each.failed_indices() == {}
            assert each.completed_outputs() == {5: paths_of(5)}
            assert len(list(each.stage_rows())) == 3
            assert [row.error for row in each.index_rows()] == [None]
            # What the attempts said is kept.
            assert messages(each, 5) == ["first", "second"]

    @pytest.mark.parametrize("flushed", [False, True])
    def test_an_error_does_not_take_the_place_of_a_completion(
        self, store: CheckpointStore, other: CheckpointStore, flushed: bool
    ) -> None:
        store.record(completed(5, logs=(a_log("first"),)))
        if flushed:
            store.flush()
        store.record(failed(5, logs=(a_log("second", 1),)))
        assert store.lookup(5) == tuple(paths_of(5))
        store.flush()
        for each in (store, other):
            assert each.failed_indices() == {}
            assert each.completed_outputs() == {5: paths_of(5)}
            assert len(list(each.stage_rows())) == 3
            assert each.artifacts().keys() == {5}
            assert messages(each, 5) == ["first", "second"]

    def test_an_error_does_not_take_the_place_of_what_another_process_completed(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        other.record(completed(5, logs=()))
        other.flush()
        store.record(failed(5, logs=(a_log("too late"),)))
        store.record(failed(6))
        store.flush()
        assert other.completed_outputs() == {5: paths_of(5)}
        assert other.failed_indices().keys() == {6}
        assert messages(other, 5) == ["too late"]

    @pytest.mark.parametrize("flushed", [False, True])
    def test_an_index_that_completes_again_replaces_what_was_recorded_but_adds_its_log(
        self, store: CheckpointStore, other: CheckpointStore, flushed: bool
    ) -> None:
        store.record(completed(5, logs=(a_log("first"),)))
        if flushed:
            store.flush()
        again = completed(
            5,
            output_paths=("new",),
            stages=(StageRecord(0, "Other", 9),),
            artifacts=(ArtifactRecord("new.txt", "Other", 2),),
            logs=(a_log("second", 1),),
            measurements={},
        )
        store.record(again)
        store.flush()
        assert other.completed_outputs() == {5: ["new"]}
        assert other.index_for_path("out/5/a.bin") is None
        assert list(other.stage_rows()) == [(5, 0, "Other", 9)]
        assert [artifact["path"] for artifact in other.artifacts(5)[5]] == ["new.txt"]
        assert [row.peak_memory_bytes for row in other.index_rows()] == [None]
        assert messages(other, 5) == ["first", "second"]

    def test_the_same_record_twice_is_one_index(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        record = completed(5, logs=())
        for each in (store, other):
            each.record(record)
            each.flush()
        assert other.counts(10).completed == 1
        assert other.completed_outputs() == {5: paths_of(5)}
        assert len(list(other.stage_rows())) == 3
        assert len(other.artifacts(5)[5]) == 1

    # --- values of any kind -------------------------------------------------------------------

    @pytest.mark.parametrize(
        "text",
        [
            "plain",
            "",
            "two\nlines\r\n\tand a tab",
            "'; DROP TABLE logs; --",
            """ "double", 'single', `back`, $$ $1 ?, %s %% {} \\ and one at the end \\""",
            "Grüße, 東京, \u202eright to left, 🍲",
            "x" * 1_000_000,
        ],
        ids=["plain", "empty", "lines", "injection", "quotes", "unicode", "long"],
    )
    def test_text_of_any_kind_is_kept(
        self, store: CheckpointStore, other: CheckpointStore, text: str
    ) -> None:
        path = f"out/{text[:3000]}"
        store.record(
            completed(
                1,
                output_paths=(path,),
                artifacts=(ArtifactRecord(path, "Sum", 1),),
                logs=(a_log(text, logger_name=text[:100]),),
            )
        )
        store.record(failed(2, text))
        store.flush()
        assert other.lookup(1) == (path,)
        assert other.completed_outputs() == {1: [path]}
        assert other.index_for_path(path) == 1
        assert other.artifacts(1)[1][0]["path"] == path
        assert messages(other, 1) == [text]
        assert other.logs(1)[0]["logger_name"] == text[:100]
        assert other.failed_indices() == {2: text}

    def test_paths_as_long_as_a_file_system_takes_are_kept(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        # Of no pattern, which a store might shorten it by.
        path = "".join(random.Random(1).choices(string.ascii_letters, k=4096))
        store.record(
            completed(1, output_paths=(path,), artifacts=(ArtifactRecord(path, "Sum", 1),))
        )
        store.flush()
        assert other.lookup(1) == (path,)
        assert other.index_for_path(path) == 1
        assert other.index_for_path(path[:-1]) is None
        assert other.artifacts(1)[1][0]["path"] == path

    @pytest.mark.parametrize(
        "text", ["caf\udce9", "a\0b", "\ud800 and \0"], ids=["surrogate", "nul", "both"]
    )
    def test_text_that_is_no_unicode_does_not_keep_an_index_from_being_recorded(
        self, store: CheckpointStore, other: CheckpointStore, text: str
    ) -> None:
        log = a_log(f"said {text} here", logger_name=text)
        artifact = ArtifactRecord(f"{text}.txt", "Sum", 1)
        store.record(completed(1, output_paths=(text, "b"), artifacts=(artifact,), logs=(log,)))
        store.record(failed(2, f"OSError: {text} is missing"))
        store.flush()
        # A sink's paths are its results; all else may be shown with escapes.
        assert other.lookup(1) == (text, "b")
        assert other.output_paths(1) == [text, "b"]
        assert other.index_for_path(text) == 1
        assert len(other.artifacts(1)[1]) == 1
        (message,) = messages(other, 1)
        assert message.startswith("said ")
        assert message.endswith(" here")
        assert other.failed_indices()[2].startswith("OSError: ")

    def test_large_numbers_are_kept(self, store: CheckpointStore, other: CheckpointStore) -> None:
        large = 2**62 + 1
        index = 2**40
        store.record(
            completed(
                index,
                wall_time_ns=large,
                stages=(StageRecord(0, "Numbers", large),),
                measurements={"peak_memory_bytes": large, "gpu_memory_bytes": 2**63 - 1},
                worker=a_worker(pid=2**31),
            )
        )
        store.flush()
        (row,) = other.index_rows()
        assert (row.index, row.wall_time_ns) == (index, large)
        assert (row.peak_memory_bytes, row.gpu_memory_bytes) == (large, 2**63 - 1)
        assert list(other.stage_rows()) == [(index, 0, "Numbers", large)]
        assert other.lookup(index) == tuple(paths_of(index))
        assert [worker["pid"] for worker in other.workers()] == [2**31]

    def test_measurements_of_any_kind_do_not_disturb(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        odd = {
            "note": "a\0b \ud800 'x'",
            "list": [1, None, {"deep": 2.5}],
            "gpu_memory_bytes": None,
        }
        store.record(completed(1, measurements=odd))
        store.record(completed(2, measurements={}))
        store.flush()
        for row in other.index_rows():
            assert (row.peak_memory_bytes, row.gpu_memory_bytes) == (None, None)

    def test_what_the_source_called_completed_indices_comes_back(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        if type(store).index_names is CheckpointStore.index_names:
            pytest.skip("keeps no names")
        store.record(completed(1, measurements={"index_name": "a \udcff.txt", "watts": 7.5}))
        store.record(completed(2, measurements={"watts": 7.5}))
        store.record(completed(3, measurements={"index_name": "b"}))
        store.record(completed(4, measurements={"index_name": "c"}))
        store.flush()
        assert other.index_names() == {1: "a \udcff.txt", 3: "b", 4: "c"}
        store.reset_index(3)
        assert other.index_names() == {1: "a \udcff.txt", 4: "c"}

    def test_the_files_of_completed_indices_come_back(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for index in (4, 1, 3):
            store.record(completed(index))
        store.record(failed(2))
        store.flush()
        files = {index: list(each) for index, each in other.recorded_files(range(10))}
        assert list(files) == [1, 3, 4]
        for index, each in files.items():
            outputs = [file.path for file in each if not file.is_artifact]
            assert outputs == paths_of(index)
            made = [artifact["path"] for artifact in other.artifacts(index).get(index, [])]
            assert [file.path for file in each if file.is_artifact] == made
        assert [index for index, _ in other.recorded_files([2, 3, 9])] == [3]
        assert list(other.recorded_files([])) == []

    def test_what_files_were_as_their_index_ended_comes_back(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        if type(store).recorded_files is CheckpointStore.recorded_files:
            pytest.skip("keeps nothing of files but their paths")
        known = (OutputFacts(2**40), OutputFacts(0, "ab" * 32))
        odd, same = ("a \udcff.txt", "the same.txt"), ("the same.txt", "b.txt")
        store.record(completed(1, output_facts=known))
        store.record(completed(2, output_paths=odd, output_facts=known))
        store.record(completed(3, output_paths=same, output_facts=()))
        store.flush()
        found = {index: files[:2] for index, files in other.recorded_files(range(10))}
        first, second = known
        path, another = paths_of(1)
        assert found == {
            1: [RecordedFile(path, first), RecordedFile(another, second)],
            2: [RecordedFile(odd[0], first), RecordedFile(odd[1], second, is_shared=True)],
            3: [RecordedFile(same[0], is_shared=True), RecordedFile(same[1])],
        }
        # What they were at an earlier attempt does not count.
        store.record(completed(1, output_facts=()))
        store.flush()
        ((_, files),) = other.recorded_files([1])
        assert {file.facts for file in files} == {OutputFacts()}

    # --- forgetting ---------------------------------------------------------------------------

    def test_reset_forgets_everything_of_the_run(
        self, workplace: StoreWorkplace, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        another = workplace.open(workplace.pipeline(20))
        another.record(completed(7))
        another.flush()
        before = contents(another)
        store.record(completed(1))
        store.record(failed(2))
        store.flush()
        store.record(completed(3))  # not flushed
        store.reset()
        for each in (store, other):
            assert not any(contents(each).values())
            assert each.lookup(1) is None
            assert each.workers() == []
            assert len(each.runs()) == 2
        assert contents(another) == before

    def test_reset_index_forgets_one_index_with_its_log(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for index in range(3):
            store.record(completed(index))
        store.flush()
        store.reset_index(1)
        store.record(completed(1, logs=()))
        store.reset_index(2)
        store.flush()
        for each in (store, other):
            assert each.completed_outputs() == {0: paths_of(0), 1: paths_of(1)}
            assert each.lookup(2) is None
            assert each.index_for_path("out/2/a.bin") is None
            assert each.artifacts().keys() == {0, 1}
            assert {row[0] for row in each.stage_rows()} == {0, 1}
            assert messages(each, 0) != []
            assert messages(each, 1) == messages(each, 2) == []

    def test_reset_indices_forgets_them_and_no_others(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for index in range(6):
            store.record(completed(index))
        store.record(failed(7))
        store.flush()
        store.record(completed(6))  # not flushed
        store.reset_indices([0, 3, 4, 6, 7, 8])
        store.reset_indices([])
        for each in (store, other):
            assert each.completed_indices() == {1, 2, 5}
            assert each.failed_indices() == {}
            assert each.artifacts().keys() <= {1, 2, 5}
            assert [index for index, _ in each.recorded_files(range(10))] == [1, 2, 5]
            assert messages(each, 3) == []

    def test_what_was_forgotten_can_fail_and_complete_again(self, store: CheckpointStore) -> None:
        store.record(completed(1))
        store.reset_index(1)
        store.record(failed(1))
        store.flush()
        assert store.failed_indices().keys() == {1}
        store.reset()
        store.record(completed(1))
        store.flush()
        assert store.completed_indices() == {1}

    # --- questions ----------------------------------------------------------------------------

    def test_an_empty_run_has_an_answer_to_every_question(self, store: CheckpointStore) -> None:
        assert not any(contents(store).values())
        counts = store.counts(10)
        assert attrs.astuple(counts) == (0, 0, 0, 0, 0)
        assert store.workers() == []
        assert store.index_for_path("out/0/a.bin") is None
        assert store.output_paths(0) == []
        assert store.artifacts(0) == {}
        assert store.logs(0) == []
        assert store.lookup(0) is None

    def test_counts_are_of_the_indices_below_the_total(self, store: CheckpointStore) -> None:
        for index in (0, 1, 8):
            store.record(completed(index, wall_time_ns=10 + index))
        for index in (2, 9):
            store.record(failed(index, wall_time_ns=1000))
        store.flush()
        everything = store.counts(10)
        assert (everything.completed, everything.failed) == (3, 2)
        assert everything.wall_time_ns == 39
        assert everything.workers == 5
        fewer = store.counts(8)
        assert (fewer.completed, fewer.failed, fewer.wall_time_ns) == (2, 1, 21)

    def test_time_adds_up_from_the_first_to_the_last_sign_of_life(
        self, store: CheckpointStore
    ) -> None:
        now = time.time()
        for ago_s, invocation_id in ((100, "a"), (50, "a"), (1000, "b")):
            started_at = utc_timestamp(now - ago_s)
            worker = a_worker(started_at=started_at, invocation_id=invocation_id)
            store.record(completed(ago_s, worker=worker))
        store.flush()
        passed_s = time.time() - now
        assert 1100 <= store.counts(10).elapsed_s <= 1100 + 2 * passed_s + 0.001

    def test_failed_indices_are_sorted(self, store: CheckpointStore) -> None:
        for index in (10, 2, 33, 4):
            store.record(failed(index, f"ValueError: {index}"))
        store.flush()
        expected = [(index, f"ValueError: {index}") for index in (2, 4, 10, 33)]
        assert list(store.failed_indices().items()) == expected

    def test_rows_are_sorted_by_index(self, store: CheckpointStore) -> None:
        for index in (10, 2, 33, 4):
            store.record(completed(index))
        store.flush()
        assert [row.index for row in store.index_rows()] == [2, 4, 10, 33]
        expected = [(index, order) for index in (2, 4, 10, 33) for order in range(3)]
        assert [row[:2] for row in store.stage_rows()] == expected
        assert list(store.artifacts()) == [2, 4, 10, 33]

    def test_stage_totals_are_of_the_completed_indices(self, store: CheckpointStore) -> None:
        store.record(completed(1))
        store.record(completed(2))
        store.record(failed(3))
        store.flush()
        assert [attrs.astuple(each) for each in store.stage_totals()] == [
            (0, "Numbers", 2, 200, 100),
            (1, "Sum", 2, 403, 202),
            (2, "TwoPaths", 2, 600, 300),
        ]
        for each in store.stage_totals():
            assert type(each.wall_time_ns) is int

    def test_a_path_leads_to_the_lowest_of_its_indices(self, store: CheckpointStore) -> None:
        for index in (7, 3, 5):
            store.record(completed(index, output_paths=(f"own/{index}", "shared")))
        store.flush()
        assert store.index_for_path("shared") == 3
        assert store.index_for_path("own/5") == 5
        assert store.index_for_path("SHARED") is None
        assert store.index_for_path("share_") is None

    def test_a_path_of_another_run_leads_nowhere(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        another = workplace.open(workplace.pipeline(20))
        another.record(completed(1))
        another.flush()
        assert store.index_for_path("out/1/a.bin") is None

    def test_artifacts_are_by_index_and_in_the_order_of_the_filters(
        self, store: CheckpointStore
    ) -> None:
        files = [("b.txt", "Second", 2), ("z.txt", "First", 1), ("a.txt", "First", 1)]
        store.record(completed(4, artifacts=tuple(ArtifactRecord(*file) for file in files)))
        store.record(completed(2))
        store.flush()
        assert list(store.artifacts()) == [2, 4]
        assert store.artifacts(9) == {}
        (own,) = store.artifacts(4).values()
        assert [tuple(row.values()) for row in own] == [files[2], files[1], files[0]]
        assert list(own[0]) == ["path", "filter_name", "filter_order"]

    # --- workers ------------------------------------------------------------------------------

    def test_a_worker_is_described(self, store: CheckpointStore, other: CheckpointStore) -> None:
        worker = a_worker()
        store.index_started(worker, 3)
        store.flush()
        (row,) = other.workers()
        assert {name: row[name] for name in attrs.asdict(worker)} == attrs.asdict(worker)
        assert (row["current_index"], row["completed_count"]) == (3, 0)
        began = datetime.fromisoformat(row["last_heartbeat"])
        store.record(completed(3, worker=worker))
        store.record(failed(4, worker=worker))
        store.flush()
        (row,) = other.workers()
        assert (row["current_index"], row["completed_count"]) == (None, 1)
        assert datetime.fromisoformat(row["last_heartbeat"]) >= began

    def test_a_worker_that_stops_is_idle(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        worker = a_worker()
        store.index_started(worker, 3)
        store.flush()
        store.worker_idle(worker)
        store.flush()
        assert [row["current_index"] for row in other.workers()] == [None]

    def test_workers_are_listed_oldest_first(self, store: CheckpointStore) -> None:
        numbers = [5, 1, 4]
        for number in numbers:
            store.index_started(a_worker(number), number)
        store.flush()
        assert [row["current_index"] for row in store.workers()] == [1, 4, 5]

    def test_a_process_that_died_is_at_no_index(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for number, invocation_id in ((1, "a"), (2, "a"), (2, "b")):
            store.index_started(a_worker(number, invocation_id=invocation_id), number)
        store.worker_gone("a", 1002)
        rows = sorted((row["invocation_id"], row["current_index"] or 0) for row in other.workers())
        assert rows == [("a", 0), ("a", 1), ("b", 2)]

    def test_an_invocation_that_is_over_has_nobody_at_work(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for number, invocation_id in ((1, "a"), (2, "a"), (3, "b")):
            store.index_started(a_worker(number, invocation_id=invocation_id), number)
        store.invocation_over("a")
        rows = sorted((row["invocation_id"], row["current_index"] or 0) for row in other.workers())
        assert rows == [("a", 0), ("a", 0), ("b", 3)]

    # --- drivers ------------------------------------------------------------------------------

    def _kept(self, *claims: Claim) -> tuple[Claim, ...]:
        """Return what a store of this kind keeps of claims."""
        return claims if self.keeps_claims else ()

    def test_claims_are_kept_for_others_to_see(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        first, second = a_claim("first", beat=2**40), a_claim("second", hostname="Zürich", pid=2)
        assert store.claims() == ()
        store.change_claims(lambda claims: (*claims, first))
        other.change_claims(lambda claims: (*claims, second))
        assert store.claims() == other.claims() == self._kept(first, second)
        store.change_claims(lambda claims: claims[1:])
        assert other.claims() == self._kept(second)
        other.change_claims(lambda claims: ())
        assert store.claims() == ()

    def test_a_change_of_claims_that_fails_changes_nothing(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        def refuse(claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
            raise KeyError(len(claims))

        store.change_claims(lambda claims: (a_claim("first"),))
        with pytest.raises(KeyError) if self.keeps_claims else contextlib.nullcontext():
            other.change_claims(refuse)
        other.change_claims(lambda claims: claims)
        assert store.claims() == self._kept(a_claim("first"))

    def test_no_change_of_claims_is_lost(
        self, workplace: StoreWorkplace, pipeline: Pipeline[Any], store: CheckpointStore
    ) -> None:
        def add_and_take_away(driver: int) -> None:
            own = workplace.open(pickle.loads(pickle.dumps(pipeline)), create=False)
            for turn in range(25):
                claim = a_claim(f"{driver}-{turn}")
                gone = a_claim(f"{driver}-{turn - 1}")
                own.change_claims(partial(_replaced, gone, claim))
            own.close()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(add_and_take_away, range(4)))
        assert set(store.claims()) == set(self._kept(*(a_claim(f"{each}-24") for each in range(4))))

    def test_no_change_of_claims_comes_in_the_middle_of_another(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        def add(name: str, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
            return (*claims, a_claim(name))

        intruder = Thread(target=lambda: other.change_claims(partial(add, "second")))

        def add_first(claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
            if intruder.ident is None:
                intruder.start()
            # It has to wait until this change is made, and could be done by now otherwise.
            intruder.join(3.0)
            return add("first", claims)

        store.change_claims(add_first)
        if intruder.ident is not None:
            intruder.join()
        assert set(store.claims()) == set(self._kept(a_claim("first"), a_claim("second")))

    def test_each_run_has_claims_of_its_own_which_a_reset_keeps(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        another = workplace.open(workplace.pipeline(20))
        store.change_claims(lambda claims: (a_claim("first"),))
        assert another.claims() == ()
        another.change_claims(lambda claims: (a_claim("second"),))
        store.reset()
        assert store.claims() == self._kept(a_claim("first"))
        assert another.claims() == self._kept(a_claim("second"))

    def test_a_second_driver_is_refused_unless_it_runs_other_indices(
        self, workplace: StoreWorkplace, store: CheckpointStore
    ) -> None:
        living = attrs.asdict(own_process())
        holder = driver_claim.DriverClaim(store, "first", "3-5", "the run")
        driver_claim.at_work["first"] = holder
        try:
            claim = attrs.evolve(a_claim("first", indices="3-5"), **living)
            store.change_claims(lambda claims: (claim,))
            with (
                pytest.raises(DriverConflictError, match=f"process {os.getpid()} on ")
                if self.keeps_claims
                else contextlib.nullcontext()
            ):
                run_pipeline(workplace.pipeline())
            run_pipeline(workplace.pipeline(), indices=[0, 1, 2, 6, 7])
            assert store.claims() == self._kept(claim)
        finally:
            del driver_claim.at_work["first"]
        run_pipeline(workplace.pipeline())
        assert store.completed_indices() == set(range(10))
        assert store.claims() == ()

    def test_a_driver_shows_that_it_lives_and_notices_that_it_was_replaced(
        self, store: CheckpointStore, other: CheckpointStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver_claim, "BEAT_S", 0.01)

        def is_replaced() -> bool:
            try:
                claim.require()
            except DriverConflictError:
                return True
            return False

        claim = driver_claim.DriverClaim(store, "first", "all", "the run")
        with contextlib.suppress(DriverConflictError), claim:
            if not self.keeps_claims:
                return
            wait_until(lambda: other.claims()[0].beat > 1)
            other.change_claims(lambda claims: (a_claim("second"),))
            wait_until(is_replaced)
        assert other.claims() == (a_claim("second"),)

    # --- closing ------------------------------------------------------------------------------

    def test_closing_writes_what_waits(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        for index in range(20):
            store.record(completed(index))
        store.close()
        assert other.completed_indices() == set(range(20))

    def test_closing_twice_is_closing_once(self, store: CheckpointStore) -> None:
        store.record(completed(1))
        store.close()
        store.close()

    def test_a_closed_store_says_so(self, store: CheckpointStore) -> None:
        store.record(completed(1))
        store.close()
        calls: list[Callable[[], Any]] = [
            lambda: store.record(completed(2)),
            store.completed_indices,
            store.runs,
            lambda: store.lookup(1),
            store.reset,
        ]
        for call in calls:
            with pytest.raises(StoreError):
                call()

    # --- many at once -------------------------------------------------------------------------

    def test_eight_threads_at_once_lose_nothing(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        workers = [a_worker(number) for number in range(8)]

        def record(share: int) -> None:
            for index in range(share, 400, 8):
                store.index_started(workers[share], index)
                store.record(completed(index, worker=workers[share]))
                assert store.lookup(index) == tuple(paths_of(index))
                if index % 20 == share:
                    store.flush()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(record, range(8)))
        store.flush()
        assert other.completed_outputs() == {index: paths_of(index) for index in range(400)}
        assert len(list(other.stage_rows())) == 3 * 400
        assert len(other.logs()) == 3 * 400
        assert [row["completed_count"] for row in other.workers()] == [50] * 8

    def test_threads_of_two_stores_that_record_the_same_indices_lose_nothing(
        self, store: CheckpointStore, other: CheckpointStore
    ) -> None:
        def record(turn: int) -> None:
            mine = (store, other)[turn % 2]
            order = range(40) if turn % 2 else reversed(range(40))
            for index in order:
                mine.record((completed if turn < 2 else failed)(index, logs=()))
            mine.flush()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(record, range(4)))
        assert other.completed_outputs() == {index: paths_of(index) for index in range(40)}
        assert other.failed_indices() == {}
        assert len(list(other.stage_rows())) == 3 * 40

    @pytest.mark.parametrize("backend", ["sequential", "thread_pool", "process_pool"])
    def test_a_run_is_recorded_and_resumed(
        self, workplace: StoreWorkplace, tmp_path: Path, backend: str
    ) -> None:
        journal, mended = tmp_path / "journal", tmp_path / "mended"

        def make() -> Pipeline[Any]:
            filters = [Log(), Sum(), FailOn([3, 7], str(mended))]
            return workplace.pipeline(30, filters, journal=str(journal))

        def run() -> Pipeline[Any]:
            pipeline = make()
            run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)
            return pipeline

        pipeline = run()
        assert pipeline.completed_indices == set(range(30)) - {3, 7}
        expected = {index: f"ValueError: {index} is not wanted" for index in (3, 7)}
        assert pipeline.failed_indices == expected
        assert pipeline.remaining_indices() == []
        summary = pipeline.summary()
        assert (summary["completed"], summary["failed"], summary["total"]) == (28, 2, 30)

        mended.touch()
        pipeline = run()
        assert sorted([int(line) for line in journal.read_text().split()]) == sorted(
            [*range(30), 3, 7]
        )
        assert pipeline.completed_indices == set(range(30))
        assert pipeline.failed_indices == {}
        artifacts = pipeline.all_filter_artifacts()
        sums = [Path(artifact["path"]).read_text() for (artifact,) in artifacts.values()]
        assert sums == [str(index) for index in range(30)]
        assert pipeline.index_for_path("out/7/a.bin") == 7
        assert pipeline.output_paths_for_index(7) == paths_of(7)
        assert all(worker["current_index"] is None for worker in pipeline.active_workers)
        store = workplace.open(make())
        assert messages(store, 5).count("number 5") == 1
        assert messages(store, 7).count("number 7") == 2
        assert len(list(store.stage_rows())) == 5 * 30

    def test_somebody_elses_processes_lose_nothing(
        self, workplace: StoreWorkplace, tmp_path: Path
    ) -> None:
        for resume in (True, False):
            pipeline = workplace.pipeline(100, [Log()], resume=resume)
            with ProcessPoolExecutor(4, mp_context=SPAWN) as pool:
                paths = list(pool.map(pipeline.__getitem__, range(100)))
            assert paths == [paths_of(index) for index in range(100)]
            assert pipeline.completed_indices == set(range(100))
            assert pipeline.summary()["completed"] == 100
            store = workplace.open(pipeline)
            assert sorted(messages(store)) == sorted(f"number {index}" for index in range(100))
            store.reset()

    def test_forked_children_record_beside_their_parent(self, workplace: StoreWorkplace) -> None:
        pipeline = workplace.pipeline(140)
        codes, done = in_another_process(fork_while_recording, pipeline)
        assert codes == [0] * 4
        assert done == set(range(140))
        assert pipeline.completed_indices == set(range(140))

    def test_a_fork_among_threads_leaves_both_sides_working(
        self, workplace: StoreWorkplace
    ) -> None:
        pipeline = workplace.pipeline(205)
        codes, done = in_another_process(fork_among_threads, pipeline)
        assert codes == [0] * 5
        assert done == set(range(205))

    def test_an_index_that_another_process_records_is_there_whole_or_not_at_all(
        self, workplace: StoreWorkplace
    ) -> None:
        pipeline = workplace.pipeline(24)
        store = workplace.open(pipeline)

        def has_stages(index: int, count: int) -> bool:
            return sum(row[0] == index for row in store.stage_rows()) == count

        parts: dict[str, Callable[[int, int], bool]] = {
            "result": lambda index, count: len(store.lookup(index) or ()) == count,
            "log": lambda index, count: len(store.logs(index)) == count,
            "artifacts": lambda index, count: len(store.artifacts(index).get(index, ())) == count,
            "stages": has_stages,
        }
        # Whichever is written last, others were there before it; it is large, so as to take long.
        orders = itertools.cycle(itertools.permutations(parts, 2))
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=record_as_told, args=(pipeline, there))
        process.start()
        there.close()
        try:
            for index, (first, last) in zip(range(24), orders, strict=False):
                here.send((index, last))
                # Without a pause, so as to see the very moment.
                while not parts[first](index, 1):
                    if here.poll() or not process.is_alive():
                        assert parts[first](index, 1), f"index {index} lacks its {first}"
                assert parts[last](index, LARGE), f"index {index} has its {first} before its {last}"
                assert here.recv() == index
            here.send(None)
        finally:
            here.close()
            process.join()

    def test_a_process_that_is_killed_leaves_whole_indices(self, workplace: StoreWorkplace) -> None:
        pipeline = workplace.pipeline(100_000, [Log()])
        begin = 0
        for turn in range(5):
            told = self._kill_at(pipeline, begin, after=20 + 7 * turn)
            looking = workplace.open(pipeline)
            whole = self._settled(looking)
            recorded = looking.completed_indices()
            # What it had said to be done is there; of the index that it was at, all or nothing.
            assert recorded >= set(range(begin)) | told
            assert recorded == set(range(len(recorded)))
            assert whole["completed_outputs"] == {index: paths_of(index) for index in recorded}
            stages = [(index, order) for index in sorted(recorded) for order in range(3)]
            assert [row[:2] for row in whole["stage_rows"]] == stages
            said = sorted(entry["message"] for entry in whole["logs"])
            assert said == sorted(f"number {index}" for index in recorded)
            begin = len(recorded)
        results = run_pipeline(pipeline, indices=range(begin + 10))
        assert results == [paths_of(index) for index in range(begin + 10)]

    @staticmethod
    def _settled(store: CheckpointStore) -> dict[str, Any]:
        """Return what is there once a server has done the last that a killed process asked for."""
        before, now = None, contents(store)
        while now != before:
            time.sleep(0.1)
            before, now = now, contents(store)
        return now

    @staticmethod
    def _kill_at(pipeline: Pipeline[Any], begin: int, after: int) -> set[int]:
        """Run a pipeline in another process, kill that, and return what it said was done."""
        here, there = SPAWN.Pipe(duplex=False)
        indices = range(begin, len(pipeline))
        process = SPAWN.Process(target=run_one_by_one, args=(pipeline, indices, there))
        process.start()
        there.close()
        told = {here.recv() for _ in range(after)}
        process.kill()
        with contextlib.suppress(EOFError, OSError):
            while True:
                told.add(here.recv())
        here.close()
        process.join()
        return told


def _replaced(gone: Claim, new: Claim, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
    return (*(each for each in claims if each != gone), new)
