"""The plugin as psnc finds it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from stages import TESTS, numbers_pipeline

from psnc import run_pipeline
from psnc.store import open_store
from psnc_postgres.store import PostgresStore


def run_psnc(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line; it finds the stages of these tests."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {TESTS!r}); from psnc.cli"]
    command[-1] += " import main; main()"
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=check)


def test_the_plugin_is_found_and_answers_for_its_schemes_only(
    store_url: str, tmp_path: Path
) -> None:
    pipeline = numbers_pipeline(store_url, 2, tmp_path / "journal")
    assert pipeline[0] == ["out/0.bin"]
    for url in (store_url, store_url.replace("postgresql:", "postgres:")):
        store = open_store(url)
        assert isinstance(store, PostgresStore)
        assert len(store.runs()) == 1
        store.close()
    other = open_store(str(tmp_path / "a.db"), create=True)
    assert not isinstance(other, PostgresStore)
    assert open_store("mysql://host/runs") is None


def test_the_driver_of_the_database_is_imported_by_those_who_use_it() -> None:
    code = """
        import sys
        from psnc.manager import plugin_manager
        from psnc.store import open_store
        assert plugin_manager().has_plugin("postgres")
        open_store("a.db", create=True).close()
        print([name for name in sys.modules if name.startswith("psycopg")])
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "[]\n"


def test_the_command_line_runs_and_looks_by_url(store_url: str, tmp_path: Path) -> None:
    Path("runs.py").write_text(
        textwrap.dedent(
            f"""
            from psnc import Pipeline
            from stages import Discard, Numbers

            class FailsOnce(Discard):
                def __call__(self, items, index):
                    if index == 1:
                        raise OSError("the disk is away")
                    return super().__call__(items, index)

            pipeline = Pipeline(Numbers(3, {str(tmp_path / "journal")!r}), sink=FailsOnce())
            """
        )
    )
    run = ("run", "runs.py:pipeline", "--store", store_url, "--resume")
    finished = run_psnc(*run, check=False)
    assert "2 completed, 1 failed" in finished.stdout, finished.stderr
    assert store_url in finished.stdout
    assert "2 of 3 completed, 1 failed" in run_psnc("status", store_url).stdout
    assert run_psnc("errors", store_url).stdout == "1: OSError: the disk is away\n"
    run_psnc("reset", store_url, "--index", "0", "--yes")
    assert "1 of 3 completed" in run_psnc("status", store_url).stdout


def test_the_password_is_nowhere_to_be_seen(
    server_url: str, store_url: str, tmp_path: Path, capfd: Any
) -> None:
    # The server lets this user in whatever the password is.
    url = store_url.replace("postgresql://psnc@", "postgresql://psnc:secret@")
    assert url != store_url
    pipeline = numbers_pipeline(url, 2, tmp_path / "journal")
    run_pipeline(pipeline, progress=True)
    assert "secret" not in str(pipeline.summary())
    assert "***" in pipeline.summary()["db_path"]
    finished = run_psnc("status", url.replace("schema=psnc_test", "schema=not_there"), check=False)
    assert finished.returncode == 3
    assert "psnc:***@" in finished.stderr
    printed = "".join(capfd.readouterr()) + finished.stdout + finished.stderr
    assert "secret" not in printed
