"""What this distribution offers to psnc: the store for ``postgresql://`` and ``postgres://``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psnc import Config, hookimpl

if TYPE_CHECKING:
    from psnc.run import Run
    from psnc.store import CheckpointStore

_SCHEMES = ("postgresql://", "postgres://")


@hookimpl
def psnc_open_store(url: str, run: Run | None, create: bool) -> CheckpointStore | None:
    """Open the tables on a PostgreSQL server."""
    if not url.startswith(_SCHEMES):
        return None
    # Not before: whoever records elsewhere should not pay for a database driver.
    from psnc_postgres.store import PostgresStore

    config = run.plugins.config if run is not None else Config()
    return PostgresStore(url, create=create, durability=config.durability)
