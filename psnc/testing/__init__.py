"""What an author of stages and plugins needs to test them.

In a ``conftest.py``::

    pytest_plugins = ["psnc.testing"]

gives every test the fixtures ``psnc_home``, ``psnc_runner`` and ``psnc_hooks``. They are asked for
by this line, as pytest's own ``pytester`` is, rather than loaded wherever psnc is installed: test
runs that have nothing to do with psnc pay nothing for it, and one that measures the coverage of
psnc does not import it before the measurement begins.

The checks of stages are plain functions. They need no pytest, and raise ``AssertionError`` with
one sentence that names the stage and the rule that it breaks::

    from psnc.testing import check_source

    def test_my_source_keeps_the_rules():
        check_source(MySource("data"))

PYTEST_DONT_REWRITE: nothing here is an assertion, and tests may import it before pytest does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psnc.testing.filter_check import check_filter
    from psnc.testing.recorder import HookCall, HookRecorder
    from psnc.testing.runner import CommandResult, Runner, RunResult
    from psnc.testing.sink_check import check_sink
    from psnc.testing.source_check import check_source
    from psnc.testing.store_suite import StoreSuite

__all__ = [
    "CommandResult",
    "HookCall",
    "HookRecorder",
    "RunResult",
    "Runner",
    "StoreSuite",
    "check_filter",
    "check_sink",
    "check_source",
]

pytest_plugins = ["psnc.testing.fixtures"]

# Imported when first used: the checks need no pytest, and the suite of stores needs no checks.
_MODULES = {
    "CommandResult": "runner",
    "HookCall": "recorder",
    "HookRecorder": "recorder",
    "RunResult": "runner",
    "Runner": "runner",
    "StoreSuite": "store_suite",
    "check_filter": "filter_check",
    "check_sink": "sink_check",
    "check_source": "source_check",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
