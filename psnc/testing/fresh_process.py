"""Call functions in new Python processes, as an index may run in any."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cloudpickle

from psnc.execution import error_text

__all__ = ["FreshProcess", "main"]

_TIMEOUT_S = 120


class FreshProcess:
    """One call of a function in a process of its own.

    Parameters
    ----------
    function : callable
        What to call; it and its arguments travel as psnc's pipelines do.
    *arguments
        Its arguments.
    hash_seed : int
        The process's ``PYTHONHASHSEED``.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, hash_seed: int | None = None
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="psnc-testing-")
        place = Path(self._directory.name)
        main_module = sys.modules["__main__"]
        spec = getattr(main_module, "__spec__", None)
        call = cloudpickle.dumps((function, arguments))
        main_file = getattr(main_module, "__file__", None)
        (place / "call").write_bytes(pickle.dumps((sys.path, spec and spec.name, main_file, call)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if hash_seed is not None:
            environment["PYTHONHASHSEED"] = str(hash_seed)
        self._outcome = place / "outcome"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main({str(place)!r})"],
            env=environment,
            stdin=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()

    def wait(self) -> int:
        """Wait for the process to end, and return its exit code."""
        return self._process.wait(_TIMEOUT_S)

    def result(self) -> Any:
        """Wait, and return what the function returned.

        Raises
        ------
        RuntimeError
            If it raised, or if the process ended without a result.
        """
        exit_code = self.wait()
        if not self._outcome.exists():
            raise RuntimeError(f"the process ended with exit code {exit_code}")
        returned, error = pickle.loads(self._outcome.read_bytes())
        if error is not None:
            raise RuntimeError(error)
        return returned


def main(directory: str) -> None:
    """Make the call that lies in a directory, and leave its outcome there."""
    place = Path(directory)
    path, main_name, main_file, call = pickle.loads((place / "call").read_bytes())
    sys.path[:] = path
    _pose_as(main_name, main_file)
    returned, error = None, None
    try:
        function, arguments = cloudpickle.loads(call)
        returned = function(*arguments)
    except Exception as raised:
        error = error_text(raised)
    draft = place / "draft"
    draft.write_bytes(pickle.dumps((returned, error)))
    os.replace(draft, place / "outcome")


def _pose_as(name: str | None, file: str | None) -> None:
    """Give classes that a script defined the qualified name that they have in the script."""
    module: Any = sys.modules["__main__"]
    module.__file__ = file
    if name is not None:
        from importlib.machinery import ModuleSpec

        module.__spec__ = ModuleSpec(name, None)
