"""Files and directories are at their place whole, or as they were, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from drivers import Start, small_disk, start, write_script
from stages_for_tests import wait_until

from psnc import OutputError, PsncError, atomic_directory, atomic_write
from psnc.atomic import atomic_path

__all__ = ["small_disk", "start"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    earlier = os.umask(mask)
    try:
        yield
    finally:
        os.umask(earlier)


def everything_in(directory: Path) -> list[str]:
    """Return the paths of all that is there, hidden or not, from there."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- what is written --------------------------------------------------------------------------


def test_bytes_and_text_are_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as file:
        assert file.write(b"\x00\r\n") == 3
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\r\n"
    with atomic_write(str(tmp_path / "b.txt"), "w") as text:
        text.write("größer\n")
    assert (tmp_path / "b.txt").read_bytes() == "größer\n".encode()
    with atomic_write(tmp_path / "c.txt", "w", encoding="latin-1", newline="\r\n") as text:
        text.write("größer\n")
    assert (tmp_path / "c.txt").read_bytes() == "größer\r\n".encode("latin-1")
    assert everything_in(tmp_path) == ["a.bin", "b.txt", "c.txt"]


def test_the_place_holds_the_old_content_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_draft_can_be_sought_in_and_closed_early(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"....tail")
        file.seek(0)
        file.write(b"head")
        file.close()
    assert (tmp_path / "a.bin").read_bytes() == b"headtail"


def test_missing_directories_are_made(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a/b/c.txt", "w") as file:
        file.write("c")
    with atomic_directory(tmp_path / "d/e/f") as draft:
        (draft / "g").touch()
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/c.txt", "d", "d/e", "d/e/f", "d/e/f/g"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    for names in (["a", "b"], ["b", "c/d"], []):
        with atomic_directory(place) as draft:
            assert draft.is_absolute()
            assert draft.name == "out"
            assert list(draft.iterdir()) == []
            for name in names:
                (draft / name).parent.mkdir(exist_ok=True)
                (draft / name).write_text(name)
        assert [name for name in everything_in(place) if (place / name).is_file()] == names
    assert everything_in(tmp_path) == ["out"]


def test_a_draft_directory_can_be_made_anew_as_libraries_do(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as draft:
        draft.rmdir()
        draft.mkdir()
        (draft / "a").touch()
    assert everything_in(tmp_path) == ["out", "out/a"]


def test_a_draft_directory_that_is_gone_in_the_end_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"out cannot be written: its draft is no directory"),
        atomic_directory(tmp_path / "out") as draft,
    ):
        draft.rmdir()
    assert everything_in(tmp_path) == []


def test_a_file_written_by_its_name_takes_its_place_and_none_changes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.npz"
    with atomic_path(path) as draft:
        assert draft.suffix == ".npz"
        assert not draft.exists()
    assert everything_in(tmp_path) == []
    for text in ("one", "two"):
        with atomic_path(path) as draft:
            draft.write_text(text)
        assert path.read_text() == text
    with atomic_path(path):
        pass
    assert path.read_text() == "two"
    assert everything_in(tmp_path) == ["a.npz"]


def test_names_that_leave_no_room_for_a_draft_s_are_written(tmp_path: Path) -> None:
    longest = "ä" * 127  # of two bytes each
    with atomic_write(tmp_path / longest) as file:
        file.write(b"a")
    os.unlink(tmp_path / longest)
    with atomic_directory(tmp_path / longest):
        pass
    (tmp_path / longest).rmdir()
    longest = f"{'a' * 245}.{'ä' * 4}"
    with atomic_path(tmp_path / longest) as path:
        path.touch()
    assert everything_in(tmp_path) == [longest]


# --- exceptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_what_was_there_and_no_draft(
    error: BaseException, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    before = everything_in(tmp_path)

    def break_off_in_a_file(path: Path) -> None:
        with atomic_write(path, "w") as file:
            file.write("new")
            raise error

    def break_off_in_a_directory(path: Path) -> None:
        with atomic_directory(path) as draft:
            (draft / "a").write_text("new")
            raise error

    for name in ("a.txt", "b.txt"):
        with pytest.raises(type(error)):
            break_off_in_a_file(tmp_path / name)
    for name in ("out", "new"):
        with pytest.raises(type(error)):
            break_off_in_a_directory(tmp_path / name)
    assert everything_in(tmp_path) == before
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "out/a").read_text() == "old"


