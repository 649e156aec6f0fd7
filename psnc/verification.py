"""Find the completed indices whose outputs are gone or changed, and have them run again."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum, auto
from functools import partial
from threading import Event

from attrs import Factory, define

from psnc.errors import OutputError, PipelineError
from psnc.output_facts import LEVELS, VerifyLevel, facts_now
from psnc.run import Run
from psnc.store import RecordedFile

__all__ = ["require_level", "reset_lost_indices"]

logger = logging.getLogger("psnc.verify")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_NAMED = 3
# More threads read no faster from one disk; so many files wait for each of them at the most.
_MOST_THREADS = 8
_FILES_A_THREAD = 16


class Verdict(Enum):
    """What came of looking at one file."""

    AS_RECORDED = auto()
    GONE = auto()
    CHANGED = auto()
    # There, as far as can be told:
    SIZE_AS_RECORDED = auto()
    THERE = auto()
    SHARED = auto()
    ELSEWHERE = auto()


@define
class _Findings:
    """What came of looking at the files of completed indices.

    Attributes
    ----------
    completed : int
        How many indices were looked at.
    gone, changed : dict of int to str
        The first such file of each index that has one; one that is gone counts first.
    verdicts : Counter
        How many files there are by verdict.
    """

    completed: int = 0
    gone: dict[int, str] = Factory(dict)
    changed: dict[int, str] = Factory(dict)
    verdicts: Counter[Verdict] = Factory(Counter)

    def take(self, index: int, path: str, verdict: Verdict) -> None:
        self.verdicts[verdict] += 1
        if verdict is Verdict.GONE:
            self.gone.setdefault(index, path)
            self.changed.pop(index, None)
        elif verdict is Verdict.CHANGED and index not in self.gone:
            self.changed.setdefault(index, path)

    def reasons(self) -> dict[int, str]:
        """Return why each index has to run again."""
        gone = {index: f"{path} is gone" for index, path in self.gone.items()}
        changed = {index: f"{path} has changed" for index, path in self.changed.items()}
        return dict(sorted((gone | changed).items()))


def require_level(level: object) -> None:
    """Refuse what is no level of verification.

    Raises
    ------
    PipelineError
        If it is none.
    """
    if level is not None and level not in LEVELS:
        raise PipelineError(f"verify={level!r}: choose 'exists', 'size' or 'checksum'")


def reset_lost_indices(run: Run, indices: Sequence[int], level: VerifyLevel) -> dict[int, str]:
    """Forget those completed indices whose outputs are gone or changed, so that they run again.

    No file is touched. What was found is said with the logger ``psnc.verify``.

    Parameters
    ----------
    run : Run
        The run, with its store open.
    indices : sequence of int
        Those to look at, sorted.
    level : {"exists", "size", "checksum"}
        Whether files have to be there, to have the size, or to have the content that is recorded.

    Returns
    -------
    dict of int to str
        Why, for each index that is forgotten.

    Raises
    ------
    OutputError
        If a file cannot be looked at; then nothing is forgotten.
    """
    store = run.store
    if store is None or not indices:
        return {}
    store.flush()
    all_shared = bool(getattr(run.pipeline.sink, "shares_outputs", False))
    findings = _look(store.recorded_files(indices), level, all_shared=all_shared)
    reasons = findings.reasons()
    # First, so that whoever sees that a disk is not mounted can still end the run.
    _say(findings, level)
    if reasons:
        store.reset_indices(list(reasons))
    return reasons


def _look(
    recorded: Iterable[tuple[int, Sequence[RecordedFile]]], level: VerifyLevel, *, all_shared: bool
) -> _Findings:
    findings = _Findings()

    def each_file() -> Iterator[tuple[int, RecordedFile]]:
        for index, files in recorded:
            findings.completed += 1
            for file in files:
                yield index, file

    stop = Event()
    judge = partial(_judge, level=level, all_shared=all_shared, stop=stop)
    judged = _judged_by_threads if level == "checksum" else _judged
    for index, file, verdict in judged(each_file(), judge, stop):
        findings.take(index, file.path, verdict)
    return findings


_Judge = Callable[[RecordedFile], Verdict]
_Judged = Iterator[tuple[int, RecordedFile, Verdict]]


def _judged(files: Iterator[tuple[int, RecordedFile]], judge: _Judge, stop: Event) -> _Judged:
    for index, file in files:
        yield index, file, judge(file)


def _judged_by_threads(
    files: Iterator[tuple[int, RecordedFile]], judge: _Judge, stop: Event
) -> _Judged:
    """Judge several files at once, in their order, however many follow."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    waiting: deque[tuple[int, RecordedFile, Future[Verdict]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="psnc-verify")
    try:
        for index, file in files:
            waiting.append((index, file, pool.submit(judge, file)))
            if len(waiting) > threads * _FILES_A_THREAD:
                oldest, its_file, future = waiting.popleft()
                yield oldest, its_file, future.result()
        for index, file, future in waiting:
            yield index, file, future.result()
    finally:
        # An interrupt does not wait for a large file.
        stop.set()
        pool.shutdown(cancel_futures=True)


