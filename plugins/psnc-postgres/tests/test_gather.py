"""What filters gathered, of the indices that the server has as completed."""

from __future__ import annotations

from pathlib import Path

import pytest
from stages import Discard, Numbers, Total

from psnc import Pipeline, PipelineError, gather_pipeline, run_pipeline


def test_the_completed_indices_of_the_run_are_gathered_in_order(
    store_url: str, tmp_path: Path
) -> None:
    output = tmp_path / "total.txt"
    pipeline = Pipeline(
        Numbers(6, str(tmp_path / "journal")),
        [Total(str(output))],
        Discard(),
        store=store_url,
        resume=True,
    )
    with pytest.raises(PipelineError, match=r"no index of postgres.* is completed"):
        gather_pipeline(pipeline)
    run_pipeline(pipeline, 2, "process_pool", indices=[5, 3, 1, 0])
    assert gather_pipeline(pipeline) == [str(output)]
    assert output.read_text() == "0 + 1 + 3 + 5"
    pipeline.reset_index(3)
    gather_pipeline(pipeline)
    assert output.read_text() == "0 + 1 + 5"
    run_pipeline(pipeline)
    gather_pipeline(pipeline)
    assert output.read_text() == "0 + 1 + 2 + 3 + 4 + 5"


def test_runs_of_one_configuration_are_gathered_each_by_itself(
    store_url: str, tmp_path: Path
) -> None:
    output = tmp_path / "total.txt"
    one, other = (
        Pipeline(
            Numbers(3, str(tmp_path / "journal")),
            [Total(str(output))],
            Discard(),
            store=store_url,
            db_dir=tmp_path / "files",
        )
        for _ in range(2)
    )
    run_pipeline(one, indices=[0, 2])
    run_pipeline(other, indices=[1])
    for pipeline, text in ((one, "0 + 2"), (other, "1")):
        gather_pipeline(pipeline)
        assert output.read_text() == text


def test_a_shard_that_is_gone_is_named_without_the_password(store_url: str, tmp_path: Path) -> None:
    pipeline = Pipeline(
        Numbers(2, str(tmp_path / "journal")), [Total("total.txt")], Discard(), store=store_url
    )
    run_pipeline(pipeline)
    (shard,) = pipeline.filter_artifacts_for_index(1)
    Path(shard["path"]).unlink()
    with pytest.raises(
        PipelineError, match=r"^index 1: .* is not there: have all machines share .* --index 1 and"
    ):
        gather_pipeline(pipeline)
