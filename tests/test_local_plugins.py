"""Plugins of a directory: modules named by ``-p``, and ``psnc_plugins.py`` beside a pipeline.

They are loaded in every process of a run, with what the driver's settings are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import PIPELINE, TELL, Psnc, Write, psnc, write
from drivers import BACKENDS, jobs
from stages_for_tests import Discard, Numbers

from psnc import Config, PluginError, PluginManager, activate, run_pipeline
from psnc.manager import BUILT_IN_PLUGINS, activated

__all__ = ["psnc", "write"]

ALL = ["0", "1", "2"]


def _tell(name: str) -> str:
    return TELL.replace("{__name__.partition('_plugins_')[0]}", name)


# --- named by -p ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "run three:pipeline -p tell",
        "run -ptell three.py:pipeline",
        "-p tell run three:pipeline",
        "-ptell run three:pipeline",
        "-p tell run three:pipeline -p tell -ptell",
        "-p no:tell run three:pipeline -p tell",
        "run three:pipeline -p no:tell -p tell",
    ],
)
def test_a_module_of_the_working_directory_is_loaded_once(
    arguments: str, psnc: Psnc, write: Write
) -> None:
    write("tell.py", TELL)
    assert psnc(*arguments.split()).told() == ALL


@pytest.mark.parametrize(
    "arguments",
    [
        "run three:pipeline",
        "-p tell run three:pipeline -p no:tell",
        "run three:pipeline -ptell -pno:tell",
    ],
)
def test_a_module_that_is_not_asked_for_is_not_loaded(
    arguments: str, psnc: Psnc, write: Write
) -> None:
    write("tell.py", TELL)
    assert psnc(*arguments.split()).told() == []


def test_an_option_without_its_value_is_a_usage_error(psnc: Psnc) -> None:
    said = psnc("run", "three:pipeline", "-p")
    assert said.code == 2
    assert "Option '-p' requires an argument." in said.err


@pytest.mark.parametrize("target", [".:x", "..:x", "three.:x", ".three:x", ":x", "a b:x"])
def test_a_target_that_names_no_module_is_refused_in_one_line(target: str, psnc: Psnc) -> None:
    assert psnc("run", target).error


# --- psnc_plugins.py --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("deep/five.py:pipeline", "deep"),
        ("./deep/../deep/five.py:pipeline", "deep"),
        ("deep.five:pipeline", "deep"),
        ("package.inner.five:pipeline", "package/inner"),
        ("deep/five.toml", "deep"),
        ("three:pipeline", ""),
        ("three.py:pipeline", ""),
        ("deep/five.py:pipeline", ""),
    ],
)
def test_the_file_beside_a_pipeline_or_in_the_working_directory_is_loaded(
    target: str, place: str, psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    write("deep/five.py", PIPELINE)
    write("package/__init__.py", "")
    write("package/inner/__init__.py", "")
    write("package/inner/five.py", PIPELINE)
    Numbers(3).write(Discard()).save(tmp_path / "deep" / "five.toml")
    write(f"{place or '.'}/psnc_plugins.py", _tell("local"))
    assert psnc("run", target).told("local") == ALL
    assert psnc("run", target, "-p", "no:psnc_plugins").told("local") == []


def test_a_module_elsewhere_on_the_path_has_the_file_beside_it(
    psnc: Psnc, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("elsewhere/five.py", PIPELINE)
    write("elsewhere/psnc_plugins.py", _tell("local"))
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert psnc("run", "five:pipeline").told("local") == ALL


def test_the_file_of_another_directory_is_left_alone(psnc: Psnc, write: Write) -> None:
    write("deep/psnc_plugins.py", _tell("local"))
    assert psnc("run", "three:pipeline").told("local") == []


def test_of_two_files_both_are_loaded_and_the_working_directorys_is_asked_first(
    psnc: Psnc, write: Write
) -> None:
    write("deep/five.py", PIPELINE)
    write("deep/psnc_plugins.py", _tell("beside"))
    write("psnc_plugins.py", _tell("here"))
    said = psnc("run", "deep/five.py:pipeline")
    assert (said.told("beside"), said.told("here")) == (ALL, ALL)
    assert said.out.startswith("here 0\nbeside 0\n")
    kept_out = psnc("run", "deep/five.py:pipeline", "-p", "no:psnc_plugins")
    assert (kept_out.told("beside"), kept_out.told("here")) == ([], [])


@pytest.mark.parametrize("target", ["deep/../three.py:pipeline", "link/three.py:pipeline"])
def test_a_file_that_is_reached_in_two_ways_is_loaded_once(
    target: str, psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(".")
    write("psnc_plugins.py", _tell("local"))
    assert psnc("run", target).told("local") == ALL


def test_a_file_that_is_named_besides_is_loaded_once(psnc: Psnc, write: Write) -> None:
    write("psnc_plugins.py", _tell("local"))
    assert psnc("run", "three:pipeline", "-p", "psnc_plugins").told("local") == ALL


def test_a_directory_of_the_files_name_is_none(psnc: Psnc, tmp_path: Path) -> None:
    (tmp_path / "psnc_plugins.py").mkdir()
    assert psnc("run", "three:pipeline").code == 0


def test_a_file_may_import_what_lies_beside_it(psnc: Psnc, write: Write) -> None:
    write("deep/five.py", PIPELINE)
    write("deep/helper.py", "def shout(text):\n    print(text)\n")
    write(
        "deep/psnc_plugins.py", "import helper\n" + _tell("local").replace("print", "helper.shout")
    )
    assert psnc("run", "deep/five.py:pipeline").told("local") == ALL


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import os\ndef (:", "{file}: importing it raised SyntaxError: invalid syntax at "
         "{file}:2: mend it, or run with -p no:psnc_plugins"),
        ("import os\n\n1 / 0", "{file}: importing it raised ZeroDivisionError: division by zero at "
         "{file}:3: mend it, or run with -p no:psnc_plugins"),
        ("import sys\nsys.exit(3)", "{file}: importing it raised SystemExit: 3 at {file}:2: mend "
         "it, or run with -p no:psnc_plugins"),
        ("import nothing_here", "{file}: importing it raised ModuleNotFoundError: No module named "
         "'nothing_here' at {file}:1: mend it, or run with -p no:psnc_plugins"),
        ("raise ValueError('two\\nlines')", "{file}: importing it raised ValueError: two lines at "
         "{file}:1: mend it, or run with -p no:psnc_plugins"),
        ("from psnc import hookimpl\n@hookimpl\ndef psnc_index_dome(): pass", "{file}: there is no "
         "hook 'psnc_index_dome' ({file}:3): did you mean 'psnc_index_done'?"),
        ("def psnc_index_done(record): pass", "{file}: psnc_index_done is not marked as a hook "
         "({file}:1): decorate it with @psnc.hookimpl"),
    ],
)  # fmt: skip
def test_a_broken_file_stops_a_run_in_one_line_and_no_listing(
    text: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    file = write("psnc_plugins.py", text)
    expected = complaint.format(file=file)
    assert psnc("run", "three:pipeline").error == expected
    assert psnc("run", "three:pipeline", "-p", "no:psnc_plugins").code == 0
    listed = psnc("plugins")
    assert listed.code == 2
    assert f"failed to load: {expected}\n" in listed.out
    # Mended, it is read anew.
    write("psnc_plugins.py", _tell("local"))
    assert psnc("run", "three:pipeline").told("local") == ALL


def test_a_hook_of_the_file_that_raises_is_told_with_the_file(psnc: Psnc, write: Write) -> None:
    file = write(
        "psnc_plugins.py",
        """
        from psnc import hookimpl

        @hookimpl
        def psnc_sources():
            raise OSError("no licence")
        """,
    )
    assert psnc("stages").error == (
        f"{file} raised in psnc_sources (OSError: no licence): mend it, or run with "
        "-p no:psnc_plugins"
    )


def test_a_plain_script_has_the_file_beside_it(
    run_python: Callable[..., Any], write: Write
) -> None:
    write("deep/psnc_plugins.py", _tell("beside"))
    write("psnc_plugins.py", _tell("here"))
    script = write(
        "deep/script.py",
        """
        from psnc import run_pipeline
        from stages_for_tests import Discard, Numbers

        run_pipeline(Numbers(1).write(Discard()))
        """,
    )
    assert run_python(script).stdout == "here 0\nbeside 0\n"


# --- classes of the file ----------------------------------------------------------------------

STAGE = """
import psnc

