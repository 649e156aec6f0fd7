"""The plugin manager: built-in plugins, entry points, and the user's choice among them."""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pluggy
from attrs import frozen

from psnc import hookspecs
from psnc.config import Config
from psnc.errors import BackendError, PluginError, StoreError

__all__ = ["PluginManager", "activate", "activated", "deactivate", "plugin_manager"]

ENTRY_POINT_GROUP = "psnc"

BUILT_IN_PLUGINS = {
    "checkpoint": "psnc.builtin.checkpoint.plugin",
    "memory": "psnc.builtin.memory",
    "gpu": "psnc.builtin.gpu",
    "logcapture": "psnc.builtin.logcapture",
    "progress": "psnc.builtin.progress",
    "backends": "psnc.builtin.backends",
}

_ORDER_OPTIONS = ("wrapper", "hookwrapper", "tryfirst", "trylast")

logger = logging.getLogger("psnc.plugins")


@frozen
class _Observer:
    """One plugin's implementation of one hook, ready to be called by keyword."""

    plugin_name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    answers_for_all: bool = False

    def __call__(self, given: dict[str, Any]) -> Any:
        return self.function(*map(given.__getitem__, self.arguments))


class PluginManager(pluggy.PluginManager):
    """Pluggy's manager, plus loading by configuration and calls that contain errors.

    Attributes
    ----------
    config : Config
        The configuration that it was made from.
    errors : dict of str to int
        How often a hook raised, by ``"plugin: hook"``.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__("psnc")
        self.config = config or Config()
        self.errors: dict[str, int] = {}
        self._logged: set[str] = set()
        self._observers: dict[str, tuple[_Observer, ...]] = {}
        self._lock = threading.Lock()
        self.add_hookspecs(hookspecs)

    def load(self) -> None:
        """Load the built-in plugins, the installed ones and those that the user names."""
        for choice in self.config.plugins:
            if choice.startswith("no:"):
                self.set_blocked(choice.removeprefix("no:"))
            else:
                self.unblock(choice)
        for name, module in BUILT_IN_PLUGINS.items():
            if not self.is_blocked(name):
                self.register(importlib.import_module(module), name=name)
        self._load_entry_points()
        for name in self.config.plugins:
            if not name.startswith("no:") and not self.is_blocked(name):
                self._load_module(name)
        self._check_plugins()
        self.call_contained("psnc_configure", config=self.config)

    def close(self) -> None:
        """Let every plugin clean up."""
        self.call_contained("psnc_unconfigure", config=self.config)

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a plugin; calls that follow see it."""
        try:
            registered = super().register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise _refused(error) from error
        self._observers = {}
        return registered

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Remove a plugin; calls that follow no longer see it."""
        removed = super().unregister(plugin, name)
        self._observers = {}
        return removed

    def implements(self, hook_name: str) -> bool:
        """Tell whether any plugin implements a hook, so that an idle hook costs one look-up."""
        return bool(self._observers_of(hook_name))

    def call_contained(
        self, hook_name: str, check: Callable[[Any], Any] | None = None, /, **arguments: Any
    ) -> list[Any]:
        """Call every implementation of a hook, each one's error contained.

        Parameters
        ----------
        hook_name : str
            The hook.
        check : callable, optional
            Given each answer; what it raises counts as the plugin's own error.
        **arguments
            The hook's arguments, all of them.

        Returns
        -------
        list
            What the implementations returned, ``None`` left out; last registered first.

        Raises
        ------
        StoreError
            Once every plugin has been called: what cannot be recorded must be said.
        """
        results: list[Any] = []
        unrecorded: StoreError | None = None
        for observer in self._observers.get(hook_name) or self._observers_of(hook_name):
            try:
                result = observer(arguments)
                if result is None:
                    continue
                answers = result if observer.answers_for_all else (result,)
                if check is not None:
                    for answer in answers:
                        check(answer)
                results.extend(answers)
            except StoreError as error:
                # Said at the end, since the other plugins still have to clean up.
                unrecorded = unrecorded or error
            except Exception as error:
                self._report(observer.plugin_name, hook_name, error)
        if unrecorded is not None:
            raise unrecorded
        return results

    def first_result(self, hook_name: str, **arguments: Any) -> Any:
        """Call a *first result* hook until one plugin answers, errors contained."""
        for observer in self._observers_of(hook_name):
            try:
                result = observer(arguments)
            except StoreError:
                raise
            except Exception as error:
                self._report(observer.plugin_name, hook_name, error)
            else:
                if result is not None:
                    return result
        return None

    def count_errors(self, errors: dict[str, int]) -> None:
        """Add the errors that another process counted."""
        for key, count in errors.items():
            self.errors[key] = self.errors.get(key, 0) + count

    def backend_classes(self) -> dict[str, type[Any] | str]:
        """Return every backend on offer by name; the last registered wins."""
        offered: dict[str, type[Any] | str] = {}
        for mapping in reversed(self.hook.psnc_backends()):
            offered.update(mapping)
        return offered

    def backend_class(self, name: str) -> type[Any]:
        """Return the backend that goes by a name.

        Raises
        ------
        BackendError
            If there is none; names those there are.
        """
        offered = self.backend_classes()
        if name not in offered:
            known = ", ".join(sorted(offered)) or "none"
            raise BackendError(f"unknown backend {name!r}: choose one of {known}")
        backend = offered[name]
        return backend if isinstance(backend, type) else load_object(backend)

    def _observers_of(self, hook_name: str) -> tuple[_Observer, ...]:
        observers = self._observers.get(hook_name)
        if observers is None:
            caller: pluggy.HookCaller = getattr(self.hook, hook_name)
            observers = tuple(self._make_observers(caller))
            self._observers[hook_name] = observers
        return observers

    def _make_observers(self, caller: pluggy.HookCaller) -> Iterable[_Observer]:
        implementations = caller.get_hookimpls()
        if any(each.wrapper or each.hookwrapper for each in implementations):
            yield self._make_wrapped_observer(caller)
            return
        for each in reversed(implementations):
            yield _Observer(each.plugin_name, each.function, tuple(each.argnames))

    def _make_wrapped_observer(self, caller: pluggy.HookCaller) -> _Observer:
        """Leave a hook with wrappers to pluggy, whose machinery goes around the whole call.

        A manager of its own holds copies of the implementations, in which errors are contained
        before a wrapper could see them.
        """
        assert caller.spec is not None  # every hook that psnc calls is specified
        inner = pluggy.PluginManager("psnc")
        inner.add_hookspecs(hookspecs)
        for each in caller.get_hookimpls():
            is_wrapper = each.wrapper or each.hookwrapper
            function = (
                _generator_copy(each.function) if is_wrapper else self._contained(each, caller.name)
            )
            options: dict[str, Any] = dict(each.opts)
            mark = hookspecs.hookimpl(**{key: options[key] for key in _ORDER_OPTIONS})
            holder = SimpleNamespace(**{caller.name: mark(function)})
            inner.register(holder)
        names = tuple(caller.spec.argnames)
        hook = getattr(inner.hook, caller.name)

        def call(*values: Any) -> Any:
            return hook(**dict(zip(names, values, strict=True)))

        plugin_names = "+".join(
            each.plugin_name for each in caller.get_hookimpls() if each.wrapper or each.hookwrapper
        )
        return _Observer(plugin_names, call, names, not caller.spec.opts.get("firstresult"))

    def _contained(self, implementation: pluggy.HookImpl, hook_name: str) -> Callable[..., Any]:
        @functools.wraps(implementation.function)
        def contained(*arguments: Any) -> Any:
            try:
                return implementation.function(*arguments)
            except StoreError:
                raise
            except Exception as error:
                self._report(implementation.plugin_name, hook_name, error)
                return None

        return contained

    def _report(self, plugin_name: str, hook_name: str, error: Exception) -> None:
        key = f"{plugin_name}: {hook_name}"
        with self._lock:
            first = key not in self._logged
            self._logged.add(key)
            self.errors[key] = self.errors.get(key, 0) + 1
        if first:
            logger.error(
                "plugin %s raised in %s (%s: %s); the run goes on without it, and further errors "
                "of this hook are only counted",
                plugin_name,
                hook_name,
                type(error).__name__,
                error,
                exc_info=error,
            )

    def _load_entry_points(self) -> None:
        from importlib_metadata import entry_points

        for entry_point in entry_points(group=ENTRY_POINT_GROUP):
            if self.is_blocked(entry_point.name) or self.has_plugin(entry_point.name):
                continue
            distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
            try:
                plugin = entry_point.load()
            except Exception as error:
                raise PluginError(
                    f"plugin {entry_point.name!r} of {distribution} cannot be loaded from "
                    f"{entry_point.value!r} ({type(error).__name__}: {error}): mend or uninstall "
                    f"it, or run with -p no:{entry_point.name}"
                ) from error
            self.register(plugin, name=entry_point.name)

    def _load_module(self, name: str) -> None:
        if self.has_plugin(name):
            return
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise PluginError(
                f"-p {name}: no installed plugin has this name, and it cannot be imported as a "
                f"module ({error})"
            ) from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(f"-p {name}: importing it raised {reason}") from error
        self.register(module, name=name)

    def _check_plugins(self) -> None:
        try:
            self.check_pending()
        except pluggy.PluginValidationError as error:
            raise _refused(error) from error


def load_object(reference: str) -> Any:
    """Import what ``"module:name"`` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _refused(error: pluggy.PluginValidationError) -> PluginError:
    reason = " ".join(str(error).split())
    return PluginError(f"{reason} (psnc.hookspecs documents the hooks there are)")


