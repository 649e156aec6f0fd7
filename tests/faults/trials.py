"""How much is tried, and with which random numbers; from the environment, as it was at first."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

FACTOR = float(os.environ.get("PSNC_TEST_FAULTS", "1"))
SEED = os.environ.get("PSNC_TEST_FAULTS_SEED") or str(random.SystemRandom().randrange(10**9))

Many = Callable[[int], int]
Tried = Callable[[str, int], None]
