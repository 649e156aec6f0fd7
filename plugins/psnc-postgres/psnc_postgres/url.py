"""Read the URL of a store: libpq's own, and ``schema=NAME`` besides."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from attrs import field, frozen
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from psnc import StoreError
from psnc.store import shown_url

__all__ = ["Place", "parse_url"]

DEFAULT_SCHEMA = "psnc"

# What needs no thought in any client. PostgreSQL keeps names that begin with pg_ for itself.
_SCHEMA_NAME = re.compile(r"(?!pg_)[A-Za-z_][A-Za-z0-9_]{0,62}")
_PORTS = re.compile(r"[0-9,]*")


@frozen
class Place:
    """Where a store's tables are.

    Attributes
    ----------
    shown : str
        The URL for people to read, without the password.
    schema : str
        The schema that the tables are in.
    parameters : dict
        What libpq is told to connect; with the password.
    """

    shown: str
    schema: str
    parameters: dict[str, Any] = field(repr=False)


def parse_url(url: str) -> Place:
    """Take a store's URL apart.

    Raises
    ------
    StoreError
        If it cannot be read, or names a schema that cannot be one.
    """
    base, _, query = url.partition("?")
    schema = DEFAULT_SCHEMA
    others = []
    for parameter in filter(None, query.split("&")):
        name, _, value = parameter.partition("=")
        if name == "schema":
            schema = unquote(value)
        else:
            others.append(parameter)
    shown = shown_url(url)
    if not _SCHEMA_NAME.fullmatch(schema) or schema == "information_schema":
        raise StoreError(
            f"{shown}: schema={schema!r} is no name for a schema: use up to 63 letters, digits and "
            "underscores, not beginning with pg_"
        )
    parameters = _parameters("?".join([base, "&".join(others)]) if others else base)
    if parameters is None:
        raise StoreError(
            f"{shown} cannot be read as postgresql://user@host:port/database?option=value: escape "
            "special characters as in %40 for @, and keep the password in ~/.pgpass or PGPASSWORD"
        )
    return Place(shown, schema, parameters)


def _parameters(url: str) -> dict[str, Any] | None:
    """Have libpq read a URL; ``None``, and not its words, if it cannot: they may quote a password.

    Where a password was not escaped, a part of it can end up as the host or the port.
    """
    try:
        parameters = conninfo_to_dict(url)
    except ProgrammingError:
        return None
    if "@" in str(parameters.get("host", "")) or not _PORTS.fullmatch(
        str(parameters.get("port", ""))
    ):
        return None
    return parameters
