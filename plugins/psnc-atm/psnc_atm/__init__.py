"""Atomic data for psnc: files and databases of ASE in, one consolidated Zarr store out.

The names below are imported when they are first used, so that listing a plugin's stages, or
reading rows without ever writing a store, does not pay for ase, lmdb and zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psnc_atm.ase_db_source import ASEDatabaseSource
    from psnc_atm.ase_source import ASESource
    from psnc_atm.aselmdb_sink import ASELMDBSink
    from psnc_atm.atomic_data import AtomicData
    from psnc_atm.atomic_dataset import AtomicDataset, open_dataset
    from psnc_atm.deduplication import DropDuplicates, StructureHashSink, UniqueStructures
    from psnc_atm.extxyz_sink import ExtxyzSink
    from psnc_atm.info_filter import AtomicInfoFilter
    from psnc_atm.lmdb_source import ASELMDBSource
    from psnc_atm.neighbour_list import NeighbourList
    from psnc_atm.selection import SelectElements, SelectEnergy, SelectForces, SelectSize
    from psnc_atm.stats_filter import AtomicStatsFilter
    from psnc_atm.store_verification import StoreReport, verify_store
    from psnc_atm.unit_conversion import ConvertUnits
    from psnc_atm.zarr_sink import AtomicDataZarrSink

__all__ = [
    "ASEDatabaseSource",
    "ASELMDBSink",
    "ASELMDBSource",
    "ASESource",
    "AtomicData",
    "AtomicDataZarrSink",
    "AtomicDataset",
    "AtomicInfoFilter",
    "AtomicStatsFilter",
    "ConvertUnits",
    "DropDuplicates",
    "ExtxyzSink",
    "NeighbourList",
    "SelectElements",
    "SelectEnergy",
    "SelectForces",
    "SelectSize",
    "StoreReport",
    "StructureHashSink",
    "UniqueStructures",
    "open_dataset",
    "verify_store",
]

_HOMES = {
    "ASEDatabaseSource": "psnc_atm.ase_db_source",
    "ASELMDBSink": "psnc_atm.aselmdb_sink",
    "ASELMDBSource": "psnc_atm.lmdb_source",
    "ASESource": "psnc_atm.ase_source",
    "AtomicData": "psnc_atm.atomic_data",
    "AtomicDataZarrSink": "psnc_atm.zarr_sink",
    "AtomicDataset": "psnc_atm.atomic_dataset",
    "AtomicInfoFilter": "psnc_atm.info_filter",
    "AtomicStatsFilter": "psnc_atm.stats_filter",
    "ConvertUnits": "psnc_atm.unit_conversion",
    "DropDuplicates": "psnc_atm.deduplication",
    "ExtxyzSink": "psnc_atm.extxyz_sink",
    "NeighbourList": "psnc_atm.neighbour_list",
    "SelectElements": "psnc_atm.selection",
    "SelectEnergy": "psnc_atm.selection",
    "SelectForces": "psnc_atm.selection",
    "SelectSize": "psnc_atm.selection",
    "StoreReport": "psnc_atm.store_verification",
    "StructureHashSink": "psnc_atm.deduplication",
    "UniqueStructures": "psnc_atm.deduplication",
    "open_dataset": "psnc_atm.atomic_dataset",
    "verify_store": "psnc_atm.store_verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
