"""GPU memory: recorded where there is a GPU, and without a word where there is none.

A stand-in for the driver says what the GPUs hold; ``pytest -m gpu`` asks a real one.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pynvml
import pytest
import stand_in_gpu
from drivers import BACKENDS, jobs
from stages_for_tests import Discard, Numbers, numbers_pipeline
from stand_in_gpu import OWN, Gpus, own

from psnc import Config, Filter, run_pipeline
from psnc.builtin import nvml
from psnc.manager import PluginManager, activated

MB = 1_000_000
Query = Callable[..., Any]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def _gpu_memory(pipeline: Any, query: Query) -> list[int | None]:
    pipeline.summary()  # what is recorded is in the database once the pipeline is asked
    rows = query(pipeline.db_path, "SELECT gpu_memory_bytes FROM index_results ORDER BY idx")
    return [value for (value,) in rows]


def _monitors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "psnc-gpu"]


# --- without a GPU ----------------------------------------------------------------------------


def _gpus() -> int:
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


GPUS = _gpus()
without_gpu = pytest.mark.skipif(GPUS > 0, reason="this machine has a GPU")


@without_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gpu_nothing_is_recorded_and_nothing_said(
    backend: str, query: Query, capfd: pytest.CaptureFixture[str], plugins: PluginManager
) -> None:
    pipeline = numbers_pipeline(4)
    # Not from a fork server, which may hold the standard error of an earlier test.
    options = {"start_method": "spawn"} if backend == "process_pool" else {}
    run_pipeline(pipeline, jobs(backend), backend, **options)
    assert _gpu_memory(pipeline, query) == [None] * 4
    assert query(pipeline.db_path, "SELECT * FROM logs") == []
    assert capfd.readouterr() == ("", "")
    assert plugins.errors == {}


@without_gpu
def test_without_a_gpu_no_thread_is_started() -> None:
    class SeeThreads(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            assert _monitors() == []
            return items

    run_pipeline(Numbers(2).filter(SeeThreads()).write(Discard()), on_error="raise")


def test_gpu_memory_that_is_not_tracked_is_null(query: Query) -> None:
    pipeline = numbers_pipeline(2, track_gpu=False)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [None] * 2


def test_a_run_that_does_not_track_the_gpu_does_not_load_its_library(
    run_python: RunPython,
) -> None:
    program = (
        "import sys\n"
        "from psnc import run_pipeline\n"
        "from stages_for_tests import numbers_pipeline\n"
        "run_pipeline(numbers_pipeline(2, track_gpu=False))\n"
        "print('pynvml' in sys.modules)\n"
    )
    assert run_python("-c", program).stdout == "False\n"


def test_without_its_library_nothing_is_recorded_and_nothing_said(
    monkeypatch: pytest.MonkeyPatch, query: Query, plugins: PluginManager
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [None] * 2
    assert plugins.errors == {}


# --- with a stand-in for the driver -----------------------------------------------------------


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: PluginManager) -> Iterator[Gpus]:
    """Have one GPU, on which nothing is held."""
    state = Gpus(tmp_path / "gpus.json")
    state.set({})
    monkeypatch.setenv(stand_in_gpu.STATE, str(state.path))
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    manager = PluginManager(Config(plugins=("stand_in_gpu",)))
    manager.load()
    with activated(manager):
        yield state
    manager.close()
    assert manager.errors == {}


@pytest.fixture
def read_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have readings at the ends of the shortest index, whatever share of the time they take."""
    monkeypatch.setattr(nvml, "_REST", 0)


class Hold(Filter[int, int]):
    """At one index holds more for as long as it takes to be noticed, or only until its end."""

    def __init__(self, state: str, at: int = 1, *, until_noticed: bool = True) -> None:
        self.state = state
        self.at = at
        self.until_noticed = until_noticed

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        gpus = Gpus(Path(self.state))
        for item in items:
            if item == self.at:
                gpus.set(own(500 * MB))
                if self.until_noticed:
                    gpus.wait_for_questions(12)
                    gpus.set(own(100 * MB))
            yield item


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_peak_of_an_index_is_recorded_though_it_is_over_before_the_end(
    backend: str, gpus: Gpus, query: Query
) -> None:
    gpus.set(own(100 * MB))
    pipeline = Numbers(2).filter(Hold(str(gpus.path))).write(Discard())
    run_pipeline(pipeline, 1, backend, on_error="raise")
    assert _gpu_memory(pipeline, query) == [100 * MB, 500 * MB]


