"""The plugin manager: which plugins there are in a process, and calls of their hooks."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import pluggy
from attrs import evolve

from psnc.config import Config
from psnc.errors import BackendError, PluginError, PsncError, StageError
from psnc.hook_calls import HookCalls, by_keyword
from psnc.offers import Offer, OfferKind, check_reference
from psnc.options import OptionParser, PluginOption, resolve_options
from psnc.plugin_loading import (
    PluginFailure,
    PluginOrigin,
    check_hooks,
    find_plugins,
    import_plugin,
)
from psnc.settings import SETTINGS, default_config

if TYPE_CHECKING:
    from psnc.run import Run

__all__ = [
    "PluginManager",
    "activate",
    "activated",
    "active_config",
    "active_manager",
    "before_leave",
    "deactivate",
    "install",
    "plugin_manager",
    "take_leave_first",
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


class PluginManager(HookCalls):
    """Loads plugins by configuration, calls their hooks, and knows what they offer.

    Attributes
    ----------
    config : Config
        The configuration that it was made from.
    origins : dict of str to PluginOrigin
        Where each loaded plugin comes from, by name, in the order of registration.
    failures : list of PluginFailure
        The plugins that could not be loaded.
    pid : int
        The process that it was made in.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()
        self.origins: dict[str, PluginOrigin] = {}
        self.failures: list[PluginFailure] = []
        self.pid = os.getpid()
        # Those that have ended are not kept for this.
        self._runs: WeakValueDictionary[int, Run] = WeakValueDictionary()
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
        with self.errors_left_to_tell():
            try:
                self.call_contained("psnc_configure", config=self.config)
            except SystemExit as error:
                # Its code is another program's, and may say that all is done.
                raise PluginError(
                    f"a plugin called exit({error.code}) in psnc_configure: find it with "
                    "psnc plugins, and mend it or run with -p no:NAME"
                ) from error

    def settle(self, given: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """Finish the configuration.

        Parameters
        ----------
        given : mapping, optional
            Values of the plugins' options from a command line. With any, even an empty one, all
            plugins are known to be loaded that the configuration file may have keys of.
        **settings
            Fields of the configuration that became known since the plugins were loaded.
        """
        config = evolve(self.config, **settings)
        if config.options is None:
            options = resolve_options(self.plugin_options(), config, given)
            config = evolve(config, options=options)
        self.config = config

    def serve(self, run: Run) -> None:
        """Know a run whose hooks this manager calls."""
        self._runs[id(run)] = run

    def retire_runs(self) -> None:
        """Close the runs of this process that nobody drives, while plugins still can be called."""
        # Not iterated over: other threads may begin runs meanwhile.
        for reference in self._runs.valuerefs():
            run = reference()
            if run is not None:
                run.retire()

    def close(self) -> None:
        """Let every plugin clean up, unless it was set up before this process was forked."""
        self.retire_runs()
        if self.pid == os.getpid():
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
        self.forget_observers()
        return registered

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Remove a plugin; calls that follow no longer see it."""
        name = name or self.get_name(plugin)
        removed = super().unregister(plugin, name)
        self.origins.pop(name or "", None)
        self.forget_observers()
        return removed

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
        except (Exception, SystemExit) as error:
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
                check_reference(hook, origin, name, reference)
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
        return [
            (self.origins[each.plugin_name], by_keyword(each.function, each.argnames))
            for each in found
        ]

    def call_or_raise(
        self, hook: str, origin: PluginOrigin, function: Callable[..., Any], *values: Any
    ) -> Any:
        """Call what cannot be done without: a plugin's error ends the command."""
        try:
            return function(dict(zip(self._hook_arguments[hook], values, strict=True)))
        except PsncError:
            raise
        except (Exception, SystemExit) as error:
            raise _raised(origin, hook, error) from error

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


def _raised(origin: PluginOrigin, hook: str, error: BaseException) -> PluginError:
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
        if _active is not None:
            # A forked process did not choose its plugins either.
            is_chosen = not _is_for_copies and _active.pid == os.getpid()
            if is_chosen or config is None or config == _active.config:
                return _active
        manager = activate(config or default_config())
        _is_for_copies = config is not None
        return manager


def active_manager() -> PluginManager | None:
    """Return this process's plugin manager, ``None`` before there is one."""
    return _active


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
    if _active is not None and _active is not manager:
        # Their plugins may ask for the process's manager, which is to be their own.
        _active.retire_runs()
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


_endings: list[Callable[[], None]] = []


def before_leave(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function called when this process's plugins are to clean up, before they do."""
    _endings.append(function)
    return function


def take_leave_first() -> None:
    """Have plugins clean up, at the end of the process, before what was imported up to now does.

    A store has a handler of its own, by then imported, which takes no record any more.
    """
    global _finalized_pid
    atexit.unregister(deactivate)
    atexit.register(deactivate)
    # Most processes of a pool end without what is registered at exit.
    multiprocessing = sys.modules.get("multiprocessing.util")
    if multiprocessing is not None and _finalized_pid != os.getpid():
        _finalized_pid = os.getpid()
        multiprocessing.Finalize(None, deactivate, exitpriority=0)


_finalized_pid: int | None = None


@atexit.register
def deactivate() -> None:
    """Let this process's plugins clean up."""
    global _active
    with ExitStack() as stack:
        for function in _endings:
            stack.callback(function)
    if _active is not None:
        _active.retire_runs()
    with _active_lock:
        previous, _active = _active, None
    if previous is not None:
        previous.close()
