"""Runs, failures, crashes, resets, merges and salvage in any order, against a plain model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from damage import root_page, zero_page
from drivers import integrity
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lives import Nursery
from machine_pipeline import COUNT, error_of, outputs_of, pipeline_at
from trials import Many, Tried
from whole import said

from psnc import Pipeline, PipelineError, gather_pipeline, run_pipeline
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.merge import merge
from psnc.builtin.checkpoint.set_aside import recover_in_place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

INDICES = st.sets(st.integers(0, COUNT - 1))
SOME = st.sets(st.integers(0, COUNT - 1), min_size=1)


class Model:
    """What a database should hold."""

    def __init__(self) -> None:
        self.completed: set[int] = set()
        self.failed: set[int] = set()

    def left(self, indices: set[int]) -> list[int]:
        """Return which of the indices a run has to do, in its order."""
        return sorted(indices - self.completed)

    def take(self, ran: list[int], bad: set[int]) -> None:
        """Take over what became of indices that ran."""
        done = set(ran) - bad
        self.completed |= done
        self.failed = (self.failed - done) | (set(ran) & bad)

    def forget(self, index: int) -> None:
        self.completed.discard(index)
        self.failed.discard(index)

    def after(self, ran: list[int], bad: set[int]) -> tuple[set[int], set[int]]:
        """Return what would be completed and failed then."""
        then = Model()
        then.completed, then.failed = set(self.completed), set(self.failed)
        then.take(ran, bad)
        return then.completed, then.failed


class Machine(RuleBasedStateMachine):
    """A database that all sorts of things happen to."""

    def __init__(self, lives: Nursery, directory: Path, counts: dict[str, int]) -> None:
        super().__init__()
        self.lives = lives
        self.counts = counts
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        (self.directory / "tried").mkdir()
        self.models = {"run": Model(), "other": Model()}
        self.pipelines: dict[str, Pipeline[int]] = {}
        self.counts["examples"] += 1

    def teardown(self) -> None:
        self._close()
        shutil.rmtree(self.directory)

    def database(self, name: str) -> Path:
        return self.directory / f"{name}.db"

    def pipeline(self, name: str) -> Pipeline[int]:
        if name not in self.pipelines:
            self.pipelines[name] = pipeline_at(self.directory, name)
        return self.pipelines[name]

    def _close(self) -> None:
        for pipeline in self.pipelines.values():
            if "_run" in pipeline.__dict__:
                pipeline.__dict__["_run"].close()
        self.pipelines.clear()

    def _refuse(self, bad: set[int]) -> None:
        (self.directory / "bad.json").write_text(json.dumps(sorted(bad)))

    # --- what happens -------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["run", "run", "other"]),
        indices=INDICES,
        bad=INDICES,
        threads=st.booleans(),
    )
    def run(self, name: str, indices: set[int], bad: set[int], threads: bool) -> None:
        self._refuse(bad)
        model = self.models[name]
        expected = [
            outputs_of(index) if index in model.completed or index not in bad else []
            for index in sorted(indices)
        ]
        backend, jobs = ("thread_pool", 3) if threads else ("sequential", 1)
        results = run_pipeline(self.pipeline(name), jobs, backend, indices=sorted(indices))
        assert results == expected
        model.take(model.left(indices), bad)

    @rule(name=st.sampled_from(["run", "other"]))
    def retry_failed(self, name: str) -> None:
        self._refuse(set())
        model = self.models[name]
        pipeline = self.pipeline(name)
        run_pipeline(pipeline, indices=pipeline.failed_indices)
        model.take(sorted(model.failed), set())

    @rule(indices=SOME, bad=INDICES, share=st.floats(0, 1))
    def crash(self, indices: set[int], bad: set[int], share: float) -> None:
        self._refuse(bad)
        self._close()
        last = 1 + int(share * (250 + 70 * len(indices)))
        arguments = (str(self.directory), sorted(indices))
        life = self.lives.fork(self.directory, "run_some", *arguments, last=last)
        status = life.wait()
        assert status in (0, -signal.SIGKILL), said(self.directory)
        self.counts["crashes"] += status != 0
        self._adopt(self.models["run"], indices, bad, complete=status == 0)

    def _adopt(self, model: Model, indices: set[int], bad: set[int], *, complete: bool) -> None:
        """Find out how far a run came; it must have recorded its first indices and no others."""
        left = model.left(indices)
        pipeline = self.pipeline("run")
        found = pipeline.completed_indices, set(pipeline.failed_indices)
        for count in range(len(left) if complete else 0, len(left) + 1):
            if found == model.after(left[:count], bad):
                model.take(left[:count], bad)
                return
        raise AssertionError(f"{found} is not what a part of {left} comes to")

    @rule(name=st.sampled_from(["run", "other"]), index=st.integers(0, COUNT - 1))
    def reset_index(self, name: str, index: int) -> None:
        self.pipeline(name).reset_index(index)
        self.models[name].forget(index)

    @rule()
    def reset(self) -> None:
        self.pipeline("run").reset()
        self.models["run"] = Model()

    @rule()
    def begin_anew(self) -> None:
        self._close()

    @rule(name=st.sampled_from(["run", "other"]))
    def gather(self, name: str) -> None:
        completed = self.models[name].completed
        if not completed:
            with pytest.raises(PipelineError, match="no index"):
                gather_pipeline(self.pipeline(name))
            return
        (file,) = gather_pipeline(self.pipeline(name))
        total = {"count": len(completed), "total": sum(completed)}
        assert json.loads(Path(file).read_text()) == total

    @precondition(lambda self: all(self.database(name).exists() for name in self.models))
    @rule(reverse=st.booleans())
    def merge(self, reverse: bool) -> None:
        self._close()
        names = sorted(self.models, reverse=reverse)
        new = self.directory / "new.db"
        merge([self.database(name) for name in names], new)
        for path in self.directory.glob("run.db*"):
            path.unlink()
        os.rename(new, self.database("run"))
        run, other = self.models["run"], self.models["other"]
        run.completed |= other.completed
        run.failed = (run.failed | other.failed) - run.completed

    @precondition(lambda self: self.database("run").exists())
    @rule()
    def damage_and_recover(self) -> None:
        self._close()
        database = self.database("run")
        zero_page(database, root_page(database, "output_files_by_path"))
        assert check(database) != []
        assert recover_in_place(database) is not None
        for path in self.directory.glob("run.db.damaged-*"):
            path.unlink()

    # --- what holds ---------------------------------------------------------------------------

    @invariant()
    def each_database_holds_what_its_model_does(self) -> None:
        for name, model in self.models.items():
            if self.database(name).exists():
                self._compare(self.pipeline(name), model)
        self.counts["steps"] += 1

    def _compare(self, pipeline: Pipeline[int], model: Model) -> None:
        completed, failed = model.completed, model.failed
        assert pipeline.completed_indices == completed
        assert pipeline.failed_indices == {index: error_of(index) for index in sorted(failed)}
        assert pipeline.remaining_indices() == sorted(set(range(COUNT)) - completed - failed)
        summary: dict[str, Any] = pipeline.summary()
        assert (summary["completed"], summary["failed"]) == (len(completed), len(failed))
        assert summary["remaining"] == COUNT - len(completed) - len(failed)
        artifacts = pipeline.all_filter_artifacts()
        assert set(artifacts) == completed
        for index in range(COUNT):
            known = index in completed
            assert pipeline.output_paths_for_index(index) == (outputs_of(index) if known else [])
            for path in outputs_of(index):
                assert pipeline.index_for_path(path) == (index if known else None)
        for index, (artifact,) in artifacts.items():
            assert json.loads(Path(artifact["path"]).read_text()) == {"count": 1, "total": index}
        assert integrity(pipeline.db_path) == "ok"
        assert check(pipeline.db_path) == []


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose files are removed as soon as they are not needed any more."""
    directory = Path(tempfile.mkdtemp(prefix="psnc-machine-"))
    yield directory
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)


def test_whatever_happens_a_database_holds_what_a_plain_model_does(
    lives: Nursery, place: Path, many: Many, tried: Tried
) -> None:
    counts = {"examples": 0, "steps": 0, "crashes": 0}
    run_state_machine_as_test(
        lambda: Machine(lives, place, counts),
        settings=settings(
            max_examples=many(40),
            stateful_step_count=20,
            deadline=None,
            derandomize=False,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    tried("sequences of the state machine", counts["examples"])
    tried("steps of them", counts["steps"])
    tried("crashes in them", counts["crashes"])
