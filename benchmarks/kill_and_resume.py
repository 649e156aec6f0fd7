"""Convert molecules with two workers, kill everything half way, resume, and compare.

Run it by hand: ``python benchmarks/kill_and_resume.py``. It writes 8 files of 2,000 molecules,
converts them once without a break, and once with a ``SIGKILL`` to driver and workers as soon as
half of the files are recorded. Both stores must be equal, element by element.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import zarr

from psnc import Pipeline, run_pipeline
from psnc_atm import ASELMDBSource, AtomicDataZarrSink

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from molecules import write_dataset


def convert(data_dir: Path, output: Path) -> Pipeline:
    """Run the pipeline to the end, or on from where an earlier run was cut short."""
    pipeline = Pipeline(
        source=ASELMDBSource(data_dir=data_dir),
        sink=AtomicDataZarrSink(output_path=output / "dataset.zarr"),
        resume=True,
        db_dir=output / "checkpoints",
    )
    run_pipeline(pipeline, n_jobs=2, backend="process_pool")
    return pipeline


def kill_half_way(data_dir: Path, output: Path, half: int) -> int:
    """Start a conversion in a process group of its own and kill it; return what is recorded."""
    command = [sys.executable, __file__, "--convert", str(data_dir), str(output)]
    process = subprocess.Popen(command, start_new_session=True)
    while recorded(output) < half and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return recorded(output)


def recorded(output: Path) -> int:
    """Count the completed indices, as another program would."""
    databases = list((output / "checkpoints").glob("*.db"))
    if not databases:
        return 0
    with closing(sqlite3.connect(databases[0], timeout=30)) as connection:
        try:
            query = "SELECT count(*) FROM index_results WHERE status = 'completed'"
            return int(connection.execute(query).fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not there yet
            return 0


def require_equal(first: Path, second: Path) -> int:
    """Compare two stores array by array; return the number of arrays."""
    ours, theirs = zarr.open_group(first, mode="r"), zarr.open_group(second, mode="r")
    names = sorted(name for name, node in ours.members(max_depth=None) if hasattr(node, "shape"))
    # The plan holds the dataset's identity, which is the same, and no output.
    for name in names:
        np.testing.assert_array_equal(ours[name][:], theirs[name][:], err_msg=name)
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("DATA", "OUTPUT"))
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    if options.convert:
        convert(*options.convert)
        return
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        write_dataset(folder / "input", options.files, options.rows)
        whole = convert(folder / "input", folder / "whole")
        print("uninterrupted:", whole.summary())
        for attempt in range(options.kills):
            output = folder / f"killed-{attempt}"
            done = kill_half_way(folder / "input", output, options.files // 2)
            resumed = convert(folder / "input", output)
            arrays = require_equal(folder / "whole/dataset.zarr", output / "dataset.zarr")
            summary = resumed.summary()
            print(
                f"killed with {done} of {options.files} recorded, resumed to "
                f"{summary['completed']}: {arrays} arrays equal"
            )


if __name__ == "__main__":
    main()
