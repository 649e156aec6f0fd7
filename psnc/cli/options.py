"""Options that several commands share."""

from __future__ import annotations

import click

__all__ = ["debug_option"]

# `main` looks for it itself, since an error may come before or after a command has its options.
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
