"""A pipeline at work in one process: its plugins, its store, its workers' identities."""

from __future__ import annotations

import os
import re
import socket
import threading
import uuid
from functools import cached_property
from typing import TYPE_CHECKING, Any

from psnc.code_versions import CodeVersion, code_version
from psnc.errors import SourceError, StoreError
from psnc.manager import PluginManager, active_manager, plugin_manager, take_leave_first
from psnc.masking import secret_texts
from psnc.output_facts import VerifyLevel
from psnc.provenance import text_values
from psnc.records import WorkerInfo, utc_timestamp
from psnc.stages import Source
from psnc.store import CheckpointStore, open_store, shown_url

if TYPE_CHECKING:
    from psnc.pipeline import Pipeline

__all__ = ["Run", "adopt", "enter_run", "run_of"]


class Run:
    """What hooks are given as ``run``.

    Attributes
    ----------
    pipeline : Pipeline
        The pipeline that runs.
    plugins : PluginManager
        The plugins of this process.
    store : CheckpointStore or None
        Where indices are recorded; ``None`` where nothing is recorded, or out of reach.
    invocation_id : str
        UUID4 in hexadecimal, shared by the driver and the workers of one call.
    run_dir : str
        The working directory; one that somebody has removed by the name that the system still
        has for it.
    total_indices : int
        The source's length as the run began.
    pid : int
        The process that this object belongs to.
    prepared : bool
        Whether the sink was told to get ready in this process.
    in_session : bool
        Whether ``run_pipeline`` drives it, rather than somebody's own ``pipeline[i]``.
    show_progress : bool or None
        What the caller of ``run_pipeline`` wants shown; ``None`` to decide by the terminal.
    verify : {"exists", "size", "checksum"} or None
        How outputs of completed indices are verified, which decides what is recorded of new ones.
    closed : bool
        Whether it records no more.
    """

    def __init__(
        self, pipeline: Pipeline[Any], plugins: PluginManager, invocation_id: str | None = None
    ) -> None:
        self.pipeline = pipeline
        self.plugins = plugins
        self.invocation_id = invocation_id or uuid.uuid4().hex
        self.run_dir = _working_directory()
        self.pid = os.getpid()
        self.total_indices = len(pipeline.source)
        self.store: CheckpointStore | None = None
        self.prepared = False
        self.in_session = False
        self.show_progress: bool | None = None
        self.verify: VerifyLevel | None = None
        self.closed = False
        self._prepare_lock = threading.Lock()
        self._local = threading.local()
        self._workers: list[WorkerInfo] = []
        # As long as it is an operation of a list, no lock is needed.
        self._at_work: list[None] = []
        self._retired = False
        plugins.serve(self)

    @property
    def config_hash(self) -> str:
        """SHA-256 of the pipeline's configuration."""
        return self.pipeline.config_hash

    @cached_property
    def hostname(self) -> str:
        """The name of this machine."""
        return socket.gethostname()

    @cached_property
    def code(self) -> CodeVersion:
        """What the code of the stages was in this process as the run began."""
        return code_version(self.pipeline)

    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """The texts that stages were given as secrets, which no record may hold."""
        pipeline = self.pipeline
        stages = [pipeline.source, *pipeline.filters, pipeline.sink]
        return secret_texts(stage for stage in stages if stage is not None)

    def open_store(self, *, create: bool) -> None:
        """Open the pipeline's store, if it records anything, and turn to this run in it.

        Raises
        ------
        StoreError
            If the store cannot be opened, or was recorded where relative paths meant other files.
        """
        if not self.pipeline.track_metrics or self.store is not None:
            return
        url = self.pipeline.configured_store_url
        store = open_store(url, self, create=create)
        if store is None:
            if "://" in url:
                raise StoreError(
                    f"no loaded plugin opens {shown_url(url)!r}: install one (psnc-postgres opens "
                    "postgresql://) or load one with -p NAME; for SQLite, give the path alone"
                )
            return
        try:
            if create:
                self._require_recorder()
                self._refuse_other_directory(store)
            store.attach(self)
        except BaseException:
            store.close()
            raise
        self.store = store
        take_leave_first()

    def prepare(self) -> None:
        """Tell the sink to get ready, once in this process.

        Raises
        ------
        SourceError
            If a completed index is another one now.
        """
        with self._prepare_lock:
            if not self.prepared and self.pipeline.sink is not None:
                self._refuse_moved_indices()
                self.pipeline.sink.prepare(self.pipeline)
            self.prepared = True

    def worker(self) -> WorkerInfo:
        """Return the identity of the calling thread, made on its first call."""
        worker: WorkerInfo | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = WorkerInfo(
                uuid.uuid4().hex, self.pid, self.hostname, utc_timestamp(), self.invocation_id
            )
            self._local.worker = worker
            self._workers.append(worker)
            self.plugins.call_contained("psnc_worker_start", run=self, worker=worker)
        return worker

    def release_workers(self) -> None:
        """Say that the workers of this process are done."""
        workers, self._workers = self._workers, []
        for worker in workers:
            self.plugins.call_contained("psnc_worker_done", run=self, worker=worker)
        self._local = threading.local()

    @property
    def is_current(self) -> bool:
        """Whether it goes on: neither closed, nor of another process, nor of earlier plugins."""
        return (
            self.plugins is active_manager()
            and not self._retired
            and not self.closed
            and self.pid == os.getpid()
        )

    def enter(self) -> bool:
        """Begin an index that somebody asked for, unless the run is closed; then :meth:`leave`."""
        self._at_work.append(None)
        if self._retired or self.closed:
            # In the moment since it was found.
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """End an index that somebody asked for."""
        self._at_work.pop()
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """Close the run once no index that somebody asked for is at work.

        Not one that ``run_pipeline`` or a loop drives, nor one of the process that this one was
        forked from.
        """
        if self.in_session or self.closed or self.pid != os.getpid():
            return
        self._retired = True
        if self._at_work:
            return
        self.closed = True
        self.release_workers()
        store, self.store = self.store, None
        if store is not None:
            store.close_or_say()

    def close(self) -> None:
        """Write what is pending and close the store."""
        self.closed = True
        self.release_workers()
        store, self.store = self.store, None
        if store is not None:
            store.close()

    def _require_recorder(self) -> None:
        """Make sure that some plugin records to the store, which another one may have opened."""
        if not self.plugins.implements("psnc_index_lookup"):
            url = shown_url(self.pipeline.configured_store_url)
            raise StoreError(
                f"no loaded plugin records to {url}, since none implements psnc_index_lookup: see "
                "psnc plugins for those kept out, or say track_metrics=False to record nothing"
            )

    def _refuse_moved_indices(self) -> None:
        """Keep a resume from taking the result of one index for that of another."""
        source = self.pipeline.source
        if self.store is None or type(source).index_name is Source.index_name:
            return
        self.store.flush()
        names = self.store.index_names()
        for index in sorted(names):
            then = names[index]
            now = source.index_name(index) if index < self.total_indices else then
            if now != then:
                raise SourceError(
                    f"index {index} is {now} now, and was {then} when it was completed: put back "
                    "what was there, or run every index again (pipeline.reset(), psnc reset DB)"
                )

    def _refuse_other_directory(self, store: CheckpointStore) -> None:
        """Keep a resume from taking another directory's files for its own.

        The hash is that of the parameters as given, so that ``data_dir="data"`` has the same
        hash everywhere, while the files it means depend on the working directory.
        """
        holds_many_runs = "://" in self.pipeline.configured_store_url
        if holds_many_runs and not self.pipeline.resume:
            return
        recorded = [row for row in store.runs() if row.config_hash == self.config_hash]
        if not recorded or _escaped(recorded[-1].run_dir) == _escaped(self.run_dir):
            return
        there = _unescaped(recorded[-1].run_dir)
        for text in text_values(self.pipeline.config):
            if not text or os.path.isabs(text):
                continue
            if any(os.path.exists(os.path.join(each, text)) for each in (self.run_dir, there)):
                place = shown_url(self.pipeline.configured_store_url)
                here = os.fsencode(self.run_dir).decode("utf-8", "backslashreplace")
                other = "store" if holds_many_runs else "db_dir"
                raise StoreError(
                    f"{place} was recorded in {recorded[-1].run_dir}, "
                    f"where the relative path {text!r} is another than in {here}: run from "
                    f"there, give absolute paths, or choose another {other}"
                )


