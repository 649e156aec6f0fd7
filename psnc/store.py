"""What a checkpoint store is: where every index of a run is recorded, and asked about.

The store that comes with psnc is SQLite's; another is a class with these methods and a plugin
that returns it from ``psnc_open_store``. ``psnc.testing.StoreSuite`` tests it.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import Factory, frozen

from psnc.errors import PluginError, StoreError
from psnc.records import IndexRecord, OutputFacts, WorkerInfo

if TYPE_CHECKING:
    from psnc.claims import Claim
    from psnc.code_versions import CodeVersion
    from psnc.run import Run

__all__ = [
    "CheckpointStore",
    "Counts",
    "IndexRow",
    "RecordedFile",
    "RunRow",
    "StageTotal",
    "open_store",
    "shown_url",
]


@frozen
class RunRow:
    """One recorded pipeline configuration."""

    run_id: int
    config_hash: str
    config_json: str
    started_at: str
    run_dir: str
    total_indices: int


@frozen
class Counts:
    """How far a run is.

    Attributes
    ----------
    completed, failed : int
        Indices by status.
    workers : int
        Workers ever registered.
    wall_time_ns : int
        Sum of the completed indices' wall times, in nanoseconds.
    elapsed_s : float
        Sum, over the invocations, of the time from first to last sign of life, in seconds.
    """

    completed: int
    failed: int
    workers: int
    wall_time_ns: int
    elapsed_s: float


@frozen
class IndexRow:
    """One index as recorded, for metrics; ``attempts`` is how often it was tried."""

    index: int
    status: str
    completed_at: str
    wall_time_ns: int
    peak_memory_bytes: int | None
    gpu_memory_bytes: int | None
    error: str | None
    attempts: int | None = None


@frozen
class RecordedFile:
    """A file that is recorded of a completed index.

    Attributes
    ----------
    path : str
        Where it is, as the stage said.
    facts : OutputFacts
        What it was as the index ended, as far as that is recorded.
    is_shared : bool
        Whether the outputs of another index are there too.
    is_artifact : bool
        Whether a filter made it.
    """

    path: str
    facts: OutputFacts = Factory(OutputFacts)
    is_shared: bool = False
    is_artifact: bool = False


@frozen
class StageTotal:
    """One stage over all the completed indices."""

    order: int
    name: str
    count: int
    wall_time_ns: int
    max_wall_time_ns: int


class CheckpointStore(ABC):
    """Records indices and answers questions about them, for one run at a time.

    Safe to use from many threads; many processes may have the same store open.
    Every method raises :class:`psnc.StoreError` when the store cannot be read or written.
    """

    # --- which run ----------------------------------------------------------------------------

    @abstractmethod
    def attach(self, run: Run) -> None:
        """Find the run to record to, or begin one.

        With ``run.pipeline.resume`` it is the latest run of the configuration
        (``run.config_hash``). Otherwise it is the run of this very pipeline, known by
        ``run.pipeline.instance_id``, which its copies in other processes share. A store whose
        URL names one run only, as the path of a SQLite file does, has one run of a configuration.
        A pipeline that was attached before stays with its run.
        """

    @abstractmethod
    def select(self, run_id: int) -> None:
        """Turn to a recorded run, to look at it."""

    @abstractmethod
    def runs(self) -> list[RunRow]:
        """List the recorded runs, oldest first."""

    # --- recording ----------------------------------------------------------------------------

    @abstractmethod
    def lookup(self, index: int) -> tuple[str, ...] | None:
        """Return the output paths of a completed index, ``None`` for any other."""

    @abstractmethod
    def index_started(self, worker: WorkerInfo, index: int) -> None:
        """Note what a worker is at; may reach the store a moment later."""

    @abstractmethod
    def worker_idle(self, worker: WorkerInfo) -> None:
        """Note that a worker stopped before its index ended."""

    def worker_gone(self, invocation_id: str, pid: int) -> None:  # noqa: B027  # optional
        """Note that a process of an invocation died, whatever its workers were at."""

    def invocation_over(self, invocation_id: str) -> None:  # noqa: B027  # optional
        """Note that no worker of an invocation is at work any more, however it ended."""

    def change_claims(  # noqa: B027  # optional
        self, change: Callable[[tuple[Claim, ...]], tuple[Claim, ...]]
    ) -> None:
        """Replace the claims of the drivers of the run by what a function makes of them.

        The function is called once or more. What it returned last takes the place of what it was
        given then, and nobody else changes the claims in between. If it raises, nothing changes.
        It must not use the store. A store that keeps no claims does not call it, and refuses no
        second driver.
        """

    @abstractmethod
    def record(self, record: IndexRecord) -> None:
        """Record one index whole or not at all, replacing what was recorded of it.

        Its log entries are added to those of earlier attempts. An error does not replace a
        completion, which only :meth:`reset` and :meth:`reset_index` undo.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when all that was recorded is in the store for others to see."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every index of the run."""

    @abstractmethod
    def reset_index(self, index: int) -> None:
        """Forget one index."""

    def reset_indices(self, indices: Sequence[int]) -> None:
        """Forget several indices; a crash meanwhile may leave some of them recorded."""
        for index in indices:
            self.reset_index(index)

    @abstractmethod
    def close(self) -> None:
        """Flush, and let go of every connection; whatever is asked afterwards is refused."""

    def close_or_say(self) -> None:
        """Close where no exception would be noticed: say on standard error what goes wrong."""
        try:
            self.close()
        except StoreError as error:
            print(f"psnc: {error}", file=sys.stderr)

    # --- questions ----------------------------------------------------------------------------

    @abstractmethod
    def completed_outputs(self) -> dict[int, list[str]]:
        """Return the output paths of every completed index, in one query."""

    def index_names(self) -> dict[int, str]:
        """Return what the source called each completed index, of those that have a name.

        It is ``index_name`` among the measurements of the record. A store that keeps no
        measurements returns nothing, and no resumed run is kept from taking one index for another.
        """
        return {}

    def code_versions(self) -> dict[str, CodeVersion]:
        """Return what the code of the stages was, by its digest, in all that is recorded.

        The digest is ``code_digest`` of the record. A store that keeps none returns nothing, and no
        resumed run says that the code has changed.
        """
        return {}

    def other_code(self, code_digest: str) -> list[str]:
        """Return the digests of other code that completed indices ran with."""
        return []

    def indices_of_code(self, code_digest: str) -> list[int]:
        """Return the completed indices that ran with such code."""
        return []

    def recorded_files(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[RecordedFile]]]:
        """Yield each completed index of these with its files, outputs first.

        A store that keeps nothing of a file but its path answers as it is written here. One that
        holds many indices had better read them in portions.

        Parameters
        ----------
        indices : sequence of int
            Sorted. Indices that are not completed are passed over.
        """
        outputs = self.completed_outputs()
        artifacts = self.artifacts()
        for index in indices:
            if index in outputs:
                made = (each["path"] for each in artifacts.get(index, ()))
                yield (
                    index,
                    [RecordedFile(path) for path in outputs[index]]
                    + [RecordedFile(path, is_artifact=True) for path in made],
                )

    @abstractmethod
    def completed_indices(self) -> set[int]:
        """Return the completed indices."""

    @abstractmethod
    def failed_indices(self) -> dict[int, str]:
        """Return the failed indices, sorted, with their error messages."""

    @abstractmethod
    def counts(self, total: int) -> Counts:
        """Return how far the run is, of the indices below ``total``."""

    @abstractmethod
    def workers(self) -> list[dict[str, Any]]:
        """Return the workers table, oldest first, one dictionary a row."""

    def claims(self) -> tuple[Claim, ...]:
        """Return the claims of the drivers of the run; a store that keeps none has none."""
        return ()

    @abstractmethod
    def index_for_path(self, path: str) -> int | None:
        """Return the lowest index that produced an output path, ``None`` if none did."""

    @abstractmethod
    def output_paths(self, index: int) -> list[str]:
        """Return the output paths of an index in the sink's order."""

    @abstractmethod
    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        """Return filter artifacts by index, each with ``path, filter_name, filter_order``."""

    @abstractmethod
    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        """Return the log entries of the run, or of one index, oldest first."""

    @abstractmethod
    def index_rows(self) -> Iterator[IndexRow]:
        """Yield the recorded indices in order."""

    @abstractmethod
    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        """Yield ``(index, stage_order, stage_name, wall_time_ns)``, sorted."""

    @abstractmethod
    def stage_totals(self) -> Iterable[StageTotal]:
        """Sum the stages' times over the completed indices."""


