"""Shards: parts of a run that several drivers share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, Write, psnc, write
from drivers import Start, start
from hypothesis import given
from hypothesis import strategies as st
from other_programs import query
from stages_for_tests import (
    GroupedDiscard,
    Pairs,
    numbers_pipeline,
    read_journal,
)

from psnc import IndexRangeError, Pipeline, PipelineError, run_pipeline
from psnc.claims import Claim
from psnc.index_ranges import ranges_in, ranges_text
from psnc.shards import Shard

__all__ = ["psnc", "start", "write"]

Groups = list[tuple[int, ...]]


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    """Some indices in groups, as `psnc.partition` gives them."""
    indices = sorted(draw(st.sets(st.integers(0, 500), max_size=60)))
    members: dict[int, list[int]] = {}
    for index in indices:
        members.setdefault(draw(st.integers(0, 20)), []).append(index)
    return sorted((tuple(each) for each in members.values()), key=lambda group: group[0])


@given(groups(), st.integers(1, 30))
def test_the_shards_are_all_indices_and_divide_no_group(groups: Groups, parts: int) -> None:
    shards = [Shard(part, parts).indices(groups) for part in range(1, parts + 1)]
    assert sorted(index for shard in shards for index in shard) == sorted(
        index for group in groups for index in group
    )
    for group in groups:
        assert sum(shard.isdisjoint(group) for shard in shards) == parts - 1


@given(st.integers(0, 300), st.integers(1, 40))
def test_shards_without_groups_are_contiguous_and_as_equal_as_can_be(
    total: int, parts: int
) -> None:
    each = [(index,) for index in range(total)]
    shards = [sorted(Shard(part, parts).indices(each)) for part in range(1, parts + 1)]
    assert [index for shard in shards for index in shard] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(groups(), st.integers(1, 30))
def test_shards_are_as_equal_as_groups_allow(groups: Groups, parts: int) -> None:
    share = sum(map(len, groups)) / parts
    largest = max(map(len, groups), default=0)
    for part in range(1, parts + 1):
        assert len(Shard(part, parts).indices(groups)) <= share + largest


def ran(pipeline: Pipeline[Any], **arguments: Any) -> list[str]:
    """Return the outputs of a run."""
    return [path for paths in run_pipeline(pipeline, **arguments) for path in paths]


@pytest.mark.parametrize("value", ["2/3", (2, 3), " 2 / 3 ", [2, 3]])
def test_a_shard_is_a_part_of_all_indices(value: Any) -> None:
    assert ran(numbers_pipeline(7), shard=value) == ["out/2-0.bin", "out/3-0.bin", "out/4-0.bin"]


def test_a_shard_is_a_part_of_the_indices_asked_for_in_their_order() -> None:
    given = [9, 5, 1, 5, 3]
    first = ran(numbers_pipeline(10), indices=given, shard="1/2")
    second = ran(numbers_pipeline(10), indices=given, shard="2/2")
    assert first == ["out/1-0.bin", "out/3-0.bin"]
    assert second == ["out/9-0.bin", "out/5-0.bin", "out/5-0.bin"]


def test_there_may_be_more_shards_than_indices() -> None:
    outputs = [ran(numbers_pipeline(2), shard=(part, 5)) for part in range(1, 6)]
    assert sorted(filter(None, outputs)) == [["out/0-0.bin"], ["out/1-0.bin"]]
    assert ran(numbers_pipeline(4), indices=[], shard="1/2") == []


@pytest.mark.parametrize("completed", [[], [0, 1, 2, 7]])
def test_what_belongs_together_is_in_one_shard_whatever_is_completed(
    tmp_path: Path, completed: list[int]
) -> None:
    def pipeline() -> Pipeline[Any]:
        return Pipeline(Pairs(12), sink=GroupedDiscard(3), db_file=tmp_path / "run.db")

    run_pipeline(pipeline(), indices=completed)
    # Pairs and threes make sixes.
    assert len(run_pipeline(pipeline(), shard="1/3")) == 6
    assert run_pipeline(pipeline(), shard="2/3") == []
    assert len(run_pipeline(pipeline(), shard="3/3")) == 6
    assert pipeline().completed_indices == set(range(12))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("3", "shard='3': give a part and the number of parts, such as '3/16'"),
        ("a/b", "shard='a/b': give a part"),
        ("-1/2", "shard='-1/2': give a part"),
        ("1/2/3", "shard='1/2/3': give a part"),
        (3, "shard=3: give a part"),
        ((1, 2, 3), r"shard=\(1, 2, 3\): give a part"),
        ((1.0, 2), r"shard=\(1.0, 2\): give a part"),
        ((True, 2), r"shard=\(True, 2\): give a part"),
        ("0/4", "shard='0/4': parts are counted from 1 to 4"),
        ("5/4", "shard='5/4': parts are counted from 1 to 4"),
        ("0/0", "shard='0/0': divide it into 1 part at least"),
    ],
)
def test_a_shard_that_there_is_not_is_refused(value: Any, said: str) -> None:
    with pytest.raises(PipelineError, match=f"^{said}") as caught:
        run_pipeline(numbers_pipeline(), shard=value)
    assert "\n" not in str(caught.value)


def test_indices_that_there_are_not_are_refused_in_every_shard() -> None:
    with pytest.raises(IndexRangeError):
        run_pipeline(numbers_pipeline(4), indices=[0, 9], shard="1/2")


SHARD = """
    import os, sys
    from stages_for_tests import held_pipeline
    from psnc import run_pipeline
    print(len(run_pipeline(held_pipeline(os.getcwd(), 200), shard=sys.argv[1])))