@pytest.mark.usefixtures("read_always")
def test_what_is_held_as_an_index_begins_or_ends_counts(gpus: Gpus, query: Query) -> None:
    pipeline = Numbers(4).filter(Hold(str(gpus.path), until_noticed=False)).write(Discard())
    _ = pipeline[0], pipeline[1], pipeline[2]
    gpus.set({})
    _ = pipeline[3]
    assert _gpu_memory(pipeline, query) == [None, 500 * MB, 500 * MB, None]


@pytest.mark.usefixtures("read_always")
@pytest.mark.parametrize(
    ("held", "expected"),
    [
        pytest.param([{"Compute": [[1, 5], [OWN, 7]]}], 7, id="another process beside it"),
        pytest.param([{"Compute": [[1, 5]]}], None, id="another process alone"),
        pytest.param([{"Compute": [[OWN, 0]]}], 0, id="nothing yet"),
        pytest.param([own(7), {}, own(8)], 15, id="several GPUs"),
        pytest.param([own(7, "Graphics")], 7, id="drawing"),
        pytest.param([own(7, "MPSCompute")], 7, id="sharing a context"),
        pytest.param(
            [{"Compute": [[OWN, 9]], "Graphics": [[OWN, 9]]}], 9, id="computing and drawing"
        ),
        pytest.param([{"mig": [{}, own(7)]}, own(8)], 15, id="a divided GPU"),
        pytest.param([{"mig": [], **own(7)}], 7, id="a GPU that could be divided"),
        pytest.param([{"Compute": [[OWN, None]]}], None, id="withheld"),
        pytest.param([own(7) | {"Graphics": 3}], 7, id="a question not supported"),
        pytest.param([own(7), {"Compute": 4, "Graphics": 4, "MPSCompute": 4}], 7, id="another's"),
    ],
)
def test_all_that_this_process_holds_counts_once_and_nothing_else(
    held: list[dict[str, Any]], expected: int | None, gpus: Gpus, query: Query
) -> None:
    gpus.set(*held)
    pipeline = numbers_pipeline(1)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [expected]


def test_an_older_driver_is_asked_in_its_own_way(gpus: Gpus, query: Query) -> None:
    newer = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics")]
    gpus.set(own(7), without=newer)
    pipeline = numbers_pipeline(1)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [7]


def test_indices_side_by_side_share_what_their_process_holds(gpus: Gpus, query: Query) -> None:
    gpus.set(own(100 * MB))

    class WaitForTheOther(Filter[int, int]):
        """Index 0 spans index 1, and holds the most while that runs."""

        begun = (threading.Event(), threading.Event())
        other_is_over = threading.Event()

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                self.begun[item].set()
                assert self.begun[1 - item].wait(30)
                if item == 0:
                    assert self.other_is_over.wait(30)
                yield item

    stages = Numbers(2).filter(WaitForTheOther()).filter(Hold(str(gpus.path)))
    pipeline = stages.write(Discard())
    first = threading.Thread(target=pipeline.__getitem__, args=(0,))
    first.start()
    _ = pipeline[1]
    WaitForTheOther.other_is_over.set()
    first.join()
    assert _gpu_memory(pipeline, query) == [500 * MB, 500 * MB]


