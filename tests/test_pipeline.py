"""The pipeline itself: how it is built, indexed, copied and sent to other processes."""

from __future__ import annotations

import copy
import os
import pickle
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import cloudpickle
import numpy as np
import pytest
from stages_for_tests import (
    Add,
    Discard,
    Double,
    FailOn,
    Journal,
    Numbers,
    Sum,
    WriteText,
    numbers_pipeline,
    read_journal,
)

from psnc import (
    Filter,
    IndexRangeError,
    Pipeline,
    PipelineError,
    PsncError,
    Sink,
    Source,
    StageError,
    TrackingDisabledError,
)

# --- building ---------------------------------------------------------------------------------


def test_a_pipeline_joins_its_stages_in_order(tmp_path: Path) -> None:
    pipeline = Numbers(3, items=2).filter(Double()).filter(Add(1)).write(WriteText("out"))
    assert pipeline[2] == ["out/2.txt"]
    assert (tmp_path / "out" / "2.txt").read_text() == "5\n5\n"


def test_builder_and_constructor_make_the_same_pipeline() -> None:
    built = Numbers(3).filter(Double()).write(Discard())
    constructed = Pipeline(source=Numbers(3), filters=[Double()], sink=Discard())
    assert built.config_hash == constructed.config_hash


def test_a_pipelines_fields_have_the_documented_defaults() -> None:
    pipeline = Pipeline(source=Numbers(3))
    values = {field.name: getattr(pipeline, field.name) for field in attrs.fields(Pipeline)}
    assert values.pop("source") is pipeline.source
    assert values == {
        "filters": (),
        "sink": None,
        "resume": False,
        "db_dir": None,
        "db_file": None,
        "store": None,
        "track_metrics": True,
        "track_memory": True,
        "track_gpu": True,
    }


def test_building_leaves_the_pipeline_it_starts_from_alone() -> None:
    start = Pipeline(source=Numbers(3), resume=True, track_gpu=False)
    filtered = start.filter(Double())
    written = filtered.write(Discard())
    assert (start.filters, start.sink) == ((), None)
    assert (len(filtered.filters), filtered.sink) == (1, None)
    assert (written.resume, written.track_gpu) == (True, False)


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Pipeline)])
def test_no_field_can_be_set(field: str) -> None:
    pipeline = numbers_pipeline()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(pipeline, field, None)


def test_filters_are_a_tuple_that_the_callers_list_cannot_change() -> None:
    filters: list[Filter[Any, Any]] = [Double()]
    pipeline: Pipeline[int] = Pipeline(source=Numbers(3), filters=filters, sink=Discard())
    filters.append(Add())
    assert len(pipeline.filters) == 1


def test_two_pipelines_of_one_configuration_are_two_pipelines() -> None:
    one, other = numbers_pipeline(), numbers_pipeline()
    assert one != other
    assert len({one, other, one}) == 2


def test_a_pipeline_is_as_long_as_its_source() -> None:
    assert len(numbers_pipeline(7)) == 7


def test_a_pipeline_iterates_over_every_index() -> None:
    assert list(numbers_pipeline(3)) == [[f"out/{index}-0.bin"] for index in range(3)]


def test_items_are_what_reaches_the_sink_and_nothing_is_recorded() -> None:
    pipeline = Numbers(4, items=2).filter(Double()).write(WriteText("out"))
    assert list(pipeline.items(3)) == [6, 6]
    assert list(pipeline.items(-1)) == [6, 6]
    assert not pipeline.db_path.exists()
    assert not Path("out").exists()


# --- misuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": Numbers}, "source: Numbers is a class: construct it first"),
        ({"source": 7}, "source: 'int' is no Source"),
        ({"source": Discard()}, "source: 'Discard' is no Source"),
        ({"source": Numbers(1), "filters": [Double]}, "filters: Double is a class"),
        ({"source": Numbers(1), "filters": [len]}, "filters: .* is no Filter"),
        ({"source": Numbers(1), "sink": Discard}, "sink: Discard is a class"),
        ({"source": Numbers(1), "sink": print}, "sink: .* is no Sink"),
    ],
)
def test_what_is_no_stage_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline(**fields)


def test_one_filter_in_place_of_a_list_is_refused_clearly() -> None:
    with pytest.raises(PsncError, match="filters"):
        Pipeline(source=Numbers(1), filters=Double())  # type: ignore[arg-type]


def test_the_builder_refuses_what_is_no_stage() -> None:
    with pytest.raises(PipelineError, match="Double is a class"):
        Numbers(1).filter(Double)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="is no Sink"):
        Numbers(1).write(Double())  # type: ignore[arg-type]


