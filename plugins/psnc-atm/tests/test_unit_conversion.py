"""Numbers in other units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import units
from structures import Structures, molecule

from psnc.errors import ConfigurationError, StageError
from psnc.testing import check_filter
from psnc_atm import AtomicData, ConvertUnits

HARTREE, BOHR = 27.211386, 0.529177


def converted(structure: AtomicData, *args: Any, **kwargs: Any) -> AtomicData:
    [made] = ConvertUnits(*args, **kwargs)(iter([structure]))
    assert isinstance(made, AtomicData)
    return made


def everything() -> AtomicData:
    return molecule(
        [6, 8],
        cell=np.eye(3),
        energy=1.0,
        free_energy=2.0,
        energies=np.ones(2),
        forces=np.ones((2, 3)),
        stress=np.ones((3, 3)),
        dipole=np.ones(3),
        charges=np.ones(2),
        magmom=1.0,
        cutoff=3.0,
        results={"virial": np.ones((3, 3)), "stresses": np.ones((2, 6)), "other": 1.0},
        info={"gap": 1.0, "orbitals": [1, 2], "name": "x"},
    )


def test_the_filter_keeps_the_rules() -> None:
    check_filter(ConvertUnits(energy=["Hartree", "eV"]), Structures([4, 0, 3]), lazy=True)
    check_filter(ConvertUnits({"info.gap": ("eV", "kJ/mol")}), Structures([4, 0, 3]))


def test_given_fields_are_converted_and_no_others() -> None:
    before = everything()
    made = converted(before, {"energy": ("Hartree", "eV"), "forces": ("Hartree/Bohr", "eV/Ang")})
    assert made.energy == pytest.approx(HARTREE)
    np.testing.assert_allclose(made.forces, HARTREE / BOHR, rtol=1e-6)
    assert made.free_energy == 2.0
    assert made.stress is before.stress
    assert made.positions is before.positions
    np.testing.assert_array_equal(before.forces, 1)


def test_all_that_follows_from_energy_and_length() -> None:
    before = everything()
    made = converted(before, energy=("Hartree", "eV"), length=("Bohr", "Ang"))
    expected = {
        "energy": HARTREE,
        "free_energy": 2 * HARTREE,
        "energies": HARTREE,
        "forces": HARTREE / BOHR,
        "stress": HARTREE / BOHR**3,
        "positions": before.positions * BOHR,
        "cell": np.eye(3) * BOHR,
        "cutoff": 3 * BOHR,
        "dipole": BOHR,
        "charges": 1.0,
        "magmom": 1.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(made, name), value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(made.results["virial"], HARTREE, rtol=1e-6)
    np.testing.assert_allclose(made.results["stresses"], HARTREE / BOHR**3, rtol=1e-5)
    assert made.results["other"] == 1.0


def test_a_field_of_its_own_unit_among_the_others() -> None:
    made = converted(everything(), {"stress": ("GPa", "eV/Ang^3")}, energy=("kcal/mol", "eV"))
    assert made.energy == pytest.approx(units.kcal / units.mol, rel=1e-15)
    assert made.stress is not None
    np.testing.assert_allclose(made.stress, units.GPa)


def test_there_and_back_again() -> None:
    before = everything()
    there = converted(before, energy=("eV", "kJ/mol"), length=("Ang", "nm"))
    back = converted(there, energy=("kJ/mol", "eV"), length=("nm", "Ang"))
    for name in ("energy", "forces", "stress", "positions", "cell"):
        np.testing.assert_allclose(getattr(back, name), getattr(before, name), rtol=1e-13)


def test_entries_of_info() -> None:
    made = converted(everything(), {"info.gap": ("Ha", "eV"), "info.orbitals": ("eV", "Ry")})
    assert made.info["gap"] == units.Ha
    np.testing.assert_allclose(made.info["orbitals"], np.array([1, 2]) / units.Ry)
    assert made.info["name"] == "x"


def test_what_a_structure_lacks_is_passed_over() -> None:
    bare = molecule([1])
    assert converted(bare, {"forces": ("Ry/Bohr", "eV/Å"), "info.gap": ("Ry", "eV")}) == bare


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        ("kcal/mol/Ang", units.kcal / units.mol),
        ("eV/Ang**2*Ang", 1.0),
        ("10 * eV / nm", 1.0),
        ("(kJ/mol)*Bohr^-1", units.kJ / units.mol / units.Bohr),
    ],
)
def test_units_as_text(unit: str, size: float) -> None:
    structure = molecule([1], forces=np.ones((1, 3)))
    made = converted(structure, {"forces": (unit, "eV/Ang")})
    np.testing.assert_allclose(made.forces, size, rtol=1e-14)


def test_dipoles_charges_masses_and_velocities() -> None:
    structure = molecule(
        [1], dipole=np.ones(3), atomic_masses=np.ones(1), velocities=np.ones((1, 3)), charge=1.0
    )
    made = converted(
        structure,
        {
            "dipole": ("Debye", "e*Ang"),
            "atomic_masses": ("kg", "amu"),
            "velocities": ("Ang/fs", "Ang/fs"),
            "charge": ("C", "e"),
        },
    )
    assert made.dipole is not None
    np.testing.assert_allclose(made.dipole, units.Debye)
    np.testing.assert_allclose(made.atomic_masses, units.kg)
    assert made.velocities is structure.velocities
    assert made.charge == units.C


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ConvertUnits was given nothing to convert"),
        (
            {"fields": {"energy": ("Hartee", "eV")}},
            "unknown unit 'Hartee' in 'Hartee'; choose from",
        ),
        ({"fields": {"energy": ("eV", "Ang")}}, "'Ang' is no unit of energy"),
        ({"fields": {"forces": ("eV", "eV")}}, "'eV' is no unit of forces"),
        (
            {"fields": {"info.gap": ("eV", "Ang")}},
            "info.gap cannot be converted from 'eV' to 'Ang'",
        ),
        ({"fields": {"pbc": ("eV", "Ang")}}, "'pbc' has no unit; choose from energy"),
        ({"fields": {"else.gap": ("eV", "Ang")}}, "'else.gap' has no unit"),
        ({"fields": {"energy": "eV"}}, "energy is 'eV'; give two units"),
        ({"energy": ("eV",)}, r"energy is \('eV',\); give two units"),
        ({"length": ("eV", "Ang")}, "'eV' is no unit of length"),
        *(
            ({"energy": ("eV", text)}, "is no unit: write names")
            for text in ("", "eV eV", "eV//Ang", "eV**0.5", "eV+eV", "0*eV", "f(eV)", "nm**9999")
        ),
        ({"energy": ("eV", "eV/Ang**True")}, "is no unit"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        ConvertUnits(**options)
    assert "\n" not in str(refused.value)


def test_an_entry_that_is_no_number_names_the_structure() -> None:
    with pytest.raises(StageError, match=r"structure 0 \(CO\): info.name is a str, not a number"):
        converted(everything(), {"info.name": ("eV", "Ry")})
