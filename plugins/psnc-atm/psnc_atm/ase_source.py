"""ASESource: structures from files of any format that ASE reads."""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc.stages import Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.structure_files import FileRun, StructureFiles, bad_entry, cause_of
from psnc_atm.xyz_frames import XYZFrame, xyz_frames

if TYPE_CHECKING:
    from ase import Atoms
    from ase.io.trajectory import TrajectoryReader

__all__ = ["ASESource"]

_XYZ = ("extxyz", "xyz")
_TRAJECTORY = "traj"
# What readers of lines and of compressed files raise.
_UNREADABLE = (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError)
_DATABASES = ("db", "json", "postgresql", "mysql")


class ASESource(StructureFiles):
    """Structures from files of any format that ``ase.io`` reads.

    CIF, POSCAR, OUTCAR, extended xyz, ASE's trajectories and whatever else ASE has a reader for.
    Each file is an index, or, of formats in which frames can be found without reading those before
    (extxyz, xyz, traj), each run of ``frames_per_index`` frames of a file. A file that cannot be
    read fails its own index only; without ``frames_per_index`` no file is opened before its index
    runs.

    What a structure has is what :meth:`AtomicData.from_ase` takes over.

    Files may be added behind the others between two runs. A run is not resumed where a completed
    index is another file's now.

    Parameters
    ----------
    path : str or Path
        A file, a directory, or a pattern such as ``"runs/*/OUTCAR"``. Of a directory those files
        are taken that lie in it directly and are not hidden.
    format : str, optional
        ASE's name of the format; by default ASE finds it out for each file.
    frames_per_index : int, optional
        Frames an index; the last index of each file may have fewer. By default a file is an index.
    pattern : str, optional
        Which files of a directory: ``"*.cif"``.

    Raises
    ------
    psnc.SourceError
        If there is no such file; if ``frames_per_index`` is given for a format that has no such
        frames; if a file or frame of an index cannot be read.
    """

    name = "ase-files"
    description = "Structures from files of any format that ASE reads"

    def __init__(
        self,
        path: Annotated[
            str | Path, Param(description="A file, a directory, or a pattern for files")
        ],
        format: Annotated[
            str | None, Param(description="ASE's name of the format; by default ASE finds it out")
        ] = None,
        frames_per_index: Annotated[
            int | None, Param(description="Frames an index; by default a file is an index")
        ] = None,
        pattern: Annotated[
            str | None, Param(description="Which files of a directory, such as *.cif")
        ] = None,
    ) -> None:
        super().__init__(path, pattern, frames_per_index, "frame")
        if format is not None:
            _check_format(format)
        self._format = format
        # Of each xyz file where its indices begin, in bytes, and how long it was then.
        self._starts: dict[str, tuple[int, NDArray[np.int64]]] = {}

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        """Yield the structures of one index, reading each as it is asked for."""
        run = self._run_of(index)
        for number, atoms in self._atoms_of(run):
            try:
                structure = AtomicData.from_ase(atoms)
            except Exception as error:
                raise bad_entry(run.path, "frame", number, error) from error
            yield structure

    def atom_counts(self, index: int) -> NDArray[np.int64]:
        """Return the number of atoms of each structure of one index.

        Of xyz files and trajectories no numbers are decoded; others are read.
        """
        run = self._run_of(index)
        format = self._format_of(run.path)
        if format in _XYZ:
            counts = [frame.atoms for _, frame in self._xyz_frames_of(run)]
        elif format == _TRAJECTORY:
            counts = list(_trajectory_counts(run))
        else:
            counts = [len(atoms) for _, atoms in self._atoms_of(run)]
        return np.array(counts, dtype=np.int64)

    def input_identity(self) -> dict[str, Any]:
        """Say what the indices are made from, so that a later run can tell whether it changed.

        Of each file its name, its size and a digest: of all of it up to 1 MiB, else of both ends
        and of 62 pieces between. A change in the middle of a larger file that leaves its size as it
        is can go unnoticed. None of these changes when the file is copied.
        """
        return {"format": self._format, **super().input_identity()}

    def _atoms_of(self, run: FileRun) -> Iterator[tuple[int, Atoms]]:
        format = self._format_of(run.path)
        if format in _XYZ:
            for number, frame in self._xyz_frames_of(run):
                yield number, _atoms_of_text(run.path, number, frame, format)
        elif format == _TRAJECTORY:
            yield from _trajectory_frames(run)
        else:
            yield from _all_frames(run.path, format)

    def _format_of(self, path: Path) -> str:
        from ase.io.formats import UnknownFileTypeError, filetype, get_ioformat

        try:
            format = self._format or filetype(str(path))
            # xyz files of no frames are what a sink writes when a filter drops everything.
            if format not in _XYZ and path.stat().st_size == 0:
                raise SourceError(f"{path}: the file is empty; replace it with a good copy")
            if format in _DATABASES:
                raise SourceError(f"{path} is a database; {_reader_of(path)}")
            get_ioformat(format)
        except UnknownFileTypeError as error:
            if path.stat().st_size == 0:
                if path.suffix in (".xyz", ".extxyz"):
                    return "extxyz"
                raise SourceError(
                    f"{path}: the file is empty; replace it with a good copy"
                ) from error
            raise SourceError(
                f"{path}: ASE does not know its format ({cause_of(error)}); say which it is "
                "(format=...), or leave the file out (pattern=...)"
            ) from error
        except _UNREADABLE as error:
            raise SourceError(f"{path}: cannot be read ({cause_of(error)})") from error
        return format

    def _count(self, path: Path) -> int:
        format = self._format_of(path)
        if format == _TRAJECTORY:
            with _trajectory(path) as trajectory:
                return len(trajectory)
        if format not in _XYZ or _is_compressed(path):
            what = "is compressed" if _is_compressed(path) else f"has the format {format}"
            raise _NoFramesError(
                f"{path} {what}, and frames cannot be found in it without reading those before; "
                "leave frames_per_index out"
            )
        return self._find_frames(path)

    def _find_frames(self, path: Path) -> int:
        """Note where indices begin; a frame that cannot be found counts, so that it can fail."""
        assert self._per_index is not None
        count = 0
        starts = []
        with _opened(path) as file:
            size = path.stat().st_size
            try:
                for frame in xyz_frames(file):
                    if count % self._per_index == 0:
                        starts.append(frame.offset)
                    count += 1
                    end = frame.offset + sum(map(len, frame.lines))
            except ValueError:
                if count % self._per_index == 0:
                    starts.append(end if count else 0)
                count += 1
        self._starts[str(path)] = size, np.array(starts, dtype=np.int64)
        return count

    def _count_or_none(self, path: Path) -> int | None:
        try:
            return super()._count_or_none(path)
        except _NoFramesError as refused:
            raise SourceError(str(refused)) from None

    def _xyz_frames_of(self, run: FileRun) -> Iterator[tuple[int, XYZFrame]]:
        number = run.start
        with _opened(run.path) as file:
            if run.size is not None:
                size, starts = self._starts.get(str(run.path), (-1, np.empty(0, np.int64)))
                if run.path.stat().st_size != size:
                    raise SourceError(
                        f"{run.path}: has changed since its frames were counted; run again"
                    )
                file.seek(int(starts[run.start // run.size]) if len(starts) else 0)
            try:
                for frame in xyz_frames(file):
                    yield number, frame
                    number += 1
                    if run.size is not None and number == run.start + run.size:
                        return
            except _UNREADABLE as error:
                raise bad_entry(run.path, "frame", number, error) from error


class _NoFramesError(Exception):
    """A file whose frames cannot be found; it is the option that is wrong, not the file."""


def _check_format(format: str) -> None:
    from ase.io.formats import ioformats

    if format in _DATABASES:
        raise SourceError(f"format {format!r} is that of a database; use ASEDatabaseSource")
    if format not in ioformats or not ioformats[format].can_read:
        raise SourceError(
            f"format {format!r} is none that ASE reads; `ase info --formats` lists them"
        )


def _atoms_of_text(path: Path, number: int, frame: XYZFrame, format: str) -> Atoms:
    from ase.io.extxyz import read_extxyz
    from ase.io.xyz import read_xyz

    try:
        text = io.StringIO(b"".join(frame.lines).decode())
        atoms: Atoms = next((read_xyz if format == "xyz" else read_extxyz)(text, slice(0, 1)))
    except Exception as error:
        raise bad_entry(path, "frame", number, error) from error
    return atoms


def _all_frames(path: Path, format: str) -> Iterator[tuple[int, Atoms]]:
    """Yield what ASE reads; its readers raise whatever a damaged file leads them to."""
    from ase.io import iread

    number = 0
    frames: Any = iread(str(path), index=":", format=format, do_not_split_by_at_sign=True)
    with closing(frames):
        while True:
            try:
                atoms = next(frames, None)
            except Exception as error:
                raise bad_entry(path, "frame", number, error) from error
            if atoms is None:
                break
            yield number, atoms
            number += 1
    if number == 0:
        raise SourceError(f"{path}: no structure is in it; replace it with a good copy")


def _trajectory_frames(run: FileRun) -> Iterator[tuple[int, Atoms]]:
    with _trajectory(run.path) as trajectory:
        for number in _numbers(run, trajectory):
            try:
                atoms = trajectory[number]
            except Exception as error:
                raise bad_entry(run.path, "frame", number, error) from error
            yield number, atoms


def _trajectory_counts(run: FileRun) -> Iterator[int]:
    with _trajectory(run.path) as trajectory:
        for number in _numbers(run, trajectory):
            try:
                frame = trajectory.backend[number]
                # Atoms that are those of the first frame are not written again.
                numbers: Any = frame.numbers if "numbers" in frame else trajectory.numbers
            except Exception as error:
                raise bad_entry(run.path, "frame", number, error) from error
            yield len(numbers)


def _numbers(run: FileRun, trajectory: TrajectoryReader) -> range:
    count = len(trajectory)
    return range(count) if run.size is None else range(run.start, count)[: run.size]


@contextmanager
def _trajectory(path: Path) -> Iterator[TrajectoryReader]:
    from ase.io.trajectory import TrajectoryReader

    try:
        trajectory = TrajectoryReader(str(path))
    except Exception as error:
        raise SourceError(
            f"{path}: cannot be read as a trajectory ({cause_of(error)}); "
            "replace it with a good copy"
        ) from error
    with trajectory:
        yield trajectory


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    from ase.io.formats import open_with_compression

    try:
        file: Any = open_with_compression(str(path), "rb")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({cause_of(error)})") from error
    with file:
        yield file


def _is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".bz2", ".xz")


def _reader_of(path: Path) -> str:
    reader = "ASELMDBSource" if path.suffix == ".aselmdb" else "ASEDatabaseSource"
    return f"read it with {reader}, or leave it out (pattern=...)"
