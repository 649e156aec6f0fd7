"""Log entries of an index are recorded with it, and logging is left as it was found."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, jobs, write_script
from stages_for_tests import Discard, FailOn, Log, Numbers, WaitFor, wait_until

from psnc import Config, Filter, LogRecord, Pipeline, hookimpl, run_pipeline
from psnc.execution import IndexContext
from psnc.manager import PluginManager, activated

Run = Callable[..., subprocess.CompletedProcess[str]]
Query = Callable[..., Any]


@contextmanager
def nobody_set_up_logging() -> Iterator[None]:
    """Take pytest's own handlers away: they are there in every phase of a test."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = handlers


class Chatter(Filter[int, int]):
    """Logs at every level, from several loggers."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            logging.debug("root says debug %d", item)
            logging.getLogger("some.library").info("library says info %d", item)
            logging.getLogger("some.library.deeper").warning("deeper says warning %d", item)
            yield item


class InHelperThread(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            helper = threading.Thread(target=logging.warning, args=("helper of %d", item))
            helper.start()
            helper.join()
            yield item


class LogSlowly(Filter[int, int]):
    """Gives another thread the time to log in between."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            for part in range(5):
                logging.getLogger("slow").warning("%d of %d", part, item)
                time.sleep(0.002)
            yield item