def test_a_pipeline_without_a_sink_does_not_run() -> None:
    with pytest.raises(PipelineError, match=r"no sink: add one with \.write"):
        Numbers(1).filter(Double())[0]


def test_a_pipeline_has_one_sink_and_it_comes_last() -> None:
    pipeline = Numbers(1).write(Discard())
    with pytest.raises(PipelineError, match="already has a sink"):
        pipeline.write(Discard())
    with pytest.raises(PipelineError, match=r"add filters before \.write"):
        pipeline.filter(Double())


@pytest.mark.parametrize("index", ["0", 1.0, None, slice(0, 2), [0], np.float64(1)])
def test_only_integers_are_indices(index: Any) -> None:
    with pytest.raises(PipelineError, match="indexed by integers, not"):
        numbers_pipeline()[index]


@pytest.mark.parametrize("index", [4, 1000, -5, np.int64(4), 2**70])
def test_an_index_out_of_range_is_refused_with_the_length(index: int) -> None:
    with pytest.raises(
        IndexRangeError, match=r"index -?\d+ is out of range: Numbers has 4 indices"
    ):
        numbers_pipeline(4)[index]


def test_an_index_out_of_range_is_an_index_error() -> None:
    with pytest.raises(IndexError, match=r"has 1 index$"):
        numbers_pipeline(1)[1]
    with pytest.raises(IndexError):
        numbers_pipeline(0)[0]


def test_a_refused_index_is_not_recorded() -> None:
    pipeline = numbers_pipeline(4)
    for index in (4, "0"):
        with pytest.raises(PsncError):
            pipeline[index]  # type: ignore[index]
    assert pipeline.failed_indices == {}
    assert pipeline.remaining_indices() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("index", "position"), [(-1, 3), (-4, 0), (np.int64(2), 2), (np.uint8(1), 1), (True, 1)]
)
def test_an_index_counts_as_python_counts(index: int, position: int) -> None:
    pipeline = numbers_pipeline(4)
    assert pipeline[index] == [f"out/{position}-0.bin"]
    assert pipeline.completed_indices == {position}


# --- what sinks and filters return ------------------------------------------------------------


