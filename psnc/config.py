"""The settings of one process: which plugins, and how they behave."""

from __future__ import annotations

import logging
from typing import Literal

from attrs import frozen

__all__ = ["Config", "Durability"]

Durability = Literal["grouped", "index", "full"]


@frozen(kw_only=True)
class Config:
    """The settings that a driver and its workers share.

    Attributes
    ----------
    plugins : tuple of str
        As ``-p`` takes them: ``"NAME"`` loads an installed plugin or a module, ``"no:NAME"``
        keeps one out. Later entries win.
    strict_plugins : bool
        A hook that raises fails the run.
    log_level : int
        The lowest level of log entry that is captured.
    durability : {"grouped", "index", "full"}
        When a finished index reaches the database: with others within 50 ms, in a transaction
        of its own, or in one that also waits for the disk.
    """

    plugins: tuple[str, ...] = ()
    strict_plugins: bool = False
    log_level: int = logging.INFO
    durability: Durability = "grouped"
