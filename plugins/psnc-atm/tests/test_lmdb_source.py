from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase.collections import g2
from data import (
    change_raw_row,
    crystals,
    molecules,
    raw_row,
    write_database,
    write_dataset,
)

from psnc import SourceError
from psnc_atm import ASELMDBSource
from psnc_atm.lmdb_file import open_file
from psnc_atm.lmdb_header import LMDBHeader, fingerprint, read_header


def sizes(source: ASELMDBSource, index: int) -> list[int]:
    return [len(structure) for structure in source[index]]


def test_each_file_is_an_index_in_the_order_of_names(dataset: Path) -> None:
    source = ASELMDBSource(dataset)
    assert len(source) == 5
    for index in range(5):
        expected = [atoms.get_positions() for atoms in molecules(40, seed=index)]
        got = [structure.positions for structure in source[index]]
        assert len(got) == 40
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_one_file_is_a_source_too(dataset: Path) -> None:
    source = ASELMDBSource(dataset / "data0003.aselmdb")
    assert len(source) == 1
    assert [s.charge for s in source[0]] == [2.0] * 40


def test_rows_come_in_numeric_order_and_gaps_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "gaps.aselmdb"
    with ase.db.connect(path) as database:
        ids = [database.write(atoms, row=n) for n, atoms in enumerate(molecules(120))]
        database.delete([1, 2, 50, 99, 100, 120])
    source = ASELMDBSource(tmp_path)
    left = [row - 1 for row in ids if row not in {1, 2, 50, 99, 100, 120}]
    assert [s.info["row"] for s in source[0]] == left
    cut = ASELMDBSource(tmp_path, rows_per_index=50)
    assert len(cut) == 3
    assert [s.info["row"] for index in range(3) for s in cut[index]] == left
    assert len(list(cut[2])) == 14


def test_runs_of_rows_never_cross_files(dataset: Path) -> None:
    source = ASELMDBSource(dataset, rows_per_index=15)
    assert len(source) == 15
    assert [len(list(source[index])) for index in range(15)] == [15, 15, 10] * 5
    whole = ASELMDBSource(dataset)
    assert [*source[3], *source[4], *source[5]] == list(whole[1])


@pytest.mark.parametrize("rows_per_index", [None, 7])
def test_atom_counts_are_the_lengths_of_the_structures(
    dataset: Path, rows_per_index: int | None
) -> None:
    source = ASELMDBSource(dataset, rows_per_index)
    for index in range(len(source)):
        counts = source.atom_counts(index)
        assert counts.dtype == np.int64
        assert counts.tolist() == sizes(source, index)


def test_atom_counts_of_rows_that_do_not_begin_with_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(3))
    text = zlib.decompress(raw_row(path, b"2"))
    change_raw_row(path, b"2", zlib.compress(b'{"user": "x", ' + text[1:]))
    source = ASELMDBSource(path)
    assert source.atom_counts(0).tolist() == sizes(source, 0)


def test_an_empty_database_is_an_index_without_rows(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "empty.aselmdb") as database:
        database.metadata = {"a": 1}
    source = ASELMDBSource(tmp_path)
    assert list(source[0]) == []
    assert source.atom_counts(0).shape == (0,)


def test_a_missing_directory_and_one_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist; give a directory"):
        ASELMDBSource(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds no \.aselmdb file"):
        ASELMDBSource(tmp_path)
    with pytest.raises(SourceError, match="rows_per_index is 0"):
        ASELMDBSource(tmp_path, rows_per_index=0)


@pytest.fixture
def three_files(tmp_path: Path, dataset: Path) -> Path:
    directory = tmp_path / "three"
    directory.mkdir()
    for number in range(3):
        shutil.copy(dataset / f"data{number:04}.aselmdb", directory)
    return directory


@pytest.mark.parametrize("rows_per_index", [None, 100])
@pytest.mark.parametrize("kept", [0, 10, 100, 4096, 5000, 8192, 20_000, 0.5, 0.9, -1])
def test_a_truncated_file_fails_its_own_index(
    three_files: Path, kept: float, rows_per_index: int | None
) -> None:
    path = three_files / "data0001.aselmdb"
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if 0 < kept < 1 else kept % size)
    source = ASELMDBSource(three_files, rows_per_index)
    assert len(source) == 3
    assert len(list(source[0])) == len(list(source[2])) == 40
    for read in (source.__getitem__, source.atom_counts):
        with pytest.raises(SourceError, match=r"data0001\.aselmdb: .*(truncated|empty|not an)"):
            list(read(1))


