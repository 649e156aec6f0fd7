"""What the code of a pipeline's stages was when results were recorded, and what has changed since.

Code is no part of a configuration's hash: a changed comment would throw away a week of work. It is
recorded beside each result instead, so that a resumed run can say what the earlier results are of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from attrs import asdict, frozen

from psnc.code_digest import code_digest, is_installed
from psnc.stages import stage_name

if TYPE_CHECKING:
    from psnc.pipeline import Pipeline
    from psnc.stages import Stage

__all__ = [
    "CodeVersion",
    "StageCode",
    "are_versions",
    "code_version",
    "united",
    "versions_in",
    "versions_text",
]


@frozen
class StageCode:
    """What the code of one stage was.

    Attributes
    ----------
    stage : str
        The name of its class.
    code : str, optional
        Digest of its bytecode and of what that names; ``None`` where there is none, as in C.
    distribution, version : str, optional
        The installed distribution that it comes from.
    """

    stage: str
    code: str | None
    distribution: str | None = None
    version: str | None = None


@frozen
class CodeVersion:
    """What the code of a pipeline's stages was.

    Attributes
    ----------
    python : str
        Which Python the bytecode is of, such as ``"3.11"``.
    stages : tuple of StageCode
        The source, the filters and the sink.
    """

    python: str
    stages: tuple[StageCode, ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all of it, the first 16 hexadecimal digits."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def changes_since(self, earlier: CodeVersion) -> list[tuple[str, str]]:
        """Return each stage whose code is another than it was, and in what."""
        changes = []
        for then, now in zip(earlier.stages, self.stages, strict=False):
            if (then.distribution, then.version) != (now.distribution, now.version):
                name = now.distribution or then.distribution
                versions = f"{then.version or 'unknown'}, now {now.version or 'unknown'}"
                changes.append((now.stage, f"{name} {versions}"))
            elif then.code != now.code and earlier.python != self.python:
                changes.append((now.stage, f"Python {earlier.python}, now {self.python}"))
            elif then.code != now.code:
                changes.append((now.stage, "its code"))
        return changes


def code_version(pipeline: Pipeline[Any]) -> CodeVersion:
    """Return what the code of a pipeline's stages is in this process."""
    stages = (pipeline.source, *pipeline.filters, pipeline.sink)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return CodeVersion(python, tuple(_stage_code(stage) for stage in stages if stage is not None))


def united(*texts: str | None) -> str | None:
    """Return ``code_versions`` of several databases in one; ``None`` if there are none.

    Raises
    ------
    ValueError
        If one is not as it was written.
    """
    return versions_text(
        {digest: each for text in texts for digest, each in versions_in(text).items()}
    )


def versions_in(text: Any) -> dict[str, CodeVersion]:
    """Return what a run's ``code_versions`` say.

    Raises
    ------
    ValueError
        If they are not as they were written.
    """
    try:
        return {
            digest: CodeVersion(each["python"], tuple(StageCode(**one) for one in each["stages"]))
            for digest, each in json.loads(text or "{}").items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("these are no versions of code") from error


def are_versions(text: Any) -> bool:
    """Tell whether what is in a database can be what was written there."""
    try:
        versions_in(text)
    except ValueError:
        return False
    return True


def versions_text(versions: Mapping[str, CodeVersion]) -> str | None:
    """Return a run's ``code_versions`` as a store keeps them; ``None`` if there are none."""
    if not versions:
        return None
    return json.dumps({digest: asdict(version) for digest, version in versions.items()})


def _stage_code(stage: Stage) -> StageCode:
    found = _distribution(type(stage).__module__) or (None, None)
    return StageCode(stage_name(stage), code_digest(stage), *found)


@functools.cache
def _distribution(module: str) -> tuple[str, str] | None:
    """Return name and version of the distribution that a module was installed with."""
    from importlib_metadata import PackageNotFoundError, distribution, packages_distributions

    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or file.startswith("<"):
        return None
    name: str | None = top
    try:
        # Most have the name of their package, and all of them are read for any other.
        distribution(top)
    except PackageNotFoundError:
        name = packages_distributions().get(top, [None])[0] if is_installed(module) else None
    if name is None:
        return None
    found = distribution(name)
    if not (is_installed(module) or _is_worked_on(found, file)):
        return None
    return found.metadata["Name"], found.version


def _is_worked_on(distribution: Any, file: str) -> bool:
    """Tell whether a file is of a distribution that runs from its source (pip install -e)."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return False
    about = json.loads(text)
    if not about.get("dir_info", {}).get("editable"):
        return False
    source = Path(unquote(urlsplit(about["url"]).path))
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(source))
