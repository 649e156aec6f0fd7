"""The settings of one process: which plugins, and how they behave."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from attrs import Factory, field, frozen

from psnc.errors import PluginError

__all__ = ["Config", "Durability"]

Durability = Literal["grouped", "index", "full"]


def _shown(store: str | None) -> str:
    """Return a store's URL for ``repr``, which logs and tracebacks may hold: no password."""
    from psnc.store import shown_url

    return repr(store if store is None else shown_url(store))


@frozen(kw_only=True)
class Config:
    """The settings that a driver and its workers share.

    Attributes
    ----------
    plugins : tuple of str
        As ``-p`` takes them: ``"NAME"`` loads an installed plugin or a module, ``"no:NAME"``
        keeps one out. Later entries win.
    local_plugins : tuple of str
        Absolute paths of plugin files that belong to a directory (``psnc_plugins.py``).
    load_installed : bool
        Load the plugins that installed distributions offer.
    strict_plugins : bool
        A hook that raises fails the run.
    log_level : int
        The lowest level of log entry that is captured.
    durability : {"grouped", "index", "full"}
        When a finished index reaches the database: with others within 50 ms, in a transaction
        of its own, or in one that also waits for the disk.
    recover : bool
        A damaged database that a run would record to is set aside and salvaged first.
    store : str, optional
        URL of the store for pipelines that name no place of their own.
    file : str, optional
        The configuration file that was read.
    file_options : mapping
        What the file says besides, for the plugins' own options.
    options : mapping, optional
        The values of the plugins' own options, by name; ``None`` until they are known.
    """

    plugins: tuple[str, ...] = ()
    local_plugins: tuple[str, ...] = ()
    load_installed: bool = True
    strict_plugins: bool = False
    log_level: int = logging.INFO
    durability: Durability = "grouped"
    recover: bool = False
    store: str | None = field(default=None, repr=_shown)
    file: str | None = None
    file_options: Mapping[str, Any] = Factory(dict)
    options: Mapping[str, Any] | None = None

    def option(self, name: str) -> Any:
        """Return the value of a plugin's option, which ``psnc_addoptions`` declared.

        Parameters
        ----------
        name : str
            As declared, with or without dashes: ``"--alert-channel"`` or ``"alert_channel"``.

        Raises
        ------
        PluginError
            If no loaded plugin declared it.
        """
        key = name.lstrip("-").replace("-", "_")
        options = self.options or {}
        if key not in options:
            known = ", ".join(sorted(options)) or "none"
            raise PluginError(f"no loaded plugin declares an option {name!r}: there are {known}")
        return options[key]
