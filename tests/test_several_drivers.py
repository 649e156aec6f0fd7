"""Several drivers on one database: one at a time for an index, whatever becomes of the others."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Psnc, psnc, write
from drivers import Driver, Start, start, wait_for_end
from other_programs import query
from stages_for_tests import (
    Discard,
    FailOn,
    Journal,
    Numbers,
    held_pipeline,
    read_journal,
    wait_until,
)

from psnc import (
    DriverConflictError,
    Pipeline,
    Sink,
    StoreError,
    TooManyFailuresError,
    driver_claim,
    gather_pipeline,
    hookimpl,
    run_pipeline,
    track,
)
from psnc.claims import Claim, claims_text
from psnc.driver_claim import DriverClaim
from psnc.manager import PluginManager
from psnc.processes import own_process
from psnc.run import run_of

__all__ = ["psnc", "start", "write"]

# The arguments: seconds between two beats, another machine's name or "", those of run_pipeline.
DRIVER = """
    import json, os, sys
    os.environ["HELD"] = "1"
    from stages_for_tests import held_pipeline
    from psnc import DriverConflictError, driver_claim, processes, run_pipeline
    beat, machine, arguments = sys.argv[1:]
    driver_claim.BEAT_S = float(beat)
    if machine:
        processes._machine = lambda: machine
    try:
        run_pipeline(held_pipeline(os.getcwd()), **json.loads(arguments))
        print("done", flush=True)
    except DriverConflictError as error:
        print(error, flush=True)
"""


@pytest.fixture
def start_held(start: Start, tmp_path: Path) -> Callable[..., Driver]:
    """Start a driver of `held_pipeline` in ``tmp_path``, and return once it is at an index."""

    def start_and_wait(
        first: int = 0, *, beat: float = 10, machine: str = "", **arguments: Any
    ) -> Driver:
        driver = start(DRIVER, beat, machine, json.dumps(arguments))
        wait_until((tmp_path / f"reached-{first}").exists)
        return driver

    return start_and_wait


def claims_of(database: Path) -> list[dict[str, Any]]:
    ((text,),) = query(database, "SELECT claims FROM pipeline_runs")
    return [] if text is None else json.loads(text)


def write_claims(database: Path, *claims: Claim) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE pipeline_runs SET claims = ?", [claims_text(claims)])


def a_claim(**fields: Any) -> Claim:
    """Return the claim of a driver on another machine, with these fields instead."""
    known: dict[str, Any] = {
        "invocation_id": "another",
        "hostname": "node7",
        "pid": 4711,
        "machine": "another machine",
        "process_started_at": "17",
        "started_at": "2026-01-02T03:04:05.000006+00:00",
        "beat": 0,
        "indices": "all",
    }
    return Claim(**{**known, **fields})


def own_claim(**fields: Any) -> Claim:
    """Return a claim of this process."""
    own = own_process()
    return a_claim(
        **{
            "hostname": own.hostname,
            "pid": own.pid,
            "machine": own.machine,
            "process_started_at": own.process_started_at,
            **fields,
        }
    )


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Return the database of `held_pipeline`, in which index 0 is completed."""
    pipeline = held_pipeline(tmp_path)
    run_pipeline(pipeline, indices=[0])
    run_of(pipeline).close()
    return tmp_path / "shared.db"


# --- the second is refused --------------------------------------------------------------------


class Watchful(Discard):
    """Notes whether it was told to get ready."""

    prepared = False

    def prepare(self, pipeline: Pipeline[Any]) -> None:
        type(self).prepared = True


