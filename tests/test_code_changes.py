"""A resumed run tells results of other code from those of its own, and does as it is told."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, Said, Write, psnc, write
from stages_for_tests import Discard, Numbers, WriteText, again
from test_own_pools import METHODS, OWN_POOLS

from psnc import CodeChangedError, Filter, Pipeline, PipelineError, StoreError, run_pipeline
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.recover import recover
from psnc.code_digest import code_digest
from psnc.stages import Stage

__all__ = ["psnc", "write"]

# --- what counts as a change ------------------------------------------------------------------

MODULE = '''
import functools
import helpers
from psnc import Filter, filter

FACTOR = 2
WEIGHTS = {"low": [1, 2]}
counter = 0
cache = {}

def inner(x):
    return x + 1

def helper(x, by=1):
    return inner(x) * by * WEIGHTS["low"][0]

def one_way(x):
    return 100 + x

WAYS = {"one": one_way}

class Shift:
    def shift(self, x):
        return x - 7

shift = Shift()

def unrelated(x):
    return x

def logged(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

class Mixin:
    offset = 1

    def shifted(self, x):
        return x + self.offset

class Stage(Mixin, Filter):
    """Doubles."""

    NAMES = ["one"]
    seen = {}

    def __call__(self, items):
        for item in items:
            yield self.one(item)

    @logged
    def one(self, x):
        def local(y):
            return y * FACTOR
        x = WAYS[self.NAMES[0]](shift.shift(x))
        return helper(local(x)) + helpers.twice(x) + self.size

    @property
    def size(self):
        return 3

    @functools.cached_property
    def width(self):
        return 4

@functools.lru_cache
def cached(x):
    return x + 5

@filter
def stage_of_function(item, by=3):
    return cached(item) + by

class Calls(Filter):
    def __init__(self, function):
        self.function = function

    def __call__(self, items):
        return map(self.function, items)
'''

HELPERS = """
def twice(x):
    return 2 * x

def others(x):
    return x
"""

# Each with the stages whose code it changes.
CHANGES = {
    ("return x + 1", "return x + 2"): {"Stage", "Calls"},
    ("by=1", "by=2"): {"Stage", "Calls"},
    ("FACTOR = 2", "FACTOR = 3"): {"Stage"},
    ("offset = 1", "offset = 2"): {"Stage"},
    ("x + self.offset", "x - self.offset"): {"Stage"},
    ("function(*args)", "function(*args) + 1"): {"Stage"},
    ("y * FACTOR", "FACTOR * y"): {"Stage"},
    ("return 3", "return 33"): {"Stage"},
    ("return 4", "return 44"): {"Stage"},
    ("return x + 5", "return x + 6"): {"stage_of_function"},
    ("by=3", "by=4"): {"stage_of_function"},
    ("map(self.function, items)", "map(self.function, iter(items))"): {"Calls"},
    ("return 2 * x", "return x * 2"): {"Stage"},
    ('{"low": [1, 2]}', '{"low": [1, 3]}'): {"Stage", "Calls"},
    ("return 100 + x", "return 101 + x"): {"Stage"},
    ("return x - 7", "return x - 8"): {"Stage"},
    ('NAMES = ["one"]', 'NAMES = ["one", "two"]'): {"Stage"},
    # What is no change.
    ('"""Doubles."""', ""): set(),
    ('"""Doubles."""', '"""Multiplies."""'): set(),
    ("    def one(self, x):", "    def one(self, x):\n        '''One.'''"): set(),
    ("def helper(", "\n\n# above\ndef helper("): set(),
    ("inner(x) * by", "inner(x)  *  by"): set(),
    ("counter = 0", "counter = 7"): set(),
    ("cache = {}", "cache = {1: 2}"): set(),
    ("seen = {}", "seen = {1: 2}"): set(),
    ("def unrelated(x):\n    return x", "def unrelated(x):\n    return -x"): set(),
    ("def others(x):\n    return x", "def others(x):\n    return -x"): set(),
}


def load(directory: Path, change: tuple[str, str] | None = None) -> dict[str, Stage]:
    """Import the modules above from a directory, with one text in place of another."""
    directory.mkdir()
    texts = {"helpers": HELPERS, "own_stages": MODULE}
    if change is not None:
        assert sum(text.count(change[0]) for text in texts.values()) == 1
    for name, text in texts.items():
        path = directory / f"{name}.py"
        path.write_text(text if change is None else text.replace(*change))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return {
        "Stage": module.Stage(),
        "stage_of_function": module.stage_of_function(),
        "Calls": module.Calls(module.helper),
    }


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a test imports under these names forgotten."""
    for name in ("helpers", "own_stages"):
        monkeypatch.setitem(sys.modules, name, sys)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_stage_reaches_is_its_code(tmp_path: Path, change: tuple[str, str]) -> None:
    before = {name: code_digest(stage) for name, stage in load(tmp_path / "before").items()}
    after = {name: code_digest(stage) for name, stage in load(tmp_path / "after", change).items()}
    assert {name for name in before if before[name] != after[name]} == CHANGES[change]


