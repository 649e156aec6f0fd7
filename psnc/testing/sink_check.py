"""The rules of sinks."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from psnc.errors import PartitionError
from psnc.execution import error_text
from psnc.partition import partition
from psnc.pipeline import Pipeline
from psnc.stages import Sink, Source, gathers
from psnc.testing.file_comparison import files_below, same_bytes
from psnc.testing.fresh_process import FreshProcess
from psnc.testing.stage_check import (
    Interruption,
    check_hash_elsewhere,
    check_stage,
    cut_short,
    fail,
    hash_of,
    require_stage,
    source_of,
)

__all__ = ["check_sink"]

Groups = Sequence[tuple[int, ...]]
SameFiles = Callable[[Path, Path], bool]

_KILLED = 86
_MEETING_S = 0.5


def check_sink(
    make_sink: Callable[[Path], Sink[Any]],
    items: Source[Any] | Sequence[Iterable[Any]],
    *,
    same_files: SameFiles = same_bytes,
) -> None:
    """Check that a sink keeps the rules that resuming and parallel runs rely on.

    - It returns the paths of files or directories that exist when it returns.
    - Running an index again returns the same paths and leaves the same files.
    - An error from the stages before it comes through, and what it leaves of that index is gone
      once the index has run.
    - So it is when its process was ended in the middle of an index, but for drafts under other
      names.
    - Indices can run in any order, in two threads that share it, and in two processes at once.
    - If it has a ``gather``, calling it again returns the same paths and leaves the same files, and
      so does another sink like it, that has prepared nothing, after indices ran in another order.
    - ``partition_indices`` puts each index into exactly one group; groups run as they ask to.
    - It can be pickled, its hash is the same in every process and stays, ``params()`` lists what
      its constructor takes.

    Parameters
    ----------
    make_sink : callable
        Given an empty directory, returns the sink, constructed to write there and nowhere else.
    items : Source, or sequence of iterables
        What to write: a source, or a list of items for each of a few indices.
    same_files : callable, optional
        Whether two files say the same; by default equal bytes do. For formats that hold the time
        of writing, say.

    Raises
    ------
    AssertionError
        If it breaks a rule: one sentence that names both.

    Examples
    --------
    >>> check_sink(lambda directory: WriteText(str(directory)), [[1, 2], [3]])
    """
    __tracebackhide__ = True
    source = source_of(items)
    with tempfile.TemporaryDirectory(prefix="psnc-testing-") as directory:
        # Without symbolic links, since a sink may return resolved paths.
        root = Path(directory).resolve()
        _SinkCheck(make_sink, source, root, same_files).check()


class _SinkCheck:
    """Writes the same items in many ways, always to one place, and compares the files.

    What a clean run writes is moved aside for that, so that a file that holds its own path is the
    same in each.
    """

    def __init__(
        self,
        make_sink: Callable[[Path], Sink[Any]],
        source: Source[Any],
        root: Path,
        same: SameFiles,
    ) -> None:
        self.make_sink = make_sink
        self.source = source
        self.output = root / "output"
        self.clean = root / "clean"
        self.same = same
        self.paths: dict[int, list[str]] = {}

    def check(self) -> None:
        __tracebackhide__ = True
        sink = self._new_sink()
        check_stage(sink)
        own_hash = hash_of(sink)
        groups = self._groups(sink)
        self._run_clean(sink, groups)
        if hash_of(sink) != own_hash:
            fail(sink, "writing changes its hash: it changes an argument that it was given")
        self._check_again(sink)
        os.rename(self.output, self.clean)
        self._check_order(groups)
        self._check_interruption()
        self._check_threads(groups)
        check_hash_elsewhere(sink)
        self._check_kill()
        self._check_processes(groups)
        if gathers(sink):
            self._check_gathering(groups)

    # --- the ways to write --------------------------------------------------------------------

    def _run_clean(self, sink: Sink[Any], groups: Groups) -> None:
        __tracebackhide__ = True
        pipeline = self._prepared(sink)
        for index in _flat(groups):
            paths = self.paths[index] = _write(sink, pipeline.items(index), index)
            for path in paths:
                if not Path(path).exists():
                    fail(sink, f"index {index} returns {path!r}, which does not exist")
                if not Path(os.path.abspath(path)).is_relative_to(self.output):
                    fail(
                        sink,
                        f"index {index} returns {path!r}, outside of the directory that make_sink "
                        "was given",
                    )

    def _check_again(self, sink: Sink[Any]) -> None:
        __tracebackhide__ = True
        shutil.copytree(self.output, self.clean, symlinks=True)
        for index in self.paths:
            again = _write_again(sink, self._pipeline(sink), index, "run again")
            if again != self.paths[index]:
                fail(
                    sink,
                    f"run again, index {index} returns {again} instead of {self.paths[index]}: "
                    "name files after the index",
                )
        self._compare(sink, "running every index again leaves other files than running it once")
        shutil.rmtree(self.clean)

    def _check_order(self, groups: Groups) -> None:
        __tracebackhide__ = True
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        for index in _flat(groups[::-1]):
            _write(sink, pipeline.items(index), index)
        self._compare(sink, "what it writes depends on the order in which indices run")

    def _check_interruption(self) -> None:
        __tracebackhide__ = True
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        for index in self.paths:
            half = _half(pipeline, index)
            try:
                _write(sink, cut_short(pipeline.items(index), half), index)
            except Exception:
                # The error itself, or one that the sink made of it: the index fails.
                pass
            else:
                fail(
                    sink,
                    "it swallows an error of the stages before it: an index that failed would "
                    "count as completed",
                )
            _write_again(sink, pipeline, index, "run again after an error in the middle of it")
        self._compare(
            sink, "after an error in the middle of an index, running the index leaves other files"
        )

    def _check_threads(self, groups: Groups) -> None:
        """Have two threads write at the same time, with the one object that threads share."""
        __tracebackhide__ = True
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        errors: list[Exception] = []

        def write(own: Groups, meeting: threading.Barrier) -> None:
            try:
                for index in _flat(own):
                    _write(sink, _met(pipeline.items(index), meeting), index)
            except Exception as error:
                errors.append(error)

        for pair in (groups[i : i + 2] for i in range(0, len(groups), 2)):
            meeting = threading.Barrier(len(pair), timeout=_MEETING_S)
            threads = [threading.Thread(target=write, args=([own], meeting)) for own in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        sentence = "two threads that write different indices with it disturb each other"
        if errors:
            fail(sink, f"{sentence} ({type(errors[0]).__name__}: {errors[0]})")
        self._compare(sink, sentence)

    def _check_kill(self) -> None:
        __tracebackhide__ = True
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        first = next(iter(self.paths))
        with FreshProcess(_write_half_and_die, pipeline, first) as process:
            if process.wait() != _KILLED:
                _ = _result(sink, process)
        sink = self._new_sink(empty=False)
        pipeline = self._prepared(sink)
        for index in self.paths:
            _write_again(sink, pipeline, index, "run again after its process was ended")
        self._compare(
            sink,
            "after its process was ended in the middle of an index, running the index leaves "
            "other files",
            drafts=True,
        )

    def _check_processes(self, groups: Groups) -> None:
        __tracebackhide__ = True
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        sentence = "two processes that write different indices at once disturb each other"
        with ExitStack() as stack:
            processes = [
                stack.enter_context(FreshProcess(_write_groups, pipeline, groups[start::2]))
                for start in range(min(2, len(groups)))
            ]
            written = [pair for process in processes for pair in _result(sink, process)]
        if dict(written) != self.paths:
            fail(sink, "another process returns other paths for the same index")
        self._compare(sink, sentence)

    def _check_gathering(self, groups: Groups) -> None:
        __tracebackhide__ = True
        indices = sorted(_flat(groups))
        shutil.rmtree(self.clean)
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        for index in _flat(groups):
            _write(sink, pipeline.items(index), index)
        made = self._gathered(sink, indices)
        shutil.copytree(self.output, self.clean, symlinks=True)
        if self._gathered(sink, indices) != made:
            fail(sink, "gather() returns other paths when it is called again")
        self._compare(sink, "gather() leaves other files when it is called again")
        sink = self._new_sink()
        pipeline = self._prepared(sink)
        for index in _flat(groups[::-1]):
            _write(sink, pipeline.items(index), index)
        if self._gathered(self._new_sink(empty=False), indices) != made:
            fail(sink, "the paths that gather() returns depend on the order in which indices ran")
        self._compare(sink, "what gather() makes depends on the order in which indices ran")

    def _gathered(self, sink: Sink[Any], indices: Sequence[int]) -> list[str]:
        __tracebackhide__ = True
        paths = _paths_of(sink, sink.gather(indices), "gather()")
        for path in paths:
            if not Path(path).exists():
                fail(sink, f"gather() returns {path!r}, which does not exist")
        return paths

    # --- what they are made of ----------------------------------------------------------------

    def _new_sink(self, *, empty: bool = True) -> Sink[Any]:
        __tracebackhide__ = True
        if empty:
            shutil.rmtree(self.output, ignore_errors=True)
            self.output.mkdir()
        sink = self.make_sink(self.output)
        require_stage(sink, Sink)
        return sink

    def _pipeline(self, sink: Sink[Any]) -> Pipeline[Any]:
        return Pipeline(source=self.source, sink=sink, track_metrics=False)

    def _prepared(self, sink: Sink[Any]) -> Pipeline[Any]:
        pipeline = self._pipeline(sink)
        sink.prepare(pipeline)
        return pipeline

    def _groups(self, sink: Sink[Any]) -> Groups:
        __tracebackhide__ = True
        try:
            return list(partition(self.source, sink, list(range(len(self.source)))))
        except PartitionError as error:
            fail(sink, str(error))

    def _compare(self, sink: Sink[Any], sentence: str, *, drafts: bool = False) -> None:
        """Compare what was written now with the clean run's."""
        __tracebackhide__ = True
        expected, found = files_below(self.clean), files_below(self.output)
        missing = sorted(expected.keys() - found.keys())
        added = [] if drafts else sorted(found.keys() - expected.keys())
        if missing:
            fail(sink, f"{sentence}: {missing[0]} is missing")
        if added:
            fail(sink, f"{sentence}: {added[0]} is left over")
        for name, path in expected.items():
            if not self.same(path, found[name]):
                fail(sink, f"{sentence}: {name} has another content")


