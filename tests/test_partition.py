"""Which indices stay together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages_for_tests import Discard, GroupedDiscard, Journal, Numbers, Pairs, grouped, read_journal

from psnc import PartitionError, Pipeline, PsncError, run_pipeline
from psnc.partition import partition


class Asks(Numbers):
    """Answers with the groups that it was constructed with."""

    def __init__(self, groups: Sequence[Sequence[int]] | None, count: int = 6) -> None:
        super().__init__(count)
        self.groups = groups

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return self.groups


class AsksSink(Discard):
    """The same, as a sink."""

    def __init__(self, groups: Sequence[Sequence[int]] | None) -> None:
        super().__init__()
        self.groups = groups

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return self.groups


class PairedJournal(Journal):
    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return grouped(indices, 2)


class RemembersAsked(Numbers):
    """Writes down which indices it was asked about."""

    def __init__(self, count: int, file: str) -> None:
        super().__init__(count)
        self.file = file

    def __getitem__(self, index: int) -> Iterator[int]:
        if index == 2 and not Path(self.file).exists():
            raise RuntimeError("not yet")
        return super().__getitem__(index)

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        Path(self.file).write_text(json.dumps(list(indices)))
        return None


def test_without_wishes_every_index_stands_alone() -> None:
    groups = partition(Numbers(4), Discard(), [0, 2, 3])
    assert (len(groups), list(groups)) == (3, [(0,), (2,), (3,)])


def test_the_sources_groups_are_kept_in_their_own_order() -> None:
    assert partition(Asks([[5, 4], [0, 1], [2, 3]]), Discard(), range(6)) == [
        (0, 1),
        (2, 3),
        (5, 4),
    ]


def test_the_sinks_groups_are_honoured() -> None:
    assert partition(Numbers(4), AsksSink([[0, 3], [1, 2]]), range(4)) == [(0, 3), (1, 2)]


def test_wishes_of_both_are_joined_until_all_hold() -> None:
    assert partition(Pairs(6), GroupedDiscard(3), range(6)) == [(0, 1, 2, 3, 4, 5)]
    assert partition(Pairs(8), AsksSink([[1, 2], [0], [3], [4], [5, 6, 7]]), range(8)) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]


def test_empty_groups_do_no_harm() -> None:
    assert partition(Asks([[], [0, 1]]), Discard(), [0, 1]) == [(0, 1)]
    assert partition(Asks([[], [0, 1]]), AsksSink([[0], [], [1]]), [0, 1]) == [(0, 1)]


@given(st.data())
def test_groups_cover_each_index_once_and_hold_both_wishes(data: st.DataObject) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, 30), min_size=1)))

    def draw_groups() -> list[list[int]]:
        labels = data.draw(
            st.lists(st.integers(0, 5), min_size=len(indices), max_size=len(indices))
        )
        by_label: dict[int, list[int]] = {}
        for index, label in zip(indices, labels, strict=True):
            by_label.setdefault(label, []).append(index)
        return list(by_label.values())

    wishes = [draw_groups(), draw_groups()]
    groups = partition(Asks(wishes[0]), AsksSink(wishes[1]), indices)
    assert sorted(index for group in groups for index in group) == indices
    for wish in wishes:
        for together in wish:
            assert any(set(together) <= set(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([[0, 1], [2]], "leaves out index 3"),
        ([[0, 1, 2, 3, 9]], "names index 9"),
        ([[0, 1], [1, 2, 3]], "more than once"),
        ([], "leaves out index 0"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name_of_the_stage(
    groups: list[list[int]], complaint: str
) -> None:
    with pytest.raises(PartitionError, match=rf"Asks\.partition_indices\(\) .*{complaint}"):
        partition(Asks(groups, count=4), Discard(), range(4))
    with pytest.raises(PartitionError, match=rf"AsksSink\.partition_indices\(\) .*{complaint}"):
        partition(Numbers(4), AsksSink(groups), range(4))


def test_a_run_with_unfit_groups_ends_before_any_index_runs() -> None:
    pipeline = Pipeline(source=Asks([[0]], count=2), sink=Discard())
    with pytest.raises(PsncError):
        run_pipeline(pipeline)
    assert pipeline.completed_indices == set()
    assert pipeline.failed_indices == {}


@pytest.mark.parametrize(
    ("backend", "n_jobs"), [("sequential", 1), ("thread_pool", 3), ("process_pool", 2)]
)
def test_a_group_runs_in_order_in_one_worker(
    backend: str, n_jobs: int, journal: str, query: Any
) -> None:
    pipeline: Pipeline[int] = Pipeline(source=PairedJournal(12, journal), sink=Discard())
    run_pipeline(pipeline, n_jobs=n_jobs, backend=backend)
    ran = read_journal(journal)
    assert sorted(ran) == list(range(12))
    assert all(ran.index(even) < ran.index(even + 1) for even in range(0, 12, 2))
    worker = dict(query(pipeline.db_path, "SELECT idx, worker_id FROM index_results"))
    assert all(worker[even] == worker[even + 1] for even in range(0, 12, 2))


def test_stages_are_asked_only_about_indices_that_are_still_to_run(tmp_path: Path) -> None:
    file = str(tmp_path / "asked.json")
    pipeline = Pipeline(source=RemembersAsked(5, file), sink=Discard())
    pipeline[0], pipeline[3]
    run_pipeline(pipeline)
    assert json.loads(Path(file).read_text()) == [1, 2, 4]
