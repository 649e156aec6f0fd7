"""Show progress in another way."""

import sys
from collections.abc import Sequence

from psnc import IndexRecord, hookimpl


@hookimpl
def psnc_run_start(indices: Sequence[int]) -> None:
    print(f"own progress: {len(indices)} to do", file=sys.stderr)


@hookimpl
def psnc_index_reported(record: IndexRecord) -> None:
    print(f"own progress: index {record.index}", file=sys.stderr)