def _result(sink: Sink[Any], process: FreshProcess) -> Any:
    __tracebackhide__ = True
    try:
        return process.result()
    except RuntimeError as error:
        fail(sink, f"it cannot write in other processes ({error})")


def _flat(groups: Groups) -> list[int]:
    return [index for group in groups for index in group]


def _half(pipeline: Pipeline[Any], index: int) -> int:
    return (sum(1 for _ in pipeline.items(index)) + 1) // 2


def _write(sink: Sink[Any], items: Iterable[Any], index: int) -> list[str]:
    """Run the sink and return its paths as text, whatever form it gives them."""
    __tracebackhide__ = True
    return _paths_of(sink, sink(iter(items), index), f"index {index}")


def _paths_of(sink: Sink[Any], returned: Any, what: str) -> list[str]:
    __tracebackhide__ = True
    if returned is None:
        return []
    try:
        paths = [returned] if isinstance(returned, (str, os.PathLike)) else list(returned)
        return [os.fspath(path) for path in paths]
    except TypeError:
        fail(
            sink,
            f"{what} returns {type(returned).__qualname__}: a sink returns the paths that it wrote",
        )


def _write_again(sink: Sink[Any], pipeline: Pipeline[Any], index: int, when: str) -> list[str]:
    __tracebackhide__ = True
    try:
        return _write(sink, pipeline.items(index), index)
    except AssertionError:
        raise
    except Exception as error:
        fail(sink, f"{when}, index {index} raises {error_text(error)}")


def _met(items: Iterable[Any], meeting: threading.Barrier) -> Iterator[Any]:
    """Yield the items, the first of them once the other thread is at its first too."""
    # Broken where the sink lets only one of them in at a time, or has no more for the other.
    with suppress(threading.BrokenBarrierError):
        meeting.wait()
    yield from items


# --- in other processes -----------------------------------------------------------------------


def _write_half_and_die(pipeline: Pipeline[Any], index: int) -> None:
    def ending(items: Iterable[Any], after: int) -> Iterator[Any]:
        try:
            yield from cut_short(items, after)
        except Interruption:
            os._exit(_KILLED)

    sink = pipeline.sink
    assert sink is not None
    sink.prepare(pipeline)
    _write(sink, ending(pipeline.items(index), _half(pipeline, index)), index)


def _write_groups(pipeline: Pipeline[Any], groups: Groups) -> list[tuple[int, list[str]]]:
    sink = pipeline.sink
    assert sink is not None
    sink.prepare(pipeline)
    return [(index, _write(sink, pipeline.items(index), index)) for index in _flat(groups)]
