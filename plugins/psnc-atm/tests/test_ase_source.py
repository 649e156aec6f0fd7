from __future__ import annotations

import gzip
import pickle
import shutil
import threading
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from data import contents, crystals, molecules

from psnc import Pipeline, SourceError, run_pipeline
from psnc.testing import check_source
from psnc_atm import ASESource, AtomicData, AtomicDataZarrSink


def write(path: Path, count: int = 5, seed: int = 0) -> list[Atoms]:
    path.parent.mkdir(parents=True, exist_ok=True)
    structures = list(molecules(count, seed))
    ase.io.write(path, structures)
    return structures


def as_read(path: Path, **options) -> list[AtomicData]:
    return [AtomicData.from_ase(atoms) for atoms in ase.io.read(path, index=":", **options)]


def counts(source: ASESource) -> list[list[int]]:
    return [source.atom_counts(index).tolist() for index in range(len(source))]


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz", "a.traj", "a.extxyz.gz", "a.xyz.bz2"])
@pytest.mark.parametrize("make", [molecules, crystals])
def test_frames_are_those_that_ase_reads(name: str, make, tmp_path: Path) -> None:
    path = tmp_path / name
    ase.io.write(path, list(make(7)))
    source = ASESource(path)
    assert len(source) == 1
    assert list(source[0]) == as_read(path)
    assert counts(source) == [[len(structure) for structure in source[0]]]


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
@pytest.mark.parametrize("frames", [1, 3, 7, 10])
def test_runs_of_frames_are_indices(name: str, frames: int, tmp_path: Path) -> None:
    for file in (name, f"b{name}"):
        write(tmp_path / file, 7)
    whole = ASESource(tmp_path)
    cut = ASESource(tmp_path, frames_per_index=frames)
    of_a_file = -(-7 // frames)
    assert len(cut) == 2 * of_a_file
    for index, file in enumerate(whole):
        parts = [list(cut[index * of_a_file + part]) for part in range(of_a_file)]
        assert [len(part) for part in parts[:-1]] == [frames] * (of_a_file - 1)
        assert [structure for part in parts for structure in part] == list(file)
    assert counts(cut) == [[len(structure) for structure in each] for each in cut]
    assert cut.index_name(of_a_file) == f"b{name}, frames 0 to {min(frames, 7) - 1}"
    copy = pickle.loads(pickle.dumps(cut))
    assert [list(each) for each in copy] == [list(each) for each in cut]


def test_plain_xyz_and_cell_vectors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    ase.io.write(path, list(molecules(4)), format="xyz")
    assert list(ASESource(path, format="xyz")[0]) == as_read(path, format="xyz")
    ase.io.write(path, list(crystals(3)), format="extxyz", vec_cell=True)
    source = ASESource(path, frames_per_index=2)
    assert [structure for each in source for structure in each] == as_read(path)
    assert next(iter(source[1])).cell.any()


def test_results_and_info_become_fields_and_info(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(
        "2\n"
        'Lattice="4 0 0 0 4 0 0 0 4" '
        "Properties=species:S:1:pos:R:3:forces:R:3:REF_forces:R:3:site:I:1"
        ' energy=-1.5 free_energy=-1.25 stress="1 2 3 2 4 5 3 5 6" virial="1 2 3 4 5 6 7 8 9"'
        " charge=-1 spin=2 REF_energy=-3.25 label=x\n"
        "O 0 0 0 1 2 3 4 5 6 7\n"
        "H 0 0 1 -1 -2 -3 -4 -5 -6 8\n"
    )
    (structure,) = ASESource(path)[0]
    assert (structure.energy, structure.free_energy) == (-1.5, -1.25)
    assert (structure.charge, structure.spin) == (-1.0, 2.0)
    np.testing.assert_array_equal(structure.forces, [[1, 2, 3], [-1, -2, -3]])
    np.testing.assert_array_equal(structure.stress, [[1, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert structure.info.keys() == {"virial", "REF_energy", "label", "REF_forces", "site"}
    np.testing.assert_array_equal(structure.info["REF_forces"], [[4, 5, 6], [-4, -5, -6]])
    sink = AtomicDataZarrSink(
        tmp_path / "store.zarr", custom={"REF_forces": "atom", "REF_energy": "system"}
    )
    run_pipeline(Pipeline(source=ASESource(path), sink=sink, track_metrics=False), progress=False)
    arrays = contents(tmp_path / "store.zarr")
    np.testing.assert_array_equal(arrays["custom/REF_forces"], [[4, 5, 6], [-4, -5, -6]])
    np.testing.assert_array_equal(np.ravel(arrays["custom/REF_energy"]), [-3.25])


def test_files_are_taken_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        write(tmp_path / f"run{number}" / "out.extxyz", number)
    (tmp_path / ".hidden").write_text("x")
    source = ASESource(tmp_path / "run*" / "*.extxyz")
    assert [len(list(each)) for each in source] == [1, 10, 2]
    assert [source.index_name(index) for index in range(3)] == [
        *("run1/out.extxyz", "run10/out.extxyz", "run2/out.extxyz")
    ]
    with pytest.raises(IndexError, match="index 3 is out of range for 3 indices"):
        list(source[3])


def test_a_pattern_says_which_files_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "a[1].extxyz", 2)
    write(tmp_path / "b.traj", 3)
    (tmp_path / "notes.txt").write_text("not a structure\n")
    (tmp_path / "below").mkdir()
    assert [len(list(each)) for each in ASESource(tmp_path, pattern="*.traj")] == [3]
    mixed = ASESource(tmp_path)
    assert len(mixed) == 3
    assert [len(list(mixed[index])) for index in range(2)] == [2, 3]
    with pytest.raises(SourceError, match=r"notes\.txt: .*pattern=") as failed:
        list(mixed[2])
    assert "\n" not in str(failed.value)
    assert len(list(ASESource(tmp_path / "a[1].extxyz")[0])) == 2


def test_a_name_with_an_at_sign_is_a_name(tmp_path: Path) -> None:
    write(tmp_path / "a@1.cif", 1)
    write(tmp_path / "b@0:1.traj", 3)
    assert [len(list(each)) for each in ASESource(tmp_path)] == [1, 3]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.xyz", tmp_path / "*.cif", tmp_path):
        with pytest.raises(SourceError, match="no file matches"):
            ASESource(path)
    write(tmp_path / "a.xyz")
    for format in ("extxzy", "png"):
        with pytest.raises(SourceError, match=f"format '{format}' is none that ASE reads"):
            ASESource(tmp_path, format=format)
    with pytest.raises(SourceError, match="use ASEDatabaseSource"):
        ASESource(tmp_path, format="db")
    with pytest.raises(SourceError, match="frames_per_index is 0; give 1 or more"):
        ASESource(tmp_path, frames_per_index=0)
    with pytest.raises(SourceError, match=r"pattern='\*' is for a directory"):
        ASESource(tmp_path / "a.xyz", pattern="*")


DAMAGED = {
    "a.extxyz": b"3\n\nO 0 0 0\nH 0 0 1\n",
    "b.extxyz": b"2\n\nO 0 0 0\nH 0 x 1\n",
    "c.extxyz": b"2\nProperties=species:S:1:pos:R:3\nO 0 0 0\nH 0 0\n",
    "d.extxyz": b"two\n\nO 0 0 0\nH 0 0 1\n",
    "e.extxyz": b"1\n\xff\xfe\nO 0 0 0\n",
    "f.extxyz": b"-1\n\n",
    "g.extxyz": b"1\nProperties=species:S:1\nXy 0 0 0\n",
    "h.traj": b"- of UlmASE-Trajectory and then nothing of the kind",
    "i.traj": b"",
    "j.cif": b"",
    "k.cif": b"data_nothing\n",
    "l.cif": b"loop_\n_atom_site_label\n",
    "POSCAR": b"Al\n1.0\n4 0 0\n",
    "OUTCAR": b"vasp.5.4.4\n",
    "m.gz": b"no gzip",
    "n.extxyz.gz": gzip.compress(b"1\n\nH 0 0 0\n" * 1000)[:40],
    "n.xyz.xz": b"\xfd7zXZ\0 and no more",
    "o.json": b"{}",
    "p.pdb": b"ATOM  what\n",
    "q": b"\0" * 100,
    "r.xyz": b"1\n\nH 0 0 0\n\n1\n\nH 0 0 0\n",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_fails_its_own_index_in_one_line(name: str, tmp_path: Path) -> None:
    for good in ("0.extxyz", "zz.extxyz"):
        write(tmp_path / good, 2)
    (tmp_path / name).write_bytes(DAMAGED[name])
    source = ASESource(tmp_path)
    assert [len(list(source[index])) for index in (0, 2)] == [2, 2]
    with pytest.raises(SourceError) as failed:
        list(source[1])
    assert str(failed.value).startswith(str(tmp_path / name))
    assert "\n" not in str(failed.value)
    source.input_identity()


def test_a_damaged_frame_is_named_and_those_before_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    write(path, 6)
    lines = path.read_text().splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.strip().isdigit()]
    lines[starts[4]] = "what\n"
    path.write_text("".join(lines))
    items = iter(ASESource(path)[0])
    assert len([next(items) for _ in range(4)]) == 4
    with pytest.raises(SourceError, match=r"a\.extxyz, frame 4: .*'what', not a number of atoms"):
        next(items)
    for frames, good in ((2, 2), (3, 1), (4, 1)):
        cut = ASESource(path, frames_per_index=frames)
        assert len(cut) == good + 1
        assert [len(list(cut[index])) for index in range(good)] == [frames] * good
        for read in (cut.__getitem__, cut.atom_counts):
            with pytest.raises(SourceError, match="frame 4: "):
                list(read(good))


def test_a_damaged_trajectory_fails_where_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    write(path, 6)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"a\.traj"):
        list(ASESource(path)[0])
    assert len(ASESource(path, frames_per_index=2)) >= 1


@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.extxyz.gz"])
def test_frames_that_cannot_be_found_are_refused_at_once(name: str, tmp_path: Path) -> None:
    ase.io.write(tmp_path / name, next(crystals(1)))
    source = ASESource(tmp_path, frames_per_index=2)
    with pytest.raises(SourceError, match="leave frames_per_index out") as refused:
        len(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "reader"), [("a.db", "ASEDatabaseSource"), ("a.aselmdb", "ASELMDBSource")]
)
def test_databases_are_for_other_sources(name: str, reader: str, tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / name) as database:
        database.write(next(molecules(1)))
    with pytest.raises(SourceError, match=f"is a database; read it with {reader}"):
        list(ASESource(tmp_path / name)[0])


def test_a_file_that_changes_is_noticed_and_a_copy_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.extxyz"
    write(path, 3)
    before = ASESource(tmp_path / "in").input_identity()
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    assert ASESource(tmp_path / "copy").input_identity() == before
    path.write_text(path.read_text().replace("energy=-", "energy=1"))
    assert ASESource(tmp_path / "in").input_identity() != before
    path.write_bytes(b"x" * 3_000_000)
    large = ASESource(tmp_path / "in").input_identity()
    for place in (0, 2_999_999):
        content = bytearray(b"x" * 3_000_000)
        content[place] = 0
        path.write_bytes(content)
        assert ASESource(tmp_path / "in").input_identity() != large


def test_a_file_that_grew_since_it_was_counted_is_not_read_as_if_it_had_not(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.extxyz", 3)
    source = ASESource(tmp_path, frames_per_index=2)
    assert len(source) == 2
    write(tmp_path / "a.extxyz", 5)
    with pytest.raises(SourceError, match="has changed since its frames were counted; run again"):
        list(source[0])


def test_threads_can_share_a_source(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.traj", 5, seed=number)
    source = ASESource(tmp_path)
    expected = [list(each) for each in source]
    read: dict[int, list[AtomicData]] = {}
    threads = [
        threading.Thread(target=lambda index=index: read.update({index: list(source[index % 4])}))
        for index in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read[index] for index in range(8)] == expected * 2


def test_the_source_keeps_the_rules(tmp_path: Path) -> None:
    write(tmp_path / "a.extxyz", 4)
    write(tmp_path / "b.traj", 3)
    check_source(ASESource(tmp_path))
    check_source(ASESource(str(tmp_path / "*"), frames_per_index=2))


@pytest.mark.parametrize("frames", [None, 3])
def test_a_store_is_the_same_however_many_write_it(frames: int | None, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.extxyz", 5, seed=number)
    stores = []
    for jobs in (1, 2):
        sink = AtomicDataZarrSink(tmp_path / f"{jobs}.zarr")
        source = ASESource(tmp_path / "in", frames_per_index=frames)
        pipeline = Pipeline(source=source, sink=sink, resume=True, db_dir=tmp_path / str(jobs))
        run_pipeline(pipeline, n_jobs=jobs, progress=False)
        stores.append(contents(tmp_path / f"{jobs}.zarr"))
    assert stores[0]["meta/samples_mask"].all()
    np.testing.assert_array_equal(stores[0]["core/positions"], stores[1]["core/positions"])
    expected = np.concatenate([s.positions for each in source for s in each])
    np.testing.assert_array_equal(stores[0]["core/positions"], expected)


def test_repaired_and_added_files_join_the_store(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.extxyz", 3)
    (tmp_path / "in/b.extxyz").write_bytes(b"what\n")

    def run() -> list[list[str]]:
        pipeline = Pipeline(
            source=ASESource(tmp_path / "in"),
            sink=AtomicDataZarrSink(tmp_path / "out.zarr"),
            resume=True,
            db_dir=tmp_path,
        )
        return run_pipeline(pipeline, progress=False)

    assert [bool(paths) for paths in run()] == [True, False]
    write(tmp_path / "in" / "b.extxyz", 2)
    write(tmp_path / "in" / "c.extxyz", 4)
    assert all(run())
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].tolist() == [True] * 9


@pytest.mark.parametrize("name", ["a b", "a?b#c", "a%20b", "a@1", "[a]", "ä", "a*"])
@pytest.mark.parametrize("suffix", [".extxyz", ".traj", ".cif"])
def test_names_may_be_odd(name: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    path = tmp_path / name / f"{name}{suffix}"
    ase.io.write(tmp_path / f"plain{suffix}", list(crystals(1)))
    (tmp_path / f"plain{suffix}").rename(path)
    for given in (path, path.parent):
        source = ASESource(given)
        assert len(list(source[0])) == 1
        assert source.index_name(0) == f"{name}{suffix}"


def test_files_that_are_added_join_a_store_of_runs_of_frames_and_only_they_run(
    tmp_path: Path,
) -> None:
    write(tmp_path / "in" / "a.extxyz", 4)

    def run() -> list[list[str]]:
        pipeline = Pipeline(
            source=ASESource(tmp_path / "in", frames_per_index=2),
            sink=AtomicDataZarrSink(tmp_path / "out.zarr"),
            resume=True,
            db_dir=tmp_path,
        )
        return run_pipeline(pipeline, progress=False)

    assert all(run())
    before = contents(tmp_path / "out.zarr")["core/positions"]
    write(tmp_path / "in" / "b.extxyz", 3)
    assert len(run()) == 4
    after = contents(tmp_path / "out.zarr")
    assert after["meta/samples_mask"].sum() == 4 + 3
    np.testing.assert_array_equal(after["core/positions"][: len(before)], before)


@pytest.mark.parametrize("frames_per_index", [2.0, True, "3"])
def test_frames_an_index_are_an_integer(tmp_path: Path, frames_per_index) -> None:
    write(tmp_path / "a.extxyz", 2)
    with pytest.raises(SourceError, match=r"^frames_per_index is .*; give an integer, 1 or more"):
        ASESource(tmp_path, frames_per_index=frames_per_index)


def test_an_empty_trajectory_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.traj").write_bytes(b"")
    for options in ({}, {"format": "traj"}):
        with pytest.raises(SourceError, match=r"a\.traj: the file is empty; replace it"):
            list(ASESource(tmp_path, **options)[0])
