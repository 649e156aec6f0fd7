"""Edges of a structure."""

from __future__ import annotations

import numpy as np
import pytest

from psnc_atm import AtomicData


def two_atoms(**fields: object) -> AtomicData:
    return AtomicData(
        atomic_numbers=np.array([1, 8]),
        positions=np.array([[0.0, 0, 0], [1, 0, 0]]),
        cell=np.diag([2.0, 3, 4]),
        **fields,  # type: ignore[arg-type]
    )


def test_a_structure_has_no_edges_unless_they_are_given() -> None:
    assert two_atoms().edge_index is None
    assert two_atoms().shifts is None


def test_edges_are_part_of_a_structure() -> None:
    edges = np.array([[0, 1], [1, 0]])
    shifts = np.array([[0, 0, 0], [1, 0, -1]])
    structure = two_atoms(edge_index=edges, unit_shifts=shifts, cutoff=2.0)
    assert structure == two_atoms(edge_index=edges.copy(), unit_shifts=shifts.copy(), cutoff=2.0)
    assert structure != two_atoms(edge_index=edges[::-1], unit_shifts=shifts, cutoff=2.0)
    assert structure != two_atoms()
    assert structure.shifts is not None
    assert structure.shifts.tolist() == [[0, 0, 0], [2, 0, -4]]
    assert "edge_index" in repr(structure)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edge_index": np.zeros((3, 2), int)}, r"edge_index has shape \(3, 2\)"),
        ({"edge_index": np.zeros(2, int)}, r"edge_index has shape \(2,\)"),
        (
            {"edge_index": np.zeros((2, 4), int), "unit_shifts": np.zeros((3, 3), int)},
            r"unit_shifts has shape \(3, 3\) for 4 edges",
        ),
        ({"unit_shifts": np.zeros((3, 3), int)}, r"unit_shifts has shape \(3, 3\) for no edges"),
    ],
)
def test_edges_that_do_not_fit_together_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        two_atoms(**fields)
