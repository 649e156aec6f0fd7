"""Sources of what is there already: a list, a dataset, files."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, overload

from psnc.errors import PipelineError, SourceError
from psnc.provenance import Content, Name
from psnc.stages import Param, Source, constructor_arguments, copy_containers

__all__ = ["FilesSource", "Indexable", "SequenceSource", "as_source"]

_ADVICE = (
    'Name the content, SequenceSource(…, name="my-data-v1"), or give the class of what has none a '
    "method psnc_config() that returns plain values."
)

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Indexable(Protocol[Item]):
    """What has a length and items by position: a list, an array, a dataset as Torch's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


class SequenceSource(Source[T]):
    """A list, an array or a dataset as a source: index ``i`` yields one item, ``sequence[i]``.

    A list is copied, so that what is done to it later changes nothing.

    Parameters
    ----------
    sequence : sequence or dataset
        Anything with ``__len__`` and ``__getitem__``. What it holds enters the pipeline's hash,
        if it has a canonical form: lists and arrays of plain values have one, and attrs classes,
        dataclasses and classes with a method ``psnc_config()``.
    name : str, optional
        What to go by in the pipeline's hash, with the length, in place of the content. Change it
        with the data: an index that was recorded under the same name is not run again.

    Examples
    --------
    >>> words = SequenceSource(["one", "two", "three"])
    >>> len(words), list(words[2])
    (3, ['three'])
    """

    _copies_objects = False

    def __init__(
        self,
        sequence: Annotated[Indexable[T], Param(description="What is to be a source.")],
        name: Annotated[
            str | None, Param(description="Stands for the content in the pipeline's hash.")
        ] = None,
    ) -> None:
        _require_indexable(sequence)
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise PipelineError(f"SequenceSource(name={name!r}): give the data a name in text")
        # The captured copy, since the hash is made of it too, unless a subclass makes the sequence.
        is_own = type(self).__init__ is SequenceSource.__init__
        self._sequence: Indexable[T] = (
            constructor_arguments(self)["sequence"] if is_own else copy_containers(sequence)
        )
        self._name = name

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, index: int) -> Iterator[T]:
        yield self._sequence[index]

    def psnc_config(self) -> dict[str, Any]:
        """Return what stands for the arguments in the pipeline's hash.

        The further arguments of a subclass stand for themselves.
        """
        more = {
            name: value
            for name, value in constructor_arguments(self).items()
            if name not in ("sequence", "name")
        }
        if self._name is not None:
            return {**more, "sequence": len(self._sequence), "name": Name(self._name)}
        return {**more, "sequence": Content(self._sequence, _ADVICE), "name": None}


class FilesSource(Source[Path]):
    """Files that are there already: index ``i`` yields the path of the ``i``-th.

    The files are found once, when the source is constructed, and sorted by path as text: ``10.h5``
    comes before ``2.h5``. Their names enter the pipeline's hash, though not what the files hold.
    With one file more or less an index would mean another file, so that a resumed run begins anew.
    So write no output where the pattern finds it.

    Parameters
    ----------
    pattern : str or path
        ``"data/*.h5"``; ``**`` stands for any number of directories; a leading dot must be
        written. A directory stands for the files in it, without those of its sub-directories. A
        relative pattern gives relative paths. A link to a directory is followed, unless it leads
        back to one that it lies in.

    Raises
    ------
    SourceError
        If there is no such file.

    Examples
    --------
    >>> for name in ("b.h5", "a.h5", "notes.txt"):
    ...     Path(name).touch()
    >>> source = FilesSource("*.h5")
    >>> len(source), list(source[0])
    (2, [PosixPath('a.h5')])
    """

    def __init__(
        self,
        pattern: Annotated[
            str | os.PathLike[str], Param(description="A pattern, a directory or a file.")
        ],
    ) -> None:
        self._root, parts = _root_and_parts(os.fspath(pattern))
        self.paths = _matching_files(self._root, parts, os.fspath(pattern))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Iterator[Path]:
        yield self.paths[index]

    def identity(self) -> dict[str, Any]:
        """Return what stands for the names of the files, below the pattern's directory."""
        root = os.path.join(Path(self._root), "")
        names = [os.fspath(path).removeprefix(root) for path in self.paths]
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
        identity = {"files": len(names), "sha256": digest.hexdigest()}
        if self.paths[0].is_absolute():
            return identity
        # By this a resume in another directory is noticed, where it means other files.
        return {**identity, "first": os.fspath(self.paths[0])}


