"""Note every hook that psnc calls, for tests to assert on."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

from psnc import hookspecs
from psnc.hookspecs import hookimpl

__all__ = ["HookCall", "HookRecorder"]

_SPECS: dict[str, Callable[..., Any]] = {
    name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "psnc_spec")
}


@frozen
class HookCall:
    """One call of a hook; its arguments are attributes too: ``call.record``.

    Attributes
    ----------
    hook : str
        The hook.
    arguments : mapping
        All arguments of the call, by name: the objects themselves, as they are now.
    """

    hook: str
    arguments: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            known = ", ".join(self.arguments) or "none"
            raise AttributeError(f"{self.hook} has no argument {name!r}: it has {known}") from None


class HookRecorder:
    """A plugin that implements every hook by noting the call.

    It answers nothing, so that it changes no result, and is called before other plugins. It notes
    calls in its own process: with worker processes, those of the driver.

    Examples
    --------
    >>> from psnc.manager import plugin_manager
    >>> hooks = HookRecorder()
    >>> _ = plugin_manager().register(hooks)
    >>> _ = Numbers(2).write(WriteText("out"))[1]
    >>> [call.context.index for call in hooks.calls("psnc_index_done")]
    [1]
    >>> hooks.assert_order("psnc_index_start", "psnc_stage_done", "psnc_index_done")
    >>> _ = plugin_manager().unregister(hooks)
    """

    def __init__(self) -> None:
        self._calls: list[HookCall] = []
        for name, spec in _SPECS.items():
            setattr(self, name, self._noting(name, spec))

    def _noting(self, name: str, spec: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(spec).parameters)

        # It shows the arguments of the hook, which is how pluggy knows what to call it with.
        @functools.wraps(spec)
        def note(*values: Any) -> None:
            self._calls.append(HookCall(name, dict(zip(names, values, strict=True))))

        return hookimpl(tryfirst=True)(note)

    def calls(self, hook: str | None = None) -> list[HookCall]:
        """Return the calls of a hook, or of all hooks, in order.

        Raises
        ------
        ValueError
            If there is no such hook.
        """
        if hook is None:
            return list(self._calls)
        _require_hook(hook)
        return [call for call in self._calls if call.hook == hook]

    def clear(self) -> None:
        """Forget the calls so far."""
        self._calls.clear()

    def assert_called(self, hook: str, times: int | None = None) -> list[HookCall]:
        """Require that a hook was called, or called so many times; return the calls."""
        __tracebackhide__ = True
        calls = self.calls(hook)
        if not calls and times != 0:
            raise AssertionError(f"{hook} was not called; called were {self._called()}")
        if times is not None and len(calls) != times:
            raise AssertionError(f"{hook} was called {len(calls)} times, not {times} times")
        return calls

    def assert_not_called(self, hook: str) -> None:
        """Require that a hook was not called."""
        __tracebackhide__ = True
        self.assert_called(hook, times=0)

    def assert_order(self, *hooks: str) -> None:
        """Require that hooks were called one after the other, whatever was called in between."""
        __tracebackhide__ = True
        for hook in hooks:
            _require_hook(hook)
        names = iter([call.hook for call in self._calls])
        for hook in hooks:
            if hook not in names:
                raise AssertionError(
                    f"{hook} was not called in its place in {', '.join(hooks)}; called were "
                    f"{self._called()}"
                )

    def _called(self) -> str:
        return ", ".join(call.hook for call in self._calls) or "none"


def _require_hook(name: str) -> None:
    if name in _SPECS:
        return
    close = difflib.get_close_matches(name, _SPECS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "psnc hooks lists those there are"
    raise ValueError(f"there is no hook {name!r}: {hint}")
