"""``psnc check``, ``psnc recover`` and ``psnc merge``: what there is for SQLite files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from psnc.cli.options import debug_option
from psnc.errors import StoreError
from psnc.store import shown_url

__all__ = ["COMMANDS"]

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("database", metavar="DB")
@_json_option
@debug_option
def check(database: str, as_json: bool) -> None:
    """Look whether a database is sound, and change nothing.

    Exit code 1 if anything is wrong with it.
    """
    import attrs

    from psnc.builtin.checkpoint.check import check as look_for_damage

    findings = look_for_damage(_sqlite_file(database))
    if as_json:
        click.echo(json.dumps([attrs.asdict(each) for each in findings], indent=1))
    else:
        for each in findings:
            click.echo(f"{each.kind}: {each.message}")
        if not findings:
            click.echo(f"{database} is sound")
    sys.exit(1 if findings else 0)


def _sqlite_file(database: str) -> Path:
    """Return the path of a database, and refuse the URL of another store."""
    if "://" in database:
        raise StoreError(f"{shown_url(database)} is no SQLite file: this command is for those only")
    return Path(database)


COMMANDS = (check,)
