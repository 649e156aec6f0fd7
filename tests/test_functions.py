"""Functions as filters and sinks."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
import pickle
import posixpath
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import cloudpickle
import numpy as np
import pytest
from stages_for_tests import Discard, Numbers, WriteText

import psnc
from psnc import (
    ConfigurationError,
    Filter,
    Param,
    Pipeline,
    PipelineError,
    Sink,
    StageError,
    run_pipeline,
)
from psnc.testing import check_filter, check_sink


@psnc.filter
def scale(item: float, factor: float = 2.0) -> float:
    """Multiply.

    By a factor.
    """
    return item * factor


@psnc.filter()
def batched(items: Iterator[Any], size: int, *, drop_last: bool = False) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch and not drop_last:
        yield batch


@psnc.filter
def forgetful(item: int) -> Any:
    print(item)


@psnc.filter
def lazy(item: int) -> Any:
    return (each for each in [item])


@psnc.filter
def weigh(item: int, /, *weights: int, **named: int) -> int:
    return item * sum(weights) + sum(named.values())


@psnc.filter
def fails(item: int) -> int:
    raise ValueError(f"cannot take {item}")


@psnc.filter
def unlock(item: int, token: Annotated[str, Param(secret=True, description="Opens.")]) -> int:
    return item


@psnc.sink
def save(items: Iterator[Any], index: int, directory: str, suffix: str = ".txt") -> Path:
    """Write the items of an index to a file."""
    path = Path(directory, f"{index}{suffix}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(" ".join(map(str, items)))
    return path


@psnc.sink()
def consume(items: Iterator[Any], index: int) -> None:
    for _ in items:
        pass


@psnc.sink
def one_by_one(items: Iterator[Any], index: int) -> Iterator[str]:
    for item in items:
        yield f"{index}/{item}"


def increment(item: int, by: int = 1) -> int:
    return item + by


def announced(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@psnc.filter
@announced
def twice(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        yield item
        yield item


class Holder:
    @staticmethod
    def negate(item: int) -> int:
        return -item

    def method(self, item: int) -> int:
        return item

    @classmethod
    def of_class(cls, item: int) -> int:
        return item


async def awaited(item: int) -> int:
    return item


async def streamed(item: int) -> AsyncIterator[int]:
    yield item


def made_inside() -> Any:
    def inner(item: int) -> int:
        return item

    return psnc.filter(inner)


def through(filter: Any, items: list[Any]) -> list[Any]:
    return list(filter(iter(items)))


@psnc.filter
def with_odd_names(item: int, self: int = 1, *, cls: int = 2) -> int:
    return item + self + cls


def test_a_parameter_may_have_any_name() -> None:
    stage = with_odd_names(self=10, cls=20)
    assert list(stage(iter([1]))) == [31]
    pipeline = Numbers(2).filter(stage)
    pipeline.save("saved.json")
    assert Pipeline.load("saved.json").config_hash == pipeline.config_hash


# --- what they do -----------------------------------------------------------------------------


def test_a_plain_function_changes_item_after_item() -> None:
    assert through(scale(factor=3.0), [1.0, 2.0]) == [3.0, 6.0]
    assert through(scale(), [1.0]) == [2.0]


def test_a_generator_function_is_given_all_items_and_may_drop_or_gather() -> None:
    assert through(batched(2), [1, 2, 3]) == [[1, 2], [3]]
    assert through(batched(2, drop_last=True), [1, 2, 3]) == [[1, 2]]
    assert through(batched(2), []) == []


def test_a_wrapped_generator_function_is_one_too() -> None:
    assert through(twice(), [1, 2]) == [1, 1, 2, 2]


def test_further_arguments_of_every_kind_are_passed_on() -> None:
    assert through(weigh(2, 3, more=10), [1]) == [15]


def test_they_are_stages() -> None:
    assert issubclass(scale, Filter)  # type: ignore[arg-type]
    assert isinstance(scale(), Filter)
    assert isinstance(batched(2), Filter)
    assert isinstance(save("out"), Sink)


def test_a_pipeline_of_functions_runs(query: Any) -> None:
    pipeline = Pipeline(Numbers(3, items=3), [scale(10), batched(2)], save("out"))
    assert run_pipeline(pipeline) == [["out/0.txt"], ["out/1.txt"], ["out/2.txt"]]
    assert Path("out/1.txt").read_text() == "[10, 10] [10]"
    names = "SELECT stage_name FROM stage_metrics WHERE idx = 1 ORDER BY stage_order"
    assert query(pipeline.db_path, names) == [("Numbers",), ("scale",), ("batched",), ("save",)]


def test_a_sink_may_return_nothing_or_yield_its_paths() -> None:
    assert Pipeline(Numbers(2), sink=consume())[1] == []
    assert Pipeline(Numbers(2, items=2), sink=one_by_one())[1] == ["1/1", "1/1"]


def test_returning_nothing_is_a_failure_that_says_what_to_return() -> None:
    pipeline = Pipeline(Numbers(1), [forgetful()], Discard())
    with pytest.raises(StageError, match=r"forgetful returned None for an item: return the item"):
        pipeline[0]
    assert list(pipeline.failed_indices) == [0]


def test_returning_a_generator_is_a_failure() -> None:
    with pytest.raises(StageError, match="lazy returned a generator for an item"):
        Pipeline(Numbers(1), [lazy()], Discard())[0]


def test_an_error_in_a_function_is_that_index_s() -> None:
    pipeline = Pipeline(Numbers(1), [fails()], Discard())
    with pytest.raises(ValueError, match="cannot take 0"):
        pipeline[0]
    assert pipeline.failed_indices == {0: "ValueError: cannot take 0"}


@pytest.mark.parametrize("filter", [scale(3.0), batched(2), psnc.filter(abs)()], ids=repr)
def test_they_keep_the_rules_for_filters(filter: Any) -> None:
    check_filter(filter, [[1.0, -2.0, 3.0], [4.0]])


def test_they_keep_the_rules_for_sinks() -> None:
    check_sink(save, [["a", "b"], ["c"]])


# --- how they look ----------------------------------------------------------------------------


def test_the_class_has_the_function_s_name_and_documentation() -> None:
    assert scale.__name__ == "scale"
    assert scale.__qualname__ == "scale"  # type: ignore[attr-defined]
    assert scale.__module__ == __name__
    assert inspect.getdoc(scale) == "Multiply.\n\nBy a factor."
    assert str(inspect.signature(scale)) == "(factor: 'float' = 2.0)"


def test_the_function_can_still_be_called() -> None:
    assert scale.function(3.0) == 6.0
    assert scale.__wrapped__(3.0, 1.0) == 3.0  # type: ignore[attr-defined]


def test_the_parameters_are_the_function_s_without_the_data() -> None:
    (factor,) = scale.params()
    assert (factor.name, factor.type, factor.default) == ("factor", float, 2.0)
    assert [param.name for param in batched.params()] == ["size", "drop_last"]
    assert [param.name for param in save.params()] == ["directory", "suffix"]
    assert consume.params() == []
    (token,) = unlock.params()
    assert (token.secret, token.description, token.required) == (True, "Opens.", True)


def test_it_shows_its_arguments_but_no_secret() -> None:
    assert repr(scale(3.0)) == "scale(factor=3.0)"
    assert repr(save("out")) == "save(directory='out', suffix='.txt')"
    assert repr(consume()) == "consume()"
    assert "s3cret" not in repr(unlock("s3cret"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batched(), r"batched\(\): missing a required argument: 'size'"),
        (lambda: scale(wrong=1), r"scale\(\): got an unexpected keyword argument 'wrong'"),
        (lambda: consume(1), r"consume\(\): too many positional arguments"),
    ],
)
def test_wrong_arguments_are_refused_at_once(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_the_class_itself_is_no_filter() -> None:
    with pytest.raises(PipelineError, match="filters: scale is a class: construct it first"):
        Pipeline(Numbers(1), [scale], Discard())  # type: ignore[list-item]


# --- which functions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Holder, "Holder is a class: derive it from psnc.Filter instead"),
        (Holder().method, "Holder.method is a method"),
        (Holder.method, "Holder.method is a method"),
        (Holder.of_class, "Holder.of_class is a method"),
        (Holder.__dict__["of_class"], "is a method"),
        ("text".join, "str.join is a method"),
        (awaited, "awaited is async"),
        (streamed, "streamed is async"),
        (made_inside, r"made_inside\(\) -> 'Any' has no parameter for an item"),
        (print, "print.* has no parameter for an item"),
        (functools.partial(increment, by=2), "'partial' is no function"),
        (7, "'int' is no function"),
        (dict.get, "'method_descriptor' is no function"),
    ],
)
def test_what_cannot_be_a_filter_is_refused_where_it_is_decorated(
    function: Any, message: str
) -> None:
    with pytest.raises(StageError, match=rf"@psnc\.filter: .*{message}"):
        psnc.filter(function)


def test_a_sink_needs_two_parameters_of_its_own() -> None:
    with pytest.raises(StageError, match=r"@psnc\.sink: len\(obj, /\) has no parameter for the in"):
        psnc.sink(len)  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"@psnc\.sink: .*derive it from psnc\.Sink"):
        psnc.sink(Holder)


@pytest.mark.parametrize(
    ("function", "item", "result"),
    [
        (increment, 1, 2),
        (math.sqrt, 4.0, 2.0),
        (posixpath.basename, "a/b", "b"),
        (Holder.negate, 1, -1),
        (np.sqrt, 4.0, 2.0),
        (functools.cache(abs), -3, 3),
    ],
)
def test_functions_of_others_become_filters(function: Any, item: Any, result: Any) -> None:
    assert through(psnc.filter(function)(), [item]) == [result]


def test_one_function_is_one_class() -> None:
    assert psnc.filter(increment) is psnc.filter(increment)
    assert psnc.filter(increment) is not psnc.filter(posixpath.basename)


# --- identity ---------------------------------------------------------------------------------


def config_of(filter: Any) -> Any:
    return Pipeline(Numbers(1), [filter], Discard()).config["filters"][0]


def test_the_hash_is_made_of_name_and_arguments() -> None:
    assert config_of(scale(3.0)) == {
        "class": "test_functions:scale",
        "params": {"factor": 3.0},
    }
    assert config_of(scale()) == config_of(scale(2.0))
    assert config_of(psnc.filter(posixpath.basename)())["class"] == "posixpath:basename"
    assert config_of(weigh(1, 2, a=3))["params"] == {"weights": [1, 2], "a": 3}


def test_a_secret_enters_the_hash_as_a_digest() -> None:
    config = config_of(unlock("s3cret"))
    assert "s3cret" not in str(config)
    assert config != config_of(unlock("other"))


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (psnc.filter(lambda item: item), "a lambda"),
        (made_inside(), "a function inside a function"),
    ],
)
def test_a_function_without_a_name_has_no_hash_but_runs_untracked(made: Any, kind: str) -> None:
    pipeline = Pipeline(Numbers(2), [made()], WriteText("out"))
    with pytest.raises(ConfigurationError, match=f"{kind} .* define it at module level"):
        pipeline[0]
    untracked = Pipeline(Numbers(2), [made()], WriteText("out"), track_metrics=False)
    assert untracked[1] == ["out/1.txt"]


# --- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pickle, cloudpickle, copy])
@pytest.mark.parametrize(
    "stage",
    [
        scale(3.0),
        batched(2, drop_last=True),
        save("out"),
        weigh(1, 2, a=3),
        psnc.filter(increment)(5),
        psnc.filter(posixpath.basename)(),
        psnc.filter(math.sqrt)(),
        psnc.filter(operator.neg)(),
        psnc.filter(Holder.negate)(),
    ],
    ids=repr,
)
def test_a_copy_is_the_same_stage(stage: Any, module: Any) -> None:
    copied = copy.deepcopy(stage) if module is copy else module.loads(module.dumps(stage))
    assert type(copied) is type(stage)
    assert repr(copied) == repr(stage)
    if isinstance(stage, Filter):
        assert config_of(copied) == config_of(stage)


def test_a_class_derived_from_a_function_s_stays_itself() -> None:
    copied = pickle.loads(pickle.dumps(Derived(4)))
    assert type(copied) is Derived
    assert through(copied, [1]) == [5]


class Derived(psnc.filter(increment)):  # type: ignore[misc]
    """Adds."""


def test_a_lambda_can_be_sent_to_another_process_untracked() -> None:
    made = psnc.filter(lambda item, factor: item * factor)
    assert through(cloudpickle.loads(cloudpickle.dumps(made(3))), [2]) == [6]


SCRIPT = """
    import psnc
    from psnc import Pipeline, run_pipeline
    from stages_for_tests import Numbers

    OFFSET = 100

    @psnc.filter
    def shift(item, by=1):
        return item + by + OFFSET

    @psnc.sink
    def save(items, index):
        with open(f"{index}.out", "w") as file:
            print(*items, file=file)
        return f"{index}.out"

    def half(item):
        return item / 2

    pipeline = Pipeline(Numbers(3), [psnc.filter(half)(), shift(by=5)], save(), resume=True)
