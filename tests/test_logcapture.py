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
    level = root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


class Do(Filter[int, int]):
    """Calls a function with each item."""

    function: Callable[[int], object]

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            self.function(item)
            yield item


def do(function: Callable[[int], object]) -> Do:
    """Return a stage that calls a function; which one is no matter for the pipeline's hash."""
    stage = Do()
    stage.function = function
    return stage


class Collect(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def private() -> Iterator[logging.Logger]:
    """Return a logger that nobody else has, as it is made."""
    logger = logging.getLogger("tests.private")
    yield logger
    logger.handlers = []
    logger.propagate = True
    logger.disabled = False
    logger.setLevel(logging.NOTSET)


class Chatter(Filter[int, int]):
    """Logs at every level, from several loggers."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            logging.getLogger().debug("root says debug %d", item)
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


def test_an_entry_that_cannot_be_shown_in_any_way_stops_nothing(query: Query) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    careless = logging.getLogger("careless")
    careless.addFilter(lambda record: True)
    careless.propagate = False
    careless.addHandler(logging.NullHandler())
    pipeline = Numbers(1).filter(do(lambda item: careless.warning(Broken(), Broken())))
    assert run_pipeline(pipeline.write(Discard())) == [["out/0-0.bin"]]


def test_text_that_is_no_unicode_is_recorded(private: logging.Logger, query: Query) -> None:
    private.propagate = False
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    pipeline = Numbers(1).filter(do(lambda item: private.warning("lost %s", name)))
    written = pipeline.write(Discard())
    run_pipeline(written, on_error="raise")
    ((_, _, _, message),) = _entries(written, query)
    assert message == r"lost caf\udce9.txt"


# --- every logger, whatever becomes of its handlers -------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logger_that_does_not_propagate_is_captured_too(backend: str, query: Query) -> None:
    pipeline = Numbers(2).filter(LogPrivately()).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend)
    assert [entry[2:] for entry in _entries(pipeline, query)] == [
        (f"alone.{i}", f"alone with {i}") for i in range(2)
    ]


class LogPrivately(Filter[int, int]):
    """Makes a logger for each item, which keeps its entries to itself."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            logger = logging.getLogger(f"alone.{item}")
            logger.propagate = False
            logger.addHandler(logging.NullHandler())
            logger.warning("alone with %d", item)
            yield item


SET_UP = """
import logging, logging.config, sys
from psnc import Filter, run_pipeline
from stages_for_tests import Discard, Numbers

SHOWN = {"level": logging.INFO, "format": "%(levelname)s %(message)s"}

def force():
    logging.basicConfig(force=True, **SHOWN)

def replace():
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(SHOWN["format"]))
    logging.getLogger().handlers = [handler]
    logging.getLogger().setLevel(logging.INFO)

def configure():
    logging.config.dictConfig({
        "version": 1,
        "disable_existing_loggers": True,
        "formatters": {"plain": {"format": SHOWN["format"]}},
        "handlers": {"shown": {"class": "logging.StreamHandler", "formatter": "plain"}},
        "root": {"level": "INFO", "handlers": ["shown"]},
    })

class SetUp(Filter):
    def __call__(self, items):
        for item in items:
            logging.getLogger("there before").warning("first of %d", item)
            globals()[sys.argv[1]]()
            logging.getLogger(f"made after {item}").info("second of %d", item)
            yield item

pipeline = Numbers(2).filter(SetUp()).write(Discard())
run_pipeline(pipeline, on_error="raise")
logging.getLogger("made at the end").info("at the end")
print(pipeline.db_path)
"""


@pytest.mark.parametrize("way", ["force", "replace", "configure"])
def test_capturing_goes_on_when_a_stage_sets_up_logging(
    way: str, tmp_path: Path, run_python: Run, query: Query
) -> None:
    script = write_script(tmp_path / "script.py", SET_UP)
    finished = run_python(script, way)
    captured = [(0, "first of 0"), (0, "second of 0"), (1, "first of 1"), (1, "second of 1")]
    shown = ["first of 0", "INFO second of 0", "WARNING first of 1", "INFO second of 1"]
    if way == "configure":  # which disables the first logger, as the program wants it
        del captured[2], shown[2]
    assert finished.stderr.splitlines() == [*shown, "INFO at the end"]
    (database,) = finished.stdout.split()
    assert query(database, "SELECT idx, message FROM logs ORDER BY id") == captured


def test_a_stage_can_set_up_logging_as_if_nobody_else_listened(
    tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import logging
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        class SetUp(Filter):
            def __call__(self, items):
                logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
                logging.info("to be seen")
                return items

        run_pipeline(Numbers(1).filter(SetUp()).write(Discard()))
        logging.info("to be seen after")
        """,
    )
    assert run_python(script).stderr == "INFO to be seen\nINFO to be seen after\n"


def test_an_entry_is_captured_once_though_a_handler_hands_it_on(
    private: logging.Logger, query: Query
) -> None:
    class HandOn(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger("other").handle(record)

    private.addHandler(HandOn())
    private.propagate = False
    pipeline = Numbers(1).filter(do(lambda item: private.warning("once"))).write(Discard())
    run_pipeline(pipeline)
    assert [entry[2:] for entry in _entries(pipeline, query)] == [("tests.private", "once")]


def test_what_a_handler_logs_is_captured_as_an_entry_of_its_own(
    private: logging.Logger, query: Query
) -> None:
    class Report(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger("reporter").warning("reported %s", record.getMessage())

    private.addHandler(Report())
    private.propagate = False
    pipeline = Numbers(1).filter(do(lambda item: private.warning("this"))).write(Discard())
    run_pipeline(pipeline)
    assert [entry[2:] for entry in _entries(pipeline, query)] == [
        ("tests.private", "this"),
        ("reporter", "reported this"),
    ]


def test_warnings_that_are_logged_are_captured(query: Query) -> None:
    def warn(item: int) -> None:
        logging.captureWarnings(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("this is old", DeprecationWarning, stacklevel=1)
        finally:
            logging.captureWarnings(False)

    pipeline = Numbers(1).filter(do(warn)).write(Discard())
    run_pipeline(pipeline, on_error="raise")
    ((_, level, logger, message),) = _entries(pipeline, query)
    assert (level, logger) == ("WARNING", "py.warnings")
    assert "DeprecationWarning: this is old" in message


def test_a_loggers_own_level_and_filters_are_its_owners_choice(
    private: logging.Logger, query: Query
) -> None:
    private.setLevel(logging.ERROR)
    quiet = logging.getLogger("tests.private.quiet")
    quiet.addFilter(lambda record: "secret" not in record.getMessage())

    def log(item: int) -> None:
        private.warning("below its level")
        quiet.error("a secret")
        quiet.error("no more than this")

    pipeline = Numbers(1).filter(do(log)).write(Discard())
    run_pipeline(pipeline)
    assert [entry[3] for entry in _entries(pipeline, query)] == ["no more than this"]


def test_what_handlers_make_of_an_entry_is_not_what_is_recorded(
    private: logging.Logger, query: Query
) -> None:
    class Colourful(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.levelname = f"\x1b[33m{record.levelname}\x1b[0m"
            record.msg = f"\x1b[1m{record.msg}\x1b[0m"

    private.addHandler(Colourful())
    private.propagate = False
    pipeline = Numbers(1).filter(do(lambda item: private.warning("plain"))).write(Discard())
    run_pipeline(pipeline)
    assert _entries(pipeline, query) == [(0, "WARNING", "tests.private", "plain")]


def test_handlers_format_an_entry_as_if_nobody_else_had(private: logging.Logger) -> None:
    class OneLine(logging.Formatter):
        def formatException(self, exc_info: Any) -> str:  # noqa: N802
            return f"<{exc_info[0].__name__}>"

    shown = []

    class Show(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(self.format(record))

    handler = Show()
    handler.setFormatter(OneLine())
    private.addHandler(handler)
    private.propagate = False
    entry = do(lambda item: private.error("wrong", exc_info=ValueError("inner")))
    run_pipeline(Numbers(1).filter(entry).write(Discard()))
    assert shown == ["wrong\n<ValueError>"]


def test_an_index_within_an_index_has_its_own_entries(query: Query) -> None:
    inner = Numbers(2).filter(Log(logging.WARNING)).write(Discard())

    def nest(item: int) -> None:
        logging.getLogger("outer").warning("before")
        _ = inner[item]
        logging.getLogger("outer").warning("after")

    outer = Numbers(2).filter(do(nest)).write(Discard())
    run_pipeline(outer)
    assert [(entry[0], entry[3]) for entry in _entries(outer, query)] == [
        (0, "before"),
        (0, "after"),
        (1, "before"),
        (1, "after"),
    ]
    assert [(entry[0], entry[3]) for entry in _entries(inner, query)] == [
        (0, "item 0"),
        (1, "item 1"),
    ]


def test_entries_of_a_driver_in_a_thread_are_not_taken_for_those_of_an_index(
    plugins: PluginManager, tmp_path: Path, query: Query
) -> None:
    class TellsTheDriver:
        @hookimpl
        def psnc_index_reported(self) -> None:
            wait_until((tmp_path / "reached-1").exists)
            logging.getLogger("driver").warning("reported")
            (tmp_path / "go").touch()

    plugins.register(TellsTheDriver())
    pipeline = Numbers(2).filter(WaitFor(str(tmp_path), [1])).write(Discard())
    driver = threading.Thread(target=run_pipeline, args=(pipeline, 2, "thread_pool"))
    driver.start()
    driver.join()
    assert _entries(pipeline, query) == []


# --- bounds -----------------------------------------------------------------------------------


def test_of_an_index_that_logs_without_end_both_ends_are_kept(
    private: logging.Logger, query: Query
) -> None:
    private.propagate = False
    private.addHandler(logging.NullHandler())
    total = 40_000

    def log(item: int) -> None:
        for number in range(total):
            private.warning("%d", number)

    pipeline = Numbers(1).filter(do(log)).filter(FailOn([0])).write(Discard())
    run_pipeline(pipeline)
    *entries, failure = _entries(pipeline, query)
    assert failure[2] == "psnc.execution"
    numbers = [int(entry[3]) for entry in entries if entry[2] == "tests.private"]
    (gap,) = [place for place, entry in enumerate(entries) if entry[2] == "psnc.logcapture"]
    assert numbers[:gap] == list(range(5_000))
    assert numbers[gap:] == list(range(total - len(numbers[gap:]), total))
    assert 5_000 <= len(numbers[gap:]) <= 10_001
    left_out = total - len(numbers)
    assert entries[gap][1] == "WARNING"
    assert entries[gap][3].startswith(f"{left_out:,} entries are left out here")


def test_entries_that_are_large_together_are_bounded_too(
    private: logging.Logger, query: Query
) -> None:
    private.propagate = False
    private.addHandler(logging.NullHandler())

    def log(item: int) -> None:
        for number in range(300):
            private.warning("%d %s", number, "x" * 90_000)

    pipeline = Numbers(1).filter(do(log)).write(Discard())
    run_pipeline(pipeline)
    messages = [entry[3] for entry in _entries(pipeline, query)]
    assert messages[0].startswith("0 x")
    assert messages[-1].startswith("299 x")
    assert 5_000_000 < sum(map(len, messages)) < 16_000_000
    assert [message for message in messages if "entries are left out here" in message]


def test_of_a_long_entry_both_ends_are_kept(private: logging.Logger, query: Query) -> None:
    private.propagate = False
    private.addHandler(logging.NullHandler())
    text = "begin" + "x" * 10_000_000 + "end"
    pipeline = Numbers(1).filter(do(lambda item: private.warning(text))).write(Discard())
    run_pipeline(pipeline)
    ((_, _, _, message),) = _entries(pipeline, query)
    assert len(message) < 101_000
    assert message.startswith("beginxxx")
    assert "\n[9,900,008 characters are left out here]\n" in message
    assert message.endswith("xxxend")


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


@pytest.mark.parametrize("in_run", [True, False])
def test_every_part_of_logging_is_left_as_it_was(
    in_run: bool, private: logging.Logger, plugins: PluginManager
) -> None:
    def parts() -> list[object]:
        loggers = [logging.getLogger(), private]
        return [
            logging.getLogRecordFactory(),
            logging.getLoggerClass(),
            *((each.level, each.handlers[:], each.propagate, each.disabled) for each in loggers),
        ]

    with nobody_set_up_logging():
        before, call_handlers = parts(), logging.Logger.callHandlers
        pipeline = Numbers(2).filter(Chatter()).write(Discard())
        if in_run:
            run_pipeline(pipeline)
            assert logging.Logger.callHandlers is call_handlers
        else:
            _ = pipeline[0], pipeline[1]
        assert parts() == before
        plugins.close()
        assert logging.Logger.callHandlers is call_handlers


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
def test_a_root_level_that_a_stage_sets_stays(level: int) -> None:
    root = logging.getLogger()
    with nobody_set_up_logging():
        root.setLevel(logging.WARNING)
        run_pipeline(Numbers(2).filter(do(lambda item: root.setLevel(level))).write(Discard()))
        assert root.level == level


def test_what_is_captured_below_the_root_level_reaches_no_other_handler(
    private: logging.Logger, query: Query
) -> None:
    collect = Collect()
    private.addHandler(collect)

    def log(item: int) -> None:
        private.info("info")
        private.warning("warning")

    pipeline = Numbers(1).filter(do(log)).write(Discard())
    with nobody_set_up_logging():
        run_pipeline(pipeline)
    assert collect.messages == ["warning"]
    assert [entry[3] for entry in _entries(pipeline, query)] == ["info", "warning"]


def test_somebody_else_who_listens_to_all_loggers_is_left_in_place(query: Query) -> None:
    heard: list[str] = []
    as_it_was: Any = logging.Logger.callHandlers

    def wrap(item: int) -> None:
        before: Any = logging.Logger.callHandlers

        def hear(logger: logging.Logger, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())
            before(logger, record)

        logging.Logger.callHandlers = hear  # type: ignore[method-assign]

    log = Log(logging.WARNING)
    first = Numbers(1).filter(do(wrap)).filter(log).write(Discard())
    second = Numbers(1).filter(log).write(Discard())
    try:
        for pipeline in (first, second):
            run_pipeline(pipeline)
            assert [entry[3] for entry in _entries(pipeline, query)] == ["item 0"]
        logging.getLogger("afterwards").warning("and this")
    finally:
        logging.Logger.callHandlers = as_it_was  # type: ignore[method-assign]
    assert heard == ["item 0", "item 0", "and this"]


def test_a_child_that_a_stage_forks_has_logging_as_it_was(tmp_path: Path, run_python: Run) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import logging, os, warnings
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        # Python 3.12 and newer say that a process with threads should rather not fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        before = logging.Logger.callHandlers

        class Fork(Filter):
            def __call__(self, items):
                child = os.fork()
                if not child:
                    same = logging.Logger.callHandlers is before
                    print(same, logging.getLogger().level, flush=True)
                    logging.getLogger("child").warning("still heard")
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                return items

        run_pipeline(Numbers(1).filter(Fork()).write(Discard()), on_error="raise")
        """,
    )
    finished = run_python(script)
    assert (finished.stdout, finished.stderr) == ("True 30\n", "still heard\n")


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