@pytest.mark.usefixtures("imported")
def test_the_code_is_the_same_wherever_it_lies_and_once_it_has_run(tmp_path: Path) -> None:
    first, second = load(tmp_path / "first"), load(tmp_path / "second")
    digests = {name: code_digest(stage) for name, stage in first.items()}
    assert None not in digests.values()
    assert digests == {name: code_digest(stage) for name, stage in second.items()}
    list(second["stage_of_function"](iter([1, 2])))  # type: ignore[operator]
    assert digests == {name: code_digest(stage) for name, stage in second.items()}


OTHER_SEEDS = """
    import sys
    import attrs
    from psnc import Filter, as_source
    from psnc.code_digest import code_digest

    @attrs.frozen
    class Item:
        x: int

    class Wrap(Filter):
        KNOWN = {"a", "b", "c"}

        def __call__(self, items):
            return (Item(item) for item in items)

    print(code_digest(Wrap()), code_digest(as_source([1, 2])))
"""


def test_the_code_is_the_same_in_every_process(run_python: Any, write: Write) -> None:
    script = write("digests.py", OTHER_SEEDS)
    printed = {run_python(script, PYTHONHASHSEED=seed).stdout for seed in "123"}
    assert len(printed) == 1


# --- what a resumed run says and does ---------------------------------------------------------

STAGES = """
from pathlib import Path
from stages_for_tests import Numbers
from psnc import Filter, Sink

class Scale(Filter):
    def __call__(self, items):
        return (item * 2 for item in items)

class Write(Sink):
    def __call__(self, items, index):
        path = Path("out") / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(map(str, items)))
        return [str(path)]

pipeline = Numbers(6).filter(Scale()).write(Write())
"""

OF_ALL = (
    "the code has changed, and 6 results are of the earlier one: Scale (its code): they stay as "
    "they are; --on-code-change rerun runs them again, ignore keeps quiet\n"
)


@pytest.fixture
def run(psnc: Psnc, caplog: pytest.LogCaptureFixture) -> Callable[..., Said]:
    """Run a pipeline; what it logs, which pytest takes for itself, counts as standard error."""

    def run(*arguments: str, database: str = "run.db") -> Said:
        caplog.clear()
        said = psnc("run", "edited.py:pipeline", "--db-file", database, *arguments)
        return said._replace(err="".join(f"{each}\n" for each in caplog.messages) + said.err)

    return run


@pytest.fixture
def edited(run: Callable[..., Said], write: Write) -> Callable[..., Said]:
    """Run a pipeline, change its filter, and return what runs it again."""
    write("edited.py", STAGES)
    assert run().code == 0
    # Of another length, or Python takes what it compiled within the same second for the same.
    write("edited.py", STAGES.replace("item * 2", "item * 30"))
    return run


def written() -> list[str]:
    return [Path("out", f"{index}.txt").read_text() for index in range(6)]


def test_a_change_is_said_and_the_results_stay(edited: Callable[..., Said]) -> None:
    said = edited()
    assert said.err == OF_ALL
    assert "6 completed before" in said.out
    assert written() == ["0", "2", "4", "6", "8", "10"]


