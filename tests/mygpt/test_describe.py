"""What the lines at the start and at the end of training warn of."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mygpt import describe
from mygpt.distributed import DistributedContext
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


@pytest.mark.parametrize(
    ("device", "flops_per_token", "rate", "warned"),
    [
        ("cpu", 7e8, 1e11, True),
        ("cpu", 7e8, 1e13, False),
        ("cpu", 1e6, 1e9, False),
        ("cuda", 7e8, 1e11, False),
    ],
)
def test_hours_on_a_cpu_are_announced(
    device: str, flops_per_token: float, rate: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """524,288 tokens of a model of 124M parameters on 100 GFLOP/s: an hour for each step."""
    monkeypatch.setattr(describe, "matmul_flops", lambda: rate)
    monkeypatch.setattr(describe.os, "cpu_count", lambda: 1)
    state = SimpleNamespace(
        config=SimpleNamespace(total_batch_size=2**19, max_steps=19073),
        ranks=DistributedContext(0, 0, 4, torch.device(device)),
        model=SimpleNamespace(flops_per_token=lambda: flops_per_token),
        step=0,
    )
    told = list(describe._cost_on_cpu(state))  # type: ignore[arg-type]
    assert len(told) == warned
    if warned:
        assert told[0].startswith(
            "warning a step will take at least 1:01:10 on this CPU, the run 810"
        )
        assert "--total-batch-size 2048 --max-steps 20" in told[0]


def test_the_fastest_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, which a busy machine slows down."""
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(describe.time, "perf_counter", lambda: next(clock))
    assert describe.matmul_flops(8) == 2 * 8**3 / 1.0
