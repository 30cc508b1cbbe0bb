"""What the lines at the end of training warn of."""

from pathlib import Path

import pytest

from mygpt import describe
from mygpt.log import RunLog, baseline_line, val_line


@pytest.mark.parametrize(
    ("loss", "warned"), [(4.01, True), (4.0, True), (float("nan"), True), (3.99, False)]
)
def test_a_run_no_better_than_token_frequencies_says_so(
    loss: float, warned: bool, tmp_path: Path
) -> None:
    """The last validation counts."""
    log = RunLog(tmp_path)
    log.write("start 0/2", baseline_line(4.0, 4.2), val_line(1, 2, 3.0 if warned else 5.0, 8))
    assert bool(list(describe._below_baseline(tmp_path))) != warned
    log.write(val_line(2, 2, loss, 8))
    told = list(describe._below_baseline(tmp_path))
    assert [("no better than the unigram baseline, 4.0000" in line) for line in told] == (
        [True] if warned else []
    )
