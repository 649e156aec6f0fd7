"""What this distribution offers to psnc: one source and one sink.

The classes are named by strings, so that ``psnc`` can list them without importing zarr or ase.
"""

from __future__ import annotations

from psnc import hookimpl


@hookimpl
def psnc_sources() -> dict[str, str]:
    """Offer the sources by name."""
    return {"ase-lmdb": "psnc_atm.lmdb_source:ASELMDBSource"}


@hookimpl
def psnc_sinks() -> dict[str, str]:
    """Offer the sinks by name."""
    return {"atomic-zarr": "psnc_atm.zarr_sink:AtomicDataZarrSink"}