def _generator_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a wrapper that can be marked without marking the plugin's own again."""

    @functools.wraps(function)
    def copy(*arguments: Any) -> Any:
        return (yield from function(*arguments))

    return copy


_active: PluginManager | None = None
_active_lock = threading.RLock()


def _renew_lock() -> None:
    """Replace a lock that a thread which is not in this process may have held."""
    global _active_lock
    _active_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def plugin_manager() -> PluginManager:
    """Return this process's plugin manager, made on first use."""
    with _active_lock:
        return _active if _active is not None else activate(Config())


def activate(config: Config) -> PluginManager:
    """Make and install this process's plugin manager from a configuration."""
    global _active
    manager = PluginManager(config)
    manager.load()
    with _active_lock:
        previous, _active = _active, manager
    if previous is not None:
        previous.close()
    return manager


@contextmanager
def activated(manager: PluginManager) -> Iterator[PluginManager]:
    """Install a plugin manager for the length of a ``with`` block; for tests."""
    global _active
    with _active_lock:
        previous, _active = _active, manager
    try:
        yield manager
    finally:
        with _active_lock:
            _active = previous


@atexit.register
def deactivate() -> None:
    """Let this process's plugins clean up."""
    global _active
    with _active_lock:
        previous, _active = _active, None
    if previous is not None:
        previous.close()
