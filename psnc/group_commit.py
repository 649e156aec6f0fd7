"""Group finished indices into transactions, so that a tiny index costs a share of one.

Records and signs of life wait in memory, and a thread writes them at the latest 50 ms after the
first of them came; an index that took that long itself is written at once. Whatever lock the store
has is held only for the writing, never while an index runs.

A store that records in this way derives from :class:`GroupCommitStore`, and says how one group is
written. What is hard to get right is here: threads, forks and the end of the process.
"""

from __future__ import annotations

import atexit
import os
import resource
import sys
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from weakref import WeakSet

from attrs import frozen

from psnc.config import Durability
from psnc.errors import StoreError
from psnc.records import IndexRecord, WorkerInfo, utc_timestamp
from psnc.store import CheckpointStore

__all__ = ["GroupCommitStore", "WorkerRow"]

GROUP_NS = 50_000_000
_LINGER_S = 1.0

# A thread that is in the middle of a transaction as the store is closed has this long to end it.
_LEAVE_S = 10.0


@frozen
class WorkerRow:
    """A row of the table ``workers``, as it should read."""

    info: WorkerInfo
    last_heartbeat: str
    current_index: int | None
    completed_count: int


class GroupCommitStore(CheckpointStore):
    """A store that writes finished indices in groups; the base of those that come with psnc.

    A subclass implements :meth:`write_group` and :meth:`disconnect`, and the questions. It holds
    :attr:`gate` whenever it uses, opens or closes a connection, and opens one whenever it finds
    none: before a fork all are closed. It sets what :meth:`disconnect` needs before it calls this
    constructor, and opens its first connection afterwards.

    Parameters
    ----------
    durability : {"grouped", "index", "full"}
        Any but the first writes each index in a transaction of its own.

    Attributes
    ----------
    gate : Gate
        Held by whichever thread uses the store, so that a fork can wait for all of them.
    """

    def __init__(self, durability: Durability) -> None:
        self.gate = Gate()
        self._run_id: int | None = None
        self._is_closed = False
        # No thread that is begun as the process ends could be waited for.
        one_by_one = durability != "grouped" or _process_ends
        self._writer = _GroupWriter(self._write_for_run, self.gate, one_by_one)
        if _process_ends:
            self._writer.stop_thread()
        else:
            with _making:
                _open_stores.add(self)

    # --- for the subclass to say --------------------------------------------------------------

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it records, for error messages; without any password."""

    @abstractmethod
    def write_group(
        self, run_id: int, records: Sequence[IndexRecord], workers: Sequence[WorkerRow]
    ) -> None:
        """Write records, no two of one index, and rows of workers, in one transaction.

        Called with the gate held.

        Raises
        ------
        StoreError
            If they cannot be written. They stay in memory, and are written with the next group.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Close every connection; called with the gate held, and never again used after a fork."""

    # --- for the subclass to use --------------------------------------------------------------

    @property
    def run_id(self) -> int:
        """The run that was selected or attached to."""
        if self._run_id is None:
            raise StoreError(f"{self.place}: no run is selected")
        return self._run_id

    def select(self, run_id: int) -> None:
        """Turn to a recorded run, to look at it."""
        self._run_id = run_id

    def pending(self, index: int) -> IndexRecord | None:
        """Return the record of an index that is not written yet."""
        return self._writer.pending(index)

    def refuse_if_closed(self) -> None:
        """Raise :class:`psnc.StoreError` after :meth:`close`."""
        if self._is_closed:
            raise StoreError(f"{self.place} was closed: open the store again")

    def forget_workers(self) -> None:
        """Begin to count the workers' indices anew."""
        self._writer.forget_workers()

    def make_room(self) -> None:
        """Say that a connection was opened, which may close those that others opened long ago.

        For a store whose connections hold nothing but files: of those there can be too many in a
        process, one for every pipeline that has run. Called with the gate held.
        """
        for store in _with_too_many_connected(self):
            # One that is at work is not idle, and to wait for it might be to wait for this one.
            if store.gate.try_acquire():
                try:
                    store.disconnect()
                finally:
                    store.gate.release()

    # --- recording ----------------------------------------------------------------------------

    def index_started(self, worker: WorkerInfo, index: int) -> None:
        """Note what a worker is at; in the store within 50 ms."""
        self.refuse_if_closed()
        self._writer.index_started(worker, index)

    def worker_idle(self, worker: WorkerInfo) -> None:
        """Note that a worker stopped before its index ended."""
        self.refuse_if_closed()
        self._writer.worker_idle(worker)

    def record(self, record: IndexRecord) -> None:
        """Record one index; in the store within 50 ms, or at once if it took that long."""
        self.refuse_if_closed()
        self._writer.record(record)

    def flush(self) -> None:
        """Return when all that was recorded is committed."""
        self.refuse_if_closed()
        self._writer.flush()

    def close(self) -> None:
        """Write what waits and close every connection; the store is of no use afterwards."""
        if self._is_closed:
            return
        _open_stores.discard(self)
        try:
            self._write_out()
        finally:
            self._is_closed = True

    def close_or_say(self) -> None:
        """Close the store, and say on standard error what cannot be written, unless it was said."""
        if not self._writer.failure_is_known:
            super().close_or_say()
            return
        with suppress(StoreError):
            self.close()

    def _write_out(self) -> None:
        self._writer.stop_thread()
        try:
            self._writer.flush()
        finally:
            with self.gate:
                self.disconnect()

    def _write_for_run(self, records: Sequence[IndexRecord], workers: Sequence[WorkerRow]) -> None:
        self.write_group(self.run_id, records, workers)

    # --- forks --------------------------------------------------------------------------------

    def hold(self) -> None:
        """Wait until no thread uses the store, keep others out, and close every connection."""
        self.gate.acquire()
        self.disconnect()

    def release(self) -> None:
        """Let threads use the store again; each opens a connection anew."""
        self.gate.release()


