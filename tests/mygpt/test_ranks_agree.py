"""Ranks with another run in mind than the first are refused, all of them, before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mygpt import command_line
from mygpt.distributed import DistributedContext
from mygpt.run_config import RunRecord
from mygpt.start import check_ranks_agree, start_or_resume
from tests.ranks import ends_of_ranks
from tests.training import ALONE, arguments

SCRIPT = """
import json, os, sys, train
sys.exit(train.main(json.loads(sys.argv[1])[int(os.environ["RANK"])]))
"""


def test_another_seed_on_one_rank_is_refused_on_both(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = [arguments(data, run, "--seed", seed) for seed in ("1", "2")]
    for code, errors in ends_of_ranks(2, SCRIPT, json.dumps(commands)):
        assert code == 2
        assert errors.count("\n") == 1
        assert "found seed 1 on rank 0 and 2 on rank 1: give all hosts the same command" in errors
    assert not (run / "log.txt").exists()


@pytest.fixture
def record(data: Path, tmp_path: Path) -> RunRecord:
    return start_or_resume(command_line.parse(arguments(data, tmp_path), "Train."))[0]


def check(first: RunRecord, second: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second of two ranks finds when both have said what they are about to do."""
    said: list[Any] = []
    monkeypatch.setattr(
        DistributedContext, "all_gather_object", lambda _, value: said.append(value) or list(said)
    )
    check_ranks_agree(first, ALONE)
    check_ranks_agree(second, ALONE)


def test_where_things_lie_may_differ(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(record.config, data=("/b/x",), log_dir=Path("/b/log"), device="auto")
    check(record, replace(record, config=config, generations={"x": 0}), monkeypatch)


def test_what_is_trained_may_not(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = replace(record.config, model=replace(record.config.model, n_layers=3))
    for other, words in (
        (replace(record, fingerprint="f" * 64), "dataset fingerprint .* and f{12} on rank 1"),
        (replace(record, generations={"x": 1}), r"generations \[0\] on rank 0 and \[1\] on"),
        (replace(record, config=deeper), "n_layers 2 on rank 0 and 3 on rank 1"),
    ):
        with pytest.raises(ValueError, match="expected the same run on all ranks, found " + words):
            check(record, other, monkeypatch)
