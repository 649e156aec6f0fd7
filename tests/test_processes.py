"""Which process is which, and whether it lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import psutil
import pytest
from stages_for_tests import wait_until

from psnc import processes
from psnc.processes import Life, ProcessIdentity, own_process


@pytest.fixture(params=["with-proc", "without-proc"])
def proc(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes looked up as Linux does, and as systems without ``/proc``."""
    if request.param == "without-proc":
        monkeypatch.setattr(processes, "_PROC", str(tmp_path / "nothing"))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def identity_of(pid: int) -> ProcessIdentity:
    started_at = processes._start_of(pid)
    assert started_at
    return attrs.evolve(own_process(), pid=pid, process_started_at=started_at)


@pytest.mark.usefixtures("proc")
def test_this_process_lives() -> None:
    assert own_process().life() is Life.ALIVE
    assert own_process() == own_process()


@pytest.mark.usefixtures("proc")
def test_a_process_that_was_killed_is_dead_as_a_zombie_and_later(
    child: subprocess.Popen[bytes],
) -> None:
    identity = identity_of(child.pid)
    assert identity.life() is Life.ALIVE
    os.kill(child.pid, signal.SIGSTOP)
    assert identity.life() is Life.ALIVE
    child.kill()
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert identity.life() is Life.DEAD
    child.wait()
    assert identity.life() is Life.DEAD


@pytest.mark.usefixtures("proc")
def test_a_process_that_began_at_another_time_is_another() -> None:
    assert attrs.evolve(own_process(), process_started_at="17").life() is Life.DEAD


@pytest.mark.usefixtures("proc")
@pytest.mark.parametrize("pid", [2**22 + 1, 2**70])
def test_a_number_that_no_process_has_is_of_a_dead_one(pid: int) -> None:
    assert attrs.evolve(own_process(), pid=pid).life() is Life.DEAD


@pytest.mark.usefixtures("proc")
def test_of_a_process_elsewhere_nothing_can_be_told() -> None:
    own = own_process()
    for elsewhere in ({"hostname": "node7"}, {"machine": "another"}, {"machine": ""}):
        assert attrs.evolve(own, pid=2**22 + 1, **elsewhere).life() is Life.UNKNOWN


def test_a_child_of_a_fork_is_another_process() -> None:
    here, there = os.pipe()
    own = own_process()
    child = os.fork()
    if child == 0:
        os.write(there, repr(own_process()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(here, 10_000).decode()
    os.close(here)
    os.close(there)
    assert said != repr(own)
    assert f"pid={child}," in said


def test_where_processes_are_shown_by_numbers_of_another_container_nothing_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text(Path("/proc/self/stat").read_text())
    (tmp_path / "self").symlink_to("1")
    monkeypatch.setattr(processes, "_PROC", str(tmp_path))
    own = own_process()
    assert (own.hostname, own.pid, own.machine) == (socket.gethostname(), os.getpid(), "")
    assert own.life() is Life.UNKNOWN


def test_a_process_that_is_hidden_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    identity = identity_of(child.pid)
    for name in ("self", "sys"):
        (tmp_path / name).symlink_to(f"/proc/{os.getpid() if name == 'self' else name}")
    monkeypatch.setattr(processes, "_machine", lambda: identity.machine)
    monkeypatch.setattr(processes, "_PROC", str(tmp_path))
    assert identity.life() is Life.UNKNOWN
    child.kill()
    child.wait()
    assert identity.life() is Life.DEAD
