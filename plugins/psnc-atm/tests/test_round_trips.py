"""Whatever is in a structure: a sink writes it so that it comes back, or refuses it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from psnc import StageError
from psnc_atm import ASELMDBSink, ASELMDBSource, ASESource, AtomicData, ExtxyzSink
from psnc_atm.atomic_data import same_values

WAYS = {"aselmdb": (ASELMDBSink, ASELMDBSource), "extxyz": (ExtxyzSink, ASESource)}
every_way = pytest.mark.parametrize("way", WAYS)

floats = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(max_size=8) | st.sampled_from(
    [
        "T",
        "F",
        "true",
        "nan",
        "1e5",
        "0x1",
        "1_0",
        "[1]",
        "{}",
        "a=b",
        '"',
        "'",
        "\\",
        "_JSON ",
        "[]",
    ]
)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
some_arrays = st.sampled_from(["f8", "f4", "i8", "i4", "u8", "?", "c16"]).flatmap(
    lambda dtype: arrays.arrays(dtype, shapes)
)
scalars = st.none() | st.booleans() | st.integers() | floats | texts
values = st.recursive(
    scalars | some_arrays,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True) | texts
structures = st.integers(0, 4).flatmap(
    lambda n: st.builds(
        AtomicData,
        atomic_numbers=arrays.arrays(np.int64, n, elements=st.integers(0, 118)),
        positions=arrays.arrays(np.float64, (n, 3)),
        cell=arrays.arrays(np.float64, (3, 3)),
        pbc=arrays.arrays(np.bool_, 3),
        energy=st.none() | floats,
        spin=st.none() | floats,
        forces=st.none() | arrays.arrays(np.float64, (n, 3)),
        stress=st.none() | arrays.arrays(np.float64, (3, 3)),
        tags=st.none() | arrays.arrays(np.int64, n),
        magmoms=st.none() | arrays.arrays(np.float64, n) | arrays.arrays(np.float64, (n, 3)),
        velocities=st.none() | arrays.arrays(np.float64, (n, 3)),
    )
)


def there_and_back(way: str, structure: AtomicData, **options: Any) -> AtomicData:
    sink, source = WAYS[way]
    with tempfile.TemporaryDirectory() as directory:
        (read,) = source(sink(Path(directory), **options)(iter([structure]), 0))[0]
    return read


@every_way
@given(info=st.dictionaries(names, values, max_size=3))
def test_info_comes_back_or_is_refused(way: str, info: dict[str, Any]) -> None:
    structure = AtomicData(
        atomic_numbers=np.array([1, 8]), positions=np.eye(3)[:2], info=dict(info)
    )
    read = there_and_back(way, structure, on_unwritable="drop")
    number_fields = {name for name in ("charge", "spin") if getattr(read, name) is not None}
    assert number_fields <= {n for n in info if isinstance(info[n], int | float)}
    for name, value in read.info.items():
        same = same_values(value, info[name])
        if not same and isinstance(info[name], list):
            same = way == "extxyz" and same_values(value, np.array(info[name]))
        assert same or (np.ndim(value) == 0 and np.array_equal(value, info[name])), name
    if read.info.keys() == info.keys() - number_fields:
        assert there_and_back(way, structure) == read
    else:
        with pytest.raises(StageError, match=r"\A[^\n]*cannot be held[^\n]*\Z"):
            there_and_back(way, structure)


def is_beyond_extxyz(structure: AtomicData) -> bool:
    tags, stress = structure.tags, structure.stress
    return (
        structure.velocities is not None
        or (tags is not None and bool(((tags < -(2**31)) | (tags >= 2**31)).any()))
        or (stress is not None and not np.array_equal(stress, stress.T, equal_nan=True))
    )


@every_way
@given(structure=structures)
def test_fields_come_back_or_are_refused(way: str, structure: AtomicData) -> None:
    if way == "extxyz" and is_beyond_extxyz(structure):
        with pytest.raises(StageError, match="cannot be held"):
            there_and_back(way, structure)
        return
    read = there_and_back(way, structure)
    assert read == structure
    assert (
        read.positions.tobytes() == structure.positions.tobytes()
        or np.isnan(structure.positions).any()
    )
