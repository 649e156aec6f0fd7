"""Lists, datasets and files as sources, and what of them enters the hash."""

from __future__ import annotations

import dataclasses
import glob
import os
import pickle
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages_for_tests import Discard, Numbers, WriteText, numbers_pipeline

from psnc import (
    ConfigurationError,
    FilesSource,
    Filter,
    Param,
    Pipeline,
    PipelineError,
    SequenceSource,
    Source,
    SourceError,
    StoreError,
    as_source,
    run_pipeline,
)
from psnc.manager import PluginManager
from psnc.testing import check_source


class Squares:
    """A dataset as Torch's: a length and items by position, and nothing else."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index * index


class Holey(Squares):
    """Cannot find one of its items, and says so as lists do."""

    def __getitem__(self, index: int) -> int:
        if index == 1:
            raise IndexError("no such row")
        return super().__getitem__(index)


class Configured(Squares):
    def psnc_config(self) -> int:
        return self.count


@attrs.frozen
class Fields(Squares):
    count: int


@dataclasses.dataclass
class DataFields(Squares):
    count: int


class WithoutLength:
    def __getitem__(self, index: int) -> int:
        return index


def hash_of(source: Any) -> str:
    return Pipeline(source=source, sink=Discard()).config_hash


def items_of(source: Any) -> list[list[Any]]:
    pipeline = Pipeline(source=source, sink=Discard())
    return [list(pipeline.items(index)) for index in range(len(pipeline))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("b.h5", "a.h5", "10.h5", "2.h5", "notes.txt", ".hidden.h5", "run-1/c.h5"):
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


# --- sequences and datasets -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "items"),
    [
        (["a", "b"], ["a", "b"]),
        ((1, 2), [1, 2]),
        (range(5, 8), [5, 6, 7]),
        ([], []),
        ([[1, 2], {"k": 3}, None], [[1, 2], {"k": 3}, None]),
        (np.arange(3.0), [0.0, 1.0, 2.0]),
        (Fields(3), [0, 1, 4]),
    ],
)
def test_each_item_of_a_sequence_is_an_index_of_its_own(thing: Any, items: list[Any]) -> None:
    assert items_of(thing) == [[item] for item in items]


def test_a_pipeline_over_a_list_runs_and_resumes() -> None:
    def pipeline() -> Pipeline[str]:
        return Pipeline(source=["x", "y", "z"], sink=WriteText("out"), resume=True)

    assert pipeline()[-1] == ["out/2.txt"]
    assert Path("out/2.txt").read_text() == "z\n"
    assert pipeline().completed_indices == {2}
    assert run_pipeline(pipeline()) == [["out/0.txt"], ["out/1.txt"], ["out/2.txt"]]


def test_a_source_stays_what_it_is() -> None:
    source = Numbers(3)
    assert as_source(source) is source


def test_text_and_paths_are_files_and_the_rest_are_sequences(data: Path) -> None:
    assert isinstance(as_source("data/*.h5"), FilesSource)
    assert isinstance(as_source(data), FilesSource)
    assert isinstance(as_source([1]), SequenceSource)


class Scaled(SequenceSource[int]):
    """A sequence with a parameter of its own."""

    def __init__(self, sequence: list[int], factor: int = 1) -> None:
        super().__init__(sequence)
        self.factor = factor

    def __getitem__(self, index: int) -> Iterator[int]:
        for item in super().__getitem__(index):
            yield item * self.factor


class Counted(SequenceSource[int]):
    """A sequence that is made, not given."""

    def __init__(self, count: int) -> None:
        super().__init__(list(range(count)))


def test_a_subclass_s_own_parameters_enter_the_hash() -> None:
    def outputs(factor: int) -> str:
        source = Scaled([1, 2], factor)
        pipeline = Pipeline(source=source, sink=WriteText("out"), resume=True)
        return Path(run_pipeline(pipeline)[1][0]).read_text()

    assert outputs(2).split() == ["4"]
    assert outputs(3).split() == ["6"]


def test_a_subclass_may_make_its_sequence() -> None:
    assert [list(Counted(3)[index]) for index in range(3)] == [[0], [1], [2]]
    hashes = {Pipeline(source=Counted(count), sink=Discard()).config_hash for count in (3, 3, 4)}
    assert len(hashes) == 2


def test_a_list_that_is_changed_later_leaves_the_source_as_it_was() -> None:
    numbers = [1, 2, 3]
    source = SequenceSource(numbers)
    numbers.append(4)
    numbers[0] = 99
    assert items_of(source) == [[1], [2], [3]]
    assert hash_of(source) == hash_of([1, 2, 3])


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (b"abc", "'bytes' is no Source: name files by text"),
        ({"a": 1}, "'dict' is no Source: it has keys"),
        (iter([1]), "'list_iterator' is no Source: it has no positions"),
        ({1, 2}, "'set' is no Source: it has no positions"),
        (WithoutLength(), "'WithoutLength' is no Source: it has no __len__"),
        (Squares, "Squares is a class: construct it first"),
        (None, "'NoneType' is no Source"),
        (3, "'int' is no Source"),
    ],
)
def test_what_has_no_positions_is_refused(thing: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline(source=thing)


def test_a_torch_dataset_that_can_only_be_iterated_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class IterableDataset(WithoutLength):
        """Inherits a __getitem__ that only raises, as Torch's does."""

    class Stream(IterableDataset):
        def __len__(self) -> int:
            return 3

    torch_data: Any = types.ModuleType("torch.utils.data")
    torch_data.IterableDataset = IterableDataset
    monkeypatch.setitem(sys.modules, "torch.utils.data", torch_data)
    with pytest.raises(PipelineError, match=r"IterableDataset has no positions: .*psnc\.track"):
        as_source(Stream())