def test_a_file_of_something_else_fails_its_own_index(three_files: Path) -> None:
    (three_files / "data0001.aselmdb").write_bytes(b"no database at all\n" * 1000)
    source = ASELMDBSource(three_files)
    with pytest.raises(SourceError, match=r"data0001\.aselmdb: not an LMDB file; replace it"):
        list(source[1])
    assert len(list(source[2])) == 40


def test_a_file_that_vanished_is_named(three_files: Path) -> None:
    source = ASELMDBSource(three_files)
    (three_files / "data0002.aselmdb").unlink()
    with pytest.raises(SourceError, match=r"data0002\.aselmdb: cannot be read \(No such file"):
        list(source[2])


def test_a_file_shorter_than_its_last_page_can_be_complete(tmp_path: Path) -> None:
    """The writer leaves such files when rows are written and deleted in one transaction."""
    path = tmp_path / "short.aselmdb"
    water, random = g2["H2O"], np.random.default_rng(0)

    def write(database, numbers: int) -> int:
        return database.write(water, data={"x": random.random(numbers)})

    database = ase.db.connect(path)  # a transaction for each row: this leaves free pages
    for _ in range(20):
        write(database, 5000)
    database.delete([3, 4, 5])
    database.close()
    with ase.db.connect(path) as database:
        for _ in range(20):
            write(database, 5000)
        database.delete([write(database, 60_000)])
    header = read_header(path)
    assert header.file_size < (header.last_page + 1) * header.page_size
    assert len(list(ASELMDBSource(path)[0])) == 37

    os.truncate(path, header.file_size - header.page_size)
    with pytest.raises(SourceError, match="truncated"):
        list(ASELMDBSource(path)[0])


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda value: value[: len(value) // 2], "incomplete"),
        (lambda value: b"\0" + value[1:], "incorrect header"),
        (lambda value: zlib.compress(b"[1, 2]"), "a JSON list"),
        (lambda value: zlib.compress(b'{"numbers": '), "Expecting value"),
        (lambda value: zlib.compress(b'{"user": "x"}'), "no 'numbers'"),
        (lambda value: zlib.compress(b'{"numbers": {"__ndarray__": [[2], "int64", [1]]}}'), "2"),
    ],
)
def test_an_undecodable_row_is_named_with_its_file(three_files: Path, damage, cause: str) -> None:
    path = three_files / "data0001.aselmdb"
    change_raw_row(path, b"17", damage(raw_row(path, b"17")))
    source = ASELMDBSource(three_files)
    seen = []
    with pytest.raises(SourceError, match=rf"data0001\.aselmdb, row 17: .*{cause}") as caught:
        seen.extend(source[1])
    assert "\n" not in str(caught.value)
    assert len(seen) <= 16
    assert len(list(source[2])) == 40


def test_keys_that_are_no_rows_are_noticed_where_they_would_shift_rows(three_files: Path) -> None:
    change_raw_row(three_files / "data0000.aselmdb", b"extra", b"x")
    assert len(list(ASELMDBSource(three_files)[0])) == 40
    with pytest.raises(SourceError, match=r"data0000\.aselmdb: has keys that are no row ids"):
        list(ASELMDBSource(three_files, rows_per_index=20)[0])


def test_pickling_is_small_and_keeps_no_file(dataset: Path) -> None:
    source = ASELMDBSource(dataset, rows_per_index=10)
    before = list(source[3])
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert list(pickle.loads(pickled)[3]) == before


@pytest.mark.parametrize("rows_per_index", [None, 20])
def test_a_file_is_free_for_others_once_it_is_read(
    dataset: Path, rows_per_index: int | None
) -> None:
    source = ASELMDBSource(dataset, rows_per_index)
    rows = iter(source[0])
    next(rows)
    del rows
    with ase.db.connect(dataset / "data0000.aselmdb") as database:
        assert len(database) == 40


def test_a_file_that_is_rewritten_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(5))
    source = ASELMDBSource(path)
    identity = source.input_identity()
    assert len(list(source[0])) == 5
    write_database(path, crystals(3))
    assert len(list(source[0])) == 8
    assert source.input_identity() != identity


