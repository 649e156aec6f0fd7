"""Where a process's settings come from: a configuration file and the environment."""

from __future__ import annotations

import logging
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from psnc.config import Config, Durability
from psnc.errors import ConfigurationError

__all__ = [
    "LOCAL_PLUGINS",
    "SETTINGS",
    "default_config",
    "plugins_of_environment",
    "plugins_of_file",
    "read_config",
    "working_directory",
]

LOCAL_PLUGINS = "psnc_plugins.py"

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def default_config() -> Config:
    """Return the settings of a process that was told nothing else.

    Those of the environment and the configuration file, with the plugin file beside the program
    that runs.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    beside = [Path(program).absolute().parent] if program else []
    return read_config(beside=[*beside, working_directory()])


def read_config(*, plugins: Iterable[str] = (), beside: Iterable[Path] = ()) -> Config:
    """Put the settings together: the configuration file's, the environment's, then those given.

    Parameters
    ----------
    plugins : iterable of str
        As ``-p`` takes them.
    beside : iterable of Path
        Directories whose plugin file is loaded, if they have one.

    Raises
    ------
    ConfigurationError
        If the configuration file cannot be read, or says something that means nothing, or if what
        is given names no plugin.
    """
    file, table = _read_file(working_directory())
    settings = {key: table[key] for key in SETTINGS if key in table}
    for key, value in settings.items():
        settings[key] = SETTINGS[key](value, f"{file}: {key.replace('_', '-')}")
    given = tuple(_choice(each, "-p") for each in plugins)
    named = (*settings.pop("plugins", ()), *plugins_of_environment(), *given)
    store = settings.pop("store", None)
    return Config(
        plugins=named,
        local_plugins=tuple(_local_plugins(beside)),
        load_installed=os.environ.get("PSNC_DISABLE_INSTALLED_PLUGINS", "") in ("", "0"),
        store=os.environ.get("PSNC_STORE", "").strip() or store,
        file=None if file is None else str(file),
        file_options={key: value for key, value in table.items() if key not in SETTINGS},
        **settings,
    )


def working_directory() -> Path:
    """Return the working directory.

    Raises
    ------
    ConfigurationError
        If somebody has removed it.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ConfigurationError(
            "the working directory is not there any more: go to one that is (cd)"
        ) from error


def plugins_of_environment() -> tuple[str, ...]:
    """Return what ``PSNC_PLUGINS`` names.

    Raises
    ------
    ConfigurationError
        If an entry names no plugin.
    """
    names = os.environ.get("PSNC_PLUGINS", "").split(",")
    return tuple(_choice(name.strip(), "PSNC_PLUGINS") for name in names if name.strip())


def plugins_of_file(path: str) -> tuple[str, ...]:
    """Return what a configuration file names.

    Raises
    ------
    ConfigurationError
        If the file cannot be read, or an entry names no plugin.
    """
    file = Path(path)
    table = _parse(file)
    own = table if file.name == "psnc.toml" else table["tool"]["psnc"]
    return _plugin_names(own.get("plugins", []), f"{path}: plugins")


def _local_plugins(beside: Iterable[Path]) -> list[str]:
    # By where they really are: a file that is reached in two ways is loaded once.
    found: dict[str, str] = {}
    for directory in beside:
        path = directory.absolute() / LOCAL_PLUGINS
        if os.path.isfile(path):
            real = os.path.realpath(path)
            found.setdefault(real, real if ".." in path.parts else str(path))
    return list(found.values())


def _read_file(start: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the nearest configuration file at or above a directory, and its table."""
    for directory in (start, *start.parents):
        own = directory / "psnc.toml"
        # A link that leads nowhere too: somebody means it to be read.
        if os.path.lexists(own):
            return own, _normalised(_parse(own), own)
        shared = directory / "pyproject.toml"
        # Not Path.is_file, which raises where the directory may not be looked into.
        if os.path.isfile(shared):
            tools = _parse(shared).get("tool")
            if isinstance(tools, dict) and "psnc" in tools:
                return shared, _normalised(tools["psnc"], shared)
    return None, {}


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}): mend it, or move it away"
        ) from error


def _normalised(table: Any, path: Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigurationError(f"{path}: tool.psnc is no table: write [tool.psnc]")
    normal: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in normal:
            raise ConfigurationError(
                f"{path}: {key!r} is there twice, with - and with _: remove one"
            )
        normal[name] = value
    return normal


# --- the file's keys --------------------------------------------------------------------------


def _plugin_names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigurationError(f'{where} is {value!r}: give a list such as ["NAME", "no:NAME"]')
    return tuple(_choice(each, where) for each in value)


def _choice(value: str, where: str) -> str:
    name = value.removeprefix("no:")
    if not name or name != name.strip():
        raise ConfigurationError(f"{where}: {value!r} names no plugin: write NAME or no:NAME")
    if "," in name:
        raise ConfigurationError(f"{where}: {value!r} has a comma: name one plugin at a time")
    if len(name.split()) > 1:
        # After no: it would keep out nothing, and say nothing.
        raise ConfigurationError(
            f"{where}: {value!r} has a space, as no plugin's name has: PSNC_PLUGINS wants commas "
            "between names, -p and plugins one at a time"
        )
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{where} is {value!r}: give true or false")
    return value


def _level(value: Any, where: str) -> int:
    if not isinstance(value, str) or value.upper() not in _LEVELS:
        raise ConfigurationError(f"{where} is {value!r}: choose one of {', '.join(_LEVELS)}")
    return logging.getLevelNamesMapping()[value.upper()]


def _durability(value: Any, where: str) -> str:
    if value not in get_args(Durability):
        raise ConfigurationError(
            f"{where} is {value!r}: choose one of {', '.join(get_args(Durability))}"
        )
    return str(value)


def _store_url(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f'{where} is {value!r}: give a URL or the path of a database, such as "runs.db"'
        )
    return value


SETTINGS: dict[str, Callable[[Any, str], Any]] = {
    "plugins": _plugin_names,
    "strict_plugins": _truth,
    "log_level": _level,
    "durability": _durability,
    "store": _store_url,
}
