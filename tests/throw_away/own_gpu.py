"""Measure the memory of some other accelerator."""

from psnc import IndexContext, hookimpl


@hookimpl
def psnc_index_measure(context: IndexContext) -> dict[str, int]:
    return {"gpu_memory_bytes": 2000 + context.index}