class Returns(Sink[Any]):
    """Returns what its ``kind`` says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, items: Iterator[Any], index: int) -> Any:
        list(items)
        return {
            "nothing": None,
            "text": "a.txt",
            "path": Path("b") / "c.txt",
            "tuple": ("a", Path("b")),
            "generator": (name for name in ("x", "y")),
            "empty": [],
            "number": 5,
            "numbers": [1, 2],
        }[self.kind]


@pytest.mark.parametrize("track_metrics", [True, False])
@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("nothing", []),
        ("text", ["a.txt"]),
        ("path", ["b/c.txt"]),
        ("tuple", ["a", "b"]),
        ("generator", ["x", "y"]),
        ("empty", []),
    ],
)
def test_a_sink_may_return_paths_in_many_ways(
    kind: str, paths: list[str], track_metrics: bool
) -> None:
    pipeline = Pipeline(source=Numbers(1), sink=Returns(kind), track_metrics=track_metrics)
    assert pipeline[0] == paths
    assert pipeline[0] == paths


@pytest.mark.parametrize("kind", ["number", "numbers"])
def test_a_sink_that_returns_no_paths_fails_its_index_by_name(kind: str) -> None:
    pipeline = Pipeline(source=Numbers(1), sink=Returns(kind))
    with pytest.raises(StageError, match="Returns returned"):
        pipeline[0]
    assert pipeline.failed_indices[0].startswith("StageError: Returns returned")


class Forgetful(Filter[Any, Any]):
    """Forgets to return its generator."""

    def __call__(self, items: Iterator[Any]) -> Iterable[Any]:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("track_metrics", [True, False])
def test_a_filter_that_returns_nothing_fails_its_index_by_name(track_metrics: bool) -> None:
    pipeline = Pipeline(
        source=Numbers(1), filters=[Forgetful()], sink=Discard(), track_metrics=track_metrics
    )
    with pytest.raises(StageError, match="Forgetful returned None"):
        pipeline[0]


class Greedy(Filter[int, int]):
    """Returns a list, and drops and adds items."""

    def __call__(self, items: Iterator[int]) -> list[int]:
        return [copy for item in items if item % 2 for copy in (item, item)]


def test_a_filter_may_return_any_iterable_and_drop_and_add_items() -> None:
    pipeline = Numbers(4).filter(Greedy()).write(WriteText("out"))
    assert pipeline[2] == ["out/2.txt"]
    assert pipeline[3] == ["out/3.txt"]
    assert Path("out/2.txt").read_text() == ""
    assert Path("out/3.txt").read_text() == "3\n3\n"


def test_a_returned_list_is_the_callers_to_change() -> None:
    pipeline = numbers_pipeline()
    for _ in range(2):
        paths = pipeline[0]
        paths.append("mine")
    assert pipeline[0] == ["out/0-0.bin"]
    assert pipeline.output_paths_for_index(0) == ["out/0-0.bin"]


# --- running twice, failing -------------------------------------------------------------------


def test_a_completed_index_is_answered_without_running_a_stage(journal: str) -> None:
    pipeline = Journal(3, journal).write(Discard(files=2))
    assert pipeline[1] == pipeline[1] == ["out/1-0.bin", "out/1-1.bin"]
    assert read_journal(journal) == [1]


def test_a_failed_index_raises_its_own_exception_and_is_recorded(journal: str) -> None:
    pipeline = Journal(3, journal).filter(FailOn([1])).write(Discard())
    with pytest.raises(RuntimeError, match=r"^bad item 1$"):
        pipeline[1]
    assert pipeline.failed_indices == {1: "RuntimeError: bad item 1"}
    assert pipeline.completed_indices == set()
    assert pipeline.output_paths_for_index(1) == []


def test_a_failed_index_is_tried_again(tmp_path: Path, journal: str) -> None:
    mended = str(tmp_path / "mended")
    pipeline = Journal(2, journal).filter(FailOn([1], mended)).write(Discard())
    for _ in range(2):
        with pytest.raises(RuntimeError):
            pipeline[1]
    Path(mended).touch()
    assert pipeline[1] == ["out/1-0.bin"]
    assert read_journal(journal) == [1, 1, 1]
    assert pipeline.failed_indices == {}
    assert pipeline.completed_indices == {1}


def test_a_failed_index_is_tried_again_on_resume(tmp_path: Path, journal: str) -> None:
    mended = str(tmp_path / "mended")

    def pipeline() -> Pipeline[int]:
        return Pipeline(
            source=Journal(3, journal),
            filters=[FailOn([1], mended)],
            sink=Discard(),
            resume=True,
        )

    first = pipeline()
    first[0]
    with pytest.raises(RuntimeError):
        first[1]
    assert pipeline().failed_indices == {1: "RuntimeError: bad item 1"}
    Path(mended).touch()
    assert list(pipeline()) == [[f"out/{index}-0.bin"] for index in range(3)]
    assert read_journal(journal) == [0, 1, 1, 2]
    assert pipeline().failed_indices == {}


class Raises(Source[int]):
    """Raises in the place, and of the kind, that it is told."""

    def __init__(self, place: str, kind: str = "ValueError") -> None:
        self.place = place
        self.kind = kind

    def __len__(self) -> int:
        return 1

    def _raise(self) -> None:
        if self.kind == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if self.kind == "SystemExit":
            raise SystemExit(3)
        raise ValueError("no luck: é\nsecond line")

    def __getitem__(self, index: int) -> Iterator[int]:
        if self.place == "call":
            self._raise()
        return self._items()

    def _items(self) -> Iterator[int]:
        yield 1
        self._raise()


@pytest.mark.parametrize("place", ["call", "iteration"])
def test_an_error_is_recorded_wherever_the_source_raises_it(place: str) -> None:
    pipeline = Raises(place).write(Discard())
    with pytest.raises(ValueError, match="no luck"):
        pipeline[0]
    assert pipeline.failed_indices == {0: "ValueError: no luck: é\nsecond line"}


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
def test_an_interrupt_is_no_failure_of_the_index(kind: str, query: Any) -> None:
    pipeline = Raises("iteration", kind).write(Discard())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        pipeline[0]
    assert pipeline.failed_indices == {}
    assert pipeline.remaining_indices() == [0]
    assert query(pipeline.db_path, "SELECT current_index, completed_count FROM workers") == [
        (None, 0)
    ]


# --- recording nothing ------------------------------------------------------------------------


def test_without_tracking_nothing_is_made_and_everything_runs_each_time(
    own_home: Path, journal: str, tmp_path: Path
) -> None:
    pipeline: Pipeline[int] = Pipeline(
        source=Journal(2, journal), sink=Discard(), track_metrics=False, db_dir=tmp_path / "db"
    )
    assert pipeline[0] == pipeline[0] == ["out/0-0.bin"]
    assert read_journal(journal) == [0, 0]
    assert list(own_home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [Path(journal)]


def test_without_tracking_an_error_is_raised_as_it_is() -> None:
    pipeline = Pipeline(
        source=Numbers(2), filters=[FailOn([1])], sink=Discard(), track_metrics=False
    )
    with pytest.raises(RuntimeError, match=r"^bad item 1$"):
        pipeline[1]


QUESTIONS: dict[str, Any] = {
    "completed_indices": lambda pipeline: pipeline.completed_indices,
    "failed_indices": lambda pipeline: pipeline.failed_indices,
    "remaining_indices": lambda pipeline: pipeline.remaining_indices(),
    "summary": lambda pipeline: pipeline.summary(),
    "metrics": lambda pipeline: pipeline.metrics,
    "active_workers": lambda pipeline: pipeline.active_workers,
    "index_for_path": lambda pipeline: pipeline.index_for_path("a"),
    "output_paths_for_index": lambda pipeline: pipeline.output_paths_for_index(0),
    "filter_artifacts_for_index": lambda pipeline: pipeline.filter_artifacts_for_index(0),
    "all_filter_artifacts": lambda pipeline: pipeline.all_filter_artifacts(),
    "reset": lambda pipeline: pipeline.reset(),
    "reset_index": lambda pipeline: pipeline.reset_index(0),
    "db_path": lambda pipeline: pipeline.db_path,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_without_tracking_every_question_gets_one_clear_error(
    question: str, own_home: Path
) -> None:
    pipeline = numbers_pipeline(track_metrics=False)
    pipeline[0]
    with pytest.raises(TrackingDisabledError, match=rf"^{question}\W.*track_metrics=True$"):
        QUESTIONS[question](pipeline)
    assert list(own_home.iterdir()) == []


def test_without_tracking_a_stateful_filter_works_on_a_copy_and_flushes_nothing() -> None:
    summing = Sum()
    pipeline = Pipeline(
        source=Numbers(3), filters=[summing], sink=WriteText("out"), track_metrics=False
    )
    assert pipeline[2] == ["out/2.txt"]
    assert summing.count == 0


# --- copies and other processes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda pipeline: pickle.loads(pickle.dumps(pipeline)),
        lambda pipeline: pickle.loads(cloudpickle.dumps(pipeline)),
    ],
    ids=["copy", "deepcopy", "pickle", "cloudpickle"],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_copy_has_the_same_hash_and_the_same_database(duplicate: Any, used_before: bool) -> None:
    pipeline = numbers_pipeline()
    if used_before:
        pipeline[0]
    twin = duplicate(pipeline)
    assert twin.config_hash == pipeline.config_hash
    assert twin.db_path == pipeline.db_path
    twin[1]
    assert (
        pipeline.completed_indices == twin.completed_indices == {1, *([0] if used_before else [])}
    )


def test_a_pipeline_without_tracking_can_be_pickled_with_parameters_that_have_no_hash() -> None:
    pipeline = Pipeline(source=Numbers(object()), sink=Discard(), track_metrics=False)  # type: ignore[arg-type]
    assert isinstance(pickle.loads(pickle.dumps(pipeline)), Pipeline)


def test_an_unfinished_pipeline_can_be_pickled() -> None:
    restored = pickle.loads(pickle.dumps(Numbers(3).filter(Double())))
    assert restored.write(Discard())[1] == ["out/1-0.bin"]


def test_a_pickle_does_not_grow_with_what_was_recorded(journal: str) -> None:
    pipeline = Journal(300, journal).write(Discard())
    pipeline[0]
    before = len(pickle.dumps(pipeline))
    for index in range(300):
        pipeline[index]
    assert len(pickle.dumps(pipeline)) == before


def test_a_forked_child_records_to_the_same_database() -> None:
    pipeline = numbers_pipeline(4)
    pipeline[0]
    child = os.fork()
    if child == 0:
        try:
            pipeline[1]
            pipeline[2]
            os._exit(0 if pipeline.completed_indices >= {1, 2} else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pipeline[3]
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert {worker["pid"] for worker in pipeline.active_workers} == {os.getpid(), child}


USE_MULTIPROCESSING = """
    import multiprocessing, sys
    from stages_for_tests import numbers_pipeline

    def run_one(pipeline, index):
        return pipeline[index], pipeline.config_hash, str(pipeline.db_path)

    if __name__ == "__main__":
        pipeline = numbers_pipeline(6)
        pipeline[0]
        here = (pipeline.config_hash, str(pipeline.db_path))
        with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
            results = pool.starmap(run_one, [(pipeline, index) for index in range(6)])
        assert [result[0] for result in results] == [[f"out/{i}-0.bin"] for i in range(6)]
        assert {result[1:] for result in results} == {here}
        print(sorted(pipeline.completed_indices), pipeline.failed_indices)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_somebody_elses_pool_records_to_the_same_database(
    method: str, tmp_path: Path, run_python: Any
) -> None:
    script = tmp_path / "pool.py"
    script.write_text(textwrap.dedent(USE_MULTIPROCESSING))
    assert run_python(script, method).stdout == "[0, 1, 2, 3, 4, 5] {}\n"