# --- one file ---------------------------------------------------------------------------------

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def _judge(file: RecordedFile, *, level: VerifyLevel, all_shared: bool, stop: Event) -> Verdict:
    if _URL.match(file.path):
        return Verdict.ELSEWHERE
    try:
        status = os.stat(file.path)
        if level == "exists" or file.is_artifact:
            return Verdict.AS_RECORDED
        if file.is_shared or all_shared:
            return Verdict.SHARED
        return _compared(file, status, level, stop)
    except ValueError:
        return Verdict.GONE  # no file can have such a name
    except OSError as error:
        if error.errno in _NOT_THERE:
            # What goes from a directory while it is looked through leaves it there, but changed.
            return Verdict.CHANGED if os.path.exists(file.path) else Verdict.GONE
        raise OutputError(
            f"{_shown(file.path)} cannot be verified ({error.strerror}): see that it can be read, "
            "or run without verify"
        ) from error


def _compared(
    file: RecordedFile, status: os.stat_result, level: VerifyLevel, stop: Event
) -> Verdict:
    known = file.facts
    if known.size_bytes is None:
        return Verdict.THERE
    if facts_now(file.path, status, with_digest=False).size_bytes != known.size_bytes:
        return Verdict.CHANGED
    if level == "size":
        return Verdict.AS_RECORDED
    if known.content_digest is None:
        return Verdict.SIZE_AS_RECORDED
    now = facts_now(file.path, status, with_digest=True, stop=stop)
    return Verdict.AS_RECORDED if now == known else Verdict.CHANGED


# --- what is said -----------------------------------------------------------------------------


def _say(findings: _Findings, level: VerifyLevel) -> None:
    lost = len(findings.gone) + len(findings.changed)
    if lost:
        logger.warning(
            "verify: %s of %s completed indices run again: %s",
            f"{lost:,}",
            f"{findings.completed:,}",
            ", ".join(_causes(findings)),
        )
    else:
        logger.info("verify: the outputs of %s completed indices stand", f"{findings.completed:,}")
    for remark in _remarks(findings.verdicts, level):
        logger.warning("verify: %s", remark)


def _causes(findings: _Findings) -> Iterator[str]:
    outputs = "outputs of "
    for lost, what in ((findings.gone, "are gone"), (findings.changed, "changed")):
        if not lost:
            continue
        named = [f"index {each}: {_shown(lost[each])}" for each in sorted(lost)[:_NAMED]]
        if len(lost) > _NAMED:
            named.append("…")
        yield f"{outputs}{len(lost):,} {what} ({', '.join(named)})"
        outputs = "of "


def _remarks(verdicts: Counter[Verdict], level: VerifyLevel) -> Iterator[str]:
    """Say of which files less is known than was asked for."""
    remarks = {
        Verdict.SIZE_AS_RECORDED: "{} no recorded checksum: only the size was compared",
        Verdict.THERE: f"{{}} no recorded {level}: only whether it is there was looked at",
    }
    for verdict, text in remarks.items():
        count = verdicts[verdict]
        if count:
            who = "1 output has" if count == 1 else f"{count:,} outputs have"
            yield text.format(who)
    if verdicts[Verdict.SHARED]:
        yield "of outputs that indices share, only whether they are there was looked at"
    if verdicts[Verdict.ELSEWHERE]:
        yield f"{verdicts[Verdict.ELSEWHERE]:,} outputs are URLs, which were not looked at"


def _shown(path: str) -> str:
    """Return a path as one line of text, whatever its bytes are."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in path
    )