"""


def test_shards_run_side_by_side_on_one_database(start: Start, tmp_path: Path) -> None:
    drivers = [start(SHARD, f"{part}/4") for part in range(1, 5)]
    assert [driver.finish(120) for driver in drivers] == [(0, "50\n", "")] * 4
    assert sorted(read_journal(tmp_path / "journal.txt")) == list(range(200))
    recorded = query(
        tmp_path / "shared.db", "SELECT idx FROM index_results WHERE status = 'completed'"
    )
    assert sorted(recorded) == [(index,) for index in range(200)]
    assert query(tmp_path / "shared.db", "SELECT claims FROM pipeline_runs") == [(None,)]


# --- psnc run ---------------------------------------------------------------------------------


@pytest.fixture
def run_shard(tmp_path: Path, psnc: Psnc) -> Callable[..., list[str]]:
    """Run a shard of a pipeline that adds up, and return the lines printed."""

    def run(*arguments: str, filters: str = "Sum()", code: int = 0) -> list[str]:
        (tmp_path / "adds.py").write_text(
            "from stages_for_tests import *\n"
            f"pipeline = Pipeline(Numbers(4), [{filters}], Discard(), db_file='adds.db')\n"
        )
        said = psnc("run", "adds.py:pipeline", "--no-progress", *arguments)
        assert (said.code, said.err) == (code, "")
        return said.out.splitlines()

    return run


def gathered(tmp_path: Path) -> list[Any]:
    return [json.loads(each.read_text()) for each in tmp_path.glob("adds.gathered/*/*")]


def test_the_shard_that_completes_the_last_index_gathers(
    tmp_path: Path, run_shard: Callable[..., list[str]]
) -> None:
    first = run_shard("--shard", "2/2")
    assert first[-1].startswith("not gathered: 2 indices of all shards are not completed yet")
    assert gathered(tmp_path) == []
    last = run_shard("--shard", "1/2")
    assert last[-1].startswith("gathered ")
    assert last[-1].endswith("of 4 of 4 indices")
    assert gathered(tmp_path) == [{"count": 4, "total": 6}]


def test_all_shards_are_of_the_indices_asked_for(
    tmp_path: Path, run_shard: Callable[..., list[str]]
) -> None:
    run_shard("--shard", "2/2", "--indices", "0-2")
    assert run_shard("--shard", "1/2", "--indices", "0-2")[-1].endswith("of 3 of 4 indices")


def test_shards_with_failures_leave_the_gathering_to_a_person(
    tmp_path: Path, run_shard: Callable[..., list[str]], psnc: Psnc
) -> None:
    filters = "FailOn([3]), Sum()"
    run_shard("--shard", "1/2", filters=filters)
    lines = run_shard("--shard", "2/2", filters=filters, code=1)
    assert lines[-1].startswith("not gathered: 1 index of all shards is not completed yet")
    assert psnc("gather", "adds.py:pipeline").out.endswith("of 3 of 4 indices\n")


def test_a_shard_whose_database_no_other_shard_has_says_so(psnc: Psnc, write: Write) -> None:
    write(
        "adds.py",
        "from stages_for_tests import *\npipeline = Numbers(4).filter(Sum()).write(Discard())\n",
    )
    for shard in ("1/2", "2/2"):
        said = psnc("run", "adds.py:pipeline", "--shard", shard)
        line = said.out.splitlines()[-1]
        assert line.startswith("not gathered: this shard was recorded to a database of its own")
    psnc("run", "adds.py:pipeline", "--resume", "--shard", "1/2")
    said = psnc("run", "adds.py:pipeline", "--resume", "--shard", "2/2")
    assert said.out.splitlines()[-1].endswith("of 4 of 4 indices")


def test_failed_indices_are_not_divided_since_they_change(psnc: Psnc) -> None:
    said = psnc("run", "three.py:pipeline", "--retry-failed", "--shard", "1/2")
    assert said.error.startswith("--shard and --retry-failed: ")


def test_a_wrong_shard_is_one_line(psnc: Psnc) -> None:
    said = psnc("run", "three.py:pipeline", "--shard", "17/16")
    assert said.error == "shard='17/16': parts are counted from 1 to 16"


# --- indices as text --------------------------------------------------------------------------

INDICES = st.one_of(
    st.sets(st.integers(0, 60)).map(sorted),
    st.builds(range, st.integers(0, 50), st.integers(0, 500), st.integers(1, 20)),
)


@given(INDICES)
def test_ranges_name_just_the_indices(indices: Any) -> None:
    text = ranges_text(indices)
    assert [index for each in ranges_in(text) for index in each] == list(indices)


def test_shares_of_every_kind_have_short_texts() -> None:
    assert ranges_text(range(1_000_000)) == "0-999999"
    assert ranges_text(range(3, 1_000_000, 16)) == "3-999987/16"
    assert ranges_text([0, 7, 8, 9, 20]) == "0,7-9,20"


def a_claim(indices: str) -> Claim:
    return Claim("one", "here", 1, "", "", "2026-01-02T03:04:05+00:00", 0, indices)


@given(INDICES, INDICES)
def test_claims_overlap_where_they_have_an_index_in_common(one: Any, other: Any) -> None:
    first, second = a_claim(ranges_text(one)), a_claim(ranges_text(other))
    assert first.overlaps(second) == second.overlaps(first) == (not set(one).isdisjoint(other))
    assert first.overlaps(a_claim("all")) == a_claim("all").overlaps(first) == bool(one)


def test_a_claim_of_more_indices_than_memory_holds_can_be_compared() -> None:
    assert a_claim("5").overlaps(a_claim(f"0-{10**18}"))
    assert not a_claim("5").overlaps(a_claim(f"6-{10**18}"))
