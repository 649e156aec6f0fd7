"""The plugin manager: which plugins there are in a process, and calls of their hooks."""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pluggy
from attrs import evolve, frozen

from psnc import hookspecs
from psnc.config import Config
from psnc.errors import BackendError, PluginError, PsncError, StageError, StoreError
from psnc.options import OptionParser, PluginOption, resolve_options
from psnc.plugin_loading import (
    PluginFailure,
    PluginOrigin,
    check_hooks,
    find_plugins,
    import_plugin,
)
from psnc.settings import SETTINGS, default_config

__all__ = [
    "Offer",
    "PluginManager",
    "activate",
    "activated",
    "active_config",
    "deactivate",
    "install",
    "load_object",
    "plugin_manager",
]

BUILT_IN_PLUGINS = {
    "checkpoint": "psnc.builtin.checkpoint.plugin",
    "memory": "psnc.builtin.memory",
    "gpu": "psnc.builtin.gpu",
    "logcapture": "psnc.builtin.logcapture",
    "progress": "psnc.builtin.progress",
    "backends": "psnc.builtin.backends",
    "stages": "psnc.builtin.stages",
}

OfferKind = Literal["source", "filter", "sink", "backend"]

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


class _Unrecorded(threading.local):
    """The error of a store in the hook that the thread is calling, if there was one."""

    error: StoreError | None = None


