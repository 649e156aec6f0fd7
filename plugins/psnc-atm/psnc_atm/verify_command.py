"""The command ``psnc verify-store``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

__all__ = ["verify_store"]


@click.command("verify-store")
@click.argument("target", metavar="PIPELINE")
@click.option("--store", metavar="DIRECTORY", help="The store, if it is not where the sink writes.")
@click.option("--indices", metavar="RANGES", help="Only these, such as 0-99,200.")
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Only N indices, evenly spread."
)
@click.option(
    "--at-most",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Differences to describe.",
)
def verify_store(
    target: str, store: str | None, indices: str | None, sample: int | None, at_most: int
) -> None:
    """Compare a Zarr store with what its pipeline gives, bit by bit.

    PIPELINE is given as to psnc run. Nothing is run and nothing written: each index is read again
    and filtered, and compared with what is in the store. The exit code is 1 if something differs.
    """
    # Here, since psnc --help is to list the command without importing zarr.
    from psnc.loading import load_pipeline
    from psnc_atm.store_verification import verify_store as verify

    if indices is not None and sample is not None:
        raise click.UsageError("give --indices or --sample, not both")
    pipeline = load_pipeline(target)
    chosen = _chosen(len(pipeline.source), indices, sample)
    with click.progressbar(
        chosen, label="indices", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as shown:
        report = verify(pipeline, store, indices=shown, at_most=at_most)
    click.echo(report)
    if not report:
        sys.exit(1)


def _chosen(total: int, indices: str | None, sample: int | None) -> Sequence[int]:
    from psnc.index_ranges import ranges_in

    if sample is not None:
        some = min(sample, total)
        return [position * total // some for position in range(some)]
    if indices is None:
        return range(total)
    try:
        return [index for some in ranges_in(indices) for index in some]
    except ValueError as error:
        raise click.BadParameter(
            f"{indices!r} is no list of indices: write 0-99,200", param_hint="--indices"
        ) from error
