"""One step: what makes it be skipped, what a skipped or dropped one leaves behind."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from mygpt import optim, spikes
from mygpt.stopping import Stop, Stopped
from mygpt.train_state import TrainState
from tests.training import ALONE, one_job
from train import StepResult, train_step, validate

pytestmark = pytest.mark.usefixtures("quick")


def state_of(job: TrainState) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    memory = optim.state_tensors(job.optimizers, job.model)
    return weights | {name: tensor.clone() for name, tensor in memory.items()}


def unchanged(job: TrainState, before: dict[str, torch.Tensor]) -> bool:
    after = state_of(job)
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def take(job: TrainState, count: int = 1) -> StepResult:
    for _ in range(count):
        outcome = train_step(job, Stop(ALONE))
    return outcome


def poison_loss(job: TrainState, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """From now on the loss and its gradient hold `value`."""
    forward = job.model.forward

    def poisoned(*inputs: torch.Tensor) -> tuple[None, torch.Tensor]:
        _, loss = forward(*inputs)
        assert loss is not None
        return None, loss * value

    monkeypatch.setattr(job.model, "forward", poisoned)


@contextmanager
def gradient_infinite_if(job: TrainState, condition: Callable[[], bool]) -> Iterator[None]:
    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.inf) if condition() else gradient

    hook = job.model.ln_f.weight.register_hook(poisoned)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_finite_numbers_moves_nothing_but_the_data(
    data: Path, tmp_path: Path, optimizer: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = one_job(data, tmp_path, "--optimizer", optimizer)
    assert take(job, 2).skip_reason == ""
    before = state_of(job)
    with monkeypatch.context() as patch:
        poison_loss(job, patch, value)
        outcome = take(job)
    assert outcome.skip_reason == f"loss is {outcome.loss}"
    assert not math.isfinite(outcome.loss)
    assert unchanged(job, before)
    assert (job.step, job.spikes.in_a_row, outcome.windows) == (3, 1, range(16, 24))
    assert job.loader.state_dict()["position"] == 24
    assert all(p.grad is None for p in job.model.parameters())
    assert take(job).skip_reason == ""
    assert job.spikes.in_a_row == 0
    assert not unchanged(job, before)


def test_a_gradient_without_finite_numbers_alone_is_enough(data: Path, tmp_path: Path) -> None:
    job = one_job(data, tmp_path)
    before = state_of(job)
    with gradient_infinite_if(job, lambda: True):
        outcome = take(job)
    assert outcome.skip_reason == "norm is inf"
    assert math.isfinite(outcome.loss)
    assert unchanged(job, before)


def test_a_spike_is_skipped_and_a_resumed_run_skips_it_too(data: Path, tmp_path: Path) -> None:
    job = one_job(data, tmp_path, "--skip-spikes", "6")
    take(job)
    before = state_of(job)
    usual = job.spikes.norms[0]
    job.spikes.norms.extend([usual / 3] * spikes.ENOUGH)
    job.spikes.norms.remove(usual)
    outcome = take(job)
    assert outcome.skip_reason.endswith(f"deviations above its mean {usual / 3:.4f}")
    assert math.isfinite(outcome.norm)
    assert unchanged(job, before)
    silent = one_job(data, tmp_path)
    take(silent)
    silent.spikes.load_state_dict(job.spikes.state_dict())
    assert take(silent).skip_reason == ""


def test_an_overflow_of_the_loss_scaler_is_no_fault(data: Path, tmp_path: Path) -> None:
    """fp16 finds its scale by overflowing: told apart, and never too many in a row."""
    job = one_job(data, tmp_path)
    job.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=True)
    take(job)
    before = state_of(job)
    with gradient_infinite_if(job, lambda: job.scaler.get_scale() > 4):
        for scale in (64, 32, 16, 8):
            assert take(job).skip_reason == f"fp16 overflow at loss scale {scale}"
            assert unchanged(job, before)
            assert job.scaler.get_scale() == scale / 2
        assert job.spikes.in_a_row == 0
        assert take(job).skip_reason == ""
    assert not unchanged(job, before)
    with gradient_infinite_if(job, lambda: True):  # no scale mends that
        reasons = [take(job).skip_reason for _ in range(5)]
    assert [reason.split()[0] for reason in reasons] == ["fp16"] * 2 + ["norm"] * 3
    assert job.spikes.in_a_row == 3


class StopAt(Stop):
    """Asked to stop from call `call` on."""

    def __init__(self, call: int) -> None:
        super().__init__(ALONE)
        self.left = call

    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    reason = "a test"


@pytest.mark.parametrize("call", [0, 1, 7, 8])
def test_a_step_is_dropped_with_its_data_wherever_it_is_stopped(
    data: Path, tmp_path: Path, call: int
) -> None:
    flags = ("--micro-batch", "1")  # eight micro-steps
    job, straight = one_job(data, tmp_path, *flags), one_job(data, tmp_path, *flags)
    assert job.grad_accum_steps == 8
    take(job)
    before = state_of(job)
    if call == 8:
        train_step(job, StopAt(call))
    else:
        with pytest.raises(Stopped, match="a test"):
            train_step(job, StopAt(call))
        assert unchanged(job, before)
        assert (job.step, job.loader.state_dict()["position"]) == (1, 8)
        take(job)
    take(straight, 2)
    assert unchanged(job, state_of(straight))


def test_a_step_that_is_almost_done_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ALMOST_DONE", 0.5)
    job = one_job(data, tmp_path)  # two micro-steps
    with pytest.raises(Stopped):
        train_step(job, StopAt(0))
    train_step(job, StopAt(1))
    assert job.step == 1


def test_a_validation_is_stopped_between_its_batches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = one_job(data, tmp_path)
    whole = validate(job, Stop(ALONE))
    monkeypatch.setattr(train, "default_batch_size", lambda *_: 5)
    parts = validate(job, StopAt(-(-len(job.val_windows) // 5)))
    assert (parts.tokens, parts.nats) == (whole.tokens, pytest.approx(whole.nats))
    assert job.model.training
    with pytest.raises(Stopped):
        validate(job, StopAt(2))
    assert job.model.training
