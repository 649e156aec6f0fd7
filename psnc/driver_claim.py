"""Claim indices of a run for a driver, unless another is at work on them; show that it lives."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from types import TracebackType
from typing import Self

import attrs

from psnc.claims import ALL, Claim
from psnc.errors import DriverConflictError, StoreError
from psnc.processes import Life, own_process
from psnc.records import utc_timestamp
from psnc.store import CheckpointStore

__all__ = ["BEAT_S", "WATCH_S", "DriverClaim", "at_work"]

# How often a driver shows a sign of life, in seconds.
BEAT_S = 10.0

# A driver of which nothing else can be told is dead if it shows none for this long, by the clock of
# whoever watches.
WATCH_S = 60.0

# How often it is tried, a beat apart, to release a claim where the store takes no writes.
_RELEASE_TRIES = 60

_logger = logging.getLogger("psnc.claims")


class DriverClaim:
    """The claim of one driver, held in a ``with`` block.

    Parameters
    ----------
    store : CheckpointStore
        Where the run is recorded; attached to it.
    invocation_id : str
        The call of ``run_pipeline``.
    indices : str
        What is claimed, as :class:`Claim` has it.
    run_name : str
        The run in messages, such as ``run 1 of x.db``.

    Raises
    ------
    DriverConflictError
        On entering, if another driver is at work on one of the indices; on leaving without another
        error, and from :meth:`require`, if another driver has taken the claim over.
    StoreError
        If the store cannot be read or written.
    """

    def __init__(
        self, store: CheckpointStore, invocation_id: str, indices: str, run_name: str
    ) -> None:
        own = Claim(
            invocation_id=invocation_id,
            started_at=utc_timestamp(),
            beat=0,
            indices=indices,
            **attrs.asdict(own_process()),
        )
        self._keeper = _Keeper(store, own, run_name)
        self._thread = threading.Thread(
            target=_show_life,
            args=(self._keeper, weakref.ref(self)),
            name="psnc-claim",
            daemon=True,
        )

    def __enter__(self) -> Self:
        at_work[self._keeper.own.invocation_id] = self
        try:
            self._thread.start()
            self._keeper.take()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def require(self) -> None:
        """Raise :class:`psnc.DriverConflictError` if another driver has taken the claim over."""
        if self._keeper.lost is not None:
            raise self._keeper.lost

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not for a process that was forked meanwhile.
        if os.getpid() != self._keeper.own.pid:
            return
        try:
            self._keeper.release()
        except StoreError as failure:
            if error is None:
                raise
            # The error that ends the run is said, and the thread goes on trying.
            _logger.info("a claim is left behind: %s", failure)
        finally:
            self._keeper.over.set()
            at_work.pop(self._keeper.own.invocation_id, None)
        # An interrupt can have kept it from beginning; it then ends by itself.
        if self._thread.is_alive() and not self._keeper.is_out:
            self._thread.join()
        if error is None:
            self.require()


# The claims that are held in this process. An interrupt can keep one from being released; then it
# is gone with the run that it was of.
at_work: weakref.WeakValueDictionary[str, DriverClaim] = weakref.WeakValueDictionary()


class _Keeper:
    """What becomes of a claim in the store; used by the driver and by a thread."""

    def __init__(self, store: CheckpointStore, own: Claim, run_name: str) -> None:
        self.own = own
        self.lost: DriverConflictError | None = None
        self.over = threading.Event()
        # Whether the store may have it.
        self.is_out = False
        self._is_releasing = False
        self._store = store
        self._run_name = run_name
        self._watched: dict[str, _Watched] = {}
        self._unsure: list[Claim] = []

    def take(self) -> None:
        """Wait until it is known who is at work, and claim the indices if nobody is."""
        while True:
            self._unsure = []
            self._store.change_claims(self._with_own)
            if not self._unsure:
                return
            time.sleep(BEAT_S / 10)

    def renew(self) -> None:
        """Show a sign of life, or notice that the claim was taken over."""
        self.own = attrs.evolve(self.own, beat=self.own.beat + 1)
        self._store.change_claims(self._renewed)

    def release(self) -> None:
        """Take the claim out of the store, if it may be there; once."""
        if not self.is_out:
            return
        self._store.change_claims(self._without_own)
        self.is_out = False

    def _with_own(self, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        own = self.own
        others = [claim for claim in claims if claim.invocation_id != own.invocation_id]
        # A store may ask twice.
        self._unsure = []
        left = [claim for claim in others if self._is_to_be_left(claim)]
        if self._unsure:
            return claims
        for claim in others:
            if claim not in left:
                _logger.info("%s: %s is dead, and its claim is over", self._run_name, claim.driver)
        self.is_out = True
        return (*left, own)

    def _is_to_be_left(self, claim: Claim) -> bool:
        """Tell whether a claim holds, and does not concern this one; refuse if it does."""
        life = _life_of(claim)
        if life is Life.DEAD:
            return False
        if not claim.overlaps(self.own):
            return True
        if life is Life.UNKNOWN:
            watched = self._watch(claim)
            if watched.beat == claim.beat:
                if time.monotonic() - watched.since >= WATCH_S:
                    return False
                self._unsure.append(claim)
                return True
        raise DriverConflictError(
            f"{self._run_name} is being run by {claim.driver}: wait for it, or "
            f"{self._way_out(claim)}"
        )

    @staticmethod
    def _way_out(claim: Claim) -> str:
        if claim.indices == ALL:
            # Beside it no part is to be had.
            return "end it and share the work (--shard 1/2 and 2/2, or --indices)"
        return "run other indices (--shard, --indices)"

    def _watch(self, claim: Claim) -> _Watched:
        watched = self._watched.get(claim.invocation_id)
        if watched is None:
            watched = self._watched[claim.invocation_id] = _Watched(claim.beat, time.monotonic())
            _logger.warning(
                "%s was being run by %s, of which nothing can be told from here: looking for a "
                "sign of life, for %g s at the most",
                self._run_name,
                claim.driver,
                WATCH_S,
            )
        return watched

    def _renewed(self, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        own = self.own
        if self._is_releasing:
            # It was released between this thread's look at it and this transaction.
            return claims
        if all(claim.invocation_id != own.invocation_id for claim in claims):
            self.lost = self.lost or self._loss(claims)
            return claims
        return tuple(own if each.invocation_id == own.invocation_id else each for each in claims)

    def _without_own(self, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        left = tuple(each for each in claims if each.invocation_id != self.own.invocation_id)
        # A store may ask twice, when the first answer has been written after all.
        was_asked, self._is_releasing = self._is_releasing, True
        if len(left) == len(claims) and not was_asked:
            self.lost = self.lost or self._loss(claims)
        return left

    def _loss(self, claims: tuple[Claim, ...]) -> DriverConflictError:
        takers = [claim.driver for claim in claims if claim.overlaps(self.own)]
        by_whom = takers[0] if takers else "another driver, which has ended since"
        return DriverConflictError(
            f"{self._run_name} was taken over by {by_whom}, as this driver showed no sign of life "
            f"for {WATCH_S:g} s: what was recorded is safe; resume when the other has ended"
        )


def _show_life(keeper: _Keeper, claim: weakref.ref[DriverClaim]) -> None:
    """Show signs of life until the claim is released, and release one that nobody holds any more.

    In a thread, which an interrupt does not reach.
    """
    while not keeper.over.wait(BEAT_S) and claim() is not None:
        if not keeper.is_out or keeper.lost is not None:
            continue
        try:
            keeper.renew()
        except StoreError as error:
            # Who records is told by its own error, and the next sign may come through.
            _logger.info("no sign of life can be written: %s", error)
    # As long as this process lives, others take the claim for that of a driver at work.
    for _ in range(_RELEASE_TRIES):
        try:
            keeper.release()
            return
        except StoreError as error:
            _logger.info("a claim is left behind, and will be released later: %s", error)
        time.sleep(BEAT_S)


@attrs.frozen
class _Watched:
    """The beat that a claim had when it was first seen, and when that was, in seconds."""

    beat: int
    since: float


def _life_of(claim: Claim) -> Life:
    life = claim.life()
    # Of a run of this very process that did not come to release it.
    if life is Life.ALIVE and claim.pid == os.getpid() and claim.invocation_id not in at_work:
        return Life.DEAD
    return life