def test_an_index_error_of_a_dataset_is_a_failure_of_that_index() -> None:
    pipeline = Pipeline(source=SequenceSource(Holey(3), name="holey"), sink=Discard())
    assert run_pipeline(pipeline) == [["out/0-0.bin"], [], ["out/2-0.bin"]]
    assert pipeline.failed_indices == {1: "IndexError: no such row"}


# --- what of a sequence is hashed -------------------------------------------------------------


def test_equal_content_is_an_equal_hash() -> None:
    assert hash_of([1, 2]) == hash_of((1, 2)) == hash_of(SequenceSource([1, 2]))
    assert hash_of([1, 2]) != hash_of([2, 1])
    assert hash_of([1, 2]) != hash_of([1, 2, 3])
    assert hash_of(np.arange(3)) == hash_of(np.arange(3))
    assert hash_of(np.arange(3)) != hash_of(np.arange(1, 4))


@pytest.mark.parametrize("kind", [Configured, Fields, DataFields])
def test_a_dataset_with_a_canonical_form_is_hashed_by_it(kind: Any) -> None:
    assert hash_of(kind(3)) == hash_of(kind(3)) != hash_of(kind(4))


def test_a_dataset_without_a_canonical_form_needs_a_name() -> None:
    with pytest.raises(ConfigurationError, match=r"'Squares' has no canonical form.*name=") as no:
        hash_of(Squares(3))
    assert "\n" not in str(no.value)
    named = SequenceSource(Squares(3), name="squares-v1")
    assert hash_of(named) == hash_of(SequenceSource(Squares(3), name="squares-v1"))
    assert hash_of(named) != hash_of(SequenceSource(Squares(4), name="squares-v1"))
    assert hash_of(named) != hash_of(SequenceSource(Squares(3), name="squares-v2"))


def test_a_dataset_without_a_canonical_form_runs_where_nothing_is_recorded() -> None:
    pipeline = Pipeline(source=Squares(3), sink=WriteText("out"), track_metrics=False)
    assert pipeline[2] == ["out/2.txt"]
    assert Path("out/2.txt").read_text() == "4\n"


@pytest.mark.parametrize("name", ["", "  ", 7])
def test_a_name_must_be_one(name: Any) -> None:
    with pytest.raises(PipelineError, match="give the data a name"):
        SequenceSource([1], name=name)