@psnc.filter
def note_process(item):
    import os
    yield os.getpid()

class Halves(psnc.Filter):
    def __call__(self, items):
        for item in items:
            yield item / 2

@psnc.hookimpl
def psnc_filters():
    return {"halves": Halves}
"""

HALVES = """
from pathlib import Path
from stages_for_tests import Numbers, WriteText
from psnc_plugins import Halves

pipeline = Numbers(3).filter(Halves()).write(WriteText(str(Path(__file__).parent / "out")))
"""


def _written(tmp_path: Path) -> list[str]:
    return [(tmp_path / "deep" / "out" / f"{i}.txt").read_text() for i in range(3)]


@pytest.mark.parametrize("here", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_of_the_file_is_a_stage_in_every_worker(
    backend: str, here: bool, psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    write("deep/psnc_plugins.py", STAGE)
    write("deep/halves.py", HALVES)
    if here:
        write("psnc_plugins.py", _tell("here"))
    said = psnc("run", "deep/halves.py:pipeline", "--backend", backend, "-j", jobs(backend))
    assert sorted(said.told("here")) == (ALL if here else [])
    assert _written(tmp_path) == ["0.0\n", "0.5\n", "1.0\n"]


def test_a_class_of_the_file_has_one_hash_wherever_it_is_run_from(
    psnc: Psnc, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("deep/psnc_plugins.py", STAGE)
    write("deep/halves.py", HALVES)
    write("psnc_plugins.py", _tell("here"))
    recorded = []
    for place, target in ((".", "deep/halves.py:pipeline"), ("deep", "halves:pipeline")):
        monkeypatch.chdir(tmp_path / place)
        assert psnc("run", target, "--db-file", tmp_path / "one.db").code == 0
        recorded.append(json.loads(psnc("status", tmp_path / "one.db", "--json").out))
    first, second = recorded
    assert len(first) == len(second) == 1


def test_the_classes_of_two_files_in_one_process_are_told_apart(
    write: Write, tmp_path: Path
) -> None:
    kept = []
    for name in ("one", "two"):
        path = write(f"{name}/psnc_plugins.py", STAGE.replace("/ 2", f"* {len(name) + len(kept)}"))
        manager = PluginManager(Config(local_plugins=(str(path),)))
        manager.load()
        kept.append(manager.stage_class("filter", "halves"))
        manager.close()
    one, two = kept
    assert list(one()(iter([1]))) == [3]
    assert list(two()(iter([1]))) == [4]
    # The second is not called psnc_plugins here; a worker that sees it alone must know it, too.
    manager = PluginManager(Config(local_plugins=(str(tmp_path / "two" / "psnc_plugins.py"),)))
    manager.load()
    with activated(manager):
        pipeline = Numbers(2).filter(two()).write(Discard())
        assert run_pipeline(pipeline, 2, "process_pool") == [["out/0-0.bin"], ["out/1-0.bin"]]
    manager.close()


# --- workers ----------------------------------------------------------------------------------

# Notes in each process what it is set to.
NOTES = """
import json
import os
from psnc import hookimpl, plugin_manager

