from __future__ import annotations

import pickle
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import all_properties
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress
from attrs import evolve
from data import crystals, molecules, write_database

from psnc_atm import ASELMDBSource, AtomicData


def assert_same_atoms(one: Atoms, other: Atoms) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name in one.arrays:
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name], err_msg=name)
    np.testing.assert_array_equal(one.cell.array, other.cell.array)
    np.testing.assert_array_equal(one.pbc, other.pbc)
    assert [c.todict() for c in one.constraints] == [c.todict() for c in other.constraints]
    for name in all_properties:
        left = None if one.calc is None else one.calc.results.get(name)
        right = None if other.calc is None else other.calc.results.get(name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize("make", [molecules, crystals])
def test_rows_become_the_same_atoms_as_with_the_reference_reader(make, tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, make(6))
    ours = [structure.to_ase() for structure in ASELMDBSource(path)[0]]
    with ase.db.connect(path) as database:
        references = [row.toatoms() for row in database.select()]
    assert len(ours) == len(references) == 6
    for one, other in zip(ours, references, strict=True):
        assert_same_atoms(one, other)


@pytest.mark.parametrize("make", [molecules, crystals])
def test_atoms_survive_the_way_there_and_back(make) -> None:
    for atoms in make(4):
        structure = AtomicData.from_ase(atoms)
        assert_same_atoms(structure.to_ase(), atoms)
        assert AtomicData.from_ase(structure.to_ase()) == structure


def test_stress_is_a_matrix_in_ases_sign_and_order() -> None:
    atoms = next(crystals(1))
    stress = AtomicData.from_ase(atoms).stress
    assert stress is not None
    np.testing.assert_array_equal(stress, stress.T)
    np.testing.assert_array_equal(full_3x3_to_voigt_6_stress(stress), atoms.get_stress())


def test_info_has_pairs_and_data_and_charge_and_spin_are_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(
        path,
        molecules(1),
        key_value_pairs={"label": "x", "both": 1.5},
        data={"charge": -1, "spin": 2, "both": 7, "grid": np.eye(2), "sub": {"1": [1, 2]}},
    )
    (structure,) = ASELMDBSource(path)[0]
    assert (structure.charge, structure.spin) == (-1.0, 2.0)
    assert structure.info.keys() == {"label", "both", "key_value_pairs.both", "grid", "sub"}
    assert structure.info["both"] == 7
    assert structure.info["key_value_pairs.both"] == 1.5
    assert structure.info["sub"] == {1: [1, 2]}
    np.testing.assert_array_equal(structure.info["grid"], np.eye(2))
    assert structure.to_ase().info["charge"] == -1


def test_complex_and_ase_objects_in_data_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    atoms = next(molecules(1))
    wave = np.array([1 + 2j, 3 - 1j])
    write_database(path, [atoms], data={"wave": wave, "start": {"atoms": atoms}})
    (structure,) = ASELMDBSource(path)[0]
    np.testing.assert_array_equal(structure.info["wave"], wave)
    np.testing.assert_array_equal(structure.info["start"]["atoms"].positions, atoms.positions)


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, -(10**30)])
def test_integers_are_read_to_the_last_digit(number: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    inside = {"list": [1.5, number], "float": 1e30}
    write_database(path, molecules(1), key_value_pairs={"big": number}, data={"inside": inside})
    (structure,) = ASELMDBSource(path)[0]
    assert structure.info == {"big": number, "inside": inside}
    assert type(structure.info["big"]) is int


def test_not_a_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    atoms = next(molecules(1))
    atoms.calc.results["energy"] = float("nan")
    atoms.calc.results["forces"][0] = float("inf")
    write_database(path, [atoms])
    (structure,) = ASELMDBSource(path)[0]
    assert np.isnan(structure.energy)
    assert np.isinf(structure.forces[0]).all()


def test_equality_looks_at_every_element_and_survives_pickling() -> None:
    atoms = next(crystals(1))
    one = AtomicData.from_ase(atoms)
    assert one == pickle.loads(pickle.dumps(one))
    atoms.positions[3, 1] += 1e-12
    assert one != AtomicData.from_ase(atoms)
    assert one != 3


def test_a_field_with_the_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="forces has 2 rows for 3 atoms"):
        AtomicData(
            atomic_numbers=np.array([1, 1, 8]), positions=np.zeros((3, 3)), forces=np.zeros((2, 3))
        )


def move(atoms: Atoms) -> None:
    atoms.positions[0, 0] += 0.1


def strain(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell * 1.01, scale_atoms=False)


def replace(atoms: Atoms) -> None:
    atoms.numbers[0] = 1


