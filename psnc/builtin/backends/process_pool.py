"""Run indices in processes of their own.

Workers start clean, from a server process that holds none of the driver's threads, locks or
connections, and without running the driver's script again, so that a script needs no
``if __name__ == "__main__"``.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.context import ForkProcess, ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import cloudpickle
from attrs import frozen
from pebble import ProcessExpired, ProcessPool
from pebble.common import process_exit

from psnc.backend import Backend, BatchLostError, R, T
from psnc.errors import INTERRUPTS, BackendError, PipelineError, WorkerDiedError
from psnc.execution import error_text
from psnc.manager import plugin_manager
from psnc.shared_bytes import SharedBytes, read_shared
from psnc.time_limit import is_enforceable
from psnc.worker import BatchResult, Surroundings, WorkerTask

__all__ = ["ProcessPoolBackend"]


@frozen
class _Sent:
    """What a call returned or raised, as bytes."""

    content: bytes
    failed: bool = False


class ProcessPoolBackend(Backend):
    """``n_jobs`` processes; one that dies is replaced.

    Parameters
    ----------
    n_jobs : int
        Number of processes.
    start_method : {"forkserver", "spawn", "fork"}, optional
        How they start: ``"forkserver"`` where there is one, else ``"spawn"``. ``"fork"`` is the
        fastest, and can deadlock once the driver has threads, as many libraries start them.
    """

    enforces_timeout = is_enforceable()

    def __init__(self, n_jobs: int, start_method: str | None = None) -> None:
        super().__init__(n_jobs)
        available = multiprocessing.get_all_start_methods()
        if start_method is None:
            start_method = "forkserver" if "forkserver" in available else "spawn"
        if start_method not in available:
            raise BackendError(
                f"start_method {start_method!r} does not exist here: choose one of "
                f"{', '.join(available)}"
            )
        self._start_method = start_method
        self._task: WorkerTask | None = None
        self._shared: list[SharedBytes] = []
        self._shared_task: SharedBytes | None = None
        self._directory: str | None = None
        # Guards what follows, for moments.
        self._changing = threading.Lock()
        self._outstanding: set[Future[Any]] = set()
        self._broken_in_a_row = 0
        self._watched: Any = None
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Call the function in the processes, which start for it if they have not yet."""
        name = _name_of(function)
        items = list(items)
        surroundings = Surroundings.here(plugin_manager().config)
        try:
            content = pickle.dumps((name, surroundings, cloudpickle.dumps(function)))
            sent = [cloudpickle.dumps(item) for item in items]
        except Exception as error:
            raise PipelineError(
                f"{name}, which the stages call to get ready, or what it is called with, cannot be "
                f"sent to another process ({type(error).__name__}: {error}): open such things when "
                "they are first used, or run with backend='thread_pool'"
            ) from error
        self._opened()
        shared = SharedBytes(content)
        self._shared.append(shared)
        # Not by where it is, which may be where an earlier one was.
        number = len(self._shared)
        schedule = partial(self._schedule, _call, number, shared.told)
        try:
            outcomes = self._schedule_in_turn(schedule, sent)
            results = [
                _result_of(outcome, partial(schedule, item))
                for outcome, item in zip(outcomes, sent, strict=False)
            ]
        except WorkerDiedError as error:
            raise WorkerDiedError(
                f"{error}: it was at {name}, which the stages call to get ready; run again, with "
                "fewer jobs if memory was short",
                error.pid,
            ) from error
        # Else a process may yet look for it.
        shared.close()
        return results

    def _schedule_in_turn(
        self, schedule: Callable[[bytes], Future[_Sent]], items: Iterable[bytes]
    ) -> list[Future[_Sent]]:
        """Schedule a call for each item, few at a time, and no more once one has failed."""
        room = threading.Semaphore(_CALLS_A_WORKER * self.n_jobs)
        failed = threading.Event()

        def make_room(done: Future[_Sent]) -> None:
            if done.cancelled() or _has_failed(done):
                failed.set()
            room.release()

        outcomes: list[Future[_Sent]] = []
        for item in items:
            room.acquire()
            if failed.is_set():
                break
            outcomes.append(schedule(item))
            outcomes[-1].add_done_callback(make_room)
        return outcomes

    def start(self, task: WorkerTask) -> None:
        """Start the processes, if they have not yet, and let them have the task."""
        directory = self._opened()
        try:
            task.share(directory)
        except OSError as error:
            raise _no_directory(error) from error
        self._shared_task = SharedBytes(task.to_bytes())
        self._shared.append(self._shared_task)
        self._task = task

    def _opened(self) -> str:
        """Return the directory that the processes know of, once there are any."""
        if self._directory is None:
            try:
                directory = tempfile.mkdtemp(prefix="psnc-run-")
            except OSError as error:
                raise _no_directory(error) from error
            self._open_pool(directory)
            self._directory = directory
        return self._directory

    def _open_pool(self, directory: str) -> None:
        self._context = _context(self._start_method, self._mend_in_time)
        self._pool: Any = ProcessPool(
            max_workers=self.n_jobs,
            initializer=_begin,
            initargs=(directory,),
            context=self._context,
        )

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        """Run the batch on the next free process."""
        assert self._shared_task is not None
        return self._schedule(_run_batch, self._shared_task.told, tuple(indices))

    def _schedule(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        outcome: Future[Any] = Future()
        with self._changing:
            context = self._context
            self._outstanding.add(outcome)
            try:
                running = self._pool.schedule(function, args=arguments)
            except BrokenProcessPool as error:
                cause = error.__cause__ or error
                raise BackendError(
                    f"worker processes cannot be started ({type(cause).__name__}: {cause}): see to "
                    "that (a TMPDIR may be too long a path), or run with --backend sequential"
                ) from error
            except RuntimeError:
                # The pool gave up since the last batch.
                self._mend_in_time(context)
                return outcome
            self._watch_in_time(self._pool, context)
        running.add_done_callback(lambda done: self._hand_over(done, outcome, context))
        return outcome

    def stop(self, *, now: bool = False) -> None:
        """End the processes, after their batches or at once."""
        if self._directory is None:
            return
        with self._changing:
            self._stopping = True
        self._over.set()
        if self._task is not None:
            self._task.stop_requested.dismiss()
        try:
            if now:
                self._context.end_at_once()
                self._pool.stop()
                self._context.cut_off()
            else:
                self._pool.close()
            self._pool.join()
            for thread in self._threads:
                thread.join()
        finally:
            for shared in self._shared:
                shared.close()
            if self._task is None:
                shutil.rmtree(self._directory, ignore_errors=True)

    def _hand_over(self, done: Future[Any], outcome: Future[Any], context: Any) -> None:
        if not done.cancelled() and isinstance(done.exception(), BrokenProcessPool):
            self._mend_in_time(context)
            return
        with self._changing:
            if outcome not in self._outstanding:
                return
            self._outstanding.remove(outcome)
            self._broken_in_a_row = 0
        _take_over(done, outcome)

    # --- a pool that is of no use any more ----------------------------------------------------

    def _watch_in_time(self, pool: Any, context: Any) -> None:
        """Keep an eye on a pool, once it has begun to work."""
        if self._watched is not context:
            self._in_thread(self._watch, pool, context)
            self._watched = context

    def _mend_in_time(self, context: Any, *, died: bool = False) -> None:
        """See to the pool in a thread of its own, since its threads cannot end themselves."""
        self._in_thread(self._mend_after_death if died else self._mend, context)

    def _in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, name="psnc-pool", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch(self, pool: Any, context: Any) -> None:
        """Mend a pool that has a batch of which it will never say anything."""
        losses = 0
        while not self._over.wait(_WATCH_S):
            losses = losses + 1 if _has_lost_a_task(pool) else 0
            # At the first look it may be about to say so.
            if losses > 1 or not pool.active:
                self._mend(context)
                return

    def _mend_after_death(self, context: Any) -> None:
        """Mend the pool if a worker died with a lock, which nobody else will ever get."""
        if not all(_is_to_be_had(lock) for lock in context.locks):
            self._mend(context)

    def _mend(self, context: Any) -> None:
        """Put another pool in the place of one that is broken, and have its batches run again."""
        with self._changing:
            if self._stopping or context is not self._context:
                return
            lost, self._outstanding = self._outstanding, set()
            self._broken_in_a_row += 1
            is_useless = self._broken_in_a_row > _BROKEN_AT_MOST
            pool = self._pool
            assert self._directory is not None
            self._open_pool(self._directory)
        try:
            context.end_at_once()
            pool.stop()
            context.cut_off()
            pool.join()
        finally:
            for outcome in lost:
                outcome.set_exception(_useless_pool() if is_useless else BatchLostError())


# A pool breaks seldom, and nearly always says so by the futures of its tasks.
_WATCH_S = 0.5

# No worker holds a lock of the pool for longer than a message takes.
_LOCK_S = 5.0

# As many calls wait with each worker, so that it need not wait for the next.
_CALLS_A_WORKER = 2

# So many pools may break one after the other before a batch is done.
_BROKEN_AT_MOST = 3


def _has_lost_a_task(pool: Any) -> bool:
    """Tell whether a task is with a worker that the pool knows to be dead.

    The pool had read of the death before it read that the worker took the task.
    """
    manager = pool._pool_manager
    workers = manager.worker_manager.workers
    tasks = list(manager.task_manager.tasks.values())
    return any(task.worker_id and task.worker_id not in workers for task in tasks)


def _is_to_be_had(lock: Any) -> bool:
    if not lock.acquire(timeout=_LOCK_S):
        return False
    lock.release()
    return True


def _name_of(function: Callable[..., Any]) -> str:
    if isinstance(function, partial):
        function = function.func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _no_directory(error: OSError) -> BackendError:
    return BackendError(
        f"worker processes need a directory for temporary files ({error}): see to it, or set "
        "TMPDIR to another"
    )


def _useless_pool() -> BackendError:
    return BackendError(
        "worker processes ended before they took an index, as when memory runs out or "
        "they cannot start: run again, with fewer jobs or --backend sequential"
    )


def _has_failed(done: Future[_Sent]) -> bool:
    error = done.exception()
    # What is lost is called again.
    return not isinstance(error, BatchLostError) if error is not None else done.result().failed


def _result_of(outcome: Future[_Sent], again: Callable[[], Future[_Sent]]) -> Any:
    while True:
        try:
            sent = outcome.result()
        except BatchLostError:
            outcome = again()
            continue
        result = pickle.loads(sent.content)
        if sent.failed:
            raise result
        return result


def _take_over(done: Future[Any], outcome: Future[Any]) -> None:
    if done.cancelled():
        outcome.cancel()
        return
    error = done.exception()
    if isinstance(error, ProcessExpired):
        outcome.set_exception(WorkerDiedError(_cause_of_death(error.exitcode), error.pid))
    elif error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code == _LEFT_QUIETLY:
        exit_code = 0
    if exit_code is not None and exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        hint = ", as when memory runs out" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process exited with code {exit_code}"


# --- in the worker ----------------------------------------------------------------------------

_directory: str | None = None
_task: WorkerTask | None = None
_function: tuple[int, str, Callable[[Any], Any]] | None = None
_busy = False


def _begin(directory: str) -> None:
    global _directory
    _directory = directory
    signal.signal(signal.SIGTERM, _leave_if_dismissed)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_driver, name="psnc-driver-watch", daemon=True).start()


