"""Stages that each break one rule, and what `psnc.testing` should say of them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psnc import Filter, Param, Sink, Source, atomic_write

Items = Iterator[Any]


# --- sources ----------------------------------------------------------------------------------


class Counting(Source[int]):
    """Keeps the rules; the others change one thing."""

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterable[Any]:
        yield index
        yield 10 * index


class GrowsLonger(Counting):
    def __len__(self) -> int:
        self.count += 1
        return self.count


class GrowsAsItIsRead(Counting):
    def __getitem__(self, index: int) -> Iterable[Any]:
        self.count += index == 2
        yield index


class HasNothing(Counting):
    def __len__(self) -> int:
        return 0


class ReturnsNone(Counting):
    def __getitem__(self, index: int) -> Iterable[Any]:
        return None  # type: ignore[return-value]


class CanBeReadOnce(Counting):
    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.iterators = [iter([index]) for index in range(count)]

    def __getitem__(self, index: int) -> Iterable[Any]:
        return self.iterators[index]

    def __reduce__(self) -> Any:
        return CanBeReadOnce, (self.count,)


class RemembersTheHighest(Counting):
    """What it answers is settled by the first reading, and by what was read before that."""

    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.highest = 0
        self.answers: dict[int, int] = {}

    def __getitem__(self, index: int) -> Iterable[Any]:
        self.highest = max(self.highest, index)
        yield self.answers.setdefault(index, self.highest)


class SharesABuffer(Counting):
    def __getitem__(self, index: int) -> Iterable[Any]:
        self.buffer = np.zeros(2)
        self.buffer += index
        yield self.buffer.copy()
        self.buffer += 1
        yield self.buffer.copy()


class HoldsALock(Counting):
    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.lock = threading.Lock()


class LocksWhenItIsRead(Counting):
    def __getitem__(self, index: int) -> Iterable[Any]:
        self.lock = threading.Lock()
        yield index


class LosesItsDataInPickle(Counting):
    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.offset = 5

    def __getitem__(self, index: int) -> Iterable[Any]:
        yield np.array([index + self.offset])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "offset": 0}


class TakesItsPlaceAlong(Counting):
    """A copy goes on counting where the original was."""

    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.start = self.place = 0

    def __getitem__(self, index: int) -> Iterable[Any]:
        self.place += 1
        yield self.start + index

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, start=state["place"])


class ChangesItsHashInPickle(Counting):
    def __reduce__(self) -> Any:
        return ChangesItsHashInPickle, (self.count + 1,)


class HidesAParameter(Counting):
    @classmethod
    def params(cls) -> list[Param]:
        return []


class InventsAParameter(Counting):
    @classmethod
    def params(cls) -> list[Param]:
        return [*super().params(), Param(name="speed", default=1)]


class ClaimsAnotherDefault(Counting):
    @classmethod
    def params(cls) -> list[Param]:
        return [Param(name="count", type=int, default=7)]


class ListsNoParams(Counting):
    @classmethod
    def params(cls) -> list[Param]:
        return ["count"]  # type: ignore[list-item]


class ListsAParameterTwice(Counting):
    @classmethod
    def params(cls) -> list[Param]:
        return 2 * super().params()


class LeavesOutAnIndex(Counting):
    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return [indices[1:]]


class LeavesOutTheLastOfSome(Counting):
    """Groups by all that there is, and forgets that only some may be left."""

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return [range(self.count)]


class ChangesItsMind(Counting):
    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.asked = 0

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        self.asked += 1
        return [[index] for index in indices] if self.asked % 2 else [indices]


class FollowsASet(Counting):
    """Goes through a set, whose order is another in another process."""

    def __getitem__(self, index: int) -> Iterable[Any]:
        yield from {f"name {number}" for number in range(20)}


class MakesAFunctionAsItIsRead(Counting):
    """Keeps what only cloudpickle takes along."""

    def __getitem__(self, index: int) -> Iterable[Any]:
        self.latest = lambda: index
        yield index


class ByIdentity:
    """An argument that goes by its address."""

    def psnc_config(self) -> int:
        return id(self)


class ByHash:
    """An argument that goes by a hash that is another in each process."""

    def __deepcopy__(self, memo: Any) -> ByHash:
        return self

    def psnc_config(self) -> int:
        return hash("by hash")


class CannotBeCopied:
    """An argument that is a good one for all that."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is only one of me")

    def psnc_config(self) -> int:
        return 1


class TakesAnything(Counting):
    def __init__(self, anything: Any) -> None:
        super().__init__()
        self.anything = anything


class ChangesItsArgument(Counting):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = weights

    def __getitem__(self, index: int) -> Iterable[Any]:
        self.weights += 1
        yield index


# --- filters ----------------------------------------------------------------------------------


class Passing(Filter[Any, Any]):
    """Keeps the rules; the others change one thing."""

    def __call__(self, items: Items) -> Iterable[Any]:
        yield from items


class FilterReturnsNone(Passing):
    def __call__(self, items: Items) -> Iterable[Any]:
        return None  # type: ignore[return-value]


class NumbersItems(Passing):
    def __init__(self) -> None:
        self.number = 0

    def __call__(self, items: Items) -> Iterable[Any]:
        for item in items:
            self.number += 1
            yield self.number, item


class ComparesWithTheLast(Passing):
    """Starts anew with each index, and so goes wrong only if two are filtered in turns."""

    def __call__(self, items: Items) -> Iterable[Any]:
        self.last: Any = None
        for item in items:
            before, self.last = self.last, item
            yield item, before


class DropsDoubles(Passing):
    """Goes through a set, whose order is another in another process."""

    def __call__(self, items: Items) -> Iterable[Any]:
        # So many that no two orders are the same by chance.
        yield from {f"{number} of item {item}" for item in items for number in range(20)}


class ForgetsInPickle(Passing):
    def __init__(self) -> None:
        self.factor = 2

    def __call__(self, items: Items) -> Iterable[Any]:
        return (self.factor * item for item in items)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "factor": 1}


class SwallowsErrors(Passing):
    def __call__(self, items: Items) -> Iterable[Any]:
        while True:
            try:
                yield next(items)
            except Exception:
                return


class FilterChangesItsArgument(Passing):
    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __call__(self, items: Items) -> Iterable[Any]:
        self.weights += 1
        return items


class TakesAllFirst(Passing):
    def __call__(self, items: Items) -> Iterable[Any]:
        yield from list(items)


class Adding(Filter[float, float]):
    """Accumulates, and keeps the rules."""

    artifact_suffix = ".json"

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, items: Iterator[float]) -> Iterator[float]:
        for item in items:
            self.total += item
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(json.dumps(self.total))

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        output.write_text(json.dumps(sum(json.loads(shard.read_text()) for shard in shards)))


class FlushesUnderAnotherName(Adding):
    """Leaves it to NumPy to end the name of its shard."""

    artifact_suffix = ""

    def flush(self, path: Path) -> None:
        np.savez(path, total=self.total)


class CannotMerge(Passing):
    def flush(self, path: Path) -> None:
        path.touch()


class AddsUpEverywhere(Adding):
    """Its total is the class's, and so every object's."""

    totals: list[float] = []  # noqa: RUF012

    def __call__(self, items: Iterator[float]) -> Iterator[float]:
        for item in items:
            self.totals.append(item)
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(json.dumps(sum(self.totals)))


class MergesOntoWhatIsThere(Adding):
    def merge(self, shards: Sequence[Path], output: Path) -> None:
        before = json.loads(output.read_text()) if output.exists() else 0.0
        output.write_text(json.dumps(before + sum(json.loads(s.read_text()) for s in shards)))


class KeepsTheLastShard(Adding):
    def merge(self, shards: Sequence[Path], output: Path) -> None:
        output.write_text(shards[-1].read_text())


class ConsumesTheShards(Adding):
    def merge(self, shards: Sequence[Path], output: Path) -> None:
        super().merge(shards, output)
        for shard in shards:
            shard.write_text(shard.read_text() + "\n")


class RemovesTheShards(Adding):
    def merge(self, shards: Sequence[Path], output: Path) -> None:
        super().merge(shards, output)
        for shard in shards:
            shard.unlink()