@pytest.mark.parametrize("change", [move, strain, replace])
def test_results_for_what_the_atoms_were_before_are_left_out(change) -> None:
    atoms = next(crystals(1))
    assert AtomicData.from_ase(atoms).energy == atoms.calc.results["energy"]
    change(atoms)
    structure = AtomicData.from_ase(atoms)
    assert structure.energy is None
    assert structure.forces is None
    assert structure.stress is None
    assert structure.results == {}
    # They are the atoms' no more, and still the calculator's.
    assert "energy" in atoms.calc.results


def test_a_live_calculator_gives_what_it_has_and_calculates_nothing() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    assert AtomicData.from_ase(atoms).energy is None
    assert atoms.calc.results == {}
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    structure = AtomicData.from_ase(atoms)
    assert structure.energy == energy
    np.testing.assert_array_equal(structure.forces, forces)
    move(atoms)
    stale = AtomicData.from_ase(atoms)
    assert stale.energy is None
    assert stale.forces is None
    assert atoms.get_potential_energy() == AtomicData.from_ase(atoms).energy != energy


@pytest.mark.parametrize("number", [2, 2.0, np.int64(2), np.float32(2), np.array(2)])
def test_charge_and_spin_are_floats_whatever_numbers_they_were(number) -> None:
    atoms = next(molecules(1))
    atoms.info.update(charge=number, spin=number)
    structure = AtomicData.from_ase(atoms)
    assert (type(structure.charge), structure.charge) == (float, 2.0)
    assert (type(structure.spin), structure.spin) == (float, 2.0)
    assert structure.info == {}


@pytest.mark.parametrize("other", ["neutral", True, [1, 2]])
def test_a_charge_that_is_no_number_stays_in_info(other) -> None:
    atoms = next(molecules(1))
    atoms.info["charge"] = other
    structure = AtomicData.from_ase(atoms)
    assert structure.charge is None
    assert structure.info == {"charge": other}


def test_arrays_that_ase_has_no_name_for_are_kept_in_info() -> None:
    atoms = next(molecules(1))
    atoms.new_array("REF_forces", np.ones((len(atoms), 3)))
    atoms.new_array("label", np.array(["a"] * len(atoms)))
    atoms.info["label"] = "water"
    structure = AtomicData.from_ase(atoms)
    assert structure.info.keys() == {"REF_forces", "label", "arrays.label"}
    np.testing.assert_array_equal(structure.info["REF_forces"], np.ones((len(atoms), 3)))
    assert structure.info["label"] == "water"
    atoms.arrays["REF_forces"][:] = 0
    assert structure.info["REF_forces"].all()


def test_results_that_only_one_code_has_survive_the_way_there_and_back() -> None:
    atoms = next(molecules(1))
    atoms.calc.results["energy_without_dispersion_correction"] = -1.5
    structure = AtomicData.from_ase(atoms)
    assert structure.results == {"energy_without_dispersion_correction": -1.5}
    again = structure.to_ase()
    assert again.calc.results["energy_without_dispersion_correction"] == -1.5
    assert again.get_potential_energy() == structure.energy
    assert AtomicData.from_ase(again) == structure


def test_results_of_atoms_at_places_that_are_no_numbers_are_kept() -> None:
    atoms = Atoms("H", positions=[[np.nan, np.inf, -0.0]])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.5)
    assert AtomicData.from_ase(atoms).energy == -1.5


def test_fixed_atoms_keep_their_velocities_with_ase() -> None:
    atoms = Atoms("H2", positions=np.eye(2, 3), constraint=FixAtoms([0]))
    structure = evolve(AtomicData.from_ase(atoms), velocities=np.ones((2, 3)))
    np.testing.assert_allclose(structure.to_ase().get_velocities(), np.ones((2, 3)), rtol=1e-15)


def test_a_stress_that_is_not_symmetric_is_handed_over_as_it_is() -> None:
    structure = AtomicData(
        atomic_numbers=np.array([1]),
        positions=np.zeros((1, 3)),
        stress=np.arange(9.0).reshape(3, 3),
    )
    assert structure.stress is not None
    atoms = structure.to_ase()
    assert atoms.calc is not None
    np.testing.assert_array_equal(atoms.calc.results["stress"], structure.stress)
    assert AtomicData.from_ase(atoms) == structure


def test_a_total_moment_that_is_a_vector_is_a_result() -> None:
    atoms = Atoms("H")
    atoms.calc = SinglePointCalculator(atoms, magmom=np.array([0.5, 1.0, 2.0]))
    structure = AtomicData.from_ase(atoms)
    assert structure.magmom is None
    np.testing.assert_array_equal(structure.results["magmom"], [0.5, 1.0, 2.0])
