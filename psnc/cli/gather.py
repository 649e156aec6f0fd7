"""``psnc gather``: put together what the filters and the sink of a recorded pipeline kept."""

from __future__ import annotations

import click

from psnc.cli.options import (
    debug_option,
    group_plugins,
    load_manager,
    pipeline_directories,
    plugin_option,
)
from psnc.cli.places import at_place, recorded, refuse_several_places
from psnc.gather import Gathered
from psnc.gather import gather as gather_files
from psnc.loading import load_pipeline
from psnc.manager import install

__all__ = ["gather", "say_gathered"]


@click.command()
@click.argument("target", metavar="MODULE:NAME|FILE.py:NAME|FILE.toml")
@click.option("--db-dir", type=click.Path(file_okay=False), help="Directory of the database.")
@click.option("--db-file", type=click.Path(dir_okay=False), help="The database.")
@click.option("--store", metavar="URL", help="The store, such as postgresql://host/db.")
@plugin_option
@debug_option
@click.pass_context
def gather(
    context: click.Context,
    /,
    target: str,
    db_dir: str | None,
    db_file: str | None,
    store: str | None,
    plugins: tuple[str, ...],
) -> None:
    """Put together what filters added up and the sink kept in a pipeline's completed indices."""
    chosen = (*group_plugins(context), *plugins)
    manager = load_manager(chosen, pipeline_directories([target]))
    manager.configure()
    install(manager)
    refuse_several_places(db_dir=db_dir, db_file=db_file, store=store)
    pipeline = recorded(at_place(load_pipeline(target), db_file, store), db_dir, "psnc gather")
    if pipeline.gathers:
        say_gathered(gather_files(pipeline))
    else:
        click.echo("nothing to gather: no stage of this pipeline keeps anything for it")


def say_gathered(gathered: Gathered) -> None:
    """Print which files were written, and of how many indices."""
    for path in gathered.files:
        click.echo(f"gathered {path} of {gathered.completed} of {gathered.total} indices")
    if not gathered.completed:
        click.echo("nothing to gather: no index is completed")
    elif not gathered.files:
        click.echo("nothing to gather: the stages kept nothing")
