"""The stages keep the rules that every source and sink must."""

from __future__ import annotations

from pathlib import Path

import pytest
from data import crystals, write_database, write_dataset

from psnc.testing import check_sink, check_source
from psnc_atm import ASELMDBSource, AtomicDataZarrSink


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """Three files of five molecules."""
    return write_dataset(tmp_path / "molecules", files=3, rows=5)


def test_the_source_keeps_the_rules(small_dataset: Path) -> None:
    write_database(small_dataset / "zz-crystals.aselmdb", crystals(3))
    check_source(ASELMDBSource(small_dataset))
    check_source(ASELMDBSource(str(small_dataset), rows_per_index=2))


def test_the_sink_keeps_the_rules(small_dataset: Path) -> None:
    source = ASELMDBSource(small_dataset, rows_per_index=2)
    check_sink(lambda directory: AtomicDataZarrSink(directory / "molecules.zarr"), source)


def test_the_sink_keeps_the_rules_where_indices_share_chunks(small_dataset: Path) -> None:
    check_sink(
        lambda directory: AtomicDataZarrSink(
            str(directory / "molecules.zarr"), atoms_per_chunk=7, systems_per_chunk=4
        ),
        ASELMDBSource(small_dataset),
    )
