"""What the hook calls of one index cost that nobody implements, and with one plugin.

Run it by hand: ``python benchmarks/hooks.py``. A round measures everything in turn; the figures are
medians over the rounds, in bare SQLite transactions of an index's rows (``recording.py``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from recording import bare_transactions, seconds_per_index

from psnc import Config, PluginManager, hookimpl

# The calls of one index through three stages.
CALLS = [
    "psnc_index_lookup",
    "psnc_index_start",
    *["psnc_stage_start"] * 3,
    *["psnc_stage_done"] * 3,
    "psnc_index_measure",
    "psnc_index_done",
    "psnc_index_reported",
]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "psnc_index_lookup": {"run": None, "index": 0},
    "psnc_index_start": {"context": None},
    "psnc_stage_start": {"context": None, "stage": None},
    "psnc_stage_done": {"context": None, "stage": None, "record": None},
    "psnc_index_measure": {"context": None},
    "psnc_index_done": {"context": None, "record": None},
    "psnc_index_reported": {"run": None, "record": None},
}


class Nothing:
    """A plugin that implements every hook of an index, and does nothing in it."""

    @hookimpl
    def psnc_index_lookup(self, run: Any, index: int) -> None: ...

    @hookimpl
    def psnc_index_start(self, context: Any) -> None: ...

    @hookimpl
    def psnc_stage_start(self, context: Any, stage: Any) -> None: ...

    @hookimpl
    def psnc_stage_done(self, context: Any, stage: Any, record: Any) -> None: ...

    @hookimpl
    def psnc_index_measure(self, context: Any) -> None: ...

    @hookimpl
    def psnc_index_done(self, context: Any, record: Any) -> None: ...

    @hookimpl
    def psnc_index_reported(self, run: Any, record: Any) -> None: ...


def call_as_execution_does(manager: PluginManager, count: int) -> None:
    for _ in range(count):
        for hook in CALLS:
            if hook == "psnc_index_lookup":
                manager.first_result(hook, **ARGUMENTS[hook])
            elif not hook.startswith("psnc_stage") or manager.implements(hook):
                manager.call_contained(hook, **ARGUMENTS[hook])


def ns_per_index(
    function: Callable[[PluginManager, int], None], manager: PluginManager, count: int
) -> float:
    started = perf_counter_ns()
    function(manager, count)
    return (perf_counter_ns() - started) / count


def manager_with(*plugins: Any) -> PluginManager:
    manager = PluginManager(Config())
    for plugin in plugins:
        manager.register(plugin)
    return manager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    empty, one = manager_with(), manager_with(Nothing())
    figures: dict[str, list[float]] = {"no plugin": [], "one plugin with every hook": []}
    transactions = []
    for _ in range(given.rounds):
        figures["no plugin"].append(ns_per_index(call_as_execution_does, empty, given.count))
        figures["one plugin with every hook"].append(
            ns_per_index(call_as_execution_does, one, given.count)
        )
        transactions.append(seconds_per_index(bare_transactions, given.count) * 1e9)
    transaction = statistics.median(transactions)
    print(f"the {len(CALLS)} hook calls of an index, in bare transactions of its rows")
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name:28} {median / transaction:.4f}  ({median / 1000:.2f} µs)")


if __name__ == "__main__":
    main()