"""


def script_text(main: str) -> str:
    return textwrap.dedent(SCRIPT) + textwrap.dedent(main)


def test_functions_of_a_script_run_in_worker_processes(tmp_path: Path, run_python: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        script_text("""
            print(run_pipeline(pipeline, n_jobs=2), pipeline.failed_indices)
            print(pipeline.config_hash)
        """)
    )
    first = run_python(script).stdout.splitlines()
    assert first[0] == "[['0.out'], ['1.out'], ['2.out']] {}"
    assert (tmp_path / "2.out").read_text() == "106.0\n"
    # Imported, it is the same configuration as run, and so resumes it.
    imported = run_python("-c", "import script").stdout.splitlines()
    assert imported == first


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_functions_of_a_script_run_in_somebody_elses_processes(
    method: str, tmp_path: Path, run_python: Any
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        script_text(f"""
            def hash_here(pipeline):
                fresh = Pipeline(pipeline.source, pipeline.filters, pipeline.sink)
                return fresh.config_hash == pipeline.config_hash

            if __name__ == "__main__":
                import multiprocessing
                with multiprocessing.get_context({method!r}).Pool(2) as pool:
                    print(pool.map(pipeline.__getitem__, range(3)))
                    print(pool.map(hash_here, [pipeline]))
                print(sorted(pipeline.completed_indices))
        """)
    )
    expected = ["[['0.out'], ['1.out'], ['2.out']]", "[True]", "[0, 1, 2]"]
    assert run_python(script, method).stdout.splitlines() == expected


# --- for type checkers ------------------------------------------------------------------------

TYPED = '''
"""A user's file."""

