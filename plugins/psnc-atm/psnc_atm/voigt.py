"""Stress as six Voigt components and as a matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["matrix_from_voigt", "voigt_from_matrix"]


def matrix_from_voigt(voigt: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn ``xx yy zz yz xz xy`` into the symmetric 3x3 matrix; a matrix is returned as it is."""
    if voigt.shape == (3, 3):
        return voigt
    if voigt.shape == (9,):
        return voigt.reshape(3, 3)
    if voigt.shape != (6,):
        raise ValueError(f"stress has shape {voigt.shape}; give 6 Voigt components or 3x3")
    return voigt[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)


def voigt_from_matrix(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn a 3x3 stress into ``xx yy zz yz xz xy``, averaging what ought to be symmetric."""
    symmetric = (matrix + matrix.T) / 2
    return symmetric.reshape(9)[[0, 4, 8, 5, 2, 1]]
