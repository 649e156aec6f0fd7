"""What an LMDB file says of itself, read with plain ``pread`` before LMDB maps it.

LMDB trusts its file: reading a page that lies beyond the end of a truncated file kills the
process (SIGBUS). So the file is proven complete before it is mapped. Being shorter than its last
page number says is no proof of truncation: LMDB leaves pages at the end unwritten when they were
allocated and freed in one transaction, and ``ase-db-backends`` writes such files (rows written
and deleted within one ``with`` block). Only for these the B+tree is walked.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

__all__ = ["LMDBHeader", "check_complete", "fingerprint", "has_key", "read_header"]

_MAGIC = 0xBEEFC0DE
_PAGE_HEADER = 16
# magic, version, address, map size, two databases, last page, transaction id
_META = struct.Struct("<IIQQ48s48sQQ")
# page size (in the first database) or unused, flags, depth, pages of three kinds, entries, root
_DATABASE = struct.Struct("<IHHQQQQQ")
_BRANCH, _LEAF = 0x01, 0x02
_BIG_DATA = 0x01
_NO_PAGE = 2**64 - 1
# Deeper than any tree can be; a damaged one may lead in a circle.
_DEEPEST = 64
# Of a row that has pages of its own: much more than the row's id and times take.
_READ_OF_A_ROW = 65_536


@frozen
class LMDBHeader:
    """The newest of an LMDB file's two meta pages.

    Attributes
    ----------
    page_size : int
        Bytes a page.
    last_page : int
        Number of the last page that was ever allocated.
    transaction : int
        Number of the last committed transaction: it grows whenever the file's content changes.
    entries : int
        Number of keys.
    root : int
        Page number of the B+tree's root; ``2**64 - 1`` in an empty file.
    file_size : int
        Bytes that the file has.
    """

    page_size: int
    last_page: int
    transaction: int
    entries: int
    root: int
    file_size: int


def read_header(path: Path) -> LMDBHeader:
    """Read the newest meta page of the LMDB file ``path``.

    Raises
    ------
    ValueError
        If it is no LMDB file, or ends before its second meta page.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError("the file is empty")
        first = _meta(file.read(_PAGE_HEADER + _META.size), size)
        file.seek(first.page_size)
        second_bytes = file.read(_PAGE_HEADER + _META.size)
    if len(second_bytes) < _PAGE_HEADER + _META.size:
        raise ValueError("the file is truncated; it ends within its first two pages")
    second = _meta(second_bytes, size, first.page_size)
    return max(first, second, key=lambda header: header.transaction)


def check_complete(path: Path, header: LMDBHeader) -> None:
    """Prove that every page that reading can touch lies within the file.

    Raises
    ------
    ValueError
        If one does not: the file is truncated.
    """
    expected = (header.last_page + 1) * header.page_size
    short = header.file_size < expected
    with path.open("rb") as file:
        for page, count in _reachable(file.fileno(), header, overflow=short):
            if (page + count) * header.page_size > header.file_size:
                raise ValueError(
                    f"the file is truncated; it has {header.file_size} of {expected} bytes"
                )