def _escaped(directory: str) -> str:
    """Return a directory as every store would have it, whatever characters it can hold."""
    return directory.encode("ascii", "backslashreplace").decode()


def _unescaped(directory: str) -> str:
    """Return a recorded directory by the name that it has on disk, if that is no UTF-8."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda odd: chr(int(odd[1], 16)), directory)


def _working_directory() -> str:
    # A pool's process may outlive the directory that it was started in, and work for a pipeline
    # that has nothing to do with it.
    try:
        return os.getcwd()
    except FileNotFoundError:
        here = "/proc/self/cwd"
        return os.readlink(here) if os.path.islink(here) else "(removed)"


_begin_lock = threading.Lock()


def _renew_lock() -> None:
    """Replace a lock that a thread which is not in this process may have held."""
    global _begin_lock
    _begin_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def run_of(pipeline: Pipeline[Any]) -> Run:
    """Return the run of a pipeline in this process, begun on first use.

    After a fork the child begins its own: connections and locks stay with the parent. So does a
    process that has other plugins since.
    """
    run: Run | None = pipeline.__dict__.get("_run")
    if run is not None and run.pid == os.getpid():
        if run.is_current or (run.in_session and not run.closed):
            return run
        # Before any lock is held: plugins learn of it.
        run.retire()
    # A copy that came to somebody else's worker brings its plugins along.
    if "_plugin_config" in pipeline.__dict__:
        return _run_of_copies(pipeline)
    with _begin_lock:
        run = pipeline.__dict__.get("_run")
        if run is None or not run.is_current:
            run = _begin_anew(pipeline, run)
    return run


def enter_run(pipeline: Pipeline[Any]) -> Run:
    """Return the run of a pipeline, which stays open until :meth:`Run.leave`."""
    while True:
        run = run_of(pipeline)
        if run.enter():
            return run


class _RunsOfCopies(threading.local):
    """The runs of copies that a thread was sent, the latest last."""

    def __init__(self) -> None:
        self.by_instance: dict[str, Run] = {}


_runs_of_copies = _RunsOfCopies()

# A pool works on few pipelines at a time; more would keep data in memory that nobody needs.
_KEPT_COPIES = 4


def _run_of_copies(pipeline: Pipeline[Any]) -> Run:
    """Return the one run of all the copies of a pipeline that this thread was sent.

    A pool sends a copy with every task. One run for each would open the store and prepare the sink
    for each, and register a worker.
    """
    runs = _runs_of_copies.by_instance
    instance: str = pipeline.instance_id
    # First, since those that the pipeline brings along may take the place of the run's.
    plugin_manager(pipeline.__dict__["_plugin_config"])
    run = runs.pop(instance, None)
    if run is None or not run.is_current:
        if run is not None:
            run.retire()
        run = _begin(pipeline)
    runs[instance] = run
    for oldest in list(runs)[:-_KEPT_COPIES]:
        runs.pop(oldest).retire()
    pipeline.__dict__["_run"] = run
    return run


def _begin_anew(pipeline: Pipeline[Any], earlier: Run | None) -> Run:
    if earlier is None or earlier.pid != os.getpid():
        return _begin(pipeline)
    # The latest run may have been told to record to another place.
    run = _begin(earlier.pipeline)
    pipeline.__dict__["_run"] = run
    return run


def _begin(pipeline: Pipeline[Any]) -> Run:
    run = Run(pipeline, plugin_manager(pipeline.__dict__.get("_plugin_config")))
    run.open_store(create=True)
    adopt(run)
    return run


def adopt(run: Run) -> None:
    """Make a run the one that its pipeline uses in this process."""
    run.pipeline.__dict__["_run"] = run