def _run_batch(told: Path | bytes, indices: tuple[int, ...]) -> BatchResult:
    global _busy, _function, _task
    if _task is None:
        # It may hold a copy of the source, which is not to be there twice.
        _function = None
        # Not in the initializer, whose errors would not reach the driver.
        _task = WorkerTask.from_bytes(read_shared(told))
        multiprocessing.util.Finalize(None, _release, exitpriority=100)
    _busy = True
    result = _task(indices)
    _busy = False
    return result


def _call(number: int, told: Path | bytes, item: bytes) -> _Sent:
    """Return what came of a call, or the error, as what is known to be readable in the driver."""
    try:
        name, function = _function_of(number, told)
        return _sent_back(name, function(pickle.loads(item)))
    except INTERRUPTS:
        raise
    except BaseException as error:
        return _error_sent_back(error)


def _function_of(number: int, told: Path | bytes) -> tuple[str, Callable[[Any], Any]]:
    global _function
    if _function is None or _function[0] != number:
        _function = None
        name, surroundings, content = pickle.loads(read_shared(told))
        surroundings.take_on()
        try:
            _function = number, name, cloudpickle.loads(content)
        except Exception as error:
            raise PipelineError(
                f"a worker process cannot load {name}, which the stages call to get ready "
                f"({type(error).__name__}: {error}): see that what it needs is there too"
            ) from error
    return _function[1:]


