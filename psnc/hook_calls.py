"""Call hooks so that a plugin's error stays its own: noted and counted, and the run goes on.

Only what a store raises passes through, once every plugin has been called: what cannot be recorded
must be said.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pluggy
from attrs import frozen

from psnc import hookspecs
from psnc.errors import INTERRUPTS, StoreError

__all__ = ["HookCalls", "by_keyword"]

_ORDER_OPTIONS = ("wrapper", "hookwrapper", "tryfirst", "trylast")

logger = logging.getLogger("psnc.plugins")


@frozen
class _Observer:
    """One plugin's implementation of one hook, ready to be called by keyword."""

    plugin_name: str
    call: Callable[[dict[str, Any]], Any]
    answers_for_all: bool = False


def by_keyword(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Any], Any]:
    """Return a function of all arguments that hands on those that another one names.

    Every index calls a dozen of these, so that none does more than its number of names asks for.
    """
    if not names:
        return lambda given: function()
    if len(names) == 1:
        name = names[0]
        return lambda given: function(given[name])
    pick = itemgetter(*names)
    return lambda given: function(*pick(given))


def _is_the_plugins_own(error: BaseException) -> bool:
    """Tell an error that is only counted from what passes through to whoever called the hook."""
    return not isinstance(error, (StoreError, *INTERRUPTS))


class _Passing(threading.local):
    """What passes through the hook that the thread is calling, once every plugin has been called.

    The error of a store, or what is no error: ``KeyboardInterrupt`` and ``SystemExit``.
    """

    error: BaseException | None = None


class HookCalls(pluggy.PluginManager):
    """Pluggy's manager of psnc's hooks, plus calls that contain errors.

    Attributes
    ----------
    errors : dict of str to int
        How often a hook raised, by ``"plugin: hook"``.
    """

    def __init__(self) -> None:
        super().__init__("psnc")
        self.errors: dict[str, int] = {}
        self._logged: set[str] = set()
        self._left_to_tell: dict[str, int] = {}
        self._observers: dict[str, tuple[_Observer, ...]] = {}
        self._lock = threading.Lock()
        self._passing = _Passing()
        self.add_hookspecs(hookspecs)

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
            Once every plugin has been called: what cannot be recorded must be said. So does
            ``KeyboardInterrupt``, since the other plugins still have to clean up.
        """
        results: list[Any] = []
        observers = self._observers.get(hook_name)
        if observers is None:
            observers = self._observers_of(hook_name)
        if not observers:
            return results
        passing: BaseException | None = None
        for observer in observers:
            try:
                result = observer.call(arguments)
                if result is None:
                    continue
                answers = result if observer.answers_for_all else (result,)
                if check is not None:
                    for answer in answers:
                        check(answer)
                results.extend(answers)
            except BaseException as error:
                if _is_the_plugins_own(error):
                    self._report(observer.plugin_name, hook_name, error)
                else:
                    passing = passing or error
        if passing is not None:
            raise passing
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
                result = observer.call(arguments)
                if result is not None and check is not None:
                    check(result)
            except (StoreError, *INTERRUPTS):
                raise
            except BaseException as error:
                self._report(observer.plugin_name, hook_name, error)
            else:
                if result is not None:
                    return result
        return None

    # --- errors -------------------------------------------------------------------------------

    @contextmanager
    def errors_left_to_tell(self) -> Iterator[None]:
        """Leave the errors of a ``with`` block to the summary of the next run."""
        before = dict(self.errors)
        yield
        self._left_to_tell = self.errors_since(before)

    def errors_since(self, before: Mapping[str, int]) -> dict[str, int]:
        """Return how many errors were added to an earlier state of :attr:`errors`."""
        return {
            key: count - before.get(key, 0)
            for key, count in self.errors.items()
            if count > before.get(key, 0)
        }

    def errors_told(self) -> dict[str, int]:
        """Return the errors that are not for the summary of a run that begins now."""
        left, self._left_to_tell = self._left_to_tell, {}
        return {key: count - left.get(key, 0) for key, count in self.errors.items()}

    def count_errors(self, errors: dict[str, int]) -> None:
        """Add the errors that another process counted."""
        for key, count in errors.items():
            self.errors[key] = self.errors.get(key, 0) + count

    def _contain(self, plugin_name: str, hook_name: str, error: BaseException) -> None:
        if _is_the_plugins_own(error):
            self._report(plugin_name, hook_name, error)
        else:
            self._passing.error = self._passing.error or error

    def _report(self, plugin_name: str, hook_name: str, error: BaseException) -> None:
        key = f"{plugin_name}: {hook_name}"
        with self._lock:
            first = key not in self._logged
            self._logged.add(key)
            self.errors[key] = self.errors.get(key, 0) + 1
        if first:
            logger.error(
                "plugin %s raised in %s (%s: %s); the run goes on, and further errors "
                "of this hook are only counted",
                plugin_name,
                hook_name,
                type(error).__name__,
                error,
                exc_info=error,
            )

    # --- the machinery ------------------------------------------------------------------------

    def forget_observers(self) -> None:
        """Look for the implementations of every hook anew."""
        self._observers = {}

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
            yield _Observer(each.plugin_name, by_keyword(each.function, each.argnames))

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
            outer, self._passing.error = self._passing.error, None
            try:
                result = hook(**dict(zip(names, values, strict=True)))
                if self._passing.error is not None:
                    raise self._passing.error
                return result
            finally:
                self._passing.error = outer

        plugin_names = "+".join(
            each.plugin_name for each in caller.get_hookimpls() if each.wrapper or each.hookwrapper
        )
        answers_for_all = not caller.spec.opts.get("firstresult")
        return _Observer(plugin_names, by_keyword(call, names), answers_for_all)

    def _contained(self, implementation: pluggy.HookImpl, hook_name: str) -> Callable[..., Any]:
        @functools.wraps(implementation.function)
        def contained(*arguments: Any) -> Any:
            try:
                return implementation.function(*arguments)
            except BaseException as error:
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
            except BaseException as error:
                contain(error)
                return (yield)
            try:
                result = yield
            except BaseException as error:  # Ctrl-C on the way; what plugins raise is contained
                with suppress(StopIteration):
                    wrapper.throw(error)
                raise
            try:
                wrapper.send(result)
            except StopIteration as end:
                return end.value
            except BaseException as error:
                contain(error)
            else:
                wrapper.close()
                contain(RuntimeError("a wrapper yields once, and this one did twice"))
            return result

        return contained
