"""The options that plugins add to ``psnc run`` and to the configuration file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from psnc.config import Config
from psnc.errors import ConfigurationError, PluginError

__all__ = ["OptionParser", "PluginOption", "resolve_options"]

_TYPES = (str, int, float, bool, Path)
_FLAG = re.compile(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*")


@frozen
class PluginOption:
    """One option that a plugin declared.

    Attributes
    ----------
    plugin : str
        The plugin's name.
    flag : str
        As on the command line: ``--alert-channel``.
    type : type
        ``str``, ``int``, ``float``, ``bool`` or ``pathlib.Path``. A ``bool`` takes no value.
    default : Any
        The value where nobody gives one.
    help : str
        One sentence.
    choices : tuple
        The values allowed; empty for all.
    multiple : bool
        Whether it can be given several times; the value is then a tuple.
    """

    plugin: str
    flag: str
    type: type = str
    default: Any = None
    help: str = ""
    choices: tuple[Any, ...] = field(default=(), converter=tuple)
    multiple: bool = False

    @property
    def name(self) -> str:
        """The option's name for :meth:`psnc.Config.option`: ``alert_channel``."""
        return self.flag[2:].replace("-", "_")

    def value_of(self, given: Any, where: str) -> Any:
        """Check a value from a configuration file and return it as the option's type.

        Raises
        ------
        ConfigurationError
            If it has another type, or is none of the choices.
        """
        if not self.multiple:
            return self._one(given, where)
        if not isinstance(given, list):
            raise ConfigurationError(f"{where} is {given!r}: give a list")
        return tuple(self._one(each, where) for each in given)

    def _one(self, given: Any, where: str) -> Any:
        if self.type is float and type(given) is int:
            given = float(given)
        if self.type is Path and isinstance(given, str):
            given = Path(given)
        if not isinstance(given, self.type) or (type(given) is bool) != (self.type is bool):
            wanted = "true or false" if self.type is bool else f"a value of type {_name(self.type)}"
            raise ConfigurationError(f"{where} is {given!r}: give {wanted}")
        if self.choices and given not in self.choices:
            raise ConfigurationError(
                f"{where} is {given!r}: choose one of {', '.join(map(str, self.choices))}"
            )
        return given


class OptionParser:
    """What ``psnc_addoptions`` is given: it collects one plugin's options.

    Examples
    --------
    >>> parser = OptionParser("alerts")
    >>> parser.add_option("--alert-channel", default="#runs", help="Where alerts go.")
    >>> parser.options[0].name
    'alert_channel'
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.options: list[PluginOption] = []

    def add_option(
        self,
        flag: str,
        *,
        type: type = str,
        default: Any = None,
        help: str = "",
        choices: Iterable[Any] = (),
        multiple: bool = False,
    ) -> None:
        """Declare an option of ``psnc run`` and a key of the configuration file.

        Parameters
        ----------
        flag : str
            ``--name-of-option``: lower case, words parted by dashes. The configuration file's key
            is the same without the leading dashes.
        type : type
            ``str``, ``int``, ``float``, ``bool`` or ``pathlib.Path``. A ``bool`` is a flag that
            takes no value.
        default : Any
            The value where nobody gives one; ``False`` for a flag, ``()`` with ``multiple``.
        help : str
            One sentence.
        choices : iterable
            The values allowed; all by default.
        multiple : bool
            Whether it can be given several times.

        Raises
        ------
        PluginError
            If the flag is no flag, or the type is none of these.
        """
        if not _FLAG.fullmatch(flag):
            raise PluginError(
                f"plugin {self.plugin!r} declares the option {flag!r}: write --words-with-dashes"
            )
        if type not in _TYPES:
            known = ", ".join(map(_name, _TYPES))
            raise PluginError(
                f"plugin {self.plugin!r} declares {flag} of type {_name(type)}: choose one of "
                f"{known}"
            )
        if default is None:
            default = () if multiple else False if type is bool else None
        self.options.append(
            PluginOption(self.plugin, flag, type, default, help, tuple(choices), multiple)
        )


def resolve_options(
    declared: Sequence[PluginOption], config: Config, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every option's value: as given, else as in the configuration file, else its default.

    Parameters
    ----------
    declared : sequence of PluginOption
        All options of the loaded plugins.
    config : Config
        Has what the configuration file says.
    given : mapping
        Values from the command line, by name; ``None`` for one that was not given.

    Raises
    ------
    ConfigurationError
        If the file has a key that no plugin declares, or a value of another type.
    """
    by_name = {option.name: option for option in declared}
    unknown = sorted(set(config.file_options) - set(by_name))
    if unknown:
        raise _unknown_key(unknown[0], by_name, config)
    values = {}
    for name, option in by_name.items():
        if given.get(name) is not None:
            values[name] = given[name]
        elif name in config.file_options:
            where = f"{config.file}: {option.flag[2:]}"
            values[name] = option.value_of(config.file_options[name], where)
        else:
            values[name] = option.default
    return values


def _unknown_key(name: str, declared: Iterable[str], config: Config) -> ConfigurationError:
    from psnc.settings import SETTINGS

    known = [each.replace("_", "-") for each in (*SETTINGS, *sorted(declared))]
    key = name.replace("_", "-")
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
    return ConfigurationError(f"{config.file}: unknown key {key!r}: {hint}")


def _name(kind: type) -> str:
    return getattr(kind, "__name__", repr(kind))
