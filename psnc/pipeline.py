"""Pipeline: an immutable chain of stages, and the questions one can ask about its runs."""

from __future__ import annotations

import hashlib
import operator
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import attrs

from psnc.errors import IndexRangeError, PipelineError, StoreError, TrackingDisabledError
from psnc.execution import chain, execute, execute_untracked
from psnc.manager import active_config, plugin_manager
from psnc.provenance import canonical_json, config_hash, pipeline_config
from psnc.run import enter_run, run_of
from psnc.stages import Filter, Sink, Source, Stage, gathers, is_stateful, stage_name
from psnc.store import CheckpointStore, shown_url

if TYPE_CHECKING:
    from psnc.metrics import PipelineMetrics

__all__ = ["Pipeline"]

T = TypeVar("T")
Out = TypeVar("Out")


def _as_source(source: Any) -> Source[Any]:
    if isinstance(source, Stage):
        return source  # type: ignore[return-value]  # one of another kind is refused below
    from psnc.sources import as_source

    return as_source(source)  # type: ignore[no-any-return]


def _as_tuple(filters: Iterable[Filter[Any, Any]]) -> tuple[Filter[Any, Any], ...]:
    try:
        return tuple(filters)
    except TypeError:
        raise PipelineError(
            f"filters: {type(filters).__qualname__!r} is no list: write filters=[…]"
        ) from None


def _path_or_none(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value).expanduser()


def _directory_or_none(value: str | os.PathLike[str] | None) -> Path | None:
    return _path_or_none(_no_url(value, "db_dir"))


def _file_or_none(value: str | os.PathLike[str] | None) -> Path | None:
    return _path_or_none(_no_url(value, "db_file"))


def _no_url(value: str | os.PathLike[str] | None, field: str) -> str | os.PathLike[str] | None:
    if value is not None and "://" in str(value):
        raise PipelineError(f"{field}={shown_url(str(value))!r} is no path: give a URL as store=")
    return value


def _shown(store: str | None) -> str:
    """Return a store's URL for ``repr``, which logs and notebooks may hold: no password."""
    return repr(store if store is None else shown_url(store))


def _text_or_none(value: str | os.PathLike[str] | None) -> str | None:
    return None if value is None else os.fspath(value)


