"""SQLite's store keeps the rules of a store, and the suite finds stores that do not."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from psnc.testing import StoreSuite


class TestSQLiteStore(StoreSuite):
    """One file is one run: pipelines that are told to begin afresh share it."""

    holds_many_runs = False

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return str(tmp_path / "suite.db")


# --- stores that break a rule -----------------------------------------------------------------

# Each is SQLite's but for one thing, and belongs to the URL scheme of its name.
BROKEN_STORES = """
    from pathlib import Path

    import attrs

    from psnc import Config, hookimpl
    from psnc.builtin.checkpoint.store import SQLiteStore
    from psnc.builtin.checkpoint.writer import (
        Transaction, _comes_too_late, _index_rows, _log_rows
    )

    class ForgetsLogs(SQLiteStore):
        def record(self, record):
            super().record(attrs.evolve(record, logs=()))

    class LetsErrorsWin(SQLiteStore):
        def record(self, record):
            if record.status == "error":
                update = "UPDATE {schema}.index_results SET status = 'error'"
                key = (self.run_id, record.index)
                self.change([(f"{update} WHERE run_id = ? AND idx = ?", key)])
            super().record(record)

    class SortsPaths(SQLiteStore):
        def record(self, record):
            super().record(attrs.evolve(record, output_paths=tuple(sorted(record.output_paths))))

    class FlushesLater(SQLiteStore):
        def flush(self):
            pass

    class FindsOnlyWhatIsWritten(SQLiteStore):
        def pending(self, index):
            return None

    class CountsEverything(SQLiteStore):
        def counts(self, total):
            return super().counts(2**62)

    class ForgetsTooMuch(SQLiteStore):
        def reset(self):
            for row in self.runs():
                self.select(row.run_id)
                super().reset()

    class RecordsInTwoTransactions(SQLiteStore):
        def write_group(self, run_id, records, workers):
            nothing = {"stages": (), "artifacts": (), "logs": ()}
            super().write_group(run_id, [attrs.evolve(r, **nothing) for r in records], workers)
            connection = self._connection()
            with Transaction(connection):
                kept = [r for r in records if not _comes_too_late(connection, run_id, r)]
                kept = [attrs.evolve(each, output_paths=()) for each in kept]
                rows_of_indices = _index_rows(run_id, kept, {})[1:]
                for text, rows in (*rows_of_indices, _log_rows(run_id, records)):
                    connection.executemany(text.replace("INSERT", "INSERT OR REPLACE"), rows)

    class KeepsNoClaims(SQLiteStore):
        def claims(self):
            return ()

        def change_claims(self, change):
            pass

    class ChangesClaimsInTwoTransactions(SQLiteStore):
        def change_claims(self, change):
            claims = change(self.claims())
            super().change_claims(lambda later: claims)

    STORES = {each.__name__.lower(): each for each in SQLiteStore.__subclasses__()}

    @hookimpl
    def psnc_open_store(url, run, create):
        scheme, separator, path = url.partition("://")
        if separator:
            config = Config() if run is None else run.plugins.config
            return STORES[scheme](Path(path), create=create, config=config)
"""

TESTS_OF_BROKEN_STORES = """
    import pytest
    from broken_stores import STORES
    from psnc.testing import StoreSuite

    def suite_for(name):
        class Suite(StoreSuite):
            holds_many_runs = False
            keeps_claims = name != "keepsnoclaims"
            plugins = ("broken_stores",)

            @pytest.fixture
            def store_url(self, tmp_path):
                return f"{name}://{tmp_path}/suite.db"

        return Suite

    for name, store in STORES.items():
        globals()[f"Test{store.__name__}"] = suite_for(name)
"""

# Some of the tests that have to notice; those that start processes are left out for their time.
NOTICED: dict[str, set[str]] = {
    "ForgetsLogs": {
        "log_entries_are_recorded",
        "everything_of_a_failed_index_is_recorded",
        "a_completion_takes_the_place_of_an_error",
        "an_error_does_not_take_the_place_of_a_completion",
        "an_error_does_not_take_the_place_of_what_another_process_completed",
        "an_index_that_completes_again_replaces_what_was_recorded_but_adds_its_log",
        "text_of_any_kind_is_kept",
        "text_that_is_no_unicode_does_not_keep_an_index_from_being_recorded",
        "reset_index_forgets_one_index_with_its_log",
        "eight_threads_at_once_lose_nothing",
        "an_index_that_another_process_records_is_there_whole_or_not_at_all",
    },
    "LetsErrorsWin": {
        "an_error_does_not_take_the_place_of_a_completion",
        "an_error_does_not_take_the_place_of_what_another_process_completed",
        "threads_of_two_stores_that_record_the_same_indices_lose_nothing",
    },
    "SortsPaths": {
        "output_paths_keep_the_order_of_the_sink",
        "everything_of_a_completed_index_is_recorded",
    },
    "FlushesLater": {
        "what_is_flushed_is_there_for_others",
        "everything_of_a_completed_index_is_recorded",
    },
    "FindsOnlyWhatIsWritten": {
        "a_completed_index_is_found_before_it_is_flushed",
        "output_paths_keep_the_order_of_the_sink",
        "eight_threads_at_once_lose_nothing",
    },
    "CountsEverything": {"counts_are_of_the_indices_below_the_total"},
    "ForgetsTooMuch": {
        "reset_forgets_everything_of_the_run",
        "each_run_has_claims_of_its_own_which_a_reset_keeps",
    },
    "RecordsInTwoTransactions": {
        "an_index_that_another_process_records_is_there_whole_or_not_at_all"
    },
    "ChangesClaimsInTwoTransactions": {"no_change_of_claims_comes_in_the_middle_of_another"},
    # To keep them is optional.
    "KeepsNoClaims": set(),
}
EXACTLY = {
    "ForgetsLogs",
    "LetsErrorsWin",
    "CountsEverything",
    "ForgetsTooMuch",
    "KeepsNoClaims",
}


@pytest.fixture(scope="module")
def failed_tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Run the suite on every broken store; return the tests that failed, by store."""
    directory = tmp_path_factory.mktemp("broken")
    (directory / "broken_stores.py").write_text(textwrap.dedent(BROKEN_STORES))
    (directory / "test_broken.py").write_text(textwrap.dedent(TESTS_OF_BROKEN_STORES))
    options = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--rootdir=."]
    without_processes = "not processes and not fork and not killed and not run_is_recorded"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", without_processes, "test_broken.py"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1, finished.stdout
    failed: dict[str, set[str]] = defaultdict(set)
    for result, store, test in re.findall(
        r"^(FAILED|ERROR) \S+::Test(\w+)::test_(\w+)", finished.stdout, re.MULTILINE
    ):
        assert result == "FAILED", finished.stdout
        failed[store].add(test)
    return failed


@pytest.mark.parametrize("store", NOTICED)
def test_the_suite_notices_a_store_that_breaks_a_rule(
    store: str, failed_tests: dict[str, set[str]]
) -> None:
    failed: Any = failed_tests[store]
    assert failed >= NOTICED[store]
    if store in EXACTLY:
        assert failed == NOTICED[store]