@hookimpl
def psnc_addoptions(parser):
    parser.add_option("--note", default="none")

@hookimpl
def psnc_index_done(context, record):
    manager, config = context.run.plugins, context.run.plugins.config
    note = {
        "plugins": list(manager.origins),
        "strict": config.strict_plugins,
        "level": config.log_level,
        "note": config.option("note"),
        "same": manager is plugin_manager(),
    }
    with open("notes.txt", "a") as file:
        file.write(json.dumps([os.getpid(), note]) + "\\n")
"""

METHODS = [("sequential", None), ("thread_pool", None), ("other", None)] + [
    ("process_pool", method) for method in ("forkserver", "spawn", "fork")
]

# Runs batches in Python processes that know nothing of the driver but the task's bytes.
OTHER_BACKEND = """
import pickle
import subprocess
import sys
from concurrent.futures import Future

from psnc import Backend, hookimpl

CODE = '''
import pickle, sys
content, indices = pickle.load(sys.stdin.buffer)
from psnc import WorkerTask
task = WorkerTask.from_bytes(content)
result = task(indices)
task.close()
sys.stdout.buffer.write(pickle.dumps(result))
'''

class Other(Backend):
    def start(self, task):
        self.content = task.to_bytes()

    def submit(self, indices):
        finished = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd="/",
            input=pickle.dumps((self.content, list(indices))),
            stdout=subprocess.PIPE,
            check=True,
        )
        future = Future()
        future.set_result(pickle.loads(finished.stdout))
        return future

    def stop(self, *, now=False):
        pass

@hookimpl
def psnc_backends():
    return {"other": Other}