from collections.abc import Iterator
from pathlib import Path

import psnc


@psnc.filter
def text(item: int, width: int = 3) -> str:
    return str(item).rjust(width)


@psnc.filter()
def pairs(items: Iterator[str], *, strict: bool) -> Iterator[tuple[str, str]]:
    for item in items:
        yield item, next(items)


@psnc.sink
def save(items: Iterator[tuple[str, str]], index: int, directory: Path) -> list[Path]:
    return [directory / f"{index}-{first}-{second}" for first, second in items]


@psnc.sink()
def nothing(items: Iterator[int], index: int) -> None:
    sum(items)


pipeline: psnc.Pipeline[tuple[str, str]] = (
    psnc.SequenceSource([1, 2])
    .filter(text(width=4))
    .filter(pairs(strict=True))
    .write(save(Path("out")))
)
names: list[str] = [param.name for param in text.params()]
raw: str = text.function(3)
for path in psnc.track(Path().iterdir(), "paths", resume=True):
    path.exists()
psnc.Pipeline(source=[1, 2], sink=nothing())
psnc.Pipeline(source="data/*.h5", filters=[text(3)])
psnc.as_source(range(3)).write(nothing())
'''

WRONG = """
text(width="wide")
psnc.SequenceSource(["a"]).filter(text())
psnc.SequenceSource([1]).write(save(Path()))
"""


@pytest.mark.slow
def test_a_user_s_file_passes_a_strict_type_checker(tmp_path: Path) -> None:
    def check(text: str) -> list[str]:
        (tmp_path / "typed.py").write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "typed.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()

    assert check(TYPED) == ["Success: no issues found in 1 source file"]
    assert check(TYPED + WRONG)[-1].startswith("Found 3 errors")