def test_what_is_no_mode_is_refused(tmp_path: Path) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("a", {}, "mode='a': choose 'wb', or 'w' for text"),
        ("x", {}, "mode='x': choose 'wb', or 'w' for text"),
        ("wb", {"encoding": "utf-8"}, "encoding and newline are of text"),
        ("wb", {"newline": ""}, "encoding and newline are of text"),
    ]
    for mode, options, message in wrong:
        with (
            pytest.raises(ValueError, match=message),
            atomic_write(tmp_path / "a", mode, **options),
        ):
            pass
    with pytest.raises(LookupError), atomic_write(tmp_path / "a", "w", encoding="runes"):
        pass
    with pytest.raises(ValueError, match="newline"), atomic_write(tmp_path / "a", "w", newline="|"):
        pass
    assert everything_in(tmp_path) == []


def test_errors_are_one_line_that_says_where_and_what_to_do(tmp_path: Path) -> None:
    file, directory, loop = tmp_path / "file", tmp_path / "directory", tmp_path / "loop"
    file.touch()
    directory.mkdir()
    loop.symlink_to(loop)
    cases = [
        (atomic_write, directory, "directory cannot be written: it is a directory"),
        (atomic_path, directory, "directory cannot be written: it is a directory"),
        (
            atomic_path,
            Path("/dev/null"),
            "/dev/null cannot be written: it is no file, but a device",
        ),
        (atomic_directory, file, "file cannot be written: it is a file, not a directory"),
        (atomic_write, file / "a", "file/a cannot be written: Not a directory; choose another"),
        (atomic_directory, file / "a", "file/a cannot be written: Not a directory; choose another"),
        (atomic_write, loop, "loop cannot be written: Too many levels of symbolic links; mend"),
        (atomic_write, tmp_path / ("a" * 256), "aaa cannot be written: File name too long"),
        (atomic_write, Path("/proc/a"), "/proc/a cannot be written: "),
    ]
    for write, path, message in cases:
        with pytest.raises(OutputError, match=message) as caught, write(path):
            pytest.fail("the block was entered")
        assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == ["directory", "file", "loop"]


def test_the_error_is_psnc_s_and_the_system_s_and_travels_between_processes(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PsncError) as caught, atomic_write(tmp_path / "file/a"):
        pass
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOTDIR
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_error_of_the_block_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "missing").read_text()


# --- disks ------------------------------------------------------------------------------------

FILL = """
import errno, os, resource, sys
from pathlib import Path
from psnc import OutputError, atomic_directory, atomic_write
from psnc.atomic import atomic_path

place, kind, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    if kind == "bytes":
        with atomic_write(place) as file:
            for _ in range(2000):
                file.write(b"x" * 1000)
    elif kind == "text":
        with atomic_write(place, "w") as file:
            file.write("x" * 2_000_000)
    elif kind == "path":
        with atomic_path(place) as draft:
            draft.write_bytes(b"x" * 2_000_000)
    else:
        with atomic_directory(place) as draft:
            (draft / "a").write_bytes(b"x" * 2_000_000)
except OSError as error:
    print(type(error).__name__, errno.errorcode[error.errno], error)
"""


@pytest.mark.parametrize("kind", ["bytes", "text", "path", "directory"])
def test_a_full_disk_leaves_what_was_there(
    kind: str, small_disk: Path, tmp_path: Path, run_python: Run
) -> None:
    _expect_the_old(kind, small_disk / "a", tmp_path, run_python, 0, "ENOSPC", "No space left on")


@pytest.mark.parametrize("kind", ["bytes", "text", "path", "directory"])
def test_a_limit_on_file_sizes_leaves_what_was_there(
    kind: str, tmp_path: Path, run_python: Run
) -> None:
    place = tmp_path / "place/a"
    place.parent.mkdir()
    _expect_the_old(kind, place, tmp_path, run_python, 300_000, "EFBIG", "File too large")


def _expect_the_old(
    kind: str, place: Path, tmp_path: Path, run_python: Run, limit: int, code: str, reason: str
) -> None:
    old = place
    if kind == "directory":
        place.mkdir()
        old = place / "a"
    old.write_text("old")
    before = everything_in(place.parent)
    script = write_script(tmp_path / "script.py", FILL)
    printed = run_python(script, place, kind, str(limit)).stdout
    if kind in ("bytes", "text"):
        assert printed.startswith(f"OutputError {code} {place} cannot be written: {reason}")
    else:
        assert printed.startswith(f"OSError {code} [Errno")
    assert old.read_text() == "old"
    assert everything_in(place.parent) == before