def test_without_a_driver_it_is_asked_for_once_in_a_process(
    gpus: Gpus, query: Query, capfd: pytest.CaptureFixture[str]
) -> None:
    not_loaded = {"nvmlInitWithFlags": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
    gpus.set(own(7), errors=not_loaded)
    pipeline = numbers_pipeline(5)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [None] * 5
    assert gpus.questions() == ["nvmlInitWithFlags"]
    assert _monitors() == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("gpu", [None, {"Compute": 3, "Graphics": 3, "MPSCompute": 3}])
def test_a_driver_that_tells_nothing_is_left_alone(
    gpu: dict[str, Any] | None, gpus: Gpus, query: Query
) -> None:
    gpus.set(*([] if gpu is None else [gpu]))
    pipeline = numbers_pipeline(5)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [None] * 5
    assert len(gpus.questions("Init")) == len(gpus.questions("Shutdown")) == 1
    assert len(gpus.questions("Processes")) <= 6
    assert _monitors() == []


def test_the_driver_is_not_asked_while_no_index_runs(gpus: Gpus) -> None:
    gpus.set(own(7))
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    time.sleep(0.1)
    asked = len(gpus.questions())
    # Several times the interval at which it is asked while one runs.
    time.sleep(0.3)
    assert len(gpus.questions()) == asked
    assert len(_monitors()) == 1


def test_the_driver_is_left_and_the_thread_ended_with_the_plugins(gpus: Gpus) -> None:
    manager = PluginManager(Config(plugins=("stand_in_gpu",)))
    manager.load()
    with activated(manager):
        run_pipeline(numbers_pipeline(2))
        assert len(_monitors()) == 1
    manager.close()
    assert _monitors() == []
    assert len(gpus.questions("Init")) == len(gpus.questions("Shutdown")) == 1


def test_a_run_that_does_not_track_the_gpu_does_not_ask_the_driver(gpus: Gpus) -> None:
    run_pipeline(numbers_pipeline(2, track_gpu=False))
    assert gpus.questions() == []


def test_a_slow_driver_does_not_slow_down_short_indices(gpus: Gpus) -> None:
    gpus.set(own(7), takes_s=0.01)
    run_pipeline(numbers_pipeline(300))
    # A reading before and after each of them would be 600.
    assert len(gpus.questions("Compute")) < 100


def test_a_gpu_that_is_lost_is_spoken_of_once_and_stops_nothing(gpus: Gpus, query: Query) -> None:
    class Lose(Filter[int, int]):
        gpus: ClassVar[Gpus]

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 1:
                    lost = {"nvmlDeviceGetComputeRunningProcesses_v3": 15}
                    self.gpus.set(own(7), own(8), errors=lost)
                    self.gpus.wait_for_questions(6)
                yield item

    Lose.gpus = gpus
    gpus.set(own(7), own(8))
    pipeline = Numbers(3).filter(Lose()).write(Discard())
    run_pipeline(pipeline, on_error="raise")
    assert _gpu_memory(pipeline, query)[:2] == [15, 15]
    ((level, logger, index, message),) = query(
        pipeline.db_path, "SELECT level_name, logger_name, idx, message FROM logs"
    )
    assert (level, logger, index) == ("WARNING", "psnc.gpu", 1)
    assert message.startswith("a GPU does not tell its memory (GPU is lost): ")


def test_an_interrupted_index_leaves_the_next_one_its_own_peak(
    gpus: Gpus, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "_REST", 0)

    class Interrupt(Filter[int, int]):
        gpus: ClassVar[Gpus]

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 0:
                    self.gpus.set(own(500 * MB))
                    raise KeyboardInterrupt
                yield item

    Interrupt.gpus = gpus
    pipeline = Numbers(2).filter(Interrupt()).write(Discard())
    with pytest.raises(KeyboardInterrupt):
        _ = pipeline[0]
    gpus.set(own(100 * MB))
    _ = pipeline[1]
    assert _gpu_memory(pipeline, query) == [100 * MB]


def test_gpu_memory_is_measured_after_a_fork_as_well(
    gpus: Gpus, run_python: RunPython, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sqlite3\n"
        "from psnc import Config\n"
        "from psnc.manager import activate\n"
        "from stages_for_tests import numbers_pipeline\n"
        "activate(Config(plugins=('stand_in_gpu',)))\n"
        "pipeline = numbers_pipeline(3)\n"
        "pipeline[0]\n"
        "child = os.fork()\n"
        "pipeline[2 if child else 1]\n"
        "pipeline.summary()\n"
        "if not child:\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "connection = sqlite3.connect(pipeline.db_path)\n"
        "print(connection.execute('SELECT gpu_memory_bytes FROM index_results').fetchall())\n"
    )
    gpus.set(own(7))
    finished = run_python(script)
    assert finished.stdout == "[(7,), (7,), (7,)]\n"
    assert len(gpus.questions("Init")) == 2


def test_a_program_that_forks_while_the_driver_is_asked_is_not_held_up(
    gpus: Gpus, run_python: RunPython, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "import pynvml\n"
        "from psnc import Config, Filter, run_pipeline\n"
        "from psnc.manager import activate\n"
        "from stages_for_tests import Discard, Numbers\n"
        "class Fork(Filter):\n"
        "    def __call__(self, items):\n"
        "        for _ in range(20):\n"
        "            child = os.fork()\n"
        "            if not child:\n"
        "                pynvml.nvmlInit()\n"
        "                os._exit(0)\n"
        "            assert os.waitpid(child, 0)[1] == 0\n"
        "        return items\n"
        "activate(Config(plugins=('stand_in_gpu',)))\n"
        "run_pipeline(Numbers(2).filter(Fork()).write(Discard()), on_error='raise')\n"
        "print('done')\n"
    )
    gpus.set(own(7), takes_s=0.002)
    assert run_python(script).stdout == "done\n"


# --- with a stand-in for PyTorch --------------------------------------------------------------


class _Cuda:
    """Counts bytes as ``torch.cuda`` does, and refuses to be begun by a question."""

    def __init__(self, devices: int = 1) -> None:
        self.initialized = False
        self.keeps_count = True
        self._now, self._peak = [0] * devices, [0] * devices

    def allocate(self, size: int, device: int = 0) -> None:
        self.initialized = True
        self._now[device] += size
        self._peak[device] = max(self._peak[device], self._now[device])

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        assert self.initialized
        return len(self._now)

    def reset_peak_memory_stats(self, device: int) -> None:
        self._require()
        self._peak[device] = self._now[device]

    def max_memory_allocated(self, device: int) -> int:
        self._require()
        return self._peak[device]

    def max_memory_reserved(self, device: int) -> int:
        return self.max_memory_allocated(device) + 2 * MB

    def _require(self) -> None:
        if not self.initialized:
            raise AssertionError("this would have begun CUDA")
        if not self.keeps_count:
            raise RuntimeError("this allocator keeps no count")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    """Have PyTorch imported, with two devices that nobody has used yet."""
    torch = ModuleType("torch")
    torch.cuda = cuda = _Cuda(devices=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    return cuda


class UseTorch(Filter[int, int]):
    """At some indices allocates tensors on two devices, and frees them."""

    def __init__(self, at: dict[int, int]) -> None:
        self.at = at

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        cuda = sys.modules["torch"].cuda
        for item in items:
            for device in (0, 1) if item in self.at else ():
                cuda.allocate(self.at[item], device)
                cuda.allocate(-self.at[item], device)
            yield item


def _torch_memory(pipeline: Any, query: Query) -> list[int | None]:
    pipeline.summary()
    rows = query(
        pipeline.db_path,
        "SELECT json_extract(measurements, '$.torch_gpu_memory_bytes') FROM index_results"
        " ORDER BY idx",
    )
    return [value for (value,) in rows]


def test_torch_tells_the_exact_peak_of_each_index_once_it_is_used(
    cuda: _Cuda, gpus: Gpus, query: Query
) -> None:
    pipeline = Numbers(4).filter(UseTorch({1: 50 * MB, 2: 20 * MB})).write(Discard())
    run_pipeline(pipeline)
    assert _torch_memory(pipeline, query) == [None, 100 * MB, 40 * MB, 0]
    # The driver tells nothing of this process here, so that what torch had reserved stands in.
    assert _gpu_memory(pipeline, query) == [None, 104 * MB, 44 * MB, 4 * MB]


@pytest.mark.usefixtures("read_always")
def test_the_larger_of_what_the_driver_and_torch_tell_is_recorded(
    cuda: _Cuda, gpus: Gpus, query: Query
) -> None:
    gpus.set(own(60 * MB))
    pipeline = Numbers(2).filter(UseTorch({0: 50 * MB, 1: 10 * MB})).write(Discard())
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [104 * MB, 60 * MB]
    assert _torch_memory(pipeline, query) == [100 * MB, 20 * MB]


def test_indices_side_by_side_keep_their_peaks_of_torch(cuda: _Cuda, query: Query) -> None:
    class Overlap(Filter[int, int]):
        """Index 0 has had its peak when index 1 begins, and ends after it."""

        had_peak, other_is_over = threading.Event(), threading.Event()

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                yield item
                if item == 0:
                    self.had_peak.set()
                    assert self.other_is_over.wait(30)

    stages = Numbers(2).filter(UseTorch({0: 50 * MB, 1: 20 * MB})).filter(Overlap())
    pipeline = stages.write(Discard())
    cuda.allocate(0)
    first = threading.Thread(target=pipeline.__getitem__, args=(0,))
    first.start()
    assert Overlap.had_peak.wait(30)
    _ = pipeline[1]
    Overlap.other_is_over.set()
    first.join()
    assert _torch_memory(pipeline, query) == [100 * MB, 40 * MB]


@pytest.mark.usefixtures("read_always")
def test_an_allocator_that_keeps_no_count_leaves_the_drivers_figure(
    cuda: _Cuda, gpus: Gpus, query: Query
) -> None:
    gpus.set(own(7))
    cuda.initialized, cuda.keeps_count = True, False
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [7, 7]
    assert _torch_memory(pipeline, query) == [None, None]


@pytest.mark.parametrize(
    "torch", [ModuleType("torch"), SimpleNamespace(cuda=None), SimpleNamespace(cuda=object())]
)
def test_another_module_named_torch_is_left_alone(
    torch: Any, monkeypatch: pytest.MonkeyPatch, query: Query, plugins: PluginManager
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    assert _torch_memory(pipeline, query) == [None, None]
    assert plugins.errors == {}


def test_torch_is_not_imported(tmp_path: Path, run_python: RunPython) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('nobody asked for this')\n")
    program = (
        "import sys\n"
        "from psnc import run_pipeline\n"
        "from stages_for_tests import numbers_pipeline\n"
        "run_pipeline(numbers_pipeline(2), 2, 'process_pool')\n"
        "run_pipeline(numbers_pipeline(2))\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python("-c", program).stdout == "False\n"


# --- with a GPU: pytest -m gpu ----------------------------------------------------------------


class HoldOnGpu(Filter[int, int]):
    """Holds 1 GiB for a while at one index, by CUDA's own means."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        cuda = ctypes.CDLL("libcuda.so.1")
        context, device, address = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_uint64()
        assert cuda.cuInit(0) == 0
        assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
        assert cuda.cuCtxSetCurrent(context) == 0
        for item in items:
            if item == self.at:
                size = ctypes.c_size_t(2**30)
                assert cuda.cuMemAlloc_v2(ctypes.byref(address), size) == 0
                time.sleep(1)
                assert cuda.cuMemFree_v2(address) == 0
            yield item


def _require_told(peaks: list[int | None]) -> list[int]:
    told = [peak for peak in peaks if peak is not None]
    if len(told) < len(peaks):
        pytest.skip("the driver does not tell this process what it holds, as in some containers")
    return told


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_the_peak_of_each_index_is_recorded(backend: str, query: Query) -> None:
    pipeline = Numbers(3).filter(HoldOnGpu(1)).write(Discard())
    run_pipeline(pipeline, 1, backend, on_error="raise")
    before, during, after = _require_told(_gpu_memory(pipeline, query))
    assert during - before >= 2**30
    assert during - after >= 2**30


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
def test_on_a_gpu_the_exact_peak_of_torch_is_recorded(query: Query) -> None:
    torch = importlib.import_module("torch")

    class UseTensor(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                torch.empty(2**28 * (item + 1), dtype=torch.uint8, device="cuda")
                yield item

    pipeline = Numbers(3).filter(UseTensor()).write(Discard())
    run_pipeline(pipeline, indices=[2, 0, 1], on_error="raise")
    assert _torch_memory(pipeline, query) == [2**28, 2**29, 3 * 2**28]
    assert all(peak and peak >= 2**28 for peak in _gpu_memory(pipeline, query))


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
def test_on_a_gpu_a_pipeline_that_does_not_use_it_has_no_figure(
    query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = numbers_pipeline(100)
    with caplog.at_level(logging.DEBUG):
        run_pipeline(pipeline, 2, "process_pool")
    assert _gpu_memory(pipeline, query) == [None] * 100
    assert caplog.records == []