def _sent_back(name: str, result: Any) -> _Sent:
    try:
        # Of classes that are in no module, such as those of a script, the driver has its own.
        return _Sent(cloudpickle.dumps(result))
    except Exception as error:
        raise PipelineError(
            f"what {name} returned cannot be sent to another process "
            f"({type(error).__name__}: {error}): have it return plain data"
        ) from error


def _error_sent_back(error: BaseException) -> _Sent:
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        content = cloudpickle.dumps(error)
        pickle.loads(content)
    except Exception:  # whatever its class does then
        named = PipelineError(f"an error that cannot be sent from a worker: {error_text(error)}")
        named.__notes__ = error.__notes__
        content = pickle.dumps(named)
    return _Sent(content, failed=True)


def _leave_if_dismissed(signal_number: int, frame: Any) -> None:
    """Answer the driver's SIGTERM only: one that all processes of a job get is the driver's."""
    if _task is None or _task.stop_requested.is_dismissed():
        process_exit(0)


def _release() -> None:
    """Take leave in order, unless the process is being ended in the middle of an index."""
    # The pool closes its pipe and then sends SIGTERM, which must not cut this short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _task is not None and not _busy:
        _task.close()


def _end_with_driver() -> None:
    """End this process when the driver dies, so that nothing runs on without it."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        if _directory is not None:
            shutil.rmtree(_directory, ignore_errors=True)
        os._exit(1)


# --- starting processes -----------------------------------------------------------------------

_main_lock = threading.Lock()


@contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Keep multiprocessing from running the driver's script again in the new process.

    It looks at these two attributes of ``__main__`` to decide. The pipeline needs no such run,
    since what is defined in ``__main__`` travels by value.
    """
    main = sys.modules["__main__"]
    with _main_lock:
        file, spec = main.__dict__.pop("__file__", None), main.__spec__
        main.__spec__ = None
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is not None:
                main.__file__ = file


