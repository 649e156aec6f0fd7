"""Offer psnc's own stages by name, for pipeline files and listings."""

from __future__ import annotations

from collections.abc import Mapping

from psnc.hookspecs import hookimpl


@hookimpl
def psnc_sources() -> Mapping[str, str]:
    """Offer the source of files."""
    return {"files": "psnc.sources:FilesSource"}
