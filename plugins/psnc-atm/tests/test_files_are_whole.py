"""What is at a file's name is whole: after an error, a full disk and a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data import molecules

from psnc import SourceError
from psnc_atm import ASELMDBSink, ASELMDBSource, ASESource, AtomicData, ExtxyzSink

SINKS = {"aselmdb": (ASELMDBSink, ASELMDBSource), "extxyz": (ExtxyzSink, ASESource)}

SCRIPT = """
import os, resource, signal, sys
import psnc_atm
from data import molecules

def items():
    for number, atoms in enumerate(molecules(1200)):
        if number == 1000 and sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield psnc_atm.AtomicData.from_ase(atoms)

if sys.argv[3] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
try:
    getattr(psnc_atm, sys.argv[1])(sys.argv[2])(items(), 0)
except OSError as error:
    print(error)
"""


def write_in_a_process(sink: type, directory: Path, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, sink.__name__, str(directory), end],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("suffix", SINKS)
@pytest.mark.parametrize("written_before", [False, True])
@pytest.mark.parametrize("end", ["kill", "limit"])
def test_a_process_that_ends_in_the_middle_leaves_what_was_there(
    suffix: str, written_before: bool, end: str, tmp_path: Path
) -> None:
    sink, source = SINKS[suffix]
    good = [AtomicData.from_ase(atoms) for atoms in molecules(3, seed=1)]
    path = tmp_path / f"00000000.{suffix}"
    if written_before:
        sink(tmp_path)(iter(good), 0)
    before = path.read_bytes() if written_before else None
    done = write_in_a_process(sink, tmp_path, end)
    if end == "limit":
        assert f"{path} cannot be written" in done.stdout
        assert os.listdir(tmp_path) == ([path.name] if written_before else [])
    else:
        assert (done.returncode, done.stderr) == (-9, "")
    assert (path.read_bytes() if path.exists() else None) == before
    if written_before:
        assert list(source(tmp_path)[0]) == good
    else:
        with pytest.raises(SourceError, match=r"no file|holds no"):
            source(tmp_path)
    sink(tmp_path)(iter(good), 0)
    assert os.listdir(tmp_path) == [path.name]
    assert list(source(tmp_path)[0]) == good


@pytest.mark.parametrize("suffix", SINKS)
def test_an_error_of_the_stages_before_comes_through_and_leaves_nothing(
    suffix: str, tmp_path: Path
) -> None:
    def items():
        yield AtomicData.from_ase(next(molecules(1)))
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        SINKS[suffix][0](tmp_path)(items(), 0)
    assert os.listdir(tmp_path) == []