class Gate:
    """A lock as ``threading.RLock``, but for the very end of the process, when nobody waits for it.

    By then threads stop wherever they are, and one that held the lock never lets go of it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """Wait until no other thread holds the lock, and hold it.

        Raises
        ------
        StoreError
            If another thread holds it for ever.
        """
        if not self._lock.acquire(blocking=not sys.is_finalizing()):
            raise StoreError("the process is ending, so that the store is out of reach")

    def try_acquire(self) -> bool:
        """Hold the lock, unless another thread does; tell whether it is held."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Let go of the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _WorkerState:
    """What is known of a worker of this process."""

    __slots__ = ("completed_count", "current_index", "info", "last_heartbeat")

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.current_index: int | None = None
        self.completed_count = 0
        self.last_heartbeat = time.time()

    def row(self) -> WorkerRow:
        last_heartbeat = utc_timestamp(self.last_heartbeat)
        return WorkerRow(self.info, last_heartbeat, self.current_index, self.completed_count)


class _GroupWriter:
    """Collects what is to be written, and has it written in order, each index whole.

    Parameters
    ----------
    write : callable
        Writes records and rows of workers in one transaction.
    gate : Gate
        Held while it does.
    one_by_one : bool
        Write every index in a transaction of its own.
    """

    def __init__(
        self,
        write: Callable[[Sequence[IndexRecord], Sequence[WorkerRow]], None],
        gate: Gate,
        one_by_one: bool,
    ) -> None:
        self._write = write
        self._one_by_one = one_by_one
        # Guards the memory below for moments; the gate is held through a transaction.
        self._lock = threading.Lock()
        self._gate = gate
        self._pending: dict[int, IndexRecord] = {}
        self._states: dict[str, _WorkerState] = {}
        self._changed: set[str] = set()
        self._error: Exception | None = None
        # Whether somebody was told that what waits cannot be written.
        self.failure_is_known = False
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def pending(self, index: int) -> IndexRecord | None:
        """Return the record of an index that is not written yet."""
        return self._pending.get(index)

    def index_started(self, worker: WorkerInfo, index: int) -> None:
        """Note that a worker is at an index."""
        self._raise_earlier_error()
        with self._lock:
            state = self._state(worker)
            state.current_index = index
        self._wake_thread()

    def worker_idle(self, worker: WorkerInfo) -> None:
        """Note that a worker is at no index."""
        with self._lock:
            self._state(worker).current_index = None
        self.flush()

    def record(self, record: IndexRecord) -> None:
        """Take a record; write it now if it took long."""
        self._raise_earlier_error()
        while not self._take(record):
            # Only what is written can be replaced by the store's rules, and only then is it known
            # which log entries are whose.
            self.flush()
        if self._one_by_one or record.wall_time_ns >= GROUP_NS:
            self.flush()
        else:
            self._wake_thread()

    def flush(self) -> None:
        """Write all that waits.

        Raises
        ------
        StoreError
            If it cannot be written. It stays in memory, and the next call tries again.
        """
        try:
            self._flush()
        except StoreError:
            self.failure_is_known = True
            raise

    def _flush(self) -> None:
        with self._gate:
            with self._lock:
                records = list(self._pending.values())
                rows = [self._states[worker_id].row() for worker_id in self._changed]
                self._changed.clear()
            if not records and not rows:
                return
            try:
                self._write(records, rows)
            except BaseException:
                # Whatever it was: what is not written stays to be written.
                with self._lock:
                    self._changed.update(row.info.worker_id for row in rows)
                raise
            self.failure_is_known = False
            with self._lock:
                for record in records:
                    if self._pending.get(record.index) is record:
                        del self._pending[record.index]

    def forget_workers(self) -> None:
        """Begin to count the workers' indices anew."""
        with self._lock:
            self._states.clear()
            self._changed.clear()

    def stop_thread(self) -> None:
        """Let the thread end, wait until it has, and have no other one begin.

        One that is alive when the interpreter ends stops wherever it is, with whatever it holds.
        """
        with self._lock:
            self._stop.set()
            thread = self._thread
        self._wake.set()
        # The store may be collected in the thread itself.
        if thread is not None and thread is not threading.current_thread():
            thread.join(_LEAVE_S)

    def flush_in_time(self) -> None:
        """Write what waits, and keep an error for the thread that records next."""
        try:
            self._flush()
        except Exception as error:
            self._error = error

    def retire_thread(self) -> bool:
        """Let the thread go, unless there is something to write again."""
        with self._lock:
            if self._wake.is_set():
                return False
            self._thread = None
            return True

    def _take(self, record: IndexRecord) -> bool:
        """Keep a record to be written, unless another one of its index still is."""
        with self._lock:
            if record.index in self._pending:
                return False
            self._pending[record.index] = record
            if record.worker is not None:
                state = self._state(record.worker)
                state.current_index = None
                state.completed_count += record.status == "completed"
            return True

    def _state(self, worker: WorkerInfo) -> _WorkerState:
        state = self._states.get(worker.worker_id)
        if state is None:
            state = self._states[worker.worker_id] = _WorkerState(worker)
        state.last_heartbeat = time.time()
        self._changed.add(worker.worker_id)
        return state

    def _raise_earlier_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            self.failure_is_known = True
            raise error

    def _wake_thread(self) -> None:
        if self._wake.is_set():
            return
        with self._lock:
            self._wake.set()
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(
                    target=_write_in_time,
                    args=(weakref.ref(self), self._wake, self._stop),
                    name="psnc-checkpoint",
                    daemon=True,
                )
                self._thread.start()


