"""How much CPU time the ``psnc`` commands that only list things take to start.

Run by hand: ``python benchmarks/startup.py``, with ``--imports`` for the modules that take longest.
Each figure is the median of several starts, user and system time, over that of ``python -c pass``
started in turn with it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "psnc --help": ["-m", "psnc", "--help"],
    "psnc plugins": ["-m", "psnc", "plugins"],
    "psnc hooks": ["-m", "psnc", "hooks"],
    "psnc backends": ["-m", "psnc", "backends"],
    "psnc stages": ["-m", "psnc", "stages"],
    "psnc run --help": ["-m", "psnc", "run", "--help"],
    "import psnc": ["-c", "import psnc"],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_starts(rounds: int) -> None:
    bare: list[float] = []
    starts: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        bare.append(cpu_seconds(["-c", "pass"]))
        for name, arguments in COMMANDS.items():
            starts[name].append(cpu_seconds(arguments))
    floor = statistics.median(bare)
    print(f"{'python -c pass':18} {floor:.3f} s of CPU time")
    for name, seconds in starts.items():
        median = statistics.median(seconds)
        print(f"{name:18} {median - floor:.3f} s more, {median / floor:.1f} times as much")


def print_imports(command: str, shown: int = 20) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMANDS[command]],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = []
    for line in finished.stderr.splitlines():
        own, cumulative, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            rows.append((int(own), int(cumulative), name.strip()))
    print(f"\n{command}: microseconds of each module's own import, and with what it imports")
    for own_us, cumulative_us, module in sorted(rows, reverse=True)[:shown]:
        print(f"{own_us:8} {cumulative_us:8}  {module}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--imports", action="store_true", help="Show the slowest imports too.")
    given = parser.parse_args()
    print_starts(given.rounds)
    if given.imports:
        for command in ("psnc --help", "psnc plugins"):
            print_imports(command)


if __name__ == "__main__":
    main()