class Warn(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        warnings.warn("this is old", stacklevel=1)
        logging.getLogger("tests").error("with a traceback", exc_info=ValueError("inner"))
        return items


def _entries(pipeline: Pipeline[Any], query: Query) -> list[tuple[int, str, str, str]]:
    pipeline.summary()  # what is recorded is in the database once the pipeline is asked
    return list(
        query(
            pipeline.db_path,
            "SELECT idx, level_name, logger_name, message FROM logs ORDER BY idx, id",
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_any_logger_are_recorded_with_the_index_and_its_worker(
    backend: str, query: Query
) -> None:
    pipeline = Numbers(3).filter(Chatter()).write(Discard())
    with nobody_set_up_logging():
        run_pipeline(pipeline, jobs(backend), backend)
    assert _entries(pipeline, query) == [
        entry
        for i in range(3)
        for entry in (
            (i, "INFO", "some.library", f"library says info {i}"),
            (i, "WARNING", "some.library.deeper", f"deeper says warning {i}"),
        )
    ]
    mismatches = query(
        pipeline.db_path,
        "SELECT * FROM logs l JOIN index_results r USING (run_id, idx)"
        " WHERE l.worker_id IS NOT r.worker_id",
    )
    assert mismatches == []


def test_entries_outside_of_an_index_are_not_recorded(query: Query) -> None:
    pipeline = Numbers(2).filter(Log(logging.WARNING)).write(Discard())
    with nobody_set_up_logging():
        logging.getLogger("before").info("before")
        _ = pipeline[0]
        logging.getLogger("between").error("between")
        _ = pipeline[1]
        logging.getLogger("after").error("after")
    assert [entry[3] for entry in _entries(pipeline, query)] == ["item 0", "item 1"]


def test_entries_of_the_driver_are_not_taken_for_those_of_an_index_in_a_thread(
    plugins: PluginManager, tmp_path: Path, query: Query
) -> None:
    class TellsTheDriver:
        @hookimpl
        def psnc_index_reported(self) -> None:
            # The other thread is in the middle of its index.
            wait_until((tmp_path / "reached-1").exists)
            logging.getLogger("driver").warning("reported")
            (tmp_path / "go").touch()

    plugins.register(TellsTheDriver())
    pipeline = Numbers(2).filter(WaitFor(str(tmp_path), [1])).write(Discard())
    run_pipeline(pipeline, 2, "thread_pool")
    assert _entries(pipeline, query) == []


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
@pytest.mark.parametrize(
    ("level", "names"),
    [
        (logging.DEBUG, ["DEBUG", "INFO", "WARNING"]),
        (logging.INFO, ["INFO", "WARNING"]),
        (logging.ERROR, []),
    ],
)
def test_the_configured_level_says_what_is_recorded(
    level: int, names: list[str], backend: str, query: Query
) -> None:
    manager = PluginManager(Config(log_level=level))
    manager.load()
    with activated(manager), nobody_set_up_logging():
        pipeline = Numbers(1).filter(Chatter()).write(Discard())
        run_pipeline(pipeline, 1, backend)
        assert [entry[1] for entry in _entries(pipeline, query)] == names
    manager.close()


def test_the_traceback_of_an_entry_is_recorded_with_it(query: Query) -> None:
    pipeline = Numbers(1).filter(Warn()).write(Discard())
    with pytest.warns(UserWarning, match="this is old"):
        run_pipeline(pipeline)
    ((_, _, _, message),) = _entries(pipeline, query)
    assert message.startswith("with a traceback\n")
    assert message.endswith("ValueError: inner")


def test_entries_come_before_the_failure_that_they_led_to(query: Query) -> None:
    pipeline = Numbers(1).filter(Log(logging.WARNING)).filter(FailOn([0])).write(Discard())
    run_pipeline(pipeline)
    first, second = _entries(pipeline, query)
    assert first == (0, "WARNING", "tests.stages", "item 0")
    assert second[:3] == (0, "ERROR", "psnc.execution")
    assert "bad item 0" in second[3]


def test_a_retry_adds_its_entries_to_those_of_the_failure(tmp_path: Path, query: Query) -> None:
    mended = tmp_path / "mended"
    filters = [Log(logging.WARNING), FailOn([0], str(mended))]
    pipeline = Pipeline(Numbers(1), filters, Discard())
    run_pipeline(pipeline)
    mended.touch()
    run_pipeline(pipeline)
    names = [entry[1] for entry in _entries(pipeline, query)]
    assert names == ["WARNING", "ERROR", "WARNING"]


def test_threads_do_not_mix_up_their_entries(query: Query) -> None:
    pipeline = Numbers(12).filter(LogSlowly()).write(Discard())
    run_pipeline(pipeline, 4, "thread_pool")
    assert _entries(pipeline, query) == [
        (i, "WARNING", "slow", f"{part} of {i}") for i in range(12) for part in range(5)
    ]


def test_entries_of_a_thread_that_a_stage_started_belong_to_its_index(query: Query) -> None:
    pipeline = Numbers(3).filter(InHelperThread()).write(Discard())
    run_pipeline(pipeline)
    assert [(entry[0], entry[3]) for entry in _entries(pipeline, query)] == [
        (i, f"helper of {i}") for i in range(3)
    ]


def test_a_plugin_that_logs_for_every_entry_is_not_called_for_its_own(
    plugins: PluginManager, query: Query
) -> None:
    class Echo:
        def __init__(self) -> None:
            self.heard: list[str] = []

        @hookimpl
        def psnc_log_record(self, context: IndexContext, record: LogRecord) -> None:
            self.heard.append(record.message)
            logging.getLogger("echo").warning("heard %s", record.message)

    echo = Echo()
    plugins.register(echo)
    pipeline = Numbers(2).filter(Log(logging.WARNING)).write(Discard())
    run_pipeline(pipeline)
    assert echo.heard == ["item 0", "item 1"]
    assert [entry[3] for entry in _entries(pipeline, query)] == ["item 0", "item 1"]


def test_an_entry_that_cannot_be_formatted_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Careless(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            logging.getLogger("careless").warning("%d items", "many")
            return items

    # pytest's own handlers raise where others complain on standard error.
    monkeypatch.setattr(logging, "lastResort", None)
    pipeline = Numbers(2).filter(Careless()).write(Discard())
    with nobody_set_up_logging():
        assert run_pipeline(pipeline) == [["out/0-0.bin"], ["out/1-0.bin"]]


# --- logging as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [[], [1]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_leaves_logging_as_it_was(backend: str, fails: list[int]) -> None:
    root = logging.getLogger()
    with nobody_set_up_logging():
        level = root.level
        pipeline = Numbers(3).filter(Chatter()).filter(FailOn(fails)).write(Discard())
        run_pipeline(pipeline, jobs(backend), backend)
        assert (root.level, root.handlers) == (level, [])


def test_an_interrupted_index_leaves_logging_as_it_was() -> None:
    class Interrupt(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            raise KeyboardInterrupt

    root = logging.getLogger()
    with nobody_set_up_logging():
        level = root.level
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(Numbers(1).filter(Interrupt()).write(Discard()))
        assert (root.level, root.handlers) == (level, [])


def test_a_program_that_set_up_logging_sees_what_it_asked_for_and_no_more(
    tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import logging
        from psnc import run_pipeline
        from stages_for_tests import Discard, Log, Numbers

        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
        for level in (logging.INFO, logging.WARNING):
            run_pipeline(Numbers(2).filter(Log(level)).write(Discard()))
        root = logging.getLogger()
        print(root.level, len(root.handlers))
        """,
    )
    finished = run_python(script)
    assert finished.stderr == "WARNING item 0\nWARNING item 1\n"
    assert finished.stdout == "30 1\n"


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
def test_warnings_still_reach_standard_error_where_nobody_set_up_logging(
    backend: str, tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import logging, sys
        from psnc import run_pipeline
        from stages_for_tests import Discard, Log, Numbers

        for level in (logging.INFO, logging.WARNING):
            pipeline = Numbers(1).filter(Log(level)).write(Discard())
            run_pipeline(pipeline, 1, sys.argv[1])
        logging.getLogger("after").info("not this")
        logging.getLogger("after").warning("but this")
        """,
    )
    finished = run_python(script, backend)
    assert finished.stderr == "item 0\nbut this\n"
