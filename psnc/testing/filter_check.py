"""The rules of filters, those that accumulate included."""

from __future__ import annotations

import copy
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from psnc.stages import Filter, Source, is_stateful
from psnc.testing.file_comparison import same_figures
from psnc.testing.stage_check import (
    Interruption,
    check_hash_elsewhere,
    check_result_elsewhere,
    check_stage,
    fail,
    hash_of,
    pickled_copy,
    require_same,
    require_stage,
    source_of,
)

__all__ = ["check_filter"]

SameFiles = Callable[[Path, Path], bool]


def check_filter(
    filter: Filter[Any, Any],
    items: Source[Any] | Sequence[Iterable[Any]],
    *,
    lazy: bool = False,
    additive: bool = True,
    same_files: SameFiles = same_figures,
) -> None:
    """Check that a filter keeps the rules that retries and parallel runs rely on.

    - The same items give the same result: twice, whatever was filtered before, while another
      index is being filtered, in a copy that went through pickle, and in another process. (What
      cannot be sent from there is not compared.)
    - An error from the stages before it comes through.
    - It can be pickled, its hash is the same in every process and stays, ``params()`` lists what
      its constructor takes.

    Of a filter that accumulates, each index is given to a fresh copy, as in a run. Besides:

    - ``flush`` writes the file that it was told to, or none.
    - What one copy gathered is not in another's file.
    - ``merge`` gives the same in any order of the shards and when called again, leaves the shards
      alone, and works on a filter that saw no item.
    - One shard for each index comes to the same as one shard of all the items.

    Parameters
    ----------
    filter : Filter
        The filter.
    items : Source, or sequence of iterables
        What to filter: a source, or a list of items for each of a few indices.
    lazy : bool
        Also require that it yields something before it has taken every item of an index.
    additive : bool
        ``False`` for a filter that accumulates what depends on how items are divided among
        indices, such as their number.
    same_files : callable, optional
        Whether two files that ``flush`` or ``merge`` wrote say the same. By default equal bytes
        do, and JSON and NumPy files whose numbers differ by rounding only.

    Raises
    ------
    AssertionError
        If it breaks a rule: one sentence that names both.

    Examples
    --------
    >>> check_filter(Double(), [[1, 2, 3], [4]])
    """
    __tracebackhide__ = True
    require_stage(filter, Filter)
    source = source_of(items)
    check_stage(filter)
    own_hash = hash_of(filter)
    expected = _filter_all(filter, source)
    _check_results(filter, source, expected)
    _check_interruption(filter, source)
    if lazy:
        _check_laziness(filter, source)
    if is_stateful(filter):
        with tempfile.TemporaryDirectory(prefix="psnc-testing-") as directory:
            _Shards(filter, source, Path(directory), same_files).check(additive)
    if hash_of(filter) != own_hash:
        fail(filter, "filtering changes its hash: it changes an argument that it was given")
    check_hash_elsewhere(filter)
    check_result_elsewhere(
        filter,
        _filter_all,
        (filter, source),
        expected,
        "another process makes something else of the same items",
    )


def _filter_all(filter: Filter[Any, Any], source: Source[Any]) -> list[list[Any]]:
    return [_filtered(filter, source[index]) for index in range(len(source))]


def _for_one_index(filter: Filter[Any, Any]) -> Filter[Any, Any]:
    return copy.deepcopy(filter) if is_stateful(filter) else filter


def _filtered(filter: Filter[Any, Any], items: Iterable[Any]) -> list[Any]:
    __tracebackhide__ = True
    return list(_stream(filter, _for_one_index(filter), iter(items)))


def _stream(named: Filter[Any, Any], filter: Filter[Any, Any], items: Iterator[Any]) -> Any:
    __tracebackhide__ = True
    produced = filter(items)
    if not isinstance(produced, Iterable):
        fail(named, f"it returns {type(produced).__qualname__}: a filter yields its items")
    return produced


def _check_results(
    filter: Filter[Any, Any], source: Source[Any], expected: list[list[Any]]
) -> None:
    __tracebackhide__ = True
    indices = range(len(source))
    for asked, order, sentence in (
        (filter, indices, "given the same items again, it makes something else of them"),
        (filter, indices[::-1], "what it makes of an index depends on those it saw before"),
        (pickled_copy(filter), indices, "a copy that went through pickle filters in another way"),
    ):
        for index in order:
            found = _filtered(asked, source[index])
            require_same(filter, expected[index], found, f"index {index}: items", sentence)
    for index in indices[:-1]:
        _check_side_by_side(filter, source, expected, (index, index + 1))


def _check_side_by_side(
    filter: Filter[Any, Any], source: Source[Any], expected: list[list[Any]], pair: tuple[int, ...]
) -> None:
    """Filter two indices in turns, as two threads do."""
    __tracebackhide__ = True
    streams = {i: iter(_stream(filter, _for_one_index(filter), iter(source[i]))) for i in pair}
    found: dict[int, list[Any]] = {index: [] for index in pair}
    while streams:
        for index, stream in list(streams.items()):
            try:
                found[index].append(next(stream))
            except StopIteration:
                del streams[index]
    sentence = "used for two indices in turns, as by two threads, it mixes them up"
    for index in pair:
        require_same(filter, expected[index], found[index], f"index {index}: items", sentence)


