"""Structures that others have published or computed: files and collections that ASE ships."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from ase import Atoms
from ase.collections import dcdft, g2, s22

# Minerals of the Crystallography Open Database, and what codes of many kinds have written.
FILES = (
    *(f"minerals/cod_{number}.cif" for number in (1010930, 1010995, 9001665, 9004112)),
    *(f"minerals/cod_{number}.cif" for number in (9004218, 9007640, 9007661, 9017338)),
    *("vasp/OUTCAR_example_1", "vasp/vasprun_dfpt.xml", "vasp/vasprun_pstress.xml"),
    *("castep/md.castep", "io/eon/multi.con", "io/eon/single.con", "opls_structure_ext.xyz"),
    *("large_atoms.magres", "nomad-images.nomad-json", "gpaw_expected_text_output"),
    *("qbox_test.xml", "qbox_04_md_ntc.reference.xml", "aims/issue_3345_spin_md_light.out"),
)
# Whole files that ASE makes nothing of, and files that are cut off.
UNREADABLE = (
    *("README.md", "rotated_bz.png", "siesta/siesta.EIG", "tersoff/SiC.tersoff", "172_defs.par"),
    *("vasp/convergence_OUTCAR_y_n", "vasp/POSCAR_example_1", "onetep_include.dat"),
    *("aims/preamble_fail.out", "lammpsdata_input.data"),
)
COLLECTIONS = {"g2": g2, "s22": s22, "dcdft": dcdft}


def path_of(file: str) -> Path:
    """Return where a file is; ASE is installed as files."""
    with as_file(files("ase.test") / "testdata" / file) as path:
        return path


@cache
def _collection(name: str) -> tuple[Atoms, ...]:
    return tuple(COLLECTIONS[name][each] for each in COLLECTIONS[name].names)


def collection(name: str) -> list[Atoms]:
    """Return copies of the structures of a collection."""
    return [atoms.copy() for atoms in _collection(name)]