def fingerprint(path: Path, header: LMDBHeader) -> str:
    """Return a digest of the first and the last rows of a file, and of the pages that lead there.

    ``ase.db`` gives each row a random id and the time, so that a file written anew has other rows
    even where the structures are the same. A few pages are read, however many rows there are: what
    happened to rows in the middle, the transaction number tells.

    Raises
    ------
    OSError
        If the file cannot be read. One that is damaged has a digest of what is left.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for end in (0, -1):
            try:
                for piece in _way_to_rows(file.fileno(), header, end):
                    digest.update(piece)
            except (ValueError, struct.error, OverflowError):
                digest.update(b"damaged")
    return digest.hexdigest()[:16]


def has_key(path: Path, header: LMDBHeader, key: bytes) -> bool:
    """Tell whether a file has a key; a few pages are read, however large it is.

    Raises
    ------
    ValueError
        If the pages that lead there are damaged, or beyond the end of the file.
    OSError
        If the file cannot be read.
    """
    page = header.root
    with path.open("rb", buffering=0) as file:
        for _ in range(_DEEPEST):
            if page == _NO_PAGE:
                return False
            content = os.pread(file.fileno(), header.page_size, page * header.page_size)
            if len(content) < header.page_size:
                raise ValueError(f"the file is truncated; it ends within its page {page}")
            flags, lower = _flags_and_lower(content, page, header)
            nodes = list(_nodes(content, lower))
            if not flags & _BRANCH:
                return any(node.key(content) == key for node in nodes)
            # The first key of a branch is not written: it stands for all before the second.
            before = [node for node in nodes[1:] if node.key(content) <= key]
            page = (before or nodes[:1])[-1].child
    raise ValueError("the file is damaged; its pages lead in a circle")


def _way_to_rows(fd: int, header: LMDBHeader, end: int) -> Iterator[bytes]:
    """Yield the pages from the root to the first (0) or last (-1) leaf, and a row beyond it."""
    page = header.root
    for _ in range(_DEEPEST):
        if page == _NO_PAGE:
            return
        content = os.pread(fd, header.page_size, page * header.page_size)
        yield content
        flags, lower = _flags_and_lower(content, page, header)
        nodes = list(_nodes(content, lower))
        if flags & _BRANCH:
            page = nodes[end].child if nodes else _NO_PAGE
            continue
        apart = [node for node in nodes if node.flags & _BIG_DATA]
        if apart:
            start = apart[end].data_page(content) * header.page_size + _PAGE_HEADER
            yield os.pread(fd, min(apart[end].size, _READ_OF_A_ROW), start)
        return


def _meta(page: bytes, file_size: int, page_size: int | None = None) -> LMDBHeader:
    if len(page) < _PAGE_HEADER + _META.size:
        raise ValueError("not an LMDB file")
    magic, _, _, _, free, main, last_page, transaction = _META.unpack_from(page, _PAGE_HEADER)
    (free_page_size, *_), main_fields = _DATABASE.unpack(free), _DATABASE.unpack(main)
    size = free_page_size if page_size is None else page_size
    if magic != _MAGIC or size < 256 or size & (size - 1):
        raise ValueError("not an LMDB file")
    return LMDBHeader(
        page_size=size,
        last_page=last_page,
        transaction=transaction,
        entries=main_fields[6],
        root=main_fields[7],
        file_size=file_size,
    )


def _reachable(fd: int, header: LMDBHeader, *, overflow: bool) -> Iterator[tuple[int, int]]:
    """Yield ``(page, number of pages)`` of all that the tree of rows consists of.

    Of leaves just the header is read, unless the pages that their rows overflow to are wanted.
    """
    waiting = [] if header.root == _NO_PAGE else [header.root]
    while waiting:
        page = waiting.pop()
        yield page, 1
        content = os.pread(fd, _PAGE_HEADER, page * header.page_size)
        flags, lower = _flags_and_lower(content, page, header)
        if not (flags & _BRANCH or overflow):
            continue
        content = os.pread(fd, header.page_size, page * header.page_size)
        for node in _nodes(content, lower):
            if flags & _BRANCH:
                waiting.append(node.child)
            elif node.flags & _BIG_DATA:
                pages = -(-(_PAGE_HEADER + node.size) // header.page_size)
                yield node.data_page(content), pages


@frozen
class _Node:
    """An entry of a page: of a branch a page below it, of a leaf a key and its value."""

    offset: int
    size: int
    flags: int
    key_size: int

    @property
    def child(self) -> int:
        return self.size | self.flags << 32

    def key(self, content: bytes) -> bytes:
        return content[self.offset + 8 : self.offset + 8 + self.key_size]

    def data_page(self, content: bytes) -> int:
        """Return where the value begins, if it has pages of its own."""
        (page,) = struct.unpack_from("<Q", content, self.offset + 8 + self.key_size)
        return int(page)


def _flags_and_lower(content: bytes, page: int, header: LMDBHeader) -> tuple[int, int]:
    number, _, flags, lower, _ = struct.unpack_from("<QHHHH", content)
    if number != page or not flags & (_BRANCH | _LEAF) or lower > header.page_size:
        raise ValueError(f"the file is damaged; its page {page} is none of LMDB's")
    return flags, lower


def _nodes(content: bytes, lower: int) -> Iterator[_Node]:
    offsets = struct.unpack_from(f"<{(lower - _PAGE_HEADER) // 2}H", content, _PAGE_HEADER)
    for offset in offsets:
        low, high, flags, key_size = struct.unpack_from("<HHHH", content, offset)
        yield _Node(offset, low | high << 16, flags, key_size)
