"""What of a structure a file cannot hold: an error, or left out on request."""

from __future__ import annotations

from typing import Literal, NoReturn

from psnc.errors import StageError

__all__ = ["OnUnwritable", "Unwritable", "check_on_unwritable"]

OnUnwritable = Literal["fail", "drop"]


class Unwritable:
    """Meets what cannot be written of one structure."""

    def __init__(self, place: str, kind: str, on_unwritable: OnUnwritable) -> None:
        self._place = place
        self._kind = kind
        self._on_unwritable = on_unwritable

    def met(self, what: str) -> None:
        """Fail, or have it left out.

        Raises
        ------
        psnc.StageError
            If it is not to be dropped.
        """
        if self._on_unwritable == "fail":
            raise StageError(
                f"{self._place}: {what} cannot be held by {self._kind} and read back as it is; "
                "take it out in a filter, or leave such things out (on_unwritable='drop')"
            )

    def refuse(self, what: str) -> NoReturn:
        """Fail in any case: the rest would be another structure.

        Raises
        ------
        psnc.StageError
            Always.
        """
        raise StageError(
            f"{self._place}: {what} cannot be held by {self._kind}; drop the structure in a filter"
        )


def check_on_unwritable(value: str) -> None:
    """Refuse an unknown choice."""
    if value not in ("fail", "drop"):
        raise StageError(f"on_unwritable is {value!r}; give 'fail' or 'drop'")