def test_a_second_driver_is_refused_with_host_and_pid_of_the_first(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    first = start_held()
    with pytest.raises(DriverConflictError) as caught:
        run_pipeline(held_pipeline(tmp_path))
    said = str(caught.value)
    assert f"process {first.process.pid} on {socket.gethostname()} since 20" in said
    assert said.startswith(f"run 1 of {tmp_path / 'shared.db'} is being run by")
    assert "--shard" in said
    assert "\n" not in said
    (tmp_path / "go").touch()
    assert first.finish()[1:] == ("done\n", "")
    assert len(run_pipeline(held_pipeline(tmp_path))) == 10
    assert read_journal(tmp_path / "journal.txt") == list(range(10))


def test_the_command_that_is_refused_says_one_line(
    start_held: Callable[..., Driver], tmp_path: Path, psnc: Psnc
) -> None:
    first = start_held()
    (tmp_path / "held.py").write_text(
        f"from stages_for_tests import held_pipeline\npipeline = held_pipeline({str(tmp_path)!r})\n"
    )
    said = psnc("run", "held.py:pipeline")
    assert (said.code, said.out) == (3, "")
    (line,) = said.err.splitlines()
    assert f"is being run by process {first.process.pid} on" in line


def test_a_driver_that_is_refused_has_done_nothing(
    database: Path, tmp_path: Path, plugins: PluginManager
) -> None:
    class Tells:
        def __init__(self) -> None:
            self.told: list[str] = []

        @hookimpl
        def psnc_run_start(self) -> None:
            self.told.append("start")

        @hookimpl
        def psnc_run_done(self) -> None:
            self.told.append("done")

    teller = Tells()
    plugins.register(teller, name="tells")
    pipeline = Pipeline(Numbers(3), sink=Watchful(), db_file=tmp_path / "other.db")
    pipeline.summary()
    alive = psutil.Process(os.getppid())
    held = own_claim(pid=alive.pid, process_started_at=start_of(alive.pid))
    write_claims(tmp_path / "other.db", held)
    with pytest.raises(DriverConflictError):
        run_pipeline(pipeline)
    assert teller.told == []
    assert not Watchful.prepared
    assert pipeline.completed_indices == set()
    assert [claim["pid"] for claim in claims_of(tmp_path / "other.db")] == [alive.pid]


def start_of(pid: int) -> str:
    """Return when a process began, as the system has it."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[19]


def test_other_indices_run_beside_the_first_driver(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    first = start_held(4, indices=[4, 5, 6])
    assert [claim["indices"] for claim in claims_of(tmp_path / "shared.db")] == ["4-6"]
    for overlapping in ([0, 6], range(10), None):
        with pytest.raises(DriverConflictError, match="indices 4-6"):
            run_pipeline(held_pipeline(tmp_path), indices=overlapping)
    pipeline = held_pipeline(tmp_path)
    run_pipeline(pipeline, indices=[0, 1, 2, 3, 7, 8, 9])
    assert pipeline.completed_indices == {0, 1, 2, 3, 7, 8, 9}
    (tmp_path / "go").touch()
    assert first.finish()[1:] == ("done\n", "")
    assert pipeline.completed_indices == set(range(10))
    assert claims_of(tmp_path / "shared.db") == []


def test_a_run_of_another_configuration_in_the_same_database_is_another_run(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    start_held()
    other = Pipeline(Numbers(3), sink=Discard(), db_file=tmp_path / "shared.db")
    assert len(run_pipeline(other)) == 3


def test_single_indices_and_questions_are_nobodys_business(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    start_held()
    pipeline = held_pipeline(tmp_path)
    assert pipeline[7] == ["out/7-0.bin"]
    assert pipeline.completed_indices == {7}
    assert gather_pipeline(pipeline) == []


def test_loops_are_not_claimed(tmp_path: Path) -> None:
    for _ in track(range(3), "loop", resume=True, db_dir=tmp_path):
        (database,) = tmp_path.glob("*.db")
        assert claims_of(database) == []


@pytest.mark.parametrize("turn", range(4))
def test_of_drivers_that_begin_at_once_exactly_one_runs(
    start: Start, tmp_path: Path, turn: int
) -> None:
    drivers = [start(DRIVER, 10, "", json.dumps({"n_jobs": 1})) for _ in range(4)]

    def still_running() -> list[Driver]:
        return [driver for driver in drivers if driver.process.poll() is None]

    wait_until(lambda: len(still_running()) == 1, timeout_s=120)
    (winner,) = still_running()
    wait_until((tmp_path / "reached-0").exists)
    (tmp_path / "go").touch()
    assert winner.finish()[1:] == ("done\n", "")
    for driver in drivers:
        if driver is not winner:
            assert f"is being run by process {winner.process.pid} on" in driver.finish()[1]
    assert read_journal(tmp_path / "journal.txt") == list(range(10))


def test_of_threads_that_begin_at_once_exactly_one_runs(tmp_path: Path) -> None:
    def drive(place: Path, begin: threading.Barrier, ended: threading.Barrier) -> str:
        pipeline = Pipeline(
            Journal(3, str(place / "journal")), sink=Waits(ended), db_file=place / "run.db"
        )
        begin.wait()
        try:
            run_pipeline(pipeline)
        except DriverConflictError:
            ended.wait()
            return "refused"
        return "ran"

    class Waits(Discard):
        """Lets an index end once the other drivers have been refused."""

        def __init__(self, ended: threading.Barrier) -> None:
            super().__init__()
            self.ended = ended

        def psnc_config(self) -> dict[str, Any]:
            return {}

        def __call__(self, items: Iterator[Any], index: int) -> list[str]:
            if index == 0:
                self.ended.wait()
            return super().__call__(items, index)

    with ThreadPoolExecutor(3) as threads:
        for turn in range(15):
            place = tmp_path / str(turn)
            place.mkdir()
            barriers = threading.Barrier(3, timeout=120), threading.Barrier(3, timeout=120)
            outcomes = list(threads.map(drive, [place] * 3, *([each] * 3 for each in barriers)))
            assert sorted(outcomes) == ["ran", "refused", "refused"]
            assert read_journal(place / "journal") == [0, 1, 2]


# --- a driver that died -----------------------------------------------------------------------


def test_the_claim_of_a_driver_that_was_killed_is_taken_over_at_once_and_quietly(
    start_held: Callable[..., Driver],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = start_held()
    # Nobody waits for it, so that it stays as a zombie.
    os.kill(first.process.pid, signal.SIGKILL)
    wait_for_end([psutil.Process(first.process.pid)])
    with caplog.at_level(logging.INFO, "psnc.claims"):
        assert len(run_pipeline(held_pipeline(tmp_path))) == 10
    assert capfd.readouterr() == ("", "")
    (entry,) = caplog.records
    assert entry.levelname == "INFO"
    assert f"process {first.process.pid} on" in entry.getMessage()
    assert claims_of(tmp_path / "shared.db") == []


def test_a_child_that_outlives_its_driver_does_not_keep_the_claim(
    start: Start, tmp_path: Path
) -> None:
    source = """
        import os, signal, sys, time
        from stages_for_tests import Discard, Journal, held_pipeline, wait_until
        from psnc import run_pipeline, Pipeline
        class Forks(Discard):
            def prepare(self, pipeline):
                if os.fork() == 0:
                    os.setsid()
                    print(os.getpid(), flush=True)
                    time.sleep(600)
                time.sleep(600)
        run_pipeline(Pipeline(Journal(3, "journal.txt"), sink=Forks(), db_file="forks.db"))
    """
    driver = start(source)
    assert driver.process.stdout is not None
    child = int(driver.process.stdout.readline())
    driver.kill()
    try:
        (claim,) = claims_of(tmp_path / "forks.db")
        assert claim["pid"] == driver.process.pid
        assert own_claim(**claim).life().value == "dead"
        assert psutil.pid_exists(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_within_a_run_leaves_its_parents_claim_alone(tmp_path: Path) -> None:
    class Forks(Sink[Any]):
        def __call__(self, items: Iterator[Any], index: int) -> list[str]:
            list(items)
            child = os.fork()
            if child == 0:
                # The ordinary way, through everything that the run has open.
                sys.exit(17)
            os.waitpid(child, 0)
            return [str(len(claims_of(tmp_path / "forks.db")))]

    program = Pipeline(Numbers(2), sink=Forks(), db_file=tmp_path / "forks.db")
    pid = os.getpid()
    try:
        outputs = run_pipeline(program)
    finally:
        if os.getpid() != pid:
            os._exit(0)
    assert outputs == [["1"], ["1"]]


def test_a_process_that_has_the_number_of_one_that_died_is_not_taken_for_it(
    database: Path, tmp_path: Path
) -> None:
    alive = os.getppid()
    assert start_of(alive) != "17"
    write_claims(database, own_claim(pid=alive, process_started_at="17"))
    assert len(run_pipeline(held_pipeline(tmp_path))) == 10


def test_claims_of_the_dead_go_though_they_are_of_other_indices(
    database: Path, tmp_path: Path
) -> None:
    write_claims(database, own_claim(process_started_at="17", indices="7-9"))
    run_pipeline(held_pipeline(tmp_path), indices=[1])
    assert claims_of(database) == []


# --- a driver elsewhere -----------------------------------------------------------------------


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 0.2)
    monkeypatch.setattr(driver_claim, "WATCH_S", 1.0)


@pytest.mark.parametrize(
    "elsewhere",
    [{}, {"machine": ""}, {"hostname": socket.gethostname()}],
    ids=["machine", "not-known", "container"],
)
@pytest.mark.usefixtures("short_watch")
def test_a_driver_elsewhere_without_a_sign_of_life_is_taken_over(
    database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, elsewhere: dict[str, str]
) -> None:
    claim = a_claim(**elsewhere)
    write_claims(database, claim)
    assert len(run_pipeline(held_pipeline(tmp_path))) == 10
    assert claims_of(database) == []
    (warning,) = [entry for entry in caplog.records if entry.levelname == "WARNING"]
    assert warning.name == "psnc.claims"
    said = warning.getMessage()
    assert f"process 4711 on {claim.hostname} since 2026-01-02 03:04:05 UTC" in said


def test_a_driver_elsewhere_that_lives_is_not_taken_over(
    start_held: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 0.2)
    monkeypatch.setattr(driver_claim, "WATCH_S", 600)
    first = start_held(beat=0.2, machine="another machine")
    with pytest.raises(DriverConflictError, match=f"process {first.process.pid} on"):
        run_pipeline(held_pipeline(tmp_path))
    (tmp_path / "go").touch()
    assert first.finish()[1:] == ("done\n", "")


def test_a_driver_elsewhere_that_ends_while_it_is_watched_is_not_waited_for(
    start_held: Callable[..., Driver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 0.2)
    monkeypatch.setattr(driver_claim, "WATCH_S", 600)
    first = start_held(beat=600, machine="another machine")
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(run_pipeline, held_pipeline(tmp_path))
        wait_until(lambda: caplog.records)
        (tmp_path / "go").touch()
        assert first.finish()[1:] == ("done\n", "")
        assert len(second.result()) == 10
    assert read_journal(tmp_path / "journal.txt") == list(range(10))


def test_a_driver_elsewhere_on_other_indices_is_left_alone(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_claim, "WATCH_S", 1e6)
    write_claims(database, a_claim(indices="5-9"))
    assert len(run_pipeline(held_pipeline(tmp_path), indices=range(5))) == 5
    assert [claim["hostname"] for claim in claims_of(database)] == ["node7"]


@pytest.mark.usefixtures("short_watch")
def test_a_driver_that_was_suspended_and_taken_over_ends(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    first = start_held(beat=0.2, machine="another machine", n_jobs=2)
    workers = first.descendants()
    os.killpg(first.process.pid, signal.SIGSTOP)
    other = held_pipeline(tmp_path)
    assert len(run_pipeline(other)) == 10
    os.killpg(first.process.pid, signal.SIGCONT)
    code, out, _ = first.finish(120)
    assert code == 0
    assert f"run 1 of {tmp_path / 'shared.db'} was taken over by another driver" in out
    wait_for_end(workers)
    assert other.completed_indices == set(range(10))
    assert claims_of(tmp_path / "shared.db") == []


@pytest.mark.usefixtures("short_watch")
def test_a_driver_that_was_taken_over_says_by_whom(
    start_held: Callable[..., Driver], tmp_path: Path
) -> None:
    first = start_held(beat=0.2, machine="another machine", n_jobs=2)
    os.killpg(first.process.pid, signal.SIGSTOP)
    write_claims(tmp_path / "shared.db", own_claim(indices="3-5"))
    os.killpg(first.process.pid, signal.SIGCONT)
    _, out, _ = first.finish(120)
    assert f"was taken over by process {os.getpid()} on {socket.gethostname()} since" in out
    assert [claim["pid"] for claim in claims_of(tmp_path / "shared.db")] == [os.getpid()]


def test_a_driver_shows_that_it_lives(start_held: Callable[..., Driver], tmp_path: Path) -> None:
    start_held(beat=0.05)
    wait_until(lambda: claims_of(tmp_path / "shared.db")[0]["beat"] > 2)


# --- the end of a run -------------------------------------------------------------------------


class Interrupts(Sink[Any]):
    def __init__(self, error: str) -> None:
        self.error = error

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        raise {"interrupt": KeyboardInterrupt, "exit": SystemExit}[self.error]


@pytest.mark.parametrize("error", ["interrupt", "exit"])
def test_a_run_that_is_cut_short_leaves_no_claim(tmp_path: Path, error: str) -> None:
    pipeline = Pipeline(Numbers(3), sink=Interrupts(error), db_file=tmp_path / "run.db")
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_pipeline(pipeline)
        assert claims_of(tmp_path / "run.db") == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, None),
        ({"on_error": "raise"}, RuntimeError),
        ({"max_failures": 1}, TooManyFailuresError),
    ],
)
def test_a_run_that_fails_leaves_no_claim(
    tmp_path: Path, options: dict[str, Any], error: type[Exception] | None
) -> None:
    pipeline = Pipeline(Numbers(3), [FailOn([1])], Discard(), db_file=tmp_path / "run.db")
    for _ in range(2):
        with pytest.raises(error) if error else nullcontext():
            run_pipeline(pipeline, **options)
        assert claims_of(tmp_path / "run.db") == []
    assert "psnc-claim" not in {thread.name for thread in threading.enumerate()}


def test_a_run_whose_sink_cannot_get_ready_leaves_no_claim(tmp_path: Path) -> None:
    class Unready(Discard):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            raise ValueError("not today")

    pipeline = Pipeline(Numbers(3), sink=Unready(), db_file=tmp_path / "run.db")
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            run_pipeline(pipeline)
        assert claims_of(tmp_path / "run.db") == []


def test_a_claim_that_this_process_did_not_come_to_release_stands_in_nobodys_way(
    database: Path, tmp_path: Path
) -> None:
    write_claims(database, own_claim())
    assert len(run_pipeline(held_pipeline(tmp_path))) == 10
    assert claims_of(database) == []


def test_a_claim_that_nobody_holds_any_more_is_released(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 0.05)
    pipeline = held_pipeline(tmp_path)
    store = pipeline.require_store("this test")
    claim = DriverClaim(store, "an invocation", "all", "the run").__enter__()
    assert [each["invocation_id"] for each in claims_of(database)] == ["an invocation"]
    # As after an interrupt between two instructions.
    del claim
    wait_until(lambda: claims_of(database) == [])


def test_a_driver_does_not_take_its_own_release_for_anothers_doing(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 1e-4)
    store = held_pipeline(tmp_path).require_store("this test")
    for turn in range(300):
        with DriverClaim(store, str(turn), "all", "the run"):
            pass
    assert claims_of(database) == []


INTERRUPTED = """
    import signal, sqlite3, time
    from stages_for_tests import Discard, Numbers, wait_until
    from psnc import Pipeline, driver_claim, run_pipeline
    driver_claim.BEAT_S = 0.02

    def interrupt(*_):
        raise KeyboardInterrupt

    def run():
        run_pipeline(Pipeline(Numbers(3), sink=Discard(), db_file="run.db"))

    def claims():
        connection = sqlite3.connect("run.db")
        ((text,),) = connection.execute("SELECT claims FROM pipeline_runs")
        connection.close()
        return text

    run()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    signal.signal(signal.SIGALRM, interrupt)
    turns = 200
    for turn in range(turns):
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1.3 * seconds * turn / turns)
            run()
        except KeyboardInterrupt:
            pass
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
        run()
        wait_until(lambda: claims() is None)
    print("done")
