from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import psnc_atm
from psnc import Sink, Source
from psnc_atm import plugin


@pytest.mark.parametrize(
    ("offered", "kind"), [(plugin.psnc_sources(), Source), (plugin.psnc_sinks(), Sink)]
)
def test_what_is_offered_exists_and_describes_itself(offered: dict[str, str], kind: type) -> None:
    for name, place in offered.items():
        module, _, class_name = place.partition(":")
        stage = getattr(import_module(module), class_name)
        assert issubclass(stage, kind)
        assert stage.name == name
        assert stage.description
        assert all(parameter.description for parameter in stage.params())


def test_listing_the_stages_imports_nothing_heavy() -> None:
    script = (
        "import sys, psnc_atm.plugin as plugin; plugin.psnc_sources(); plugin.psnc_sinks();"
        "print(sorted({'ase', 'lmdb', 'numpy', 'zarr', 'orjson'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_there_and_others_are_not() -> None:
    for name in psnc_atm.__all__:
        assert getattr(psnc_atm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        psnc_atm.Nothing  # noqa: B018