"""


@pytest.fixture
def notes(write: Write, tmp_path: Path) -> Callable[[], dict[int, list[Any]]]:
    """Write the plugins, and return what they noted, by process."""
    # By its whole path, as a process may work in another directory.
    text = NOTES.replace('"notes.txt"', repr(str(tmp_path / "notes.txt")))
    write("psnc_plugins.py", text)
    write("other_backend.py", OTHER_BACKEND)
    write("named.py", _tell("named"))

    def read() -> dict[int, list[Any]]:
        by_pid: dict[int, list[Any]] = {}
        for line in (tmp_path / "notes.txt").read_text().splitlines():
            pid, note = json.loads(line)
            by_pid.setdefault(pid, []).append(note)
        return by_pid

    return read


@pytest.mark.parametrize(("backend", "method"), METHODS)
def test_workers_have_the_drivers_plugins_and_settings(
    backend: str,
    method: str | None,
    notes: Callable[[], Mapping[int, list[Any]]],
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from psnc.settings import read_config

    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "1")
    monkeypatch.setenv("PSNC_PLUGINS", "no:gpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    write("psnc.toml", "note = 'of the file'\nlog-level = 'error'\nplugins = ['no:memory']")
    config = read_config(plugins=["named", "other_backend"], beside=[tmp_path])
    # What workers would find for themselves is not what the driver's settings came from.
    write("psnc.toml", "plugins = ['nothing_at_all']")
    manager = PluginManager(config)
    manager.load_plugins()
    manager.require_plugins()
    manager.configure(strict_plugins=True)
    with activated(manager):
        options = {} if method is None else {"start_method": method}
        n_jobs = 1 if backend == "other" else jobs(backend)
        run_pipeline(Numbers(4).write(Discard()), n_jobs, backend, **options)
    manager.close()
    built_in = [name for name in BUILT_IN_PLUGINS if name not in ("gpu", "memory")]
    expected = {
        "plugins": [*built_in, "named", "other_backend", str(tmp_path / "psnc_plugins.py")],
        "strict": True,
        "level": 40,
        "note": "of the file",
        "same": True,
    }
    noted = notes()
    assert [note for each in noted.values() for note in each] == [expected] * 4
    assert (os.getpid() in noted) == (backend in ("sequential", "thread_pool"))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_plugin_is_set_up_and_cleans_up_once_in_each_process(
    method: str, run_python: Callable[..., Any], write: Write, tmp_path: Path
) -> None:
    write(
        "psnc_plugins.py",
        """
        import os
        from psnc import hookimpl

        def note(word):
            with open("calls.txt", "a") as file:
                file.write(f"{os.getpid()} {word}\\n")

        @hookimpl
        def psnc_configure():
            note("set up")

        @hookimpl
        def psnc_unconfigure():
            note("clean up")
        """,
    )
    script = write(
        "script.py",
        f"""
        from psnc import run_pipeline
        from stages_for_tests import Discard, Numbers

        if __name__ == "__main__":
            run_pipeline(Numbers(8).write(Discard()), 2, "process_pool", start_method="{method}")
        """,
    )
    run_python(script)
    by_pid: dict[str, list[str]] = {}
    for line in (tmp_path / "calls.txt").read_text().splitlines():
        pid, _, word = line.partition(" ")
        by_pid.setdefault(pid, []).append(word)
    driver = next(iter(by_pid))
    assert by_pid.pop(driver) == ["set up", "clean up"]
    # A worker that is stopped before it has begun does not clean up; a forked one leaves alone
    # what its parent set up.
    assert by_pid
    assert set(map(tuple, by_pid.values())) <= {("set up", "clean up"), ("set up",)}


def test_a_module_cleans_up_before_it_is_set_up_anew(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        "careful.py",
        """
        from psnc import hookimpl

        calls = []

        @hookimpl
        def psnc_configure():
            calls.append("set up")

        @hookimpl
        def psnc_unconfigure():
            calls.append("clean up")
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with activated(PluginManager()):
        activate(Config(plugins=("careful",)))
        activate(Config(plugins=("careful",)))
        activate(Config())
    assert sys.modules["careful"].calls == ["set up", "clean up", "set up", "clean up"]


def test_settings_that_are_refused_leave_the_plugins_as_they_are(write: Write) -> None:
    with activated(PluginManager()) as manager:
        with pytest.raises(PluginError, match="nothing_at_all"):
            activate(Config(plugins=("nothing_at_all",)))
        from psnc import plugin_manager

        assert plugin_manager() is manager
