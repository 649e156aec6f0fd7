"""``psnc check``, ``psnc recover`` and ``psnc merge``: what there is for SQLite files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import click

from psnc.cli.options import debug_option
from psnc.errors import StoreError

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


@click.command()
@click.argument("database", metavar="DB")
@click.option(
    "-o", "--output", metavar="NEW.db", help="The new file.  [default: DB with .recovered]"
)
@_json_option
@debug_option
def recover(database: str, output: str | None, as_json: bool) -> None:
    """Salvage what is whole into a new file, and leave the database as it is.

    What does not come across runs again.
    """
    import attrs

    from psnc.builtin.checkpoint.recover import recover as salvage

    path = _sqlite_file(database)
    new = _sqlite_file(output) if output else path.with_suffix(f".recovered{path.suffix}")
    found = salvage(path, new)
    if as_json:
        click.echo(json.dumps({"output": str(new), **attrs.asdict(found)}, indent=1))
        return
    click.echo(found.line)
    for table, kept in found.kept.items():
        dropped = found.dropped[table]
        click.echo(f"  {table}: {kept} rows" + (f", {dropped} left behind" if dropped else ""))
    for reason, count in found.reasons.items():
        click.echo(f"  left behind: {count} indices {reason}")
    if found.unknown_pages:
        click.echo(f"  left alone: {found.unknown_pages} pages whose rows may have been deleted")
    click.echo(f"database {new}")


@click.command()
@click.argument("databases", metavar="A.db B.db …", nargs=-1, required=True)
@click.option("-o", "--output", metavar="ALL.db", required=True, help="The new file.")
@click.option(
    "--prefer",
    type=click.Choice(["first", "last"]),
    help="Of which database, if one index was completed with different outputs.",
)
@_json_option
@debug_option
def merge(
    databases: tuple[str, ...],
    output: str,
    prefer: Literal["first", "last"] | None,
    as_json: bool,
) -> None:
    """Merge the databases of shards into a new one, and change none of them."""
    import attrs

    from psnc.builtin.checkpoint.merge import merge as merge_files

    paths = [_sqlite_file(each) for each in databases]
    merged = merge_files(paths, _sqlite_file(output), prefer)
    if as_json:
        click.echo(json.dumps({"output": output, **attrs.asdict(merged)}, indent=1))
        return
    click.echo(merged.line)
    click.echo(f"database {output}")


def _sqlite_file(database: str) -> Path:
    """Return the path of a database, and refuse the URL of another store."""
    from psnc.store import shown_url

    if "://" in database:
        raise StoreError(f"{shown_url(database)} is no SQLite file: this command is for those only")
    return Path(database)


COMMANDS = (check, merge, recover)