"""


def test_an_interrupt_at_any_moment_keeps_nobody_from_the_next_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What measures coverage has a lock of its own, which an interrupt can leave behind for ever.
    for name in [name for name in os.environ if name.startswith("COV")]:
        monkeypatch.delenv(name)
    driver = start(INTERRUPTED, stderr=subprocess.DEVNULL)
    code, out, _ = driver.finish(250)
    assert (code, out) == (0, "done\n")


@pytest.fixture
def keep_claims(plugins: PluginManager, tmp_path: Path) -> Path:
    """Have claims stay in the database from the end of the run on."""
    database = tmp_path / "kept.db"

    class KeepsClaims:
        @hookimpl
        def psnc_run_done(self) -> None:
            with closing(sqlite3.connect(database)) as connection, connection:
                connection.execute(
                    "CREATE TRIGGER keep BEFORE UPDATE OF claims ON pipeline_runs "
                    "BEGIN SELECT RAISE(ABORT, 'claims are kept'); END"
                )

    plugins.register(KeepsClaims(), name="keeps-claims")
    return database


def test_a_claim_that_cannot_be_released_is_said(keep_claims: Path) -> None:
    pipeline = Pipeline(Numbers(3), sink=Discard(), db_file=keep_claims)
    with pytest.raises(StoreError, match="claims are kept"):
        run_pipeline(pipeline)
    assert pipeline.completed_indices == {0, 1, 2}


def test_a_claim_that_cannot_be_released_hides_no_earlier_error(keep_claims: Path) -> None:
    pipeline = Pipeline(Numbers(3), sink=Interrupts("interrupt"), db_file=keep_claims)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline)


def test_a_claim_that_could_not_be_released_goes_once_the_store_takes_writes_again(
    keep_claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_claim, "BEAT_S", 0.1)
    with pytest.raises(StoreError, match="claims are kept"):
        run_pipeline(Pipeline(Numbers(3), sink=Discard(), db_file=keep_claims))
    assert len(claims_of(keep_claims)) == 1
    with closing(sqlite3.connect(keep_claims)) as connection, connection:
        connection.execute("DROP TRIGGER keep")
    wait_until(lambda: claims_of(keep_claims) == [])


# --- databases --------------------------------------------------------------------------------


def test_reset_keeps_claims(database: Path, tmp_path: Path, psnc: Psnc) -> None:
    write_claims(database, a_claim())
    held_pipeline(tmp_path).reset()
    assert psnc("reset", database, "--yes").code == 0
    assert [claim["pid"] for claim in claims_of(database)] == [4711]


def test_check_does_not_mind_claims_and_copies_have_none(
    database: Path, tmp_path: Path, psnc: Psnc
) -> None:
    write_claims(database, a_claim())
    assert psnc("check", database).code == 0
    assert psnc("merge", database, "-o", tmp_path / "merged.db").code == 0
    assert psnc("recover", database, "-o", tmp_path / "recovered.db").code == 0
    for copy in ("merged.db", "recovered.db"):
        assert claims_of(tmp_path / copy) == []
        assert query(tmp_path / copy, "SELECT idx FROM index_results") == [(0,)]
    assert len(claims_of(database)) == 1


UNREADABLE = [
    "{",
    "17",
    "[17]",
    "[{}]",
    claims_text([a_claim(indices="7-3")]),
    claims_text([a_claim(pid=0)]),
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_claims_are_damage_that_can_be_mended(
    database: Path, tmp_path: Path, psnc: Psnc, text: str
) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE pipeline_runs SET claims = ?", [text])
    pipeline = held_pipeline(tmp_path)
    with pytest.raises(StoreError, match=r"damaged .*claim of run 1.*psnc recover"):
        run_pipeline(pipeline)
    run_of(pipeline).close()
    found = psnc("check", database)
    assert (found.code, found.out) == (
        1,
        "run: run 1: what drivers claim of it cannot be read\n",
    )
    (tmp_path / "held.py").write_text(
        f"from stages_for_tests import held_pipeline\npipeline = held_pipeline({str(tmp_path)!r})\n"
    )
    said = psnc("run", "held.py:pipeline", "--recover")
    assert said.code == 0, said
    assert "9 completed, 1 completed before" in said.out
    assert psnc("check", database).code == 0


def test_claims_of_a_later_psnc_are_read(database: Path, tmp_path: Path) -> None:
    entry = json.loads(claims_text([a_claim(indices="5")]) or "")[0]
    with closing(sqlite3.connect(database)) as connection, connection:
        text = json.dumps([{**entry, "mood": "cheerful"}])
        connection.execute("UPDATE pipeline_runs SET claims = ?", [text])
    assert len(run_pipeline(held_pipeline(tmp_path), indices=[1, 2])) == 2


# --- psnc status ------------------------------------------------------------------------------


def test_status_shows_the_drivers(
    start_held: Callable[..., Driver], tmp_path: Path, psnc: Psnc
) -> None:
    first = start_held(4, indices=[4, 5])
    database = tmp_path / "shared.db"
    alive = claims_of(database)
    host = socket.gethostname()
    since = alive[0]["started_at"]
    write_claims(
        database,
        Claim(**alive[0]),
        own_claim(process_started_at="17", indices="7-9"),
        a_claim(indices="0"),
    )
    lines = psnc("status", database).out.splitlines()
    pid = first.process.pid
    assert f"  run by process {pid} on {host} since {since[:19]} UTC: indices 4-5" in lines
    left = f"  left by process {os.getpid()} on {host}, which is dead: indices 7-9, begun 2026-"
    assert any(line.startswith(left) for line in lines)
    elsewhere = "  run by process 4711 on node7 since 2026-01-02T03:04:05 UTC"
    assert f"{elsewhere}, unless it has died: indices 0" in lines
    (row,) = json.loads(psnc("status", database, "--json").out)
    assert row["drivers"][0] == {
        "pid": pid,
        "hostname": host,
        "started_at": since,
        "indices": "4-5",
        "state": "alive",
    }
    assert [driver["state"] for driver in row["drivers"]] == ["alive", "dead", "unknown"]
    os.kill(pid, signal.SIGKILL)
    wait_for_end([psutil.Process(pid)])
    (row,) = json.loads(psnc("status", database, "--json").out)
    assert row["drivers"][0]["state"] == "dead"
