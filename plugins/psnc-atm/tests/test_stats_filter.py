"""Statistics of a dataset: what is in the table, and that it depends on the dataset alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy import stats
from structures import Nowhere, Structures, molecule, some_structures

from psnc import Pipeline, gather_pipeline, run_pipeline
from psnc.errors import ConfigurationError, StageError
from psnc.testing import check_filter
from psnc_atm import ASELMDBSource, AtomicData, AtomicInfoFilter, AtomicStatsFilter

COLUMNS = [
    *("field", "component", "count", "mean", "std", "var", "min", "max", "abs_mean", "abs_max"),
    *("skewness", "kurtosis", "nan_count", "inf_count"),
]


def table_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = parquet.read_table(path).to_pylist()
    assert len({(row["field"], row["component"]) for row in rows}) == len(rows)
    return {(row["field"], row["component"]): row for row in rows}


def written(structures: list[AtomicData], directory: Path, parts: int = 1, **options: Any) -> Path:
    """The table of structures divided into indices of about the same size."""
    shards = []
    for part, chosen in enumerate(np.array_split(np.arange(len(structures)), parts)):
        own = AtomicStatsFilter("unused", **options)
        assert list(own(structures[i] for i in chosen)) == [structures[i] for i in chosen]
        own.flush(directory / f"{part}.json")
        shards.append(directory / f"{part}.json")
    AtomicStatsFilter("unused", **options).merge(shards, directory / "table.parquet")
    return directory / "table.parquet"


def test_the_filter_keeps_the_rules(tmp_path: Path) -> None:
    source = Structures([3, 0, 4, 1])
    check_filter(AtomicStatsFilter(tmp_path / "stats.parquet"), source, lazy=True)
    check_filter(
        AtomicStatsFilter("stats.parquet", ["energy"], {"gap": "system", "site": "atom"}), source
    )


def test_each_component_of_each_field_has_a_row(tmp_path: Path) -> None:
    structures = some_structures(40)
    path = written(structures, tmp_path)
    assert parquet.read_table(path).column_names == COLUMNS
    table = table_of(path)
    forces = np.concatenate([one.forces for one in structures if one.forces is not None])
    cells = np.array([one.cell for one in structures])
    stresses = np.array([one.stress for one in structures if one.stress is not None])
    columns = {
        ("forces", "x"): forces[:, 0],
        ("forces", "z"): forces[:, 2],
        ("cell", "bz"): cells[:, 1, 2],
        ("stress", "xy"): stresses[:, 0, 1],
        ("pbc", "b"): np.array([one.pbc[1] for one in structures], dtype=float),
        ("energy", ""): np.array([one.energy for one in structures if one.energy is not None]),
        ("atomic_numbers", ""): np.concatenate([one.atomic_numbers for one in structures]),
    }
    for key, values in columns.items():
        row = table[key]
        assert row["count"] == len(values)
        assert row["nan_count"] == row["inf_count"] == 0
        expected = {
            "mean": values.mean(),
            "std": values.std(),
            "var": values.var(),
            "min": values.min(),
            "max": values.max(),
            "abs_mean": np.abs(values).mean(),
            "abs_max": np.abs(values).max(),
            "skewness": stats.skew(values),
            "kurtosis": stats.kurtosis(values),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-10), (key, name)
    fields = [field for field, _ in table]
    assert fields == sorted(fields, key=list(dict.fromkeys(fields)).index)
    assert fields[:4] == ["atomic_numbers", "positions", "positions", "positions"]
    assert "dipole" not in fields


def test_entries_of_info_and_a_choice_of_fields(tmp_path: Path) -> None:
    structures = some_structures(20)
    path = written(
        structures, tmp_path, fields=["energy"], custom={"site": "atom", "gap": "system"}
    )
    table = table_of(path)
    assert list(table) == [("energy", ""), ("gap", ""), ("site", "")]
    assert table["gap", ""]["count"] == 20
    assert table["site", ""]["count"] == sum(map(len, structures))


def test_arrays_of_any_shape_have_numbered_components(tmp_path: Path) -> None:
    structures = [molecule([1], info={"tensor": np.arange(4.0).reshape(2, 2)})]
    table = table_of(written(structures, tmp_path, fields=[], custom={"tensor": "system"}))
    assert [(key, row["mean"]) for key, row in table.items()] == [
        (("tensor", "0,0"), 0.0),
        (("tensor", "0,1"), 1.0),
        (("tensor", "1,0"), 2.0),
        (("tensor", "1,1"), 3.0),
    ]


def test_what_is_not_finite_is_counted_and_what_is_undefined_is_null(tmp_path: Path) -> None:
    structures = [molecule([1], energy=energy) for energy in (1.0, np.nan, np.inf, 1.0)]
    row = table_of(written(structures, tmp_path, fields=["energy"]))["energy", ""]
    assert (row["count"], row["nan_count"], row["inf_count"]) == (2, 1, 1)
    assert (row["mean"], row["std"], row["skewness"], row["kurtosis"]) == (1.0, 0.0, None, None)


def test_no_structures_give_an_empty_table(tmp_path: Path) -> None:
    assert table_of(written([], tmp_path)) == {}


@settings(max_examples=25)
@given(seed=st.integers(0, 99), parts=st.integers(1, 9), order=st.randoms(use_true_random=False))
def test_division_and_order_do_not_change_a_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parts: int, order: Any
) -> None:
    structures = some_structures(12, seed)
    whole = written(structures, tmp_path_factory.mktemp("whole"))
    order.shuffle(structures)
    divided = written(structures, tmp_path_factory.mktemp("divided"), parts)
    assert divided.read_bytes() == whole.read_bytes()


def test_more_atoms_than_are_added_at_once(tmp_path: Path) -> None:
    structures = [molecule([6] * 7000, seed=seed) for seed in range(10)]
    row = table_of(written(structures, tmp_path))["positions", "y"]
    assert row["count"] == 70_000
    everything = np.concatenate([one.positions[:, 1] for one in structures])
    assert row["std"] == pytest.approx(everything.std(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ["forxes"]}, "unknown field 'forxes'; choose from atomic_numbers, positions"),
        ({"custom": {"gap": "edge"}}, "unknown level 'edge'; choose from atom, system"),
        ({"custom": {"forces": "atom"}}, "custom: 'forces' is the name of a field"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AtomicStatsFilter("stats.parquet", **options)


@pytest.mark.parametrize(
    ("value", "level", "message"),
    [
        ("large", "system", r"structure 0 \(CH\): 'gap' in info is a str, not a number"),
        (np.ones(3), "atom", r"structure 0 \(CH\): 'gap' in info has shape \(3,\) for 2 atoms"),
    ],
)
def test_info_that_is_no_number_names_the_structure(value: Any, level: Any, message: str) -> None:
    structure = molecule([6, 1], info={"gap": value})
    with pytest.raises(StageError, match=message):
        list(AtomicStatsFilter("stats.parquet", custom={"gap": level})(iter([structure])))


def test_items_that_are_no_structures_are_refused() -> None:
    with pytest.raises(StageError, match="AtomicStatsFilter was given a str, not AtomicData"):
        list(AtomicStatsFilter("stats.parquet")(iter(["H2O"])))  # type: ignore[list-item]


# --- in a pipeline ----------------------------------------------------------------------------


def pipeline(dataset: Path, output: Path, rows: int = 3, **options: Any) -> Pipeline[Any]:
    return Pipeline(
        source=ASELMDBSource(dataset, rows_per_index=rows),
        filters=[
            AtomicStatsFilter(output / "stats.parquet", custom={"gap": "system"}),
            AtomicInfoFilter(output / "info.json"),
        ],
        sink=Nowhere(),
        **options,
    )


def gathered(made: Pipeline[Any]) -> list[bytes]:
    return [Path(path).read_bytes() for path in gather_pipeline(made)]


def test_a_run_and_a_gather(dataset: Path, tmp_path: Path) -> None:
    made = pipeline(dataset, tmp_path / "one")
    run_pipeline(made, progress=False)
    files = gathered(made)
    table = table_of(tmp_path / "one" / "stats.parquet")
    assert table["energy", ""]["count"] == 200
    assert table["gap", ""]["max"] == 1.0
    for rows, jobs in ((200, 1), (7, 2)):
        other = pipeline(dataset, tmp_path / f"rows{rows}", rows)
        run_pipeline(other, n_jobs=jobs, progress=False)
        assert gathered(other) == files


def test_killed_and_resumed_the_table_is_the_same(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "molecules", files=3, rows=60)
    clean = pipeline(dataset, tmp_path / "clean")
    run_pipeline(clean, progress=False)
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from psnc import run_pipeline
from test_stats_filter import pipeline
made = pipeline(Path({str(dataset)!r}), Path({str(tmp_path / "killed")!r}), resume=True,
                db_dir=Path({str(tmp_path / "db")!r}))
run_pipeline(made, n_jobs=2, progress=False)
"""
    (tmp_path / "script.py").write_text(script)
    shards = tmp_path / "db"
    for share in (1, 20):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")], start_new_session=True
        )
        while len(list(shards.rglob("*.json"))) < share and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = pipeline(dataset, tmp_path / "killed", resume=True, db_dir=tmp_path / "db")
    run_pipeline(resumed, n_jobs=2, progress=False)
    assert resumed.remaining_indices() == []
    assert gathered(resumed) == gathered(clean)
