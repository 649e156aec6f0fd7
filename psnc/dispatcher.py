"""Feed batches of indices to a backend, until each index has ended for good."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import count

import attrs

from psnc.backend import Backend, BatchLostError
from psnc.errors import BackendError, IndexTimeoutError, WorkerDiedError
from psnc.execution import error_text
from psnc.records import IndexRecord, LogRecord, utc_timestamp
from psnc.retries import RetryPolicy
from psnc.time_limit import LastWords
from psnc.worker import BatchResult, WorkerTask

__all__ = ["Dispatcher"]

# A batch should take about this long: tiny indices share the cost of one message, and a run that
# is interrupted waits no longer than this for them.
_BATCH_S = 0.1

# A signal that arrives just before the driver falls asleep does not wake it: Python would answer it
# only when the next batch ends.
_ANSWER_SIGNALS_S = 0.5

# Batches in flight for each worker: one that runs and one that waits, so that none sits idle.
_BATCHES_PER_WORKER = 2

_ERROR_LEVEL = 40


@attrs.frozen
class _Flight:
    """A batch on its way.

    Attributes
    ----------
    batch : tuple of int
        Its indices.
    after : tuple of int
        Indices of the same group that wait for it.
    again : bool
        Whether it ran before, in part at least.
    """

    batch: tuple[int, ...]
    after: tuple[int, ...] = ()
    again: bool = False


@attrs.frozen
class _Failure:
    """An attempt that failed, and may have another one."""

    record: IndexRecord
    is_worth_it: bool


class Dispatcher:
    """Feeds batches to a backend and yields what comes back, until all is done.

    A batch grows with the measured speed of its indices, and shrinks towards the end of the run
    so that the workers end together. What a worker hands back of a batch that took longer than
    expected goes out again. A group that must stay together is never split, except
    after a worker died over it: what is left of that batch then runs one index at a time, so
    that only the index that kills its worker is lost. What is to be tried again waits its time, and
    whatever of its group comes after it waits along.

    Parameters
    ----------
    backend : Backend
        Runs the batches.
    task : WorkerTask
        What the backend was started with.
    groups : collection of tuple of int
        The indices, those that must stay together in one tuple.
    policy : RetryPolicy
        Which failures have another attempt.
    on_retry : callable
        Told of each failed attempt that is to have another: its record, its number and the seconds
        until the next.
    on_wake : callable
        Called before anything is submitted, and at least twice a second while batches run. What it
        raises ends the run.

    Attributes
    ----------
    quarantined : dict of int to int
        Indices whose last attempt ended its worker, and how many attempts they had.
    """

    def __init__(
        self,
        backend: Backend,
        task: WorkerTask,
        groups: Collection[tuple[int, ...]],
        policy: RetryPolicy,
        on_retry: Callable[[IndexRecord, int, float], None],
        on_wake: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._task = task
        self._groups = iter(groups)
        self._next_group = next(self._groups, None)
        self._left = sum(len(group) for group in groups)
        self._policy = policy
        self._on_retry = on_retry
        self._on_wake = on_wake
        self._ready: deque[_Flight] = deque()
        self._waiting: list[tuple[float, int, _Flight]] = []
        self._order = count()
        self._running: dict[Future[BatchResult], _Flight] = {}
        self._attempts: dict[int, int] = {}
        # The latest failure of each index that is to be tried again.
        self._failures: dict[int, IndexRecord] = {}
        self._seconds_per_index: float | None = None
        self._stopping = False
        self.quarantined: dict[int, int] = {}

    def results(self) -> Iterable[BatchResult]:
        """Yield results as they come, each index once."""
        self._dispatch()
        while self._running or (self._waiting and not self._stopping):
            for future in self._wait():
                yield self._outcome(future, self._running.pop(future))
                self._dispatch()
            self._dispatch()
        if self._failures:
            # There will be no other attempt at these in this run.
            yield BatchResult(list(self._failures.values()))

    @property
    def done(self) -> bool:
        """Whether every index has come back."""
        return not (self._next_group or self._ready or self._waiting or self._running)

    def stop_dispatching(self) -> None:
        """Start nothing more, and let workers end after their present index."""
        self._stopping = True
        self._task.stop_requested.set()

    # --- what to run next ---------------------------------------------------------------------

    def _wait(self) -> Iterable[Future[BatchResult]]:
        """Sleep until something has come back, or is due."""
        seconds = _ANSWER_SIGNALS_S
        if self._waiting and not self._stopping:
            seconds = min(seconds, max(self._waiting[0][0] - time.monotonic(), 0))
        if not self._running:
            time.sleep(seconds)
            return ()
        return wait(self._running, seconds, return_when=FIRST_COMPLETED).done

    def _dispatch(self) -> None:
        self._on_wake()
        while not self._stopping and len(self._running) < self._capacity():
            if self._waiting and self._waiting[0][0] <= time.monotonic():
                self._submit(heapq.heappop(self._waiting)[2])
            elif self._ready:
                self._submit(self._ready.popleft())
            elif self._next_group:
                self._submit(_Flight(self._next_batch()))
            else:
                return

    def _submit(self, flight: _Flight) -> None:
        self._running[self._backend.submit(flight.batch)] = flight

    def _one_by_one(self, batch: tuple[int, ...]) -> None:
        if batch:
            self._ready.append(_Flight(batch[:1], after=batch[1:], again=True))

    def _capacity(self) -> int:
        # Before the first result nothing is known of the indices: one batch a worker.
        # Long ones need none waiting either, and an interrupt should find none.
        known_and_short = (self._seconds_per_index or _BATCH_S) < _BATCH_S
        in_flight = _BATCHES_PER_WORKER if known_and_short else 1
        return 1 if self._backend.n_jobs == 1 else self._backend.n_jobs * in_flight

    def _next_batch(self) -> tuple[int, ...]:
        batch: list[int] = []
        size = self._batch_size()
        while (group := self._next_group) and (not batch or len(batch) + len(group) <= size):
            batch += group
            self._next_group = next(self._groups, None)
        self._left -= len(batch)
        return tuple(batch)

    def _batch_size(self) -> int:
        if self._seconds_per_index is None:
            return 1
        by_time = int(_BATCH_S / max(self._seconds_per_index, 1e-7))
        by_share = self._left // (self._backend.n_jobs * _BATCHES_PER_WORKER)
        return max(1, min(by_time, by_share))

    # --- what came of it ----------------------------------------------------------------------

    def _outcome(self, future: Future[BatchResult], flight: _Flight) -> BatchResult:
        error = future.exception()
        if isinstance(error, WorkerDiedError):
            return self._after_death(error, flight)
        if isinstance(error, BatchLostError):
            # What of it is done is found by look-up.
            self._ready.append(_Flight(flight.batch, flight.after, again=True))
            return BatchResult([])
        if error is not None:
            raise error
        result = future.result()
        self._require_result_of(flight.batch, result)
        self._learn(result)
        return self._settle(flight, result)

    def _settle(self, flight: _Flight, result: BatchResult) -> BatchResult:
        """Keep back what is to be tried again, and see to what waits for the batch."""
        records = result.records
        if flight.again:
            # What the store knew by now was done by the worker that died, in this very run.
            records = [attrs.evolve(record, cached=False) for record in records]
        final, failures = [], []
        for record in records:
            if record.status == "error":
                failure = _Failure(record, is_worth_it=record.index not in result.lasting_failures)
                if self._tries_again(failure):
                    failures.append(failure)
                    continue
            final.append(self._ended(record))
        skipped = flight.batch[len(records) :]
        if failures:
            self._wait_and_retry(failures, skipped, flight.after)
        elif skipped:
            self._ready.append(_Flight(skipped, flight.after, flight.again))
        else:
            self._one_by_one(flight.after)
        ends_the_run = not (failures and failures[-1].record is records[-1])
        return attrs.evolve(
            result, records=final, exception=result.exception if ends_the_run else None
        )

    def _tries_again(self, failure: _Failure) -> bool:
        attempt = self._attempts.get(failure.record.index, 0) + 1
        self._attempts[failure.record.index] = attempt
        return failure.is_worth_it and attempt <= self._policy.retries and not self._stopping

    def _ended(self, record: IndexRecord) -> IndexRecord:
        """Forget what was kept of an index that has ended for good."""
        self._failures.pop(record.index, None)
        self._attempts.pop(record.index, None)
        return record

    def _wait_and_retry(
        self, failures: Sequence[_Failure], skipped: tuple[int, ...], after: tuple[int, ...]
    ) -> None:
        """Have failed indices of one batch run again together, since they may be of one group."""
        attempts = [self._attempts[each.record.index] for each in failures]
        pause_s = self._policy.pause_s(max(attempts))
        for failure, attempt in zip(failures, attempts, strict=True):
            self._on_retry(failure.record, attempt, pause_s)
            self._failures[failure.record.index] = attrs.evolve(failure.record, recorded=True)
        batch = (*(each.record.index for each in failures), *skipped)
        due = time.monotonic() + pause_s
        heapq.heappush(self._waiting, (due, next(self._order), _Flight(batch, after, again=True)))

    def _after_death(self, error: WorkerDiedError, flight: _Flight) -> BatchResult:
        self._task.worker_died(error.pid)
        words = self._task.last_words(error.pid)
        if words is not None and words.index in flight.batch:
            return self._after_time_out(words, flight)
        if len(flight.batch) > 1:
            self._one_by_one((*flight.batch, *flight.after))
            return BatchResult([])
        index = flight.batch[0]
        done = self._recorded_result(index)
        record = done or IndexRecord(index, "error", error=error_text(error))
        return self._settle_death(error, record, flight.after)

    def _after_time_out(self, words: LastWords, flight: _Flight) -> BatchResult:
        """Go on after an index that is known to have taken too long."""
        seconds = self._task.timeout
        error = IndexTimeoutError(f"it took longer than {seconds:g} s, and its worker was ended")
        entry = f"index {words.index} took longer than {seconds:g} s\n{words.traceback}"
        record = IndexRecord(
            words.index,
            "error",
            wall_time_ns=int((seconds or 0) * 1e9),
            error=error_text(error),
            logs=(LogRecord(utc_timestamp(), _ERROR_LEVEL, "ERROR", "psnc.execution", entry),),
        )
        # Those of the batch that were done are found by look-up.
        others = tuple(index for index in flight.batch if index != words.index)
        return self._settle_death(error, record, (*others, *flight.after))

    def _settle_death(
        self, error: WorkerDiedError, record: IndexRecord, after: tuple[int, ...]
    ) -> BatchResult:
        if record.status == "completed":
            self._one_by_one(after)
            return BatchResult([self._ended(record)])
        failure = _Failure(record, self._policy.is_worth_it(error))
        if self._tries_again(failure):
            self._wait_and_retry([failure], (), after)
            return BatchResult([])
        self.quarantined[record.index] = self._attempts[record.index]
        self._one_by_one(after)
        return BatchResult([self._ended(record)])

    def _recorded_result(self, index: int) -> IndexRecord | None:
        """Find what a worker recorded that died before it could hand it in."""
        store = self._task.run.store
        paths = None if store is None else store.lookup(index)
        if paths is None:
            return None
        return IndexRecord(index, "completed", tuple(paths), recorded=True)

    def _require_result_of(self, batch: tuple[int, ...], result: object) -> None:
        """Refuse what would pass for a run of all indices, and is not."""
        name = type(self._backend).__qualname__
        if not isinstance(result, BatchResult):
            raise BackendError(
                f"backend {name} answers a batch with {type(result).__qualname__!r}: give its "
                "future what the task returned"
            )
        ended = tuple(record.index for record in result.records)
        # A batch may come back unfinished. One that was not even begun would be sent for ever.
        if ended != batch[: len(ended)] or not (ended or self._stopping):
            raise BackendError(
                f"backend {name} answers a batch of {len(batch)} indices with the records of "
                f"{len(ended)}, or of others: call the task once, with all indices of the batch"
            )

    def _learn(self, result: BatchResult) -> None:
        """Follow the speed of the indices, the latest batch counting half."""
        if result.records:
            latest = result.elapsed_s / len(result.records)
            earlier = self._seconds_per_index
            self._seconds_per_index = latest if earlier is None else (latest + earlier) / 2
