"""Kill drivers and workers at any moment, go on, and compare with a run that nobody killed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from lives import Life, Nursery
from trials import Many, Tried
from whole import assert_equal_to_clean, completed_afterwards, new_directory, said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

COUNT = 40
# The moments at which a life can end are spread over a bit more time than it takes.
BEYOND_THE_END = 1.15
LIVES = 40


class Way:
    """A way to run the pipeline, how long it takes, and what comes of it if nobody is killed."""

    def __init__(self, lives: Nursery, directory: Path, backend: str, start_method: str | None):
        self.lives = lives
        self.start_method = start_method
        self.arguments = (COUNT, backend, start_method)
        self.clean = new_directory(directory / "clean")
        self._measure(new_directory(directory / "warm"))
        self.whole_s = self._measure(self.clean)
        self.start_s = min(self._measure(self.clean), self.whole_s)
        self.steps = self._count_steps(new_directory(directory / "steps"))

    def start(self, directory: Path, **options: Any) -> Life:
        """Begin to run or resume in a directory."""
        return self.lives.fork(directory, "run_all", *self.arguments, **options)

    def moment_s(self, chance: Random, left: int) -> float:
        """Return a moment in a life that has so many indices left to run."""
        whole_s = self.start_s + (self.whole_s - self.start_s) * left / COUNT
        return chance.random() * whole_s * BEYOND_THE_END

    def _measure(self, directory: Path) -> float:
        life = self.start(directory)
        assert life.wait() == 0, said(directory)
        self.lives.warm_up(directory)
        return time.monotonic() - life.began

    def _count_steps(self, directory: Path) -> int:
        assert self.start(directory, last=0).wait() == 0, said(directory)
        return int((directory / "steps").read_text())


# --- kills from outside -----------------------------------------------------------------------


class Trial:
    """One run that is killed and resumed until it is complete."""

    def __init__(self, way: Way, directory: Path, chance: Random) -> None:
        self.way = way
        self.directory = new_directory(directory)
        self.chance = chance
        self.kills = {"driver": 0, "worker": 0, "all": 0, "step": 0}
        self.completed: set[int] = set()

    def run(self, whom: list[str]) -> None:
        """Kill it again and again, then let it end."""
        for _ in range(LIVES):
            if self._one_life(self.chance.choice(whom)):
                break
        life = self.way.start(self.directory)
        assert life.wait() == 0, said(self.directory)
        life.wait_for_orphans()
        assert_equal_to_clean(self.directory, self.way.clean)

    def _one_life(self, whom: str) -> bool:
        """Live until somebody is killed, and look; tell whether it was complete before."""
        left = COUNT - len(self.completed)
        if whom == "step":
            share = self.chance.random() * BEYOND_THE_END * (0.1 + 0.9 * left / COUNT)
            where = self.chance.choice(["driver", "worker"])
            last = 1 + int(share * self.way.steps)
            life = self.way.start(self.directory, where=where, last=last)
        else:
            life = self.way.start(self.directory)
            self._kill(life, whom)
        try:
            status = life.wait()
        except TimeoutError:
            print(whom, said(self.directory))
            raise
        assert status in (0, -signal.SIGKILL), said(self.directory)
        if status and whom != "worker":
            self.kills[whom] += 1
        if status and self.chance.random() < 0.3:
            # Whoever resumes at once may meet workers that have not noticed yet.
            return False
        life.wait_for_orphans()
        self.completed = completed_afterwards(
            self.directory, self.completed, untouched=self.chance.random() < 0.5
        )
        return status == 0 and len(self.completed) == COUNT

    def _kill(self, life: Life, whom: str) -> None:
        wait_s = self.way.moment_s(self.chance, COUNT - len(self.completed))
        # It takes a while to find a worker.
        moment = life.began + (wait_s / 2 if whom == "worker" else wait_s)
        while time.monotonic() < moment and not life.is_over():
            time.sleep(0.001)
        if whom == "driver":
            life.kill()
        elif whom == "all":
            life.kill_all()
        else:
            while not (workers := life.workers(self.way.start_method)) and not life.is_over():
                time.sleep(0.001)
            with suppress(ProcessLookupError):
                if workers:
                    os.kill(self.chance.choice(workers), signal.SIGKILL)
                    self.kills["worker"] += 1


KINDS = {
    "driver": "drivers killed",
    "worker": "workers killed",
    "all": "drivers killed with all their workers",
    "step": "processes killed at a step of their own",
}


def kill(
    way: Way, directory: Path, chance: Random, whom: list[str], kills: int, tried: Tried
) -> None:
    """Kill so often, in as many runs as that takes."""
    survived = dict.fromkeys(KINDS, 0)
    runs = 0
    # However few moments hit, it has an end.
    while sum(survived.values()) < kills and runs < 3 * kills:
        trial = Trial(way, directory / f"run-{runs}", chance)
        trial.run(whom)
        runs += 1
        for kind, count in trial.kills.items():
            survived[kind] += count
    for kind, count in survived.items():
        tried(KINDS[kind], count)
    tried("indices compared with a clean run", runs * COUNT)


@pytest.mark.parametrize(
    ("backend", "start_method", "whom", "kills"),
    [
        ("process_pool", "fork", ["driver", "worker", "all", "step"], 60),
        ("process_pool", "forkserver", ["driver", "worker", "all"], 12),
        ("thread_pool", None, ["driver", "step"], 30),
        ("sequential", None, ["driver", "step"], 30),
    ],
)
def test_a_run_that_is_killed_over_and_over_equals_a_clean_one(
    backend: str,
    start_method: str | None,
    whom: list[str],
    kills: int,
    lives: Nursery,
    tmp_path: Path,
    chance: Random,
    many: Many,
    tried: Tried,
) -> None:
    way = Way(lives, tmp_path, backend, start_method)
    kill(way, tmp_path, chance, whom, many(kills), tried)
