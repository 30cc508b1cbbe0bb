"""What is known of a run, and what is said of what is not."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.report import run_summary
from tests.dataset import write_dataset
from tests.mygpt.support import STEPS, gpt2_dataset, write_run


def test_a_whole_run(tmp_path: Path) -> None:
    data = gpt2_dataset(tmp_path / "data")
    write_run(tmp_path / "run", data)
    about = run_summary.of_run(tmp_path / "run")
    assert about.dataset is not None
    assert about.dataset.fingerprint == about.record.fingerprint == data.fingerprint
    assert len(about.history.train) == STEPS == about.config.max_steps
    assert (about.missing, about.evaluation, about.samples) == ("", None, [])


def test_a_dataset_that_moved_or_is_another(tmp_path: Path) -> None:
    data = gpt2_dataset(tmp_path / "data")
    write_run(tmp_path / "run", data)
    data.folder.rename(tmp_path / "moved")
    gone = run_summary.of_run(tmp_path / "run")
    assert gone.dataset is None
    assert "if it was moved, give its folder with --data" in gone.missing
    assert run_summary.of_run(tmp_path / "run", [str(tmp_path / "moved")]).missing == ""
    other = write_dataset(tmp_path / "other", seed=1)
    wrong = run_summary.of_run(tmp_path / "run", [str(other.folder)])
    assert wrong.dataset is None
    assert f"{data.fingerprint[:12]}, found" in wrong.missing


def test_what_is_no_run_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a run with config\.json in"):
        run_summary.of_run(tmp_path)
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a JSON object in .*eval\.json.* again"):
        run_summary.read_evaluation(tmp_path)


@given(st.integers(0, 500), st.integers(2, 30))
def test_the_spread_is_even_and_has_both_ends(count: int, most: int) -> None:
    found = run_summary.first_to_last(count, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count:
        assert (found[0], found[-1]) == (0, count - 1)
        gaps = {b - a for a, b in pairwise(found)}
        assert not gaps or max(gaps) - min(gaps) <= 1
