"""The backends that come with psnc, offered by name."""

from __future__ import annotations

from collections.abc import Mapping

from psnc import hookimpl


@hookimpl
def psnc_backends() -> Mapping[str, str]:
    """Offer ``sequential``, ``thread_pool`` and ``process_pool``."""
    return {
        "sequential": "psnc.builtin.backends.sequential:SequentialBackend",
        "thread_pool": "psnc.builtin.backends.thread_pool:ThreadPoolBackend",
        "process_pool": "psnc.builtin.backends.process_pool:ProcessPoolBackend",
    }
