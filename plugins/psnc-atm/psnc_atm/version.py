"""The version of this distribution, which stores name as their writer."""

from __future__ import annotations

__all__ = ["VERSION"]

VERSION = "0.1.0"