def open_store(url: str, run: Run | None = None, *, create: bool = False) -> CheckpointStore | None:
    """Ask the plugins for the store at a URL; ``None`` if no plugin answers.

    Raises
    ------
    StoreError
        If the store cannot be opened.
    PluginError
        If a plugin raises anything else, or answers with what is no store.
    """
    from psnc.manager import plugin_manager

    manager = run.plugins if run is not None else plugin_manager()
    try:
        store = manager.first_or_raise("psnc_open_store", url=url, run=run, create=create)
    except PluginError as error:
        raise PluginError(str(error).replace(url, shown_url(url))) from error
    if store is not None and not isinstance(store, CheckpointStore):
        origins = [origin for origin, _ in manager.implementations("psnc_open_store")]
        # pluggy does not say who answered; psnc's own plugin does as it should.
        names = ", ".join(each.title for each in origins if each.kind != "built-in")
        raise PluginError(
            f"psnc_open_store of one of the plugins {names} answered {shown_url(url)!r} with "
            f"{type(store).__qualname__!r}: return a psnc.CheckpointStore, or None"
        )
    return store


def shown_url(url: str) -> str:
    """Return a store's URL as it may be printed and recorded: without its password.

    Examples
    --------
    >>> shown_url("postgresql://ada:secret@host/runs")
    'postgresql://ada:***@host/runs'
    >>> shown_url("runs/a.db")
    'runs/a.db'
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = _SECRET_PARAMETER.sub(r"\1***", rest)
    # A password may hold what it should have had as %-escapes: so up to the last @.
    login = _LOGIN.match(rest)
    if login is None or _PORT.match(login["password"]):
        return f"{scheme}://{rest}"
    return f"{scheme}://{login['user']}:***@{rest[login.end() :]}"


# A user's name may hold an @ that should have been an escape, as those of some hosted servers do.
_LOGIN = re.compile(r"(?P<user>[^:/?]*):(?P<password>.*)@", re.DOTALL)
_PORT = re.compile(r"\d*(,[^@]*)?[/?]")
_SECRET_PARAMETER = re.compile(r"([?&][^=&]*(?:password|passwd|secret|token)[^=&]*=)[^&]*", re.I)
