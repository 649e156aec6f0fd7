"""Molecules in ASE LMDB files become one Zarr store.

Run it from anywhere::

    psnc run examples/molecules.py:pipeline -j 2      # 8 files of 86 molecules
    psnc run examples/molecules.py:large -j 2         # 8 files of 2,000 molecules

The first run writes the input. The writer is ``ase-db-backends``, not psnc. Everything goes to
``build/molecules`` beside this folder, or to the directory that ``PSNC_EXAMPLE_DIR`` names.
Delete that directory to begin again.

The molecules are those of the G2 set that ships with ASE (``ase.collections.g2``), as far as they
consist of elements for which ASE's effective medium theory, ``ase.calculators.emt.EMT``, has
parameters: 86 of 162. The first 86 structures of a dataset are these molecules as the set has
them; all others are copies whose atoms are moved by normally distributed random steps of 0.05 Å.

Energies and forces are what EMT returns for exactly the stored positions, so that they are
consistent with each other. They are no chemistry: EMT is made for metals, and ASE's own
documentation calls its parameters for hydrogen, carbon, nitrogen and oxygen unrealistic.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators import emt
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2

from psnc import Pipeline, atomic_directory
from psnc_atm import ASELMDBSource, AtomicDataZarrSink

SEED = 20240229
STEP = 0.05  # Å


def pipeline() -> Pipeline:
    """Return the pipeline over the small dataset."""
    return zarr_pipeline("small", files=8, rows=86)


def large() -> Pipeline:
    """Return the pipeline over the large dataset; writing its input takes about half a minute."""
    return zarr_pipeline("large", files=8, rows=2000)


def zarr_pipeline(name: str, files: int, rows: int, folder: Path | None = None) -> Pipeline:
    """Return a pipeline over a dataset of ``files`` times ``rows`` molecules, written if missing.

    The database lies beside the store and is used again by the next run, so that a run that was
    cut short goes on where it ended.
    """
    folder = (folder or output_folder()) / name
    write_dataset(folder / "input", files, rows)
    return Pipeline(
        source=ASELMDBSource(data_dir=folder / "input"),
        sink=AtomicDataZarrSink(output_path=folder / "molecules.zarr"),
        resume=True,
        db_dir=folder / "checkpoints",
    )


def output_folder() -> Path:
    """Return where the example writes."""
    chosen = os.environ.get("PSNC_EXAMPLE_DIR")
    return Path(chosen or Path(__file__).parents[1] / "build" / "molecules").absolute()


def write_dataset(folder: Path, files: int, rows: int) -> None:
    """Write ``files`` databases of ``rows`` molecules each to ``folder``, if it is not there.

    ``folder`` is either whole or missing, whenever the process is stopped.
    """
    if folder.exists():
        return
    print(f"writing {files} files of {rows} molecules to {folder}", file=sys.stderr)
    structures = molecules()
    with atomic_directory(folder) as draft:
        for number in range(files):
            path = draft / f"molecules-{number:02}.aselmdb"
            with ase.db.connect(path, type="aselmdb") as database:
                for molecule, atoms in islice(structures, rows):
                    database.write(atoms, molecule=molecule)


def molecules() -> Iterator[tuple[str, Atoms]]:
    """Yield names and structures without end, the same ones every time."""
    rng = np.random.default_rng(SEED)
    names = [name for name in g2.names if set(g2[name].symbols) <= set(emt.parameters)]
    for name in names:
        yield name, with_emt_results(g2[name])
    while True:
        for name in names:
            atoms = g2[name]
            atoms.rattle(STEP, rng=rng)
            yield name, with_emt_results(atoms)


def with_emt_results(atoms: Atoms) -> Atoms:
    """Attach energy and forces to a structure."""
    atoms.calc = emt.EMT()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms
