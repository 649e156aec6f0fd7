"""Read the pages of an SQLite file, as far as they are sound, without SQLite.

The format is the published one: https://www.sqlite.org/fileformat2.html. SQLite gives up at the
first page that is wrong; here each page is judged by itself. A page counts only if all of it adds
up: its cells, its free blocks and its fragments fill it exactly, as SQLite's own
``integrity_check`` demands. So rows that were deleted, whose bytes may well be there still, do not
come back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from attrs import frozen

__all__ = ["Cell", "PageFile", "TreePage"]

MAGIC = b"SQLite format 3\0"
_DEFAULT_PAGE_SIZE = 4096

_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF = 2, 5, 10, 13
_KINDS = (_INDEX_INTERIOR, _TABLE_INTERIOR, _INDEX_LEAF, _TABLE_LEAF)


class Cell(NamedTuple):
    """One cell of a page.

    Attributes
    ----------
    child : int or None
        The page to the left, in an interior page.
    rowid : int or None
        Of a table with such numbers.
    values : tuple or None
        The record; ``None`` if it has none, or none that can be read.
    """

    child: int | None
    rowid: int | None
    values: tuple[Any, ...] | None


@frozen
class TreePage:
    """A page of a table or an index.

    Attributes
    ----------
    number : int
        Which page, from 1.
    is_leaf : bool
        Whether there are none below it.
    is_table : bool
        Whether its rows have numbers; indices and tables ``WITHOUT ROWID`` have none.
    cells : list of Cell
        In order.
    right : int or None
        The rightmost page below it.
    """

    number: int
    is_leaf: bool
    is_table: bool
    cells: list[Cell]
    right: int | None

    @property
    def children(self) -> list[int]:
        """The pages below it, in order."""
        if self.right is None:
            return []
        return [cell.child for cell in self.cells if cell.child is not None] + [self.right]


class PageFile:
    """The pages of a database file, with those of its write-ahead log in their places.

    Parameters
    ----------
    path : Path
        The database. Beside it may be its log, of which the transactions count that are whole.

    Attributes
    ----------
    has_header : bool
        Whether the file begins with a header that can be believed.
    page_size, usable : int
        Bytes of a page, and how many of them are used.
    count : int
        How many pages the database has.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        self._wal = _opened(path.with_name(f"{path.name}-wal"))
        log = _read_log(self._wal) if self._wal is not None else None
        # Where in the log the latest version of a page is.
        self._in_log = log.pages if log is not None else {}
        self.page_size, self.usable = _DEFAULT_PAGE_SIZE, _DEFAULT_PAGE_SIZE
        if log is not None:
            self.page_size = self.usable = log.page_size
        size = 0 if self._file is None else self._file.seek(0, 2)
        start = self.page(1)[:100]
        self.has_header = self._take_header(start)
        self.count = size // self.page_size
        stated = int.from_bytes(start[28:32], "big")
        if log is not None:
            self.count = log.page_count
        elif self.has_header and self.count < stated:
            # It was cut off.
            self.count = stated
        # What is beyond the end that the header states may be anything.
        self._knows_free = self.has_header and self.count == stated

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._wal):
            if file is not None:
                file.close()

    def page(self, number: int) -> bytes:
        """Return the bytes of a page; too few, or none, where the file is cut off."""
        place = self._in_log.get(number)
        if place is not None and self._wal is not None:
            self._wal.seek(place)
            return self._wal.read(self.page_size)
        if self._file is None or number < 1:
            return b""
        self._file.seek((number - 1) * self.page_size)
        return self._file.read(self.page_size)

    def tree_page(self, number: int) -> TreePage | None:
        """Return a page of a table or index; ``None`` if it is none, or not sound."""
        content = self.page(number)
        if len(content) < self.page_size:
            return None
        try:
            return _TreePageReader(self, number, content).read()
        except (IndexError, ValueError, struct.error):
            return None

    def free_pages(self) -> set[int] | None:
        """Return the pages that are in no use; ``None`` if that cannot be told."""
        if not self._knows_free:
            return None
        start = self.page(1)
        trunk, count = struct.unpack(">II", start[32:40])
        free: set[int] = set()
        while trunk:
            content = self.page(trunk)
            if trunk in free or trunk > self.count or len(content) < self.page_size:
                return None
            following, leaves = struct.unpack(">II", content[:8])
            if leaves > self.usable // 4 - 2:
                return None
            numbers = struct.unpack(f">{leaves}I", content[8 : 8 + 4 * leaves])
            if any(number in free or not 0 < number <= self.count for number in numbers):
                return None
            free.update((trunk, *numbers))
            trunk = following
        return free if len(free) == count else None

    def overflow(self, number: int, size: int) -> bytes:
        """Return so many bytes of a record from the chain of pages that begins at a page.

        Raises
        ------
        ValueError
            If the chain is broken.
        """
        parts: list[bytes] = []
        seen: set[int] = set()
        while size > 0:
            content = self.page(number)
            part = content[4 : min(self.usable, 4 + size)]
            # Pages of nothing but zeros are what a disk gives back of those that it lost.
            if number in seen or len(content) < self.page_size or not any(part):
                raise ValueError("broken chain of overflow pages")
            seen.add(number)
            parts.append(part)
            size -= len(part)
            number = int.from_bytes(content[:4], "big")
        if number:
            raise ValueError("chain of overflow pages is too long")
        return b"".join(parts)

    def _take_header(self, start: bytes) -> bool:
        if len(start) < 100 or not start.startswith(MAGIC):
            return False
        size = int.from_bytes(start[16:18], "big")
        size = 65536 if size == 1 else size
        # Constants of the format: a header in which they are wrong is none.
        if size < 512 or size & (size - 1) or start[21:24] != b"\x40\x20\x20" or start[20] > 32:
            return False
        if start[56:60] not in (b"\0\0\0\1", b"\0\0\0\0"):
            return False
        if self._in_log and size != self.page_size:
            return False
        before = self.page_size, self.usable
        self.page_size, self.usable = size, size - start[20]
        # The first table begins on the second page.
        if self.tree_page(2) is None:
            found = self.page_size, self.usable
            self.page_size, self.usable = before
            if self.tree_page(2) is not None:
                return False
            self.page_size, self.usable = found
        return True