def test_a_change_is_said_on_standard_error(edited: Callable[..., Said], run_python: Any) -> None:
    arguments = ("-m", "psnc", "run", "edited.py:pipeline", "--db-file", "run.db")
    assert run_python(*arguments).stderr == OF_ALL


def test_a_change_is_said_as_often_as_it_is_met(edited: Callable[..., Said]) -> None:
    assert edited().err == edited().err == OF_ALL


def test_a_change_can_be_an_error(edited: Callable[..., Said]) -> None:
    error = edited("--on-code-change", "error").error
    assert error.startswith("the code has changed, and 6 results are of the earlier one: Scale")
    assert "--on-code-change rerun" in error
    assert written() == ["0", "2", "4", "6", "8", "10"]


def test_what_has_changed_can_be_run_again(edited: Callable[..., Said]) -> None:
    said = edited("--on-code-change", "rerun")
    assert "Scale (its code): they run again\n" in said.err
    assert "6 completed, 0 failed" in said.out
    assert written() == ["0", "30", "60", "90", "120", "150"]
    assert edited().err == ""


def test_a_change_can_be_ignored(edited: Callable[..., Said]) -> None:
    assert edited("--on-code-change", "ignore").err == ""
    assert written() == ["0", "2", "4", "6", "8", "10"]


def test_only_indices_that_are_asked_for_run_again(edited: Callable[..., Said]) -> None:
    said = edited("--on-code-change", "rerun", "--indices", "1,4-5")
    assert "and 3 results are of the earlier one" in said.err
    assert written() == ["0", "30", "4", "6", "120", "150"]
    assert "and 3 results are of the earlier one" in edited().err


def test_an_edited_comment_is_no_change(edited: Callable[..., Said], write: Write) -> None:
    write("edited.py", STAGES.replace("class Scale", "\n\n# Doubles each.\nclass Scale"))
    assert edited().err == ""


def test_results_of_several_versions_are_told_apart(
    edited: Callable[..., Said], write: Write
) -> None:
    edited("--on-code-change", "rerun", "--indices", "0-1")
    text = STAGES.replace("item * 2", "item * 400").replace('" ".join', '", ".join')
    write("edited.py", text)
    said = edited()
    assert "6 results are of the earlier one: Scale (its code); Write (its code):" in said.err
    write("edited.py", STAGES.replace('" ".join', '", ".join'))
    counted = edited().err.partition(": ")[2].partition(":")[0]
    assert sorted(counted.split("; ")) == ["Scale (its code), 2", "Write (its code)"]


def test_a_choice_that_there_is_not_is_refused(psnc: Psnc) -> None:
    said = psnc("run", "three.py:pipeline", "--on-code-change", "maybe")
    assert said.code == 2
    assert "'warn', 'error', 'rerun', 'ignore'" in said.err
    with pytest.raises(PipelineError, match="on_code_change='maybe': choose one of 'warn', "):
        run_pipeline(Numbers(1).write(Discard()), on_code_change="maybe")  # type: ignore[arg-type]


def triple(item: int) -> int:
    return 3 * item


class Apply(Filter[int, int]):
    """Calls what the name stands for at the time, as a cell of a notebook does."""

    def __call__(self, items: Any) -> Any:
        return (triple(item) for item in items)


def test_a_function_that_was_defined_again_in_the_same_process_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(Numbers(3), [Apply()], Discard(), resume=True)
    run_pipeline(pipeline)
    run_pipeline(pipeline)
    assert caplog.messages == []
    monkeypatch.setitem(globals(), "triple", lambda item: 4 * item)
    with pytest.raises(CodeChangedError, match=r"3 results are of the earlier one: Apply"):
        run_pipeline(pipeline, on_code_change="error")
    run_pipeline(pipeline)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "the code has changed, and 3 results are of the earlier one"
    ]


# --- distributions and Python -----------------------------------------------------------------

INSTALLED = """
from psnc import Filter

class Same(Filter):
    def __call__(self, items):
        return items
"""