@attrs.frozen(slots=False, eq=False)
class Pipeline(Generic[T]):
    """A source, filters and a sink, run one integer index at a time.

    ``pipeline[i]`` runs index ``i``, records it and returns the sink's output paths; an index
    that the pipeline's database already holds returns its recorded paths at once.

    Attributes
    ----------
    source : Source
        Where items come from. A list, a dataset with ``__len__`` and ``__getitem__``, or text or a
        path that names files becomes one; see :func:`psnc.as_source`.
    filters : tuple of Filter
        What happens to them on the way.
    sink : Sink, optional
        Where they go; a pipeline runs once it has one.
    resume : bool
        Use the database that belongs to this configuration, and skip what it holds as
        completed. Otherwise each pipeline object begins a database of its own.
    db_dir : path, optional
        Directory of the database; by default ``$PSNC_CACHE_DIR``, else ``$XDG_CACHE_HOME/psnc``,
        else ``~/.cache/psnc``.
    db_file : path, optional
        The database itself, whatever ``resume`` and ``db_dir`` say.
    store : URL or path, optional
        Another kind of store, which a plugin opens, such as ``postgresql://host/database``; a
        path is a SQLite database, as in ``db_file``. By default ``$PSNC_STORE``, or the
        configuration file's, for a pipeline with neither ``db_dir`` nor ``db_file``.
    track_metrics : bool
        Record anything at all.
    track_memory : bool or "python"
        Record each index's peak memory: the process's high-water mark, or with ``"python"``
        what ``tracemalloc`` counts, which is slow.
    track_gpu : bool
        Record GPU memory where there is a GPU.

    Examples
    --------
    >>> pipeline = Numbers(3).filter(Double()).write(WriteText("out"))
    >>> pipeline[2]
    ['out/2.txt']
    >>> pipeline.completed_indices
    {2}
    """

    source: Source[Any] = attrs.field(converter=_as_source)
    filters: tuple[Filter[Any, Any], ...] = attrs.field(default=(), converter=_as_tuple)
    sink: Sink[T] | None = None
    resume: bool = False
    db_dir: Path | None = attrs.field(default=None, converter=_directory_or_none)
    db_file: Path | None = attrs.field(default=None, converter=_file_or_none)
    store: str | None = attrs.field(default=None, converter=_text_or_none, repr=_shown)
    track_metrics: bool = True
    track_memory: bool | Literal["python"] = True
    track_gpu: bool = True

    def __attrs_post_init__(self) -> None:
        _require_stage("source", self.source, Source)
        for filter in self.filters:
            _require_stage("filters", filter, Filter)
        if self.sink is not None:
            _require_stage("sink", self.sink, Sink)
        _refuse_two_places(self)
        self.__dict__["_created_at"] = _unique_timestamp()
        self.__dict__["_instance_id"] = uuid.uuid4().hex

    # --- building -----------------------------------------------------------------------------

    def filter(self, filter: Filter[T, Out]) -> Pipeline[Out]:
        """Return a pipeline with one more filter at the end."""
        if self.sink is not None:
            raise PipelineError("this pipeline already has a sink: add filters before .write()")
        return attrs.evolve(self, filters=(*self.filters, filter))  # type: ignore[return-value]

    def write(self, sink: Sink[T]) -> Pipeline[T]:
        """Return a pipeline that ends in a sink."""
        if self.sink is not None:
            raise PipelineError("this pipeline already has a sink: it can have only one")
        return attrs.evolve(self, sink=sink)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pipeline to a file, as TOML, YAML or JSON by its suffix.

        Raises
        ------
        ConfigurationError
            If a stage or a parameter has no form in such a file; names all that have none.
        PipelineError
            If the file cannot be written, or its suffix is another.
        """
        from psnc.pipeline_files.file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Pipeline[Any]:
        """Read a pipeline from a file: one of the same hash as the pipeline that was saved.

        It imports the modules that the file names, and calls the constructors of its stages.

        Raises
        ------
        PipelineError
            If anything is wrong with the file; names all that is.
        """
        from psnc.pipeline_files.file import load

        return load(path)

    # --- running ------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of source indices."""
        return len(self.source)

    def __getitem__(self, index: int) -> list[str]:
        """Run one index and return the sink's output paths.

        Raises
        ------
        IndexRangeError
            If the source has no such index.
        PipelineError
            If the pipeline has no sink.
        StoreError
            If the outcome cannot be recorded.
        Exception
            Whatever a stage raises, once it is recorded.
        """
        self.require_sink()
        run = enter_run(self)
        try:
            index = self.normalise(index, run.total_indices)
            if not self.track_metrics:
                return execute_untracked(run, index)
            record, exception = execute(run, index)
            if run.store is not None:
                # The caller has the result in hand, so that it must be on record.
                run.store.flush()
        finally:
            run.leave()
        if exception is not None:
            raise exception
        return list(record.output_paths)

    def __iter__(self) -> Iterator[list[str]]:
        """Run every index in turn."""
        return (self[index] for index in range(len(self)))

    def items(self, index: int) -> Iterable[T]:
        """Yield what reaches the sink for one index, without the sink and without a record."""
        return chain(self, self._normal(index))

    def normalise(self, index: int, total: int) -> int:
        """Turn an index as Python takes it into one between 0 and ``total``."""
        try:
            position = operator.index(index)
        except TypeError:
            raise PipelineError(
                f"a pipeline is indexed by integers, not {type(index).__qualname__}"
            ) from None
        if position < 0:
            position += total
        if not 0 <= position < total:
            raise IndexRangeError(
                f"index {index} is out of range: {stage_name(self.source)} has {total} "
                f"{'index' if total == 1 else 'indices'}"
            )
        return position

    def require_sink(self) -> Sink[Any]:
        """Return the sink, or raise :class:`PipelineError` if there is nothing to write to."""
        if self.sink is None:
            raise PipelineError("this pipeline has no sink: add one with .write(sink)")
        return self.sink

    @cached_property
    def has_state(self) -> bool:
        """Whether a filter accumulates."""
        return any(is_stateful(filter) for filter in self.filters)

    @property
    def gathers(self) -> bool:
        """Whether a filter accumulates, or the sink has a ``gather`` of its own."""
        return self.has_state or gathers(self.sink)

    # --- identity -----------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """The stages and their parameters, in JSON's own types."""
        return pipeline_config(self.source, self.filters, self.sink)

    @cached_property
    def config_json(self) -> str:
        """Canonical JSON of :attr:`config`."""
        return canonical_json(self.config)

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of :attr:`config_json`, 64 hexadecimal digits."""
        return config_hash(self.config_json)

    @property
    def instance_id(self) -> str:
        """UUID4 in hexadecimal of this object, which its copies in other processes share."""
        instance_id: str = self.__dict__["_instance_id"]
        return instance_id

    @property
    def db_path(self) -> Path:
        """Absolute path of the database, whether or not it exists yet.

        That of the latest run, which may have been given another ``resume`` or ``db_dir``.
        """
        self._require_tracking("db_path")
        return self._latest.configured_db_path

    @property
    def store_url(self) -> str:
        """Where the pipeline is recorded: the path of its database, or its store's URL."""
        return self._latest.configured_store_url

    @property
    def _latest(self) -> Pipeline[Any]:
        run = self.__dict__.get("_run")
        return self if run is None else run.pipeline

    @property
    def configured_db_path(self) -> Path:
        """Absolute path of the database that the pipeline's own fields name."""
        url = self.configured_store_url
        if "://" in url:
            raise StoreError(f"{shown_url(url)} is no file: ask for store_url")
        return Path(url)

    @cached_property
    def configured_store_url(self) -> str:
        """The URL that the pipeline's own fields name; a path for SQLite."""
        url = self.store
        if url is None and self.db_file is None and self.db_dir is None:
            url = plugin_manager().config.store
        if url is not None and "://" in url:
            return url
        file = self.db_file if url is None else Path(url).expanduser()
        if file is not None:
            return str(file.absolute())
        return str(self._place_without_suffix().with_suffix(".db"))

    def _place_without_suffix(self) -> Path:
        distinction = "" if self.resume else f"_{self.__dict__['_created_at']}"
        directory = self.db_dir or _default_directory()
        return directory.absolute() / f"{self.config_hash[:16]}{distinction}"

    def artifact_path(self, order: int, filter: Stage, index: int) -> Path:
        """Path of the file to which a stateful filter flushes one index."""
        directory = self._filters_directory(".artifacts") / f"{order}-{stage_name(filter)}"
        return directory / f"{index}{getattr(filter, 'artifact_suffix', '')}"

    def gathered_path(self, order: int, filter: Stage) -> Path:
        """Path of the file for all completed indices of a stateful filter that names none.

        It lies with the latest run, which may have been given another ``resume`` or ``db_dir``.
        """
        name = f"{order}-{stage_name(filter)}{getattr(filter, 'artifact_suffix', '')}"
        return self._latest._filters_directory(".gathered") / name

    def _filters_directory(self, suffix: str) -> Path:
        url = self.configured_store_url
        if "://" in url:
            place = self._place_without_suffix()
            # Another store has another record of this index, and another file for it.
            which = hashlib.sha256(shown_url(url).encode()).hexdigest()[:8]
            place = place.with_name(f"{place.name}_{which}")
        else:
            place = self.configured_db_path
        # The hash, since a database may hold several configurations.
        return place.with_suffix(suffix) / self.config_hash[:16]

    def __getstate__(self) -> dict[str, Any]:
        """Carry along what a copy needs to record to the same place, with the same plugins."""
        if self.track_metrics and self.sink is not None:
            _ = self.configured_store_url, self.config_hash
        state = {key: value for key, value in self.__dict__.items() if key != "_run"}
        # That of a copy that is passed on, in a process that had no use for plugins itself.
        carried = self.__dict__.get("_plugin_config")
        return {**state, "_plugin_config": active_config() or carried or plugin_manager().config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # --- questions ----------------------------------------------------------------------------

    @property
    def completed_indices(self) -> set[int]:
        """Successfully completed indices."""
        return self.require_store("completed_indices").completed_indices()

    @property
    def failed_indices(self) -> dict[int, str]:
        """Failed indices with their error messages."""
        return self.require_store("failed_indices").failed_indices()

    def remaining_indices(self) -> list[int]:
        """Return the indices neither completed nor failed, sorted."""
        store = self.require_store("remaining_indices()")
        completed, failed = store.completed_indices(), store.failed_indices()
        every = range(len(self.source))
        return [index for index in every if index not in completed and index not in failed]

    def summary(self) -> dict[str, Any]:
        """Return how far the pipeline is.

        Returns
        -------
        dict
            ``total, completed, failed, remaining, errors`` (counts; ``errors`` counts the error
            messages on record, one for each failed index), ``avg_time_ms`` (mean wall time of a
            completed index), ``total_elapsed_s`` (from the first to the last sign of life of
            each invocation, summed), ``workers`` (ever registered), ``config_hash``, ``db_path``.
        """
        total = len(self.source)
        counts = self.require_store("summary()").counts(total)
        average = counts.wall_time_ns / counts.completed / 1e6 if counts.completed else 0.0
        return {
            "total": total,
            "completed": counts.completed,
            "failed": counts.failed,
            "remaining": total - counts.completed - counts.failed,
            "errors": counts.failed,
            "avg_time_ms": round(average, 3),
            "total_elapsed_s": round(counts.elapsed_s, 3),
            "workers": counts.workers,
            "config_hash": self.config_hash,
            "db_path": shown_url(self.store_url),
        }

    @property
    def metrics(self) -> PipelineMetrics:
        """Timing and memory, by run, index and stage."""
        from psnc.metrics import PipelineMetrics

        return PipelineMetrics(self.require_store("metrics"), self.summary())

    @property
    def active_workers(self) -> list[dict[str, Any]]:
        """Workers registered for this pipeline, one dictionary a worker."""
        return self.require_store("active_workers").workers()

    def index_for_path(self, path: str | os.PathLike[str]) -> int | None:
        """Return the lowest index that produced an output path, ``None`` if none did."""
        return self.require_store("index_for_path()").index_for_path(os.fspath(path))

    def output_paths_for_index(self, index: int) -> list[str]:
        """Return the recorded output paths of one index; empty if it has none."""
        return self.require_store("output_paths_for_index()").output_paths(self._normal(index))

    def filter_artifacts_for_index(self, index: int) -> list[Mapping[str, Any]]:
        """Return the files that filters produced for one index.

        Returns
        -------
        list of dict
            Each with ``path``, ``filter_name`` and ``filter_order``.
        """
        index = self._normal(index)
        return self.require_store("filter_artifacts_for_index()").artifacts(index).get(index, [])

    def all_filter_artifacts(self) -> dict[int, list[Mapping[str, Any]]]:
        """Return the files that filters produced, by index."""
        return self.require_store("all_filter_artifacts()").artifacts()

    def reset(self) -> None:
        """Forget every recorded index, so that all run again."""
        self.require_store("reset()").reset()

    def reset_index(self, index: int) -> None:
        """Forget one index, so that it runs again."""
        self.require_store("reset_index()").reset_index(self._normal(index))

    def _normal(self, index: int) -> int:
        return self.normalise(index, len(self.source))

    def require_store(self, asked: str) -> CheckpointStore:
        """Return the store, with all that was recorded in it, or say what asked for it in vain.

        Raises
        ------
        TrackingDisabledError
            If nothing is recorded.
        """
        self._require_tracking(asked)
        store = run_of(self).store
        if store is None:
            raise TrackingDisabledError(
                f"{asked} needs a checkpoint store, and no loaded plugin opened one for "
                f"{shown_url(self.store_url)}"
            )
        store.flush()
        return store

    def _require_tracking(self, asked: str) -> None:
        if not self.track_metrics:
            raise TrackingDisabledError(
                f"{asked} needs a database, and this pipeline keeps none: construct it with "
                "track_metrics=True"
            )


def _refuse_two_places(pipeline: Pipeline[Any]) -> None:
    if pipeline.store is not None and pipeline.db_file is not None:
        raise PipelineError("store and db_file both say where to record: give one of them")


def _require_stage(field: str, value: Any, kind: type[Stage]) -> None:
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise PipelineError(f"{field}: {value.__qualname__} is a class: construct it first")
    raise PipelineError(
        f"{field}: {type(value).__qualname__!r} is no {kind.__name__}: derive it from "
        f"psnc.{kind.__name__}"
    )


def _default_directory() -> Path:
    configured = os.environ.get("PSNC_CACHE_DIR")
    if configured:
        return Path(configured).expanduser()
    # The documented default is XDG's on every system, so that platformdirs' Unix rules are used.
    from platformdirs.unix import Unix

    directory = Unix("psnc", appauthor=False).user_cache_path
    if not directory.is_absolute():
        raise StoreError("there is no home directory for the database: set PSNC_CACHE_DIR or HOME")
    return directory


_last_timestamp = datetime.min.replace(tzinfo=UTC)
_timestamp_lock = threading.Lock()


def _unique_timestamp() -> str:
    """Return the present moment to the microsecond, never the same one twice in a process."""
    global _last_timestamp
    with _timestamp_lock:
        _last_timestamp = max(datetime.now(UTC), _last_timestamp + timedelta(microseconds=1))
        return _last_timestamp.strftime("%Y%m%dT%H%M%S%f")