def _opened(path: Path) -> BinaryIO | None:
    return open(path, "rb") if path.exists() else None


class _TreePageReader:
    """Reads one page, and refuses it unless it adds up."""

    def __init__(self, file: PageFile, number: int, content: bytes) -> None:
        self._file = file
        self._number = number
        self._content = content
        self._usable = file.usable

    def read(self) -> TreePage | None:
        start = 100 if self._number == 1 else 0
        content = self._content
        kind = content[start]
        if kind not in _KINDS:
            return None
        is_leaf = kind in (_INDEX_LEAF, _TABLE_LEAF)
        first_free, count, begin, fragments = struct.unpack_from(">HHHB", content, start + 1)
        begin = begin or 65536
        pointers_at = start + (8 if is_leaf else 12)
        pointers = struct.unpack_from(f">{count}H", content, pointers_at)
        if pointers_at + 2 * count > begin or begin > self._usable:
            return None
        read = [self._cell(kind, at) for at in pointers]
        used = sorted((at, end) for at, (_, end) in zip(pointers, read, strict=True))
        if not self._adds_up(used, first_free, begin, fragments):
            return None
        right = None if is_leaf else int.from_bytes(content[start + 8 : start + 12], "big")
        cells = [cell for cell, _ in read]
        return TreePage(self._number, is_leaf, kind in (5, 13), cells, right)

    def _adds_up(
        self, used: list[tuple[int, int]], first_free: int, begin: int, fragments: int
    ) -> bool:
        """Tell whether cells, free blocks and fragments fill the page without overlapping."""
        blocks = list(used)
        at = first_free
        while at:
            following, size = struct.unpack_from(">HH", self._content, at)
            if size < 4 or (following and following <= at):
                return False
            blocks.append((at, at + size))
            at = following
        end, gaps = begin, 0
        for first, last in sorted(blocks):
            if first < end:
                return False
            gaps += first - end
            end = last
        return end <= self._usable and gaps + self._usable - end == fragments

    def _cell(self, kind: int, at: int) -> tuple[Cell, int]:
        """Return the cell at a place, and where it ends."""
        first, child, rowid = at, None, None
        if kind in (_INDEX_INTERIOR, _TABLE_INTERIOR):
            child = int.from_bytes(self._content[at : at + 4], "big")
            at += 4
        if kind == _TABLE_INTERIOR:
            rowid, at = _varint(self._content, at)
            return Cell(child, _signed(rowid), None), max(at, first + 4)
        size, at = _varint(self._content, at)
        if kind == _TABLE_LEAF:
            rowid, at = _varint(self._content, at)
        local = self._local_size(kind, size)
        end = at + local + (4 if local < size else 0)
        if end > self._usable:
            raise ValueError("the cell goes beyond its page")
        payload = self._content[at : at + local]
        try:
            if local < size:
                following = int.from_bytes(self._content[end - 4 : end], "big")
                payload += self._file.overflow(following, size - local)
            values = _record(payload)
        except (ValueError, IndexError):
            values = None
        return Cell(child, _signed(rowid), values), max(end, first + 4)

    def _local_size(self, kind: int, size: int) -> int:
        """Return how many bytes of a record are in the page itself."""
        usable = self._usable
        most = usable - 35 if kind == _TABLE_LEAF else (usable - 12) * 64 // 255 - 23
        if size <= most:
            return size
        least = (usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (usable - 4)
        return local if local <= most else least


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return a number of one to nine bytes, and where it ends."""
    value = 0
    for place in range(at, at + 8):
        byte = content[place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + 1
    return value << 8 | content[at + 8], at + 9


def _signed(value: int | None) -> int | None:
    return value if value is None or value < 1 << 63 else value - (1 << 64)


_INTEGER_SIZES = (0, 1, 2, 3, 4, 6, 8)


def _record(payload: bytes) -> tuple[Any, ...]:
    """Return the values of a record, which fills its bytes exactly.

    Raises
    ------
    ValueError, IndexError
        If it is none.
    """
    header_end, at = _varint(payload, 0)
    body = header_end
    values: list[Any] = []
    while at < header_end:
        kind, at = _varint(payload, at)
        value, body = _value(payload, kind, body)
        values.append(value)
    if at != header_end or body != len(payload):
        raise ValueError("the record does not fill its bytes")
    return tuple(values)


def _value(payload: bytes, kind: int, at: int) -> tuple[Any, int]:
    if kind <= 6:
        end = at + _INTEGER_SIZES[kind]
        value: Any = int.from_bytes(payload[at:end], "big", signed=True) if kind else None
    elif kind == 7:
        end = at + 8
        value = struct.unpack(">d", payload[at:end])[0] if end <= len(payload) else None
    elif kind in (8, 9):
        end, value = at, kind - 8
    elif kind in (10, 11):
        raise ValueError("a kind of value that is not in use")
    else:
        end = at + (kind - 12) // 2
        content = payload[at:end]
        value = content.decode() if kind % 2 else content
    if end > len(payload):
        raise ValueError("the value goes beyond its record")
    return value, end


# --- the write-ahead log ----------------------------------------------------------------------


@frozen
class _Log:
    page_size: int
    page_count: int
    pages: dict[int, int]


def _read_log(file: BinaryIO) -> _Log | None:
    """Return where the pages of whole transactions are; ``None`` if there are none."""
    header = file.read(32)
    if len(header) < 32:
        return None
    magic, _, page_size, _, *salts = struct.unpack(">6I", header[:24])
    if magic not in (0x377F0682, 0x377F0683):
        return None
    order = ">" if magic & 1 else "<"
    sums = _checksum(header[:24], (0, 0), order)
    if sums != struct.unpack(">II", header[24:]) or not 512 <= page_size <= 65536:
        return None
    pages: dict[int, int] = {}
    page_count = 0
    for number, place, commit_size in _frames(file, page_size, salts, sums, order):
        pages[number] = place
        if commit_size:
            page_count, committed = commit_size, dict(pages)
    if not page_count:
        return None
    return _Log(page_size, page_count, {n: at for n, at in committed.items() if n <= page_count})


def _frames(
    file: BinaryIO, page_size: int, salts: list[int], sums: tuple[int, int], order: str
) -> Iterator[tuple[int, int, int]]:
    """Yield the page, place and commit size of frames up to the first that is not sound."""
    while True:
        header, place = file.read(24), file.tell()
        content = file.read(page_size)
        if len(content) < page_size:
            return
        number, commit_size, *frame_salts, first, second = struct.unpack(">6I", header)
        sums = _checksum(content, _checksum(header[:8], sums, order), order)
        if frame_salts != salts or sums != (first, second) or not number:
            return
        yield number, place, commit_size


def _checksum(content: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