@overload
def as_source(thing: Source[T]) -> Source[T]: ...  # type: ignore[overload-overlap]


@overload
def as_source(thing: str | os.PathLike[str]) -> FilesSource: ...  # type: ignore[overload-overlap]


@overload
def as_source(thing: Indexable[T]) -> SequenceSource[T]: ...


def as_source(thing: Any) -> Source[Any]:
    """Make a source of what is there already.

    ``Pipeline(source=…)`` does so by itself.

    Parameters
    ----------
    thing : Source, sequence, dataset, str or path
        A source is returned as it is. Text and paths name files (:class:`FilesSource`); anything
        else with ``__len__`` and ``__getitem__`` holds the items (:class:`SequenceSource`).

    Raises
    ------
    PipelineError
        If it is none of these.
    SourceError
        If there is no such file.

    Examples
    --------
    >>> list(as_source(range(10, 20))[3])
    [13]
    """
    if isinstance(thing, Source):
        return thing
    if isinstance(thing, (str, os.PathLike)):
        return FilesSource(thing)
    return SequenceSource(thing)


def _require_indexable(thing: Any) -> None:
    kind = type(thing).__qualname__
    if isinstance(thing, type):
        raise PipelineError(f"source: {thing.__qualname__} is a class: construct it first")
    if isinstance(thing, (str, bytes, bytearray, memoryview)):
        advice = "name files by text or a path, or put it in a list"
    elif isinstance(thing, Mapping):
        advice = "it has keys and no positions: make a list of its items()"
    elif _is_iterable_dataset(thing):
        advice = "an IterableDataset has no positions: loop over it with psnc.track"
    elif not hasattr(type(thing), "__getitem__"):
        advice = "it has no positions: make a list of it, or derive its class from psnc.Source"
    elif not hasattr(type(thing), "__len__"):
        advice = "it has no __len__: give its class one, or loop over it with psnc.track"
    else:
        return
    raise PipelineError(f"source: {kind!r} is no Source: {advice}")


def _is_iterable_dataset(thing: Any) -> bool:
    # It inherits a __getitem__ that only raises, and may have a length.
    torch_data = sys.modules.get("torch.utils.data")
    return torch_data is not None and isinstance(thing, torch_data.IterableDataset)


def _root_and_parts(given: str) -> tuple[str, tuple[str, ...]]:
    """Return the directory below which to look, and the parts of the pattern to look for."""
    place = os.path.expanduser(given)
    if not place:
        raise SourceError("FilesSource(''): name files by a pattern such as 'data/*.h5'")
    if os.path.isdir(place):
        return place, ("*",)
    if os.path.exists(place):
        return os.path.dirname(place), (glob.escape(os.path.basename(place)),)
    parts = Path(place).parts
    fixed = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    # With a slash behind it, it means directories only.
    rest = () if place.endswith(os.sep) else parts[len(fixed) :]
    return os.path.join("", *fixed), rest


def _matching_files(root: str, parts: tuple[str, ...], given: str) -> list[Path]:
    found = {path for path in _expanded(Path(root), parts, ()) if path.is_file()}
    if not found:
        raise SourceError(
            f"no file matches {given!r} in {os.getcwd()}: check the path, and write a pattern "
            "such as 'data/*.h5' or 'data/**/*.h5'"
        )
    return sorted(found, key=Path.as_posix)


def _expanded(directory: Path, parts: tuple[str, ...], way: tuple[Path, ...]) -> Iterator[Path]:
    """Yield what the rest of a pattern means below a directory.

    ``glob`` itself goes in circles: of a few links that lead back it makes paths without number.
    So the way there is known, as the directories that it really leads through.
    """
    if not parts:
        yield directory
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        real = directory.resolve()
        if real in way:
            return
        yield from _expanded(directory, rest or ("*",), way)
        for each in _names(directory, "*"):
            if Path(directory, each).is_dir():
                yield from _expanded(Path(directory, each), parts, (*way, real))
    elif glob.has_magic(part):
        for each in _names(directory, part):
            yield from _expanded(Path(directory, each), rest, way)
    else:
        yield from _expanded(Path(directory, part), rest, way)


def _names(directory: Path, pattern: str) -> list[str]:
    """Return what matches in a directory; a leading dot must be written."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []  # no directory, or one that may not be looked into
    is_hidden = not pattern.startswith(".")
    return [
        each for each in fnmatch.filter(names, pattern) if not (is_hidden and each.startswith("."))
    ]
