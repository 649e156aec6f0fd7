"""Inflate zlib streams, with ISA-L where it is installed.

The results are the same, and so are the errors: what ISA-L refuses is given to zlib, which says
what is wrong with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["inflate"]

_Inflate = Callable[[bytes | memoryview], bytes]


def _fastest() -> _Inflate:
    try:
        isal: Any = import_module("isal.isal_zlib")
    except ImportError:
        return zlib.decompress

    def inflate_with_isal(value: bytes | memoryview) -> bytes:
        try:
            content: bytes = isal.decompress(value)
        except isal.error:
            content = zlib.decompress(value)
        return content

    return inflate_with_isal


inflate: _Inflate = _fastest()