# --- places -----------------------------------------------------------------------------------


def test_a_relative_path_is_that_of_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    with atomic_write("a.txt", "w"), atomic_directory("out") as draft, atomic_path("b.txt") as path:
        os.chdir(there)
        (draft / "a").touch()
        path.touch()
    assert everything_in(here) == ["a.txt", "b.txt", "out", "out/a"]
    assert everything_in(there) == []


def test_a_removed_working_directory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with (
        pytest.raises(OutputError, match=r"^a\.txt cannot be written: No such"),
        atomic_write("a.txt"),
    ):
        pass
    monkeypatch.chdir(tmp_path)


def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("old")
    (tmp_path / "a").symlink_to("elsewhere/a.txt")
    (tmp_path / "dangling").symlink_to("elsewhere/new.txt")
    (tmp_path / "out").symlink_to("elsewhere/out", target_is_directory=True)
    for name in ("a", "dangling"):
        with atomic_write(tmp_path / name, "w") as file:
            file.write("new")
    for names in ("ab", "c"):
        with atomic_directory(tmp_path / "out") as draft:
            for name in names:
                (draft / name).touch()
    assert (elsewhere / "a.txt").read_text() == (elsewhere / "new.txt").read_text() == "new"
    assert everything_in(elsewhere) == ["a.txt", "new.txt", "out", "out/c"]
    assert all((tmp_path / name).is_symlink() for name in ("a", "dangling", "out"))


def test_links_in_a_directory_are_kept_as_they_are(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as draft:
        (draft / "dangling").symlink_to("nowhere")
        (draft / "up").symlink_to("..")
    assert os.readlink(tmp_path / "out/dangling") == "nowhere"
    assert os.readlink(tmp_path / "out/up") == ".."


def test_a_pipe_is_written_to_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with atomic_write(pipe, "w") as file:
        file.write("through")
    reader.join()
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


# --- permissions ------------------------------------------------------------------------------


def test_permissions_are_those_that_open_and_mkdir_give(tmp_path: Path) -> None:
    with umask(0o027):
        with atomic_write(tmp_path / "a"), atomic_directory(tmp_path / "b"):
            pass
        with atomic_path(tmp_path / "c") as path:
            path.touch()
    assert [mode_of(tmp_path / name) for name in "abc"] == [0o640, 0o750, 0o640]


def test_permissions_of_what_was_there_stay(tmp_path: Path) -> None:
    for name in "ac":
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o604)
    (tmp_path / "b").mkdir()
    (tmp_path / "b").chmod(0o2705)
    with atomic_write(tmp_path / "a"), atomic_directory(tmp_path / "b") as draft:
        (draft / "x").touch()
    with atomic_path(tmp_path / "c") as path:
        path.touch()
    assert [mode_of(tmp_path / name) for name in "abc"] == [0o604, 0o2705, 0o604]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@as_root
def test_the_owner_of_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").mkdir()
    for name in "ab":
        os.chown(tmp_path / name, 1234, 2345)
    with atomic_write(tmp_path / "a"), atomic_directory(tmp_path / "b"):
        pass
    for name in "ab":
        status = (tmp_path / name).stat()
        assert (status.st_uid, status.st_gid) == (1234, 2345)