def _check_interruption(filter: Filter[Any, Any], source: Source[Any]) -> None:
    __tracebackhide__ = True
    items = list(source[0])
    broke_off = False

    def breaking() -> Iterator[Any]:
        nonlocal broke_off
        yield from items[: (len(items) + 1) // 2]
        broke_off = True
        raise Interruption

    try:
        list(_stream(filter, _for_one_index(filter), breaking()))
    except Exception:
        # The error itself, or one that the filter made of it: the index fails, as it should.
        return
    if broke_off:
        fail(
            filter,
            "it swallows an error of the stages before it: an index that failed would count as "
            "completed",
        )


def _check_laziness(filter: Filter[Any, Any], source: Source[Any]) -> None:
    __tracebackhide__ = True
    for index in range(len(source)):
        waiting = deque(source[index])
        total = len(waiting)
        taken = (waiting.popleft() for _ in range(total))
        stream = iter(_stream(filter, _for_one_index(filter), taken))
        yields_some = any(True for _ in stream)
        if yields_some and total > 1 and not waiting:
            fail(
                filter,
                f"it takes all {total} items of index {index} before it yields one: items should "
                "pass one by one",
            )


class _Shards:
    """What an accumulating filter flushes and merges, in a directory of its own."""

    def __init__(
        self, filter: Filter[Any, Any], source: Source[Any], directory: Path, same: SameFiles
    ) -> None:
        self.filter = filter
        self.source = source
        self.directory = directory
        self.same = same
        self.suffix = getattr(filter, "artifact_suffix", "")

    def check(self, additive: bool) -> None:
        __tracebackhide__ = True
        filter = self.filter
        if not callable(getattr(filter, "merge", None)):
            fail(filter, "it has flush() and no merge(): what it gathers could not be put together")
        indices = range(len(self.source))
        shards = [self._flushed(f"{index}", self.source[index]) for index in indices]
        for index in indices[::-1]:
            again = self._flushed(f"{index}-again", self.source[index])
            if not self._alike(shards[index], again):
                fail(
                    filter,
                    "flush() writes what another index or attempt gathered too: keep what it "
                    "gathers on the object, made in __init__",
                )
        written = [shard for shard in shards if shard.exists()]
        if written:
            self._check_merge(written)
            if additive:
                self._check_division(written)

    def _check_merge(self, shards: list[Path]) -> None:
        __tracebackhide__ = True
        before = [shard.read_bytes() for shard in shards]
        merged = self._merged("merged", shards)
        first = self._copy_of(merged)
        if [shard.exists() and shard.read_bytes() for shard in shards] != before:
            fail(self.filter, "merge() changes the shards, which it will be given again")
        if not self.same(first, self._merged("merged", shards)):
            fail(self.filter, "merge() called again for the same file gives another: replace it")
        if not self.same(first, self._merged("reversed", shards[::-1])):
            fail(self.filter, "what merge() gives depends on the order of the shards")

    def _check_division(self, shards: list[Path]) -> None:
        __tracebackhide__ = True
        everything = chain.from_iterable(self.source[i] for i in range(len(self.source)))
        whole = self._flushed("whole", everything)
        merged, of_whole = self._merged("merged", shards), self._merged("of-whole", [whole])
        if not self.same(merged, of_whole):
            fail(
                self.filter,
                "the merged shards of the indices differ from one shard of all their items "
                "(additive=False if it gathers what depends on indices)",
            )

    def _flushed(self, name: str, items: Iterable[Any]) -> Path:
        __tracebackhide__ = True
        path = self._path(name)
        own = copy.deepcopy(self.filter)
        list(_stream(self.filter, own, iter(items)))
        before = set(self.directory.iterdir())
        own.flush(path)  # type: ignore[attr-defined]
        for other in set(self.directory.iterdir()) - before - {path}:
            fail(
                self.filter,
                f"flush() writes {other.name!r}, told to write {path.name!r}: set artifact_suffix "
                "in the class, if what writes the file adds an ending",
            )
        return path

    def _merged(self, name: str, shards: list[Path]) -> Path:
        __tracebackhide__ = True
        path = self._path(name)
        pickled_copy(self.filter).merge(shards, path)  # type: ignore[attr-defined]
        if not path.exists():
            fail(self.filter, "merge() does not write the file that it was told to")
        return path

    def _copy_of(self, path: Path) -> Path:
        duplicate = path.with_name(f"copy-of-{path.name}")
        duplicate.write_bytes(path.read_bytes())
        return duplicate

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{self.suffix}"

    def _alike(self, one: Path, other: Path) -> bool:
        if one.exists() != other.exists():
            return False
        return not one.exists() or self.same(one, other)
