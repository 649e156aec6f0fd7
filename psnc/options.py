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

__all__ = ["OptionParser", "PluginOption", "require_known", "resolve_options"]

_TYPES = {
    str: 'text, as in "text"',
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: 'a path, as in "path"',
}
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
    def flags(self) -> tuple[str, ...]:
        """What the command line takes: of a ``bool`` also ``--no-…``, which makes it false."""
        return (self.flag, f"--no-{self.flag[2:]}") if self.type is bool else (self.flag,)

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
        given = _converted(given, self.type)
        if not _is_a(given, self.type):
            raise ConfigurationError(f"{where} is {given!r}: give {_TYPES[self.type]}")
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
            If the flag is no flag, the type is none of these, or the default and the choices are
            of another type or do not go together.
        """
        self._require(_is_flag(flag), f"the option {flag!r}", "write --words-with-dashes")
        known = ", ".join(map(_name, _TYPES))
        self._require(
            type in tuple(_TYPES), f"{flag} of type {_name(type)}", f"choose one of {known}"
        )
        self._require(
            not isinstance(choices, str), f"{flag} with the choices {choices!r}", "give a list"
        )
        allowed = tuple(_converted(each, type) for each in choices)
        if default is None:
            default = () if multiple else False if type is bool else None
        elif multiple and isinstance(default, (list, tuple)):
            default = tuple(_converted(each, type) for each in default)
        else:
            default = _converted(default, type)
        option = PluginOption(self.plugin, flag, type, default, help, allowed, multiple)
        self._check(option)
        self.options.append(option)

    def _check(self, option: PluginOption) -> None:
        flag, wanted = option.flag, f"give one of type {_name(option.type)}"
        for choice in option.choices:
            about = f"{flag} with the choice {choice!r}"
            self._require(_is_a(choice, option.type), about, wanted)
        if option.type is bool:
            about = f"{flag} of type bool with choices or multiple"
            self._require(not (option.choices or option.multiple), about, "a flag has neither")
        about = f"{flag} with the default {option.default!r}"
        if option.multiple:
            self._require(isinstance(option.default, tuple), about, "give a list")
        elif option.default is None:
            return
        for value in option.default if option.multiple else (option.default,):
            self._require(_is_a(value, option.type), about, wanted)
            is_allowed = not option.choices or value in option.choices
            self._require(is_allowed, about, "give one of the choices")

    def _require(self, condition: bool, declared: str, advice: str) -> None:
        if not condition:
            raise PluginError(f"plugin {self.plugin!r} declares {declared}: {advice}")


def resolve_options(
    declared: Sequence[PluginOption], config: Config, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return every option's value: as given, else as in the configuration file, else its default.

    Parameters
    ----------
    declared : sequence of PluginOption
        All options of the loaded plugins.
    config : Config
        Has what the configuration file says.
    given : mapping, optional
        Values from the command line, by name; ``None`` for one that was not given. No mapping at
        all where a pipeline's own plugins may not be loaded, as they are by ``psnc run``.

    Raises
    ------
    ConfigurationError
        If the file has a value of another type, or a key that no plugin can declare.
    """
    by_name = {option.name: option for option in declared}
    all_loaded = given is not None and not _some_plugin_is_kept_out(config)
    for name in sorted(set(config.file_options) - set(by_name)):
        _refuse_unknown(name, by_name, config, all_loaded=all_loaded)
    given = given or {}
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


def require_known(declared: Sequence[PluginOption], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a program gives for options, by their names and checked as a file's values are.

    Raises
    ------
    ConfigurationError
        If a name is no option's, or a value has another type.
    """
    by_name = {option.name: option for option in declared}
    values = {}
    for key, value in given.items():
        option = by_name.get(str(key).removeprefix("--").replace("-", "_"))
        if option is None:
            known = [each.replace("_", "-") for each in sorted(by_name)]
            close = difflib.get_close_matches(str(key).replace("_", "-"), known, n=1)
            there_are = f"there are {', '.join(known) or 'none'}"
            hint = f"did you mean {close[0]!r}?" if close else there_are
            raise ConfigurationError(f"no loaded plugin declares an option {key!r}: {hint}")
        if option.multiple and isinstance(value, tuple):
            value = list(value)
        values[option.name] = option.value_of(value, f"option {key!r}")
    return values


def _refuse_unknown(
    name: str, declared: Iterable[str], config: Config, *, all_loaded: bool
) -> None:
    from psnc.settings import SETTINGS

    known = [each.replace("_", "-") for each in (*SETTINGS, *sorted(declared))]
    key = name.replace("_", "-")
    close = difflib.get_close_matches(key, known, n=1)
    if isinstance(config.file_options[name], Mapping):
        hint = "write psnc's keys side by side, and no table among them"
    elif close:
        hint = f"did you mean {close[0]!r}?"
    elif not all_loaded:
        # It may well be that of a plugin which is kept out, or which lies beside a pipeline: nobody
        # need change the file for a command that does without it.
        return
    else:
        hint = f"the keys are {', '.join(known)}"
    raise ConfigurationError(f"{config.file}: unknown key {key!r}: {hint}")


def _some_plugin_is_kept_out(config: Config) -> bool:
    from psnc.manager import BUILT_IN_PLUGINS

    kept_out = {
        choice.removeprefix("no:")
        for number, choice in enumerate(config.plugins)
        if choice.startswith("no:") and choice.removeprefix("no:") not in config.plugins[number:]
    }
    return not config.load_installed or not kept_out <= set(BUILT_IN_PLUGINS)


def _converted(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    return value


def _is_flag(flag: Any) -> bool:
    return isinstance(flag, str) and _FLAG.fullmatch(flag) is not None


def _is_a(value: Any, kind: type) -> bool:
    """Tell whether a value is of a type; to Python a ``bool`` is an ``int`` as well."""
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _name(kind: type) -> str:
    return getattr(kind, "__name__", repr(kind))