class PluginManager(pluggy.PluginManager):
    """Pluggy's manager, plus loading by configuration and calls that contain errors.

    Attributes
    ----------
    config : Config
        The configuration that it was made from.
    errors : dict of str to int
        How often a hook raised, by ``"plugin: hook"``.
    origins : dict of str to PluginOrigin
        Where each loaded plugin comes from, by name, in the order of registration.
    failures : list of PluginFailure
        The plugins that could not be loaded.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__("psnc")
        self.config = config or Config()
        self.errors: dict[str, int] = {}
        self.origins: dict[str, PluginOrigin] = {}
        self.failures: list[PluginFailure] = []
        self._logged: set[str] = set()
        # Of psnc_configure: they are the first run's to tell.
        self._untold: dict[str, int] = {}
        self._observers: dict[str, tuple[_Observer, ...]] = {}
        self._lock = threading.Lock()
        self._unrecorded = _Unrecorded()
        self._pid = os.getpid()
        self.add_hookspecs(hookspecs)
        self._hook_arguments = {
            name: tuple(caller.spec.argnames)
            for name, caller in vars(self.hook).items()
            if isinstance(caller, pluggy.HookCaller) and caller.spec is not None
        }

    def load(self) -> None:
        """Load every plugin that the configuration asks for, and set it up.

        Raises
        ------
        PluginError
            If one cannot be loaded.
        """
        self.load_plugins()
        self.require_plugins()
        self.configure()

    def load_plugins(self) -> None:
        """Register the plugins; what fails is in :attr:`failures`."""
        for choice in self.config.plugins:
            if choice.startswith("no:"):
                self.set_blocked(choice.removeprefix("no:"))
            else:
                self.unblock(choice)
        for origin in find_plugins(self.config, BUILT_IN_PLUGINS):
            if self.is_blocked(origin.title):
                continue
            try:
                self._load(origin)
            except PluginError as error:
                self.failures.append(PluginFailure(origin, str(error)))

    def require_plugins(self) -> None:
        """Raise :class:`PluginError` if a plugin could not be loaded."""
        if self.failures:
            first, *others = self.failures
            names = ", ".join(each.origin.title for each in others)
            more = f" (nor could be loaded: {names})" if others else ""
            raise PluginError(f"{first.reason}{more}")

    def plugin_options(self) -> list[PluginOption]:
        """Return the options that the plugins declare, those of a plugin together.

        Raises
        ------
        PluginError
            If two plugins declare the same one, or one's declaration fails.
        """
        declared: dict[str, PluginOption] = {}
        for origin, function in self.implementations("psnc_addoptions"):
            parser = OptionParser(origin.title)
            self.call_or_raise("psnc_addoptions", origin, function, parser)
            for option in parser.options:
                other = declared.setdefault(option.name, option)
                if other is not option or option.name in SETTINGS:
                    whose = "psnc" if other is option else f"plugin {other.plugin!r}"
                    raise PluginError(
                        f"{origin.described} declares the option {option.flag}, which {whose} "
                        f"has already: rename it, or run with -p no:{origin.title}"
                    )
        return list(declared.values())

    def configure(self, given: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """Finish the configuration as :meth:`settle` does, and let plugins set themselves up."""
        self.settle(given, **settings)
        before = dict(self.errors)
        self.call_contained("psnc_configure", config=self.config)
        self._untold = {
            key: count - before.get(key, 0)
            for key, count in self.errors.items()
            if count > before.get(key, 0)
        }

    def settle(self, given: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """Finish the configuration.

        Parameters
        ----------
        given : mapping, optional
            Values of the plugins' options from a command line.
        **settings
            Fields of the configuration that became known since the plugins were loaded.
        """
        config = evolve(self.config, **settings)
        if config.options is None:
            options = resolve_options(self.plugin_options(), config, given or {})
            config = evolve(config, options=options)
        self.config = config

    def close(self) -> None:
        """Let every plugin clean up, unless it was set up before this process was forked."""
        if self._pid == os.getpid():
            self.call_contained("psnc_unconfigure", config=self.config)

    def get_canonical_name(self, plugin: Any) -> str:
        """Return a name for a plugin that was given none: its module's, or one of its class's."""
        name = str(getattr(plugin, "__name__", None) or type(plugin).__name__)
        if isinstance(plugin, ModuleType):
            return name
        names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        return next(each for each in names if not self.has_plugin(each))

    def register(
        self, plugin: Any, name: str | None = None, origin: PluginOrigin | None = None
    ) -> str | None:
        """Register a plugin; calls that follow see it.

        Raises
        ------
        PluginError
            If it is registered, or its name is taken, or it implements what is no hook.
        """
        if self.is_registered(plugin):
            raise PluginError(f"the plugin {self.get_name(plugin)!r} is registered already")
        name = name or self.get_canonical_name(plugin)
        origin = origin or PluginOrigin(name, "object", type(plugin).__qualname__)
        if name in self.origins:
            raise PluginError(_two_of_one_name(self.origins[name], origin))
        check_hooks(plugin, origin, self._marked_functions(plugin), self._hook_arguments)
        try:
            registered = super().register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise PluginError(f"{origin.described} is refused: {reason}") from error
        if registered is not None:
            self.origins[name] = origin
        self._observers = {}
        return registered

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Remove a plugin; calls that follow no longer see it."""
        name = name or self.get_name(plugin)
        removed = super().unregister(plugin, name)
        self.origins.pop(name or "", None)
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
        observers = self._observers.get(hook_name)
        if observers is None:
            observers = self._observers_of(hook_name)
        if not observers:
            return results
        unrecorded: StoreError | None = None
        for observer in observers:
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

    def first_result(
        self, hook_name: str, check: Callable[[Any], Any] | None = None, /, **arguments: Any
    ) -> Any:
        """Call a *first result* hook until one plugin answers, errors contained.

        Parameters
        ----------
        hook_name : str
            The hook.
        check : callable, optional
            Given an answer; what it raises counts as the plugin's own error.
        **arguments
            The hook's arguments, all of them.
        """
        for observer in self._observers_of(hook_name):
            try:
                result = observer(arguments)
                if result is not None and check is not None:
                    check(result)
            except StoreError:
                raise
            except Exception as error:
                self._report(observer.plugin_name, hook_name, error)
            else:
                if result is not None:
                    return result
        return None

    def first_or_raise(self, hook_name: str, **arguments: Any) -> Any:
        """Call a *first result* hook that cannot be done without, wrappers included.

        Raises
        ------
        PluginError
            If a plugin raises anything but an error of psnc's; names the plugin.
        """
        caller: pluggy.HookCaller = getattr(self.hook, hook_name)
        try:
            return caller(**arguments)
        except PsncError:
            raise
        except Exception as error:
            import traceback

            # pluggy does not say whose function raised; the traceback does.
            frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
            for origin, function in self._functions(caller):
                if getattr(function, "__code__", None) in frames:
                    raise _raised(origin, hook_name, error) from error
            raise

    def _functions(self, caller: pluggy.HookCaller) -> Iterator[tuple[PluginOrigin, Any]]:
        for each in caller.get_hookimpls():
            yield self.origins[each.plugin_name], each.function

    def errors_told(self) -> dict[str, int]:
        """Return the errors that are not for the summary of a run that begins now."""
        untold, self._untold = self._untold, {}
        return {key: count - untold.get(key, 0) for key, count in self.errors.items()}

    def count_errors(self, errors: dict[str, int]) -> None:
        """Add the errors that another process counted."""
        for key, count in errors.items():
            self.errors[key] = self.errors.get(key, 0) + count

    # --- what plugins offer -------------------------------------------------------------------

    def offers(self, kind: OfferKind) -> dict[str, Offer]:
        """Return what the plugins offer of a kind, by name; the last registered wins.

        Raises
        ------
        PluginError
            If a plugin's hook raises, or returns no mapping of names.
        """
        hook = f"psnc_{kind}s"
        offered: dict[str, Offer] = {}
        for origin, function in self.implementations(hook):
            mapping = self.call_or_raise(hook, origin, function)
            if mapping is None:
                continue
            if not isinstance(mapping, Mapping):
                raise PluginError(
                    f"{origin.described}: {hook} returned "
                    f"{type(mapping).__qualname__}: return a mapping of names to classes"
                )
            for name, reference in mapping.items():
                _check_reference(hook, origin, name, reference)
                offered[name] = Offer(name, reference, origin)
        return offered

    def backend_class(self, name: str) -> type[Any]:
        """Return the backend that goes by a name.

        Raises
        ------
        BackendError
            If there is none; names those there are.
        """
        return self._offered_class("backend", name, BackendError)

    def stage_class(self, kind: OfferKind, name: str) -> type[Any]:
        """Return the source, filter or sink that goes by a name.

        Raises
        ------
        StageError
            If there is none; names those there are.
        """
        return self._offered_class(kind, name, StageError)

    def _offered_class(self, kind: OfferKind, name: str, error: type[PsncError]) -> type[Any]:
        offered = self.offers(kind)
        if name not in offered:
            known = ", ".join(sorted(offered)) or "none"
            raise error(f"unknown {kind} {name!r}: choose one of {known}")
        return offered[name].load()

    def implementations(self, hook: str) -> list[tuple[PluginOrigin, Callable[..., Any]]]:
        """Return each implementation of a hook with its plugin, first registered first."""
        caller: pluggy.HookCaller = getattr(self.hook, hook)
        order = list(self.origins)
        found = sorted(caller.get_hookimpls(), key=lambda each: order.index(each.plugin_name))
        return [(self.origins[each.plugin_name], _by_keyword(each)) for each in found]

    def call_or_raise(
        self, hook: str, origin: PluginOrigin, function: Callable[..., Any], *values: Any
    ) -> Any:
        """Call what cannot be done without: a plugin's error ends the command."""
        try:
            return function(dict(zip(self._hook_arguments[hook], values, strict=True)))
        except PsncError:
            raise
        except Exception as error:
            raise _raised(origin, hook, error) from error

    # --- calls --------------------------------------------------------------------------------

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

        A manager of its own holds copies of the implementations, in which errors are contained:
        those of a wrapper too, before they could keep the other plugins from being called.
        """
        assert caller.spec is not None  # every hook that psnc calls is specified
        inner = pluggy.PluginManager("psnc")
        inner.add_hookspecs(hookspecs)
        for each in caller.get_hookimpls():
            is_wrapper = each.wrapper or each.hookwrapper
            contain = self._contained_wrapper if is_wrapper else self._contained
            function = contain(each, caller.name)
            options: dict[str, Any] = dict(each.opts)
            mark = hookspecs.hookimpl(**{key: options[key] for key in _ORDER_OPTIONS})
            holder = SimpleNamespace(**{caller.name: mark(function)})
            inner.register(holder)
        names = tuple(caller.spec.argnames)
        hook = getattr(inner.hook, caller.name)

        def call(*values: Any) -> Any:
            outer, self._unrecorded.error = self._unrecorded.error, None
            try:
                result = hook(**dict(zip(names, values, strict=True)))
                if self._unrecorded.error is not None:
                    raise self._unrecorded.error
                return result
            finally:
                self._unrecorded.error = outer

        plugin_names = "+".join(
            each.plugin_name for each in caller.get_hookimpls() if each.wrapper or each.hookwrapper
        )
        return _Observer(plugin_names, call, names, not caller.spec.opts.get("firstresult"))

    def _contained(self, implementation: pluggy.HookImpl, hook_name: str) -> Callable[..., Any]:
        @functools.wraps(implementation.function)
        def contained(*arguments: Any) -> Any:
            try:
                return implementation.function(*arguments)
            except Exception as error:
                self._contain(implementation.plugin_name, hook_name, error)
                return None

        return contained

    def _contained_wrapper(
        self, implementation: pluggy.HookImpl, hook_name: str
    ) -> Callable[..., Any]:
        """Have a wrapper that raises keep nothing from the plugins that it goes around."""
        contain = functools.partial(self._contain, implementation.plugin_name, hook_name)

        @functools.wraps(implementation.function)
        def contained(*arguments: Any) -> Generator[Any, Any, Any]:
            wrapper: Any = implementation.function(*arguments)
            try:
                next(wrapper)
            except StopIteration:
                contain(RuntimeError("a wrapper yields once, and this one did not"))
                return (yield)
            except Exception as error:
                contain(error)
                return (yield)
            try:
                result = yield
            except BaseException as error:  # an interrupt: errors were contained on the way
                with suppress(StopIteration):
                    wrapper.throw(error)
                raise
            try:
                wrapper.send(result)
            except StopIteration as end:
                return end.value
            except Exception as error:
                contain(error)
            else:
                wrapper.close()
                contain(RuntimeError("a wrapper yields once, and this one did twice"))
            return result

        return contained

    def _contain(self, plugin_name: str, hook_name: str, error: Exception) -> None:
        if not isinstance(error, StoreError):
            self._report(plugin_name, hook_name, error)
        elif self._unrecorded.error is None:
            # Said at the end, since the other plugins still have to clean up.
            self._unrecorded.error = error

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

    # --- loading ------------------------------------------------------------------------------

    def _load(self, origin: PluginOrigin) -> None:
        if origin.name in self.origins:
            raise PluginError(_two_of_one_name(self.origins[origin.name], origin))
        plugin = import_plugin(origin)
        # A module named by -p may be an installed plugin's own, which is loaded already.
        if not self.is_registered(plugin):
            self.register(plugin, origin.name, origin)

    def _marked_functions(self, plugin: Any) -> list[tuple[str, Any, bool]]:
        found = []
        for name in dir(plugin):
            options = self.parse_hookimpl_opts(plugin, name)
            if options is not None:
                hook = options.get("specname") or name
                found.append((hook, getattr(plugin, name), bool(options.get("optionalhook"))))
        return found


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
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(
                f"{self.name!r} of {self.origin.described} cannot be imported from "
                f"{self.reference!r} ({reason}): install what it needs, or mend the plugin"
            ) from error
        return loaded


def _check_reference(hook: str, origin: PluginOrigin, name: Any, reference: Any) -> None:
    is_text = isinstance(reference, str) and all(reference.partition(":"))
    if not isinstance(name, str) or not (is_text or isinstance(reference, type)):
        raise PluginError(
            f"{origin.described}: {hook} names {name!r} {reference!r}: give a class, or its "
            'reference "module:Class"'
        )


def load_object(reference: str) -> Any:
    """Import what ``"module:name"`` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _raised(origin: PluginOrigin, hook: str, error: Exception) -> PluginError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return PluginError(
        f"{origin.described} raised in {hook} ({reason}): mend it, or run with -p no:{origin.title}"
    )