@as_root
def test_what_may_not_be_written_is_refused(run_python: Run) -> None:
    """As another user, in a place of its own, since root may do everything."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory).resolve()
        place.chmod(0o755)
        for name in ("mine", "mine/locked", "locked"):
            (place / name).mkdir()
        (place / "mine/a").write_text("old")
        os.chown(place / "mine", 1234, 1234)
        before = everything_in(place)
        script = write_script(
            place / "script.py",
            """
            import os
            from psnc import OutputError, atomic_directory, atomic_write

            os.chdir(os.path.dirname(__file__))
            os.setuid(1234)
            for write, path in (
                (atomic_write, "mine/a"), (atomic_write, "new"), (atomic_write, "locked/a"),
                (atomic_directory, "mine/locked"), (atomic_directory, "new"),
            ):
                try:
                    with write(path):
                        print("entered")
                except OutputError as error:
                    print(error)
            with atomic_write("mine/b"), atomic_directory("mine/c"):
                pass
            """,
        )
        lines = run_python(script).stdout.splitlines()
        script.unlink()
        for line, name in zip(
            lines, ["mine/a", "new", "locked/a", "mine/locked", "new"], strict=True
        ):
            assert line == (
                f"{place / name} cannot be written: Permission denied; give yourself the "
                "permission, or choose another place"
            )
        assert everything_in(place) == sorted([*before, "mine/b", "mine/c"])


# --- many at once -----------------------------------------------------------------------------

WRITE = """
import sys, threading
from pathlib import Path
import psnc.atomic
from psnc import atomic_directory, atomic_write

place, name = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "no exchange":
    psnc.atomic._exchange_function = lambda: None
Path(f"begun-{name}").touch()

def write(thread):
    for number in range(12):
        text = f"{name}-{thread}-{number} " * 3000
        with atomic_write(place / "file.txt", "w") as file:
            file.write(text)
        with atomic_directory(place / "directory") as draft:
            for part in "abc":
                (draft / part).write_text(text)

