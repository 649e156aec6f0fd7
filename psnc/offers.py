"""What plugins offer by name: a stage or a backend, as a class or as a reference to one."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from attrs import frozen

from psnc.errors import PluginError
from psnc.plugin_loading import PluginOrigin

__all__ = ["Offer", "OfferKind", "check_reference", "load_object"]

OfferKind = Literal["source", "filter", "sink", "backend"]


@frozen
class Offer:
    """A stage or backend that a plugin offers by name."""

    name: str
    reference: type[Any] | str
    origin: PluginOrigin

    def load(self) -> type[Any]:
        """Return the class, imported now if it was only named.

        Raises
        ------
        PluginError
            If it cannot be imported.
        """
        if not isinstance(self.reference, str):
            return self.reference
        try:
            loaded: type[Any] = load_object(self.reference)
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(
                f"{self.name!r} of {self.origin.described} cannot be imported from "
                f"{self.reference!r} ({reason}): install what it needs, or mend the plugin"
            ) from error
        return loaded


def check_reference(hook: str, origin: PluginOrigin, name: Any, reference: Any) -> None:
    """Raise :class:`PluginError` unless a name refers to a class."""
    is_text = isinstance(reference, str) and all(reference.partition(":"))
    if not isinstance(name, str) or not (is_text or isinstance(reference, type)):
        raise PluginError(
            f"{origin.described}: {hook} names {name!r} {reference!r}: give a class, or its "
            'reference "module:Class"'
        )


def load_object(reference: str) -> Any:
    """Import what ``"module:name"`` refers to."""
    module, _, path = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found