def test_a_long_list_enters_the_database_by_its_digest() -> None:
    numbers = list(range(1_000_000))
    pipeline = Pipeline(source=numbers, sink=Discard())
    assert len(pipeline.config_json) < 1000
    changed = numbers.copy()
    changed[500_000] = -1
    assert pipeline.config_hash == hash_of(numbers)
    assert pipeline.config_hash != hash_of(changed)
    assert pipeline.config_hash != hash_of(numbers[:-1])


@pytest.mark.parametrize("count", [2, 5000])
def test_relative_paths_in_a_list_are_noticed_in_another_directory(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> Pipeline[str]:
        files = [f"{number}.txt" for number in range(count)]
        return Pipeline(source=files, sink=Discard(), resume=True, db_dir=tmp_path / "db")

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").touch()
    monkeypatch.chdir(tmp_path / "one")
    pipeline()[0]
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(StoreError, match=r"relative path '0\.txt' is another"):
        pipeline()[1]


def test_a_data_name_is_not_taken_for_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squares").mkdir()
    source = SequenceSource(Squares(3), name="squares")
    pipeline = Pipeline(source=source, sink=Discard(), resume=True, db_dir=tmp_path / "db")
    pipeline[0]
    monkeypatch.chdir(tmp_path / "squares")
    copied = pickle.loads(pickle.dumps(pipeline))
    copied[1]
    assert copied.completed_indices == {0, 1}


# --- other processes --------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_copy_of_a_dataset_source_has_its_items_and_hash(module: Any) -> None:
    source = SequenceSource(Squares(4), name="squares")
    copied = module.loads(module.dumps(source))
    assert items_of(copied) == items_of(source)
    assert hash_of(copied) == hash_of(source)


def test_a_list_is_pickled_once() -> None:
    numbers = list(range(10**6, 10**6 + 20_000))
    alone, as_source_size = len(pickle.dumps(numbers)), len(pickle.dumps(SequenceSource(numbers)))
    assert as_source_size < 1.1 * alone


def test_a_dataset_of_a_script_runs_in_worker_processes(tmp_path: Path, run_python: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from psnc import Pipeline, SequenceSource, run_pipeline
            from stages_for_tests import WriteText

            class Letters:
                def __len__(self):
                    return 3

                def __getitem__(self, index):
                    return "abc"[index]

            pipeline = Pipeline(
                source=SequenceSource(Letters(), name="letters"), sink=WriteText("out")
            )
            run_pipeline(pipeline, n_jobs=2)
            print(sorted(pipeline.completed_indices))
        """)
    )
    assert run_python(script).stdout == "[0, 1, 2]\n"
    assert (tmp_path / "out/2.txt").read_text() == "c\n"


# --- files ------------------------------------------------------------------------------------


def test_files_are_sorted_by_their_path_as_text(data: Path) -> None:
    names = ["10.h5", "2.h5", "a.h5", "b.h5"]
    assert items_of("data/*.h5") == [[Path("data", name)] for name in names]


def test_two_stars_stand_for_any_number_of_directories(data: Path) -> None:
    found = [path for (path,) in items_of("data/**/*.h5")]
    assert found[-1] == Path("data/run-1/c.h5")
    assert len(found) == 5


def test_links_are_followed_but_not_in_circles(data: Path) -> None:
    (data.parent / "far").mkdir()
    (data.parent / "far/d.h5").touch()
    (data / "far").symlink_to(data.parent / "far")
    before = items_of("data/**/*.h5")
    assert [Path("data/far/d.h5")] in before
    (data / "run-1/back").symlink_to(data)
    (data / "here").symlink_to(".")
    assert items_of("data/**/*.h5") == before
    assert items_of("data/here/a.*") == [[Path("data/here/a.h5")]]


PARTS = ["*", "**", "a", "?", "[ab]", "[!a]*", "*.h5", ".*", "[[]x]", "b.h5"]


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
def test_a_pattern_means_what_it_means_to_glob(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in ("a/b/c.h5", "a/b.h5", "b/a/a.h5", "b/.hidden/a.h5", ".a/b.h5", "[x]/a", "c"):
            Path(directory, name).parent.mkdir(parents=True, exist_ok=True)
            Path(directory, name).touch()
        pattern = os.path.join(directory, *parts)
        expected = sorted(
            {each for each in glob.glob(pattern, recursive=True) if Path(each).is_file()}
        )
        if Path(pattern).is_dir():
            return  # stands for the files in it
        if not expected:
            with pytest.raises(SourceError, match="no file matches"):
                FilesSource(pattern)
        else:
            assert sorted(map(str, FilesSource(pattern).paths)) == expected


def test_a_directory_stands_for_the_files_in_it(data: Path) -> None:
    names = ["10.h5", "2.h5", "a.h5", "b.h5", "notes.txt"]
    assert items_of(data) == [[data / name] for name in names]
    assert items_of("data/") == [[Path("data", name)] for name in names]


def test_a_file_stands_for_itself(data: Path) -> None:
    assert items_of(data / "b.h5") == [[data / "b.h5"]]


def test_names_that_look_like_patterns_are_found(tmp_path: Path) -> None:
    directory = tmp_path / "run[1]"
    directory.mkdir()
    (directory / "what?.txt").touch()
    assert items_of(directory) == [[directory / "what?.txt"]]
    assert items_of(directory / "what?.txt") == [[directory / "what?.txt"]]


def test_the_home_directory_can_be_written_short(own_home: Path) -> None:
    (own_home / "a.h5").touch()
    assert items_of("~/*.h5") == [[own_home / "a.h5"]]


@pytest.mark.parametrize("pattern", ["data/*.zip", "nothing", "", "data/*/"])
def test_no_file_is_an_error_that_says_where(pattern: str, data: Path) -> None:
    with pytest.raises(SourceError, match=r"data/\*\.h5") as error:
        FilesSource(pattern)
    if pattern:
        assert repr(pattern) in str(error.value)
        assert os.getcwd() in str(error.value)


def test_the_set_of_files_decides_the_hash(data: Path) -> None:
    before = hash_of("data/*.h5")
    (data / "a.h5").write_text("other content")
    (data / "unrelated.txt").touch()
    assert hash_of("data/*.h5") == hash_of(Path("data/*.h5")) == before
    (data / "c.h5").touch()
    more = hash_of("data/*.h5")
    (data / "c.h5").unlink()
    (data / "b.h5").rename(data / "bb.h5")
    renamed = hash_of("data/*.h5")
    assert len({before, more, renamed}) == 3


def test_a_resumed_run_does_not_take_a_new_file_for_an_old_one(data: Path) -> None:
    def pipeline() -> Pipeline[Path]:
        return Pipeline(source="data/*.h5", sink=WriteText("out"), resume=True)

    run_pipeline(pipeline())
    assert pipeline().completed_indices == {0, 1, 2, 3}
    (data / "0.h5").touch()
    assert pipeline().completed_indices == set()
    run_pipeline(pipeline())
    written = [Path(f"out/{index}.txt").read_text() for index in range(5)]
    assert written == [f"data/{name}\n" for name in ("0.h5", "10.h5", "2.h5", "a.h5", "b.h5")]


def test_a_file_that_comes_during_a_run_is_not_seen_by_it(data: Path) -> None:
    source = FilesSource("data/*.h5")
    paths = items_of(source)
    (data / "0.h5").touch()
    copied = cloudpickle.loads(cloudpickle.dumps(source))
    assert items_of(source) == items_of(copied) == paths
    assert hash_of(source) == hash_of(copied)


def test_the_same_relative_pattern_in_another_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> Pipeline[Path]:
        return Pipeline(source="in/*.txt", sink=Discard(), resume=True, db_dir=tmp_path / "db")

    for name in ("one", "two"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in/a.txt").touch()
    monkeypatch.chdir(tmp_path / "one")
    pipeline()[0]
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(StoreError, match=r"relative path 'in/a\.txt' is another"):
        pipeline()[0]


def test_an_absolute_pattern_means_the_same_in_every_directory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline() -> Pipeline[Path]:
        return Pipeline(source=f"{data}/*.h5", sink=Discard(), resume=True)

    pipeline()[0]
    monkeypatch.chdir(data)
    assert pipeline().completed_indices == {0}


def test_file_names_that_are_no_text_are_hashed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"odd\xff.h5")).touch()
    assert len(hash_of("*.h5")) == 64


def test_pipeline_files_know_the_source_of_files_by_name(plugins: PluginManager) -> None:
    assert plugins.stage_class("source", "files") is FilesSource


@pytest.mark.parametrize(
    "source",
    [SequenceSource([1, 2]), SequenceSource(Squares(3), name="squares")],
    ids=["list", "dataset"],
)
def test_they_keep_the_rules_for_sources(source: Source[Any]) -> None:
    check_source(source)


def test_files_keep_the_rules_for_sources(data: Path) -> None:
    check_source(FilesSource(data))


def test_the_parameters_are_described() -> None:
    assert [param.name for param in SequenceSource.params()] == ["sequence", "name"]
    (param,) = FilesSource.params()
    assert isinstance(param, Param)
    assert param.required
    assert param.description


# --- what a stage says of its own identity ----------------------------------------------------


class Versioned(Source[int]):
    """Yields what a file says at the time of construction."""

    def __init__(self, path: str) -> None:
        self.version: Any = Path(path).read_text() if os.path.exists(path) else None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Iterator[int]:
        yield index

    def identity(self) -> Any:
        return self.version


class Threads(Filter[Any, Any]):
    """Has a parameter that decides nothing of what it yields."""

    def __init__(self, scale: int, threads: int = 1) -> None:
        self.scale = scale
        self.threads = threads

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items

    def psnc_config(self) -> Any:
        return {"scale": self.scale}


@attrs.define
class OwnIdentity(Filter[Any, Any]):
    """Calls a parameter of its own so."""

    identity: Any = None

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class OwnIdentityAttribute(Filter[Any, Any]):
    def __init__(self, identity: str) -> None:
        self.identity = identity  # type: ignore[assignment,method-assign]

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


def test_identity_enters_the_hash() -> None:
    without = hash_of(Versioned("version"))
    Path("version").write_text("1")
    first = hash_of(Versioned("version"))
    Path("version").write_text("2")
    second = hash_of(Versioned("version"))
    assert len({without, first, second}) == 3
    assert '"identity":"2"' in Pipeline(Versioned("version"), sink=Discard()).config_json


def test_a_stage_without_an_identity_is_described_as_ever() -> None:
    assert "identity" not in numbers_pipeline(3).config_json
    assert numbers_pipeline(3).config["source"] == {
        "class": "stages_for_tests:Numbers",
        "params": {"count": 3, "items": 1},
    }


def test_an_identity_without_a_canonical_form_is_an_error_that_names_the_stage() -> None:
    source = Versioned("version")
    source.version = object()
    with pytest.raises(ConfigurationError, match=r"Versioned\.identity\(\): a value of type"):
        hash_of(source)


@pytest.mark.parametrize("kind", [OwnIdentity, OwnIdentityAttribute])
def test_a_parameter_may_be_called_identity(kind: Any) -> None:
    def config(value: str) -> Any:
        return Pipeline(Numbers(1), [kind(value)], Discard()).config["filters"][0]

    assert config("x")["params"] == {"identity": "x"}
    assert "identity" not in config("x")


def test_a_stage_may_say_what_stands_for_its_arguments() -> None:
    def hash_with(*arguments: int) -> str:
        return Pipeline(Numbers(1), [Threads(*arguments)], Discard()).config_hash

    assert hash_with(2, 1) == hash_with(2, 8) != hash_with(3, 1)


def test_what_stands_for_arguments_must_be_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Threads, "psnc_config", lambda self: 7)
    pipeline = Pipeline(Numbers(1), [Threads(1)], Discard())
    with pytest.raises(ConfigurationError, match=r"Threads\.psnc_config\(\) returned int"):
        _ = pipeline.config_hash