USES_INSTALLED = """
import sys
sys.path.insert(0, "site-packages")
from installed_stages import Same
from stages_for_tests import Discard, Numbers

pipeline = Numbers(2).filter(Same()).write(Discard())
"""


def test_another_version_of_a_distribution_is_a_change(
    tmp_path: Path, write: Write, run_python: Any
) -> None:
    write("site-packages/installed_stages/__init__.py", INSTALLED)
    metadata = write("site-packages/installed_stages-1.5.dist-info/METADATA", "")
    write("uses.py", USES_INSTALLED)

    def install(version: str) -> None:
        text = f"Metadata-Version: 2.1\nName: installed-stages\nVersion: {version}\n"
        metadata.write_text(text)

    def run() -> str:
        done = run_python("-m", "psnc", "run", "uses.py:pipeline", "--db-file", "run.db")
        return str(done.stderr)

    install("1.5")
    assert "code" not in run()
    assert "code" not in run()
    install("1.6")
    assert "Same (installed-stages 1.5, now 1.6)" in run()


def test_another_python_is_said_where_the_code_cannot_be_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(Numbers(2), [Apply()], Discard(), db_file=tmp_path / "run.db")
    run_pipeline(pipeline)
    change_code_versions(
        pipeline.db_path,
        lambda text: text.replace('"python": "3.', '"python": "2.').replace(
            '"code": "', '"code": "0'
        ),
    )
    change_code_digests(pipeline.db_path)
    run_pipeline(again(pipeline))
    now = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"Apply (Python 2.{sys.version_info.minor}, now {now})" in caplog.text


# --- what is on record ------------------------------------------------------------------------


def change_code_versions(database: Path, change: Callable[[str], str | None]) -> None:
    """Have a run's code be another: under another digest, and what a function makes of it."""
    with closing(sqlite3.connect(database)) as connection, connection:
        ((text,),) = connection.execute("SELECT code_versions FROM pipeline_runs").fetchall()
        (digest,) = json.loads(text)
        changed = change(text.replace(digest, "0" * 16))
        connection.execute("UPDATE pipeline_runs SET code_versions = ?", (changed,))


def change_code_digests(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "UPDATE index_results SET code_digest = ?, details_checksum = NULL", ("0" * 16,)
        )


@pytest.fixture
def recorded(tmp_path: Path) -> Pipeline[Any]:
    pipeline = Pipeline(Numbers(3), [Apply()], WriteText("out"), db_file=tmp_path / "run.db")
    run_pipeline(pipeline)
    return pipeline


def test_the_code_of_a_run_and_of_each_result_is_on_record(
    recorded: Pipeline[Any], query: Any
) -> None:
    ((text,),) = query(recorded.db_path, "SELECT code_versions FROM pipeline_runs")
    ((digest, about),) = json.loads(text).items()
    assert [stage["stage"] for stage in about["stages"]] == ["Numbers", "Apply", "WriteText"]
    assert all(len(stage["code"]) == 16 for stage in about["stages"])
    digests = query(recorded.db_path, "SELECT code_digest, count(*) FROM index_results GROUP BY 1")
    assert digests == [(digest, 3)]


def test_code_that_is_not_on_record_is_said_to_be_so(
    recorded: Pipeline[Any], caplog: pytest.LogCaptureFixture
) -> None:
    change_code_versions(recorded.db_path, lambda text: None)
    change_code_digests(recorded.db_path)
    run_pipeline(again(recorded))
    assert "3 results are of the earlier one: code that is not on record:" in caplog.text


def test_results_of_a_psnc_that_recorded_no_code_are_not_judged(
    recorded: Pipeline[Any], caplog: pytest.LogCaptureFixture
) -> None:
    change_code_versions(recorded.db_path, lambda text: None)
    with closing(sqlite3.connect(recorded.db_path)) as connection, connection:
        connection.execute("UPDATE index_results SET code_digest = NULL, details_checksum = NULL")
    run_pipeline(again(recorded), on_code_change="error")
    assert caplog.messages == []