def test_a_forked_child_opens_its_own_file_while_the_parent_reads(dataset: Path) -> None:
    script = f"""
import os, sys
from psnc_atm import ASELMDBSource
source = ASELMDBSource({str(dataset)!r}, rows_per_index=20)
rows = iter(source[0])
next(rows)
child = os.fork()
if child == 0:
    try:
        ok = len(list(source[0])) == 20 and len(list(source[9])) == 20
    finally:
        os._exit(0 if ok else 1)
status = os.waitpid(child, 0)[1]
assert len(list(rows)) == 19
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == 0


def test_a_file_that_somebody_else_has_open_is_named(dataset: Path) -> None:
    source = ASELMDBSource(dataset)
    with (
        ase.db.connect(dataset / "data0000.aselmdb"),
        pytest.raises(SourceError, match=r"data0000\.aselmdb: open in this process already"),
    ):
        list(source[0])
    assert len(list(source[0])) == 40


def test_threads_that_open_and_close_one_file_never_meet_it_half_closed(dataset: Path) -> None:
    failures: list[Exception] = []

    def open_and_close() -> None:
        try:
            for _ in range(500):
                assert len(open_file(dataset / "data0000.aselmdb").ids) == 40
        except SourceError as error:
            failures.append(error)

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert failures == []


def test_threads_read_the_same_files_at_once(dataset: Path) -> None:
    source = ASELMDBSource(dataset, rows_per_index=10)
    expected = [sizes(source, index) for index in range(len(source))]
    got: list[list[list[int]]] = []

    def read() -> None:
        got.append([sizes(source, index) for index in range(len(source))])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


def test_a_file_of_full_length_that_ends_in_zeros_fails_its_index_alone(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=200)
    path = data / "data0001.aselmdb"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)  # as an interrupted download into reserved space
    source = ASELMDBSource(data)
    with pytest.raises(SourceError, match=r"data0001\.aselmdb: .*damaged"):
        list(source[1])
    assert len(list(source[0])) == len(list(source[2])) == 200


def rewritten(path: Path, make) -> tuple[LMDBHeader, LMDBHeader]:
    """Delete a file and write it anew, and return what its header was and is."""
    before = read_header(path)
    path.unlink()
    make()
    return before, read_header(path)


@pytest.mark.parametrize("numbers", [0, 3000])  # rows within pages, and on pages of their own
def test_a_file_that_was_made_anew_is_told_from_the_one_before(
    tmp_path: Path, numbers: int
) -> None:
    path = tmp_path / "rows.aselmdb"

    def make() -> None:
        write_database(path, molecules(30), data={"x": np.ones(numbers)})

    make()
    identity = ASELMDBSource(path).input_identity()
    assert ASELMDBSource(path).input_identity() == identity
    before, after = rewritten(path, make)
    # Nothing else tells them apart.
    assert before == after
    assert ASELMDBSource(path).input_identity() != identity


@pytest.mark.parametrize("row", [b"1", b"999"])  # the first and the last by key
def test_another_first_or_last_row_is_enough_to_tell_files_apart(
    tmp_path: Path, row: bytes
) -> None:
    path, copy = tmp_path / "rows.aselmdb", tmp_path / "copy.aselmdb"
    write_database(path, molecules(1000), data={"x": np.ones(600)})
    shutil.copy(path, copy)
    value = raw_row(path, row)
    change_raw_row(path, row, value[:-1] + bytes([value[-1] ^ 1]))
    change_raw_row(copy, row, value)
    assert read_header(path) == read_header(copy)
    assert fingerprint(path, read_header(path)) != fingerprint(copy, read_header(copy))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count bytes")
def test_telling_files_apart_reads_little_of_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(2000), data={"x": np.random.default_rng(0).random(1000)})
    assert path.stat().st_size > 10_000_000
    source = ASELMDBSource(path)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    source.input_identity()
    assert bytes_read() - before < 150_000


def test_a_damaged_file_can_be_told_from_a_good_one_and_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(200), data={"x": np.ones(3000)})
    content = path.read_bytes()
    identities = []
    for kept in (len(content), len(content) // 2, 8192, 4096, 100, 0):
        path.write_bytes(content[:kept])
        identities.append(ASELMDBSource(path).input_identity())
    header = read_header_of(content, path)
    spoilt = bytearray(content)
    start = header.root * header.page_size
    spoilt[start : start + header.page_size] = b"\xff" * header.page_size
    path.write_bytes(spoilt)
    identities.append(ASELMDBSource(path).input_identity())
    assert identities[0] not in identities[1:]


def read_header_of(content: bytes, path: Path) -> LMDBHeader:
    path.write_bytes(content)
    return read_header(path)


@pytest.mark.parametrize("rows_per_index", [2.0, True, "3"])
def test_rows_an_index_are_an_integer(dataset: Path, rows_per_index) -> None:
    with pytest.raises(SourceError, match=r"^rows_per_index is .*; give an integer, 1 or more"):
        ASELMDBSource(dataset, rows_per_index)


def test_a_tilde_is_the_home_directory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(dataset.parent))
    assert len(ASELMDBSource(f"~/{dataset.name}")) == 5