@contextmanager
def _born_deaf_to_interrupts() -> Iterator[None]:
    """Have new processes begin with SIGINT and SIGTERM blocked, which are the driver's to answer.

    Once they are up, workers ignore the one and judge the other. Until then a Ctrl-C, which goes to
    all processes of a terminal, or a SIGTERM, which a scheduler sends to all processes of a job,
    would end them, and the pool with them.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


# How long a death is kept from the pool, which must have heard before which task the worker took.
_LAST_WORDS_S = 0.3

# What the exit code 0 of a worker is reported as: the pool would take it for an end that was
# asked for, and wait for the worker's task for ever.
_LEFT_QUIETLY = 256


# What to do when a worker is found dead. Not an attribute, since a process is pickled.
_when_dead: WeakKeyDictionary[BaseProcess, Callable[[], None]] = WeakKeyDictionary()


class _WorkerProcess(BaseProcess):
    """A process whose death the pool always notices, and connects with its task."""

    _found_dead: float | None = None
    _told_to_end = False
    _ends_at_once = False

    def end_at_once(self) -> None:
        """Have :meth:`terminate` end the process whatever it is at."""
        self._ends_at_once = True

    @property
    def exitcode(self) -> int | None:
        code = super().exitcode
        return _LEFT_QUIETLY if code == 0 else code

    def is_alive(self) -> bool:
        if super().is_alive():
            return True
        if self._found_dead is None:
            self._found_dead = time.monotonic()
            if not self._told_to_end:
                _when_dead[self]()
        return not self._told_to_end and time.monotonic() - self._found_dead < _LAST_WORDS_S

    def start(self) -> None:
        with _hidden_main_module(), _born_deaf_to_interrupts():
            super().start()

    def terminate(self) -> None:
        self._told_to_end = True
        if self._ends_at_once:
            # What it is at may be deaf to anything less.
            super().kill()
        else:
            super().terminate()


class _WorkerForkServerProcess(_WorkerProcess, ForkServerProcess):
    """Started by a server process."""


class _WorkerSpawnProcess(_WorkerProcess, SpawnProcess):
    """Started anew."""


class _WorkerForkProcess(_WorkerProcess, ForkProcess):
    """Forked from the driver."""


def _context(start_method: str, mend: Callable[..., None]) -> Any:
    context = multiprocessing.get_context(start_method)
    process_class = {
        "forkserver": _WorkerForkServerProcess,
        "spawn": _WorkerSpawnProcess,
        "fork": _WorkerForkProcess,
    }[start_method]

    class WorkerContext(type(context)):  # type: ignore[misc]
        # The pool lets go of its locks before its workers have ended; one that is still
        # starting would look for them in vain.
        locks: list[Any]

        def __init__(self) -> None:
            super().__init__()
            self.locks = []
            self._ends: list[connection.Connection] = []
            self._processes: WeakSet[_WorkerProcess] = WeakSet()

        def RLock(self) -> Any:  # noqa: N802
            self.locks.append(super().RLock())
            return self.locks[-1]

        def Pipe(self, duplex: bool = True) -> Any:  # noqa: N802
            # Sockets, which can be shut for whoever has them.
            ends = super().Pipe(duplex=True)
            self._ends.append(ends[0])
            return ends

        def Process(self, **arguments: Any) -> Any:  # noqa: N802
            process = process_class(**arguments)
            self._processes.add(process)
            _when_dead[process] = lambda: mend(self, died=True)
            return process

        def end_at_once(self) -> None:
            for process in list(self._processes):
                process.end_at_once()

        def cut_off(self) -> None:
            """Have nobody wait for the other end of a pipe, whichever processes may hold it.

            A worker that dies half way through a message leaves the driver waiting for the rest,
            and so does whatever process has inherited the pipe and lives.
            """
            for end in self._ends:
                # The pool may have closed it.
                with suppress(OSError), socket.socket(fileno=os.dup(end.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)

    return WorkerContext()
