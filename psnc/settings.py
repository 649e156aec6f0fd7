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

__all__ = ["LOCAL_PLUGINS", "SETTINGS", "default_config", "read_config"]

LOCAL_PLUGINS = "psnc_plugins.py"


def default_config() -> Config:
    """Return the settings of a process that was told nothing else.

    Those of the environment and the configuration file, with the plugin file beside the program
    that runs.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    beside = [Path(program).absolute().parent] if program else []
    return read_config(beside=[Path.cwd(), *beside])


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
        If the configuration file cannot be read, or says something that means nothing.
    """
    file, table = _read_file(Path.cwd())
    settings = {key: table[key] for key in SETTINGS if key in table}
    for key, value in settings.items():
        settings[key] = SETTINGS[key](value, f"{file}: {key.replace('_', '-')}")
    named = (*settings.pop("plugins", ()), *_plugins_of_environment(), *plugins)
    store = os.environ.get("PSNC_STORE") or settings.pop("store", None)
    return Config(
        plugins=named,
        local_plugins=tuple(_local_plugins(beside)),
        load_installed=not os.environ.get("PSNC_DISABLE_INSTALLED_PLUGINS"),
        store=store,
        file=None if file is None else str(file),
        file_options={key: value for key, value in table.items() if key not in SETTINGS},
        **settings,
    )


def _plugins_of_environment() -> tuple[str, ...]:
    names = os.environ.get("PSNC_PLUGINS", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def _local_plugins(beside: Iterable[Path]) -> list[str]:
    found = []
    for directory in beside:
        path = str(directory.absolute() / LOCAL_PLUGINS)
        if path not in found and os.path.isfile(path):
            found.append(path)
    return found


def _read_file(start: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the nearest configuration file at or above a directory, and its table."""
    for directory in (start, *start.parents):
        own = directory / "psnc.toml"
        if own.is_file():
            return own, _normalised(_parse(own), own)
        shared = directory / "pyproject.toml"
        if shared.is_file() and "psnc" in (tools := _parse(shared).get("tool", {})):
            return shared, _normalised(tools["psnc"], shared)
    return None, {}


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _normalised(table: Any, path: Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigurationError(f"{path}: tool.psnc is no table: write [tool.psnc]")
    normal: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in normal:
            raise ConfigurationError(f"{path}: {key!r} is there twice, with - and with _")
        normal[name] = value
    return normal


# --- the file's keys --------------------------------------------------------------------------


def _plugin_names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ConfigurationError(f'{where} is {value!r}: give a list such as ["NAME", "no:NAME"]')
    return tuple(value)


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{where} is {value!r}: give true or false")
    return value


def _level(value: Any, where: str) -> int:
    level = logging.getLevelNamesMapping().get(value.upper()) if isinstance(value, str) else None
    if level is None:
        raise ConfigurationError(f"{where} is {value!r}: give DEBUG, INFO, WARNING or ERROR")
    return level


def _durability(value: Any, where: str) -> str:
    if value not in get_args(Durability):
        raise ConfigurationError(
            f"{where} is {value!r}: choose one of {', '.join(get_args(Durability))}"
        )
    return str(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{where} is {value!r}: give text")
    return value


SETTINGS: dict[str, Callable[[Any, str], Any]] = {
    "plugins": _plugin_names,
    "strict_plugins": _truth,
    "log_level": _level,
    "durability": _durability,
    "store": _text,
}