threads = [threading.Thread(target=write, args=[thread]) for thread in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


def test_a_directory_that_another_writer_moves_away_meanwhile_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def looked_at_too_late(path: Path, mode: int) -> bool:
        monkeypatch.undo()
        place.rmdir()
        return os.access(path, mode)

    monkeypatch.setattr(os, "access", looked_at_too_late)
    with atomic_directory(place) as draft:
        (draft / "a").write_text("whole")
    assert (place / "a").read_text() == "whole"


def is_whole(text: str) -> bool:
    return len(set(text.split())) == 1 and text.count(" ") == 3000


@pytest.mark.parametrize("exchange", ["exchange", "no exchange"])
def test_threads_and_processes_that_write_one_place_at_once_each_write_it_whole(
    exchange: str, tmp_path: Path, start: Start
) -> None:
    place = tmp_path / "place"
    drivers = []
    for name in ("one", "two", "three"):
        drivers.append(start(WRITE, place, name, exchange))
        # Its script is written anew for the next.
        wait_until((tmp_path / f"begun-{name}").exists)
    looks = 0
    while any(driver.process.poll() is None for driver in drivers):
        with suppress(FileNotFoundError):
            assert is_whole((place / "file.txt").read_text())
            for part in "abc":
                assert is_whole((place / "directory" / part).read_text())
            looks += 1
    assert [driver.finish() for driver in drivers] == [(0, "done\n", "")] * 3
    assert looks
    assert is_whole((place / "file.txt").read_text())
    texts = {(place / "directory" / part).read_text() for part in "abc"}
    assert len(texts) == 1
    assert is_whole(texts.pop())
    assert everything_in(place) == [
        "directory", "directory/a", "directory/b", "directory/c", "file.txt",
    ]  # fmt: skip


def test_one_process_can_write_one_place_twice_at_once(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    with atomic_write(place, "w") as outer:
        for text in ("one", "two"):
            with atomic_write(place, "w") as inner:
                inner.write(text)
            assert place.read_text() == text
        outer.write("three")
    assert place.read_text() == "three"
    assert everything_in(tmp_path) == ["a.txt"]


def test_a_child_that_is_forked_in_the_block_leaves_the_file_to_its_parent(
    tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import os
        from psnc import atomic_directory, atomic_write

        for write in (atomic_write, atomic_directory):
            for ending in (RuntimeError, None):
                child = -1
                try:
                    with write("place/out") as draft:
                        child = os.fork()
                        if child == 0 and ending is not None:
                            raise ending
                        if child != 0:
                            assert os.waitpid(child, 0)[1] == 0
                            assert len(os.listdir("place")) == 1 and not os.path.exists("place/out")
                except RuntimeError:
                    pass
                if child == 0:
                    os._exit(0)
                assert os.listdir("place") == ["out"]
                os.unlink("place/out") if write is atomic_write else os.rmdir("place/out")
        print("done")
        """,
    )
    assert run_python(script).stdout == "done\n"


# --- kills ------------------------------------------------------------------------------------

# Ends itself by SIGKILL at the n-th thing that Python has the system do in the block or at its end,
# for n = 1, 2, 3, …, until it gets through. Each time a forked child, on fresh old content.
KILLED_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
import psnc.atomic
from psnc import atomic_directory, atomic_write
from psnc.atomic import atomic_path

kind, exchange, there = sys.argv[1], sys.argv[2] == "exchange", sys.argv[3] == "old"
if not exchange:
    psnc.atomic._exchange_function = lambda: None
place = Path("place/7.out").absolute()
ENOUGH = {"open", "ctypes.set_errno", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod",
          "os.chown", "os.listdir", "os.scandir", "shutil.rmtree", "fcntl.flock"}

def write(text):
    if kind == "file":
        with atomic_write(place, "w") as file:
            file.write(text[:2])
            file.flush()
            file.write(text[2:])
    elif kind == "path":
        with atomic_path(place) as draft:
            draft.write_text(text)
    else:
        with atomic_directory(place) as draft:
            for name in (text, "both"):
                (draft / name).write_text(text)

def state():
    if not place.exists():
        return None
    if place.is_file():
        return place.read_text()
    assert sorted(os.listdir(place)) == sorted([(place / "both").read_text(), "both"])
    return (place / "both").read_text()

def die_at(step):
    def hook(event, arguments):
        nonlocal step
        if event in ENOUGH:
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

write("warm up: what is imported on the way")
step = 0
while True:
    step += 1
    shutil.rmtree("place", ignore_errors=True)
    os.mkdir("place")
    if there:
        write("old")
    child = os.fork()
    if child == 0:
        die_at(step)
        write("newer")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    left = sorted(os.listdir("place"))
    found = state()
    drafts = [name for name in left if name != place.name]
    assert len(drafts) <= 1 + (kind == "path"), left
    assert all(each.startswith(".7.out.") and ".draft" in each for each in drafts), left
    print(found, len(drafts), flush=True)
    if found is None and there:
        # The old one comes back with the next who writes, even if that one fails.
        try:
            with atomic_directory(place):
                assert state() == "old"
                raise RuntimeError
        except RuntimeError:
            assert state() == "old"
    write("next")
    assert os.listdir("place") == [place.name], os.listdir("place")
    assert state() == "next"
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


def _killed_at_every_step(
    kind: str, exchange: str, there: str, tmp_path: Path, run_python: Run
) -> list[tuple[str, int]]:
    script = write_script(tmp_path / "script.py", KILLED_AT_EVERY_STEP)
    printed = run_python(script, kind, exchange, there).stdout
    return [(line.split()[0], int(line.split()[1])) for line in printed.splitlines()]


@pytest.mark.parametrize("there", ["old", "nothing"])
@pytest.mark.parametrize("kind", ["file", "path", "directory"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_a_draft_that_the_next_one_removes(
    kind: str, there: str, tmp_path: Path, run_python: Run
) -> None:
    steps = _killed_at_every_step(kind, "exchange", there, tmp_path, run_python)
    states = [state for state, _ in steps]
    old = "old" if there == "old" else "None"
    turn = states.index("newer")
    assert turn >= 3
    assert states == [old] * turn + ["newer"] * (len(states) - turn)
    assert steps[-1] == ("newer", 0)
    assert sum(drafts for _, drafts in steps) >= 2


def test_without_an_exchange_there_is_one_moment_of_nothing_and_the_old_one_comes_back(
    tmp_path: Path, run_python: Run
) -> None:
    steps = _killed_at_every_step("directory", "no exchange", "old", tmp_path, run_python)
    states = [state for state, _ in steps]
    before, after = states.count("old"), states.count("newer")
    assert min(before, after) >= 3
    assert states == ["old"] * before + ["None"] * states.count("None") + ["newer"] * after
    # The second of the two renames, and nothing else.
    assert states.count("None") == 1


OVER_AND_OVER = """
import itertools, sys
from psnc import atomic_directory, atomic_write

for number in itertools.count():
    text = f"{number} " * 20000
    with atomic_write("place/file.txt", "w") as file:
        for part in range(20):
            file.write(f"{number} " * 1000)
    with atomic_directory("place/directory") as draft:
        for part in "abc":
            (draft / part).write_text(text)
    if number == 0:
        open("begun", "w").close()
"""


def test_random_kills_leave_whole_files_and_directories(
    tmp_path: Path, start: Start, run_python: Run
) -> None:
    place = tmp_path / "place"
    for kill in range(12):
        (tmp_path / "begun").unlink(missing_ok=True)
        driver = start(OVER_AND_OVER)
        wait_until((tmp_path / "begun").exists)
        # Some more rounds, a different number each time.
        rounds = 1 + kill % 4
        wait_until(lambda rounds=rounds: int((place / "file.txt").read_text()[:2]) >= rounds)
        driver.kill()
        texts = [(place / "file.txt").read_text()]
        texts += [(place / "directory" / part).read_text() for part in "abc"]
        for text in texts:
            assert len(set(text.split())) == 1
            assert text.count(" ") == 20000
        assert len(set(texts[1:])) == 1
        assert sorted(os.listdir(place / "directory")) == ["a", "b", "c"]
    for name in ("file.txt", "directory"):
        write = atomic_write if name == "file.txt" else atomic_directory
        with write(place / name):
            pass
    assert sorted(os.listdir(place)) == ["directory", "file.txt"]


HOLD = """
import sys, time
from pathlib import Path
from psnc import atomic_directory, atomic_write

with atomic_write("place/file.txt", "w") as file, atomic_directory("place/directory") as draft:
    file.write("patient")
    file.flush()
    (draft / "a").write_text("patient")
    Path("held-" + sys.argv[1]).touch()
    while not Path("go").exists():
        time.sleep(0.01)
"""


def test_drafts_of_the_living_are_left_alone_even_if_they_are_stopped(
    tmp_path: Path, start: Start
) -> None:
    place = tmp_path / "place"
    patient = start(HOLD, "patient")
    wait_until((tmp_path / "held-patient").exists)
    os.kill(patient.process.pid, signal.SIGSTOP)
    held = everything_in(place)
    for _ in range(3):
        with atomic_write(place / "file.txt", "w"), atomic_directory(place / "directory"):
            pass
        assert everything_in(place) == sorted([*held, "directory", "file.txt"])
    os.kill(patient.process.pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    assert patient.finish() == (0, "", "")
    assert (place / "file.txt").read_text() == (place / "directory/a").read_text() == "patient"
    assert everything_in(place) == ["directory", "directory/a", "file.txt"]


def test_what_several_killed_writers_left_is_removed_at_once(tmp_path: Path, start: Start) -> None:
    place = tmp_path / "place"
    drivers = []
    for number in range(6):
        drivers.append(start(HOLD, number))
        wait_until((tmp_path / f"held-{number}").exists)
    assert len(os.listdir(place)) == 12
    for driver in drivers:
        driver.kill()
    with atomic_write(place / "file.txt"), atomic_directory(place / "directory"):
        pass
    assert everything_in(place) == ["directory", "file.txt"]


def test_drafts_of_other_machines_and_other_files_are_left_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt"):
        (draft,) = os.listdir(tmp_path)
    machine = draft.removeprefix(".a.txt.").removesuffix("-0.draft")
    assert len(machine) == 8
    others = [f".a.txt.{'0' * 8}-0.draft", f".a.txt.bak.{machine}-0.draft", ".a.txt.draft"]
    for other in others:
        (tmp_path / other).touch()
    (tmp_path / draft).touch()
    with atomic_write(tmp_path / "a.txt"):
        pass
    assert everything_in(tmp_path) == sorted(["a.txt", *others])


def test_a_link_under_a_draft_s_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with atomic_write(tmp_path / "a.txt"):
        (draft,) = (name for name in os.listdir(tmp_path) if name != "precious")
    (tmp_path / draft).symlink_to("precious")
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_without_locks_drafts_have_random_names_and_are_removed_by_their_writer_alone(
    tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import errno, fcntl, os, re
        from psnc import atomic_directory, atomic_write

        def flock(descriptor, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock
        for write in (atomic_write, atomic_directory):
            with write("place/a") as one, write("place/a") as other:
                drafts = os.listdir("place")
                assert len(drafts) == 2
                for draft in drafts:
                    assert re.fullmatch(r"\\.a\\.[0-9a-f]{8}-[0-9a-f]{32}\\.draft", draft)
            assert os.listdir("place") == ["a"]
            os.unlink("place/a") if write is atomic_write else os.rmdir("place/a")
        print("done")
        """,
    )
    assert run_python(script).stdout == "done\n"
