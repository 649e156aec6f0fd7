"""Real virtual environments, and distributions to install there."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import textwrap
import venv
from collections.abc import Mapping
from pathlib import Path

Finished = subprocess.CompletedProcess[str]

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"

[project.entry-points.psnc]
{entry_points}
"""

_WHEEL = """
[tool.hatch.build.targets.wheel]
bypass-selection = true

[tool.hatch.build.targets.wheel.force-include]
{files}
"""


class Environment:
    """A virtual environment that has psnc and what it needs from the environment of the tests.

    Nothing is downloaded: what is installed is built from source by the build tools that the
    environment of the tests has.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        venv.EnvBuilder(symlinks=True).create(directory)
        self.python = directory / "bin" / "python"
        (packages,) = (directory / "lib").glob("python*/site-packages")
        shared = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        # Unlike a plain line of a .pth file, this follows the .pth files that lie there, such as
        # those of distributions that are installed in editable mode.
        lines = [f"import site; site.addsitedir({path!r})\n" for path in shared]
        (packages / "environment_of_the_tests.pth").write_text("".join(lines))

    def install(self, *projects: Path, editable: bool = False) -> None:
        """Build and install distributions from their source trees."""
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        named = [part for each in projects for part in (["-e"] if editable else []) + [str(each)]]
        finished = self.run("-m", "pip", "install", *options, *named, cwd=self.directory)
        assert finished.returncode == 0, finished.stderr

    def run(self, *arguments: object, cwd: Path, **variables: str) -> Finished:
        """Run the environment's Python."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=cwd,
            env={**kept, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def psnc(self, *arguments: object, cwd: Path, **variables: str) -> Finished:
        """Run ``psnc``."""
        return self.run("-m", "psnc", *arguments, cwd=cwd, COLUMNS="200", **variables)


def write_distribution(
    directory: Path,
    name: str,
    modules: Mapping[str, str],
    entry_points: Mapping[str, str],
    version: str = "1.0",
) -> Path:
    """Write a source tree with some modules, and return its directory."""
    project = directory / name
    project.mkdir(parents=True)
    lines = "\n".join(f'{key} = "{value}"' for key, value in entry_points.items())
    pyproject = _PYPROJECT.format(name=name, version=version, entry_points=lines)
    files = "".join(f'"{module}.py" = "{module}.py"\n' for module in modules)
    pyproject += _WHEEL.format(files=files)
    (project / "pyproject.toml").write_text(pyproject)
    for module, source in modules.items():
        (project / f"{module}.py").write_text(textwrap.dedent(source))
    return project
