"""What this distribution offers to psnc: sources, filters, sinks, a command, and measurements.

The classes are named by strings, so that ``psnc`` can list them without importing zarr or ase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psnc import hookimpl

if TYPE_CHECKING:
    import click

    from psnc import IndexContext


@hookimpl
def psnc_sources() -> dict[str, str]:
    """Offer the sources by name."""
    return {
        "ase-db": "psnc_atm.ase_db_source:ASEDatabaseSource",
        "ase-files": "psnc_atm.ase_source:ASESource",
        "ase-lmdb": "psnc_atm.lmdb_source:ASELMDBSource",
        "unique-structures": "psnc_atm.deduplication:UniqueStructures",
    }


@hookimpl
def psnc_filters() -> dict[str, str]:
    """Offer the filters by name."""
    return {
        "atomic-info": "psnc_atm.info_filter:AtomicInfoFilter",
        "atomic-stats": "psnc_atm.stats_filter:AtomicStatsFilter",
        "convert-units": "psnc_atm.unit_conversion:ConvertUnits",
        "drop-duplicates": "psnc_atm.deduplication:DropDuplicates",
        "neighbour-list": "psnc_atm.neighbour_list:NeighbourList",
        "select-elements": "psnc_atm.selection:SelectElements",
        "select-energy": "psnc_atm.selection:SelectEnergy",
        "select-forces": "psnc_atm.selection:SelectForces",
        "select-size": "psnc_atm.selection:SelectSize",
    }


@hookimpl
def psnc_sinks() -> dict[str, str]:
    """Offer the sinks by name."""
    return {
        "aselmdb-files": "psnc_atm.aselmdb_sink:ASELMDBSink",
        "atomic-zarr": "psnc_atm.zarr_sink:AtomicDataZarrSink",
        "extxyz-files": "psnc_atm.extxyz_sink:ExtxyzSink",
        "structure-hashes": "psnc_atm.deduplication:StructureHashSink",
    }


@hookimpl
def psnc_add_commands(cli: click.Group) -> None:
    """Add ``psnc verify-store``."""
    from psnc_atm.verify_command import verify_store

    cli.add_command(verify_store)


@hookimpl
def psnc_index_measure(context: IndexContext) -> Mapping[str, int] | None:
    """Record what a source has counted of an index."""
    source: Any = context.run.pipeline.source
    if not hasattr(source, "index_measurements"):
        return None
    measurements: Mapping[str, int] | None = source.index_measurements(context.index)
    return measurements