def _two_of_one_name(first: PluginOrigin, second: PluginOrigin) -> str:
    name = second.name
    if first.kind == "built-in":
        return (
            f"plugin {name!r} of {second} has the name of a built-in plugin: give it another name; "
            f"to replace the built-in, run with -p no:{name} besides"
        )
    if second.kind == "object":
        return f"there is a plugin named {name!r} already, of {first}: give this one another name"
    return (
        f"two plugins are named {name!r}, of {first} and of {second}: rename one of the entry "
        f"points, uninstall one, or keep both out with -p no:{name}"
    )


def _by_keyword(implementation: pluggy.HookImpl) -> Callable[[Mapping[str, Any]], Any]:
    names = implementation.argnames
    return lambda given: implementation.function(*map(given.__getitem__, names))


_active: PluginManager | None = None
# Whether it was made for a pipeline that came from another process, and for no other reason.
_is_for_copies = False
_active_lock = threading.RLock()


def _renew_lock() -> None:
    """Replace a lock that a thread which is not in this process may have held."""
    global _active_lock
    _active_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def plugin_manager(config: Config | None = None) -> PluginManager:
    """Return this process's plugin manager, made on first use.

    Parameters
    ----------
    config : Config, optional
        What to make it from, if there is none yet, or one for another configuration that came
        to this worker of somebody's pool: by default the settings of the environment and the
        configuration file.
    """
    global _is_for_copies
    with _active_lock:
        is_other = _is_for_copies and config is not None and config != active_config()
        if _active is not None and not is_other:
            return _active
        manager = activate(config or default_config())
        _is_for_copies = config is not None
        return manager


def active_config() -> Config | None:
    """Return the configuration of this process's plugin manager, ``None`` before there is one."""
    return None if _active is None else _active.config


def activate(config: Config) -> PluginManager:
    """Make and install this process's plugin manager from a configuration."""
    manager = PluginManager(config)
    manager.load_plugins()
    manager.require_plugins()
    manager.settle()
    # A module that both have must clean up before it is set up again.
    install(manager)
    manager.configure()
    return manager


def install(manager: PluginManager) -> PluginManager:
    """Make a loaded plugin manager this process's own, in place of any other."""
    global _active, _is_for_copies
    with _active_lock:
        previous, _active = _active, manager
        _is_for_copies = False
    if previous is not None and previous is not manager:
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
