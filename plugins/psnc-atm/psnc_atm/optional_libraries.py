"""Libraries that one filter needs and others do not."""

from __future__ import annotations

from importlib.util import find_spec

from psnc.errors import ConfigurationError

__all__ = ["require_library"]


def require_library(library: str, stage: str, *, extra: str) -> None:
    """Say at once, and not after days of work, that a library is not installed.

    It is not imported.

    Raises
    ------
    psnc.ConfigurationError
        If there is no such library.
    """
    if not _is_there(library):
        raise ConfigurationError(
            f"{stage} needs {library}, which is not installed: pip install 'psnc-atm[{extra}]'"
        )


def _is_there(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:
        return False  # a program has said that it must not be imported