@pytest.mark.parametrize("text", ["{", "[]", '{"0000000000000000": {}}', "7"])
def test_code_versions_that_cannot_be_read_are_damage(
    recorded: Pipeline[Any], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded.require_store("a test").close()
    with closing(sqlite3.connect(recorded.db_path)) as connection, connection:
        connection.execute("UPDATE pipeline_runs SET code_versions = ?", (text,))
    what = "code_versions of run 1 is not as it was written"
    with pytest.raises(StoreError, match=rf"damaged and was left as it is \({what}\)"):
        run_pipeline(again(recorded))
    (finding,) = check(recorded.db_path)
    assert finding.message == "run 1: code_versions is not as it was written"
    recover(recorded.db_path, tmp_path / "recovered.db")
    assert check(tmp_path / "recovered.db") == []
    mended = Pipeline(
        recorded.source, recorded.filters, recorded.sink, db_file=tmp_path / "recovered.db"
    )
    assert len(run_pipeline(mended)) == 3
    assert caplog.messages == []


# --- one code in every process ----------------------------------------------------------------

SCRIPT = """
from own_pools import *
import json, logging, sys
from psnc import Filter, Pipeline, filter, run_pipeline
from stages_for_tests import Discard, Numbers

SCALE = 2

def scaled(x):
    return SCALE * x

class Own(Filter):
    width = 7

    def __call__(self, items):
        def one(x):
            return scaled(x) + self.width
        return map(one, items)

@filter
def shifted(item, by):
    return item - by

pipeline = Pipeline(Numbers(6), [Own(), shifted(10)], Discard(), db_file="run.db")

if __name__ == "__main__":
    kind = sys.argv[1]
    if kind.startswith("psnc"):
        run_pipeline(pipeline, 2, "process_pool", start_method=kind.split()[1])
    elif kind != "sequential":
        map_in_pool(kind, pipeline.__getitem__, range(6))
    run_pipeline(pipeline, on_code_change="error")
"""


@pytest.mark.parametrize("kind", [*(f"psnc {each}" for each in METHODS), "joblib loky"])
def test_workers_and_other_peoples_pools_have_the_code_of_the_driver(
    tmp_path: Path, run_python: Any, query: Any, kind: str
) -> None:
    (tmp_path / "own_pools.py").write_text(OWN_POOLS)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    run_python("script.py", kind, JOBLIB_TEMP_FOLDER=str(tmp_path))
    assert query("run.db", "SELECT count(DISTINCT code_digest) FROM index_results") == [(1,)]
    # As a module, and as the command has it.
    run_python("-c", "from script import *; run_pipeline(pipeline, on_code_change='error')")
    run_python("-m", "psnc", "run", "script.py:pipeline", "--on-code-change", "error")


EDITED_MEANWHILE = """
from pathlib import Path
from edited import Numbers, Scale, Write
from psnc import Pipeline, run_pipeline

pipeline = Pipeline(Numbers(6), [Scale()], Write(), db_file="run.db")
file = Path("edited.py")
as_imported = file.read_text()
file.write_text(as_imported.replace("item * 2", "item * 300"))
run_pipeline(pipeline, 2, "process_pool", start_method=METHOD)
file.write_text(as_imported)
"""


@pytest.mark.parametrize("method", [each for each in METHODS if each != "fork"])
def test_what_a_worker_imported_after_an_edit_is_not_taken_for_the_code_of_the_driver(
    run: Callable[..., Said], write: Write, run_python: Any, method: str
) -> None:
    write("edited.py", STAGES)
    run_python("-c", EDITED_MEANWHILE.replace("METHOD", repr(method)))
    assert "6 results are of the earlier one: Scale (its code)" in run().err


def test_merged_databases_keep_what_the_code_was(
    psnc: Psnc, run: Callable[..., Said], write: Write
) -> None:
    write("edited.py", STAGES)
    run("--indices", "0-2", database="a.db")
    write("edited.py", STAGES.replace("item * 2", "item * 30"))
    run("--indices", "3-5", database="b.db")
    assert psnc("merge", "a.db", "b.db", "-o", "all.db").code == 0
    said = run(database="all.db")
    assert "and 3 results are of the earlier one: Scale (its code)" in said.err
    assert "6 completed before" in said.out
