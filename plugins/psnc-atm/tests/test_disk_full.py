from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from psnc_atm import ASELMDBSource

SCRIPT = """
import sys
from psnc import Pipeline, run_pipeline
from psnc_atm import ASELMDBSource, AtomicDataZarrSink
source, store, db, full = sys.argv[1:]
pipeline = Pipeline(
    source=ASELMDBSource(source), sink=AtomicDataZarrSink(store), resume=True, db_dir=db
)
run_pipeline(pipeline, indices=[0], progress=False)
with open(full, "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
run_pipeline(pipeline, progress=False)
print(len(pipeline.completed_indices), pipeline.failed_indices[1])
import os
os.unlink(full)
run_pipeline(pipeline, progress=False)
print(len(pipeline.completed_indices), pipeline.failed_indices)
"""


def test_a_full_disk_fails_indices_by_name_and_a_later_run_completes_them(
    dataset: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    in_its_own_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {small}"
    try:
        if subprocess.run([*in_its_own_namespace, mount], capture_output=True).returncode != 0:
            pytest.skip("this machine does not let a user mount a tmpfs")
    except FileNotFoundError:
        pytest.skip("this machine has no unshare")
    paths = [str(dataset), str(small / "out.zarr"), str(tmp_path / "db"), str(small / "full")]
    arguments = [sys.executable, "-c", SCRIPT, *paths]
    done = subprocess.run(
        [*in_its_own_namespace, f'{mount} && exec "$@"', "sh", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    full, after = done.stdout.splitlines()
    assert full.startswith("1 StageError: ")
    assert "cannot be written (No space left on device)" in full
    assert after == f"{len(ASELMDBSource(dataset))} {{}}"