def _write_in_time(
    reference: weakref.ref[_GroupWriter], wake: threading.Event, stop: threading.Event
) -> None:
    """Write 50 ms after something came; end when nothing has come for a while, or when told to.

    Between times the thread does not hold the writer, which can so be collected with its store.
    """
    while True:
        idle = not wake.wait(_LINGER_S)
        if not idle:
            stop.wait(GROUP_NS / 1e9)
            wake.clear()
        writer = reference()
        if stop.is_set() or writer is None or (idle and writer.retire_thread()):
            return
        writer.flush_in_time()
        del writer


# --- how many are connected -------------------------------------------------------------------

# Those that opened a connection, the latest last.
_connected: list[weakref.ref[GroupCommitStore]] = []
_connected_lock = threading.Lock()

# A connection needs three descriptors, as SQLite's do, and psnc leaves most of them to others.
_LIMIT_FOR_ONE = 12
_MOST_CONNECTED = 256


def _with_too_many_connected(latest: GroupCommitStore) -> list[GroupCommitStore]:
    """Note who opened a connection, and return those that are to close theirs for it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        most = _MOST_CONNECTED
    else:
        most = max(1, min(limit // _LIMIT_FOR_ONE, _MOST_CONNECTED))
    with _connected_lock:
        stores = [store for each in _connected if (store := each()) is not None]
        stores = [store for store in stores if store is not latest and not store._is_closed]
        stores.append(latest)
        _connected[:] = map(weakref.ref, stores[-most:])
    return stores[:-most]


# --- the end of the process -------------------------------------------------------------------

_open_stores: WeakSet[GroupCommitStore] = WeakSet()
_process_ends = False


@atexit.register
def _close_open_stores() -> None:
    global _process_ends
    _process_ends = True
    for store in list(_open_stores):
        store.close_or_say()


# --- forks ------------------------------------------------------------------------------------

# No connection can be carried over a fork. SQLite's child would take over locks that it does not
# have, and its writes would be lost; a server's child would talk into its parent's conversation.
# So none is open while the process forks.
# Each thread that forks holds the stores that there are, and no new one is made meanwhile.
_held = threading.local()
_making = threading.RLock()


def _hold_open_stores() -> None:
    _making.acquire()
    _held.stores = sorted(_open_stores, key=id)
    for store in _held.stores:
        store.hold()
    # Last, since whoever has it has a gate, and waits for nothing.
    _connected_lock.acquire()


def _release_held() -> None:
    _connected_lock.release()
    stores, _held.stores = _held.stores, []
    for store in reversed(stores):
        store.release()
    _making.release()


def _leave_to_parent() -> None:
    _release_held()
    # What these stores still have to write is the parent's to write.
    _open_stores.clear()


os.register_at_fork(
    before=_hold_open_stores,
    after_in_parent=_release_held,
    after_in_child=_leave_to_parent,
)