class AveragesAverages(Adding):
    """Weighs a short index as a long one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __call__(self, items: Iterator[float]) -> Iterator[float]:
        for item in items:
            self.count += 1
            self.total += item
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(json.dumps(self.total / max(self.count, 1)))

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        means = [json.loads(shard.read_text()) for shard in shards]
        output.write_text(json.dumps(sum(means) / len(means)))


class WritesNoMerge(Adding):
    def merge(self, shards: Sequence[Path], output: Path) -> None: ...


# --- sinks ------------------------------------------------------------------------------------


class Writing(Sink[Any]):
    """Keeps the rules: a file an index, there whole or not at all; the others change one thing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, items: Items, index: int) -> Any:
        return self.write(self.directory / f"{index}.txt", items)

    def write(self, path: Path, items: Items) -> Any:
        with atomic_write(path, "w") as file:
            for item in items:
                print(item, file=file, flush=True)
        return [path]


class WritesOnlyOnce(Writing):
    def write(self, path: Path, items: Items) -> Any:
        with path.open("x") as file:
            file.write(repr(list(items)))
        return [path]


class LeavesADraftInItsWay(Writing):
    def write(self, path: Path, items: Items) -> Any:
        draft = path.with_suffix(".draft")
        with draft.open("x") as file:
            file.write(repr(list(items)))
        os.replace(draft, path)
        return [path]


class ReturnsANumber(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        super().__call__(items, index)
        return 7


class ReturnsWhatIsNotThere(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        super().__call__(items, index)
        return [self.directory / f"{index}.bin"]


class WritesElsewhere(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        return self.write(Path(f"{index}.txt"), items)


class NamesFilesByCount(Writing):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.numbers = iter(range(1_000))

    def __call__(self, items: Items, index: int) -> Any:
        return self.write(self.directory / f"{next(self.numbers)}.txt", items)


class NamesFilesByProcess(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        return self.write(self.directory / f"{index}-{os.getpid()}.txt", items)


class Appends(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        path = self.directory / f"{index}.txt"
        with path.open("a") as file:
            file.writelines(f"{item}\n" for item in items)
        return path


class OverwritesTheOthers(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        return self.write(self.directory / "all.txt", items)


class SinkSwallowsErrors(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        return self.write(self.directory / f"{index}.txt", SwallowsErrors()(items))


class LeavesDrafts(Writing):
    """Writes under a new name each time, and leaves it lying about if it does not get to an end."""

    def write(self, path: Path, items: Items) -> Any:
        draft = path.with_suffix(f".{os.urandom(4).hex()}")
        with draft.open("w") as file:
            file.writelines(f"{item}\n" for item in items)
        os.replace(draft, path)
        return [path]


class SkipsWhatExists(Writing):
    """Takes half a file, of a process that was ended, for a whole one."""

    def __call__(self, items: Items, index: int) -> Any:
        path = self.directory / f"{index}.txt"
        if path.exists():
            return path
        try:
            with path.open("w") as file:
                for item in items:
                    print(item, file=file, flush=True)
        except Exception:
            path.unlink()
            raise
        return path


class SharesAFile(Writing):
    def __call__(self, items: Items, index: int) -> Any:
        self.path = self.directory / f"{index}.txt"
        self.lines: list[str] = []
        for item in items:
            self.lines.append(f"{item}\n")
        self.path.write_text("".join(self.lines))
        return self.path


class SinkChangesItsArgument(Writing):
    def __init__(self, directory: Path, weights: Any) -> None:
        super().__init__(directory)
        self.weights = weights

    def __call__(self, items: Items, index: int) -> Any:
        self.weights += 1
        return super().__call__(items, index)


class WorksInOneThread(Writing):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.thread = threading.get_ident()

    def __call__(self, items: Items, index: int) -> Any:
        if threading.get_ident() != self.thread:
            raise OSError("the connection is another thread's")
        return super().__call__(items, index)


class WorksInOneProcess(Writing):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.pid = os.getpid()

    def __call__(self, items: Items, index: int) -> Any:
        if os.getpid() != self.pid:
            raise OSError("the connection is another process's")
        return super().__call__(items, index)


class KnowsOnlyItsOwn(Writing):
    """Writes all that this object has seen to one file, and so loses what others wrote there."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.seen: dict[int, list[Any]] = {}

    def __call__(self, items: Items, index: int) -> Any:
        self.seen[index] = list(items)
        path = self.directory / "all.json"
        path.write_text(json.dumps(self.seen, sort_keys=True))
        return path


class GroupsWrongly(Writing):
    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return [[*indices, indices[0]]]
