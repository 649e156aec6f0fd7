from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import psnc_atm
from psnc import Filter, Sink, Source
from psnc_atm import plugin


@pytest.mark.parametrize(
    ("offered", "kind"),
    [
        (plugin.psnc_sources(), Source),
        (plugin.psnc_filters(), Filter),
        (plugin.psnc_sinks(), Sink),
    ],
)
def test_what_is_offered_exists_and_describes_itself(offered: dict[str, str], kind: type) -> None:
    for name, place in offered.items():
        module, _, class_name = place.partition(":")
        stage = getattr(import_module(module), class_name)
        assert issubclass(stage, kind)
        assert stage.name == name
        assert stage.description
        assert all(parameter.description for parameter in stage.params())


HEAVY = ("ase", "lmdb", "matscipy", "numpy", "orjson", "pyarrow", "scipy", "zarr")


def heavy_imports(script: str) -> str:
    script += f"\nimport sys; print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.stdout.splitlines()[-1]


def test_listing_the_stages_imports_nothing_heavy() -> None:
    ask = "plugin.psnc_sources(); plugin.psnc_filters(); plugin.psnc_sinks()"
    assert heavy_imports(f"import psnc_atm.plugin as plugin; {ask}") == "[]"


@pytest.mark.parametrize("arguments", [["stages"], ["--help"]])
def test_the_command_imports_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import sys
from psnc.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit as ended:
    assert not ended.code
"""
    assert heavy_imports(script) == "[]"


def test_filters_are_constructed_without_the_libraries_of_their_work() -> None:
    made = "psnc_atm.AtomicStatsFilter('stats.parquet'); psnc_atm.NeighbourList(5.0)"
    assert heavy_imports(f"import psnc_atm; {made}") == "['numpy']"


@pytest.mark.parametrize(
    ("library", "made", "extra"),
    [
        ("pyarrow", "AtomicStatsFilter('stats.parquet')", "stats"),
        ("matscipy", "NeighbourList(5.0)", "neighbours"),
    ],
)
def test_a_library_that_is_not_installed_is_said_at_once(
    library: str, made: str, extra: str
) -> None:
    script = f"import sys; sys.modules[{library!r}] = None; import psnc_atm; psnc_atm.{made}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        f"needs {library}, which is not installed: pip install 'psnc-atm[{extra}]'" in done.stderr
    )


def test_public_names_are_there_and_others_are_not() -> None:
    for name in psnc_atm.__all__:
        assert getattr(psnc_atm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        psnc_atm.Nothing  # noqa: B018


def test_the_code_of_the_sink_is_the_same_in_every_process() -> None:
    script = (
        "from psnc.code_digest import code_digest\n"
        "from psnc_atm import AtomicDataZarrSink\n"
        "print(code_digest(AtomicDataZarrSink('x.zarr')))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(digests) == 1
