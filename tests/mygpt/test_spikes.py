"""What is called a spike, what is never taken, and when nothing helps any more."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mygpt import spikes
from mygpt.spikes import Spikes

NORMS = st.lists(st.floats(0.5, 1.5), min_size=spikes.ENOUGH, max_size=3 * spikes.WINDOW)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_taken(bad: float) -> None:
    judge = Spikes(0)
    assert judge.update(bad, 1.0) == f"loss is {bad}"
    assert judge.update(1.0, bad) == f"norm is {bad}"
    assert judge.update(1.0, 1e9) == ""
    assert list(judge.norms) == [1e9]


@given(NORMS, st.floats(1, 9))
def test_a_spike_is_far_above_the_last_norms(norms: list[float], deviations: float) -> None:
    judge = Spikes(deviations)
    judge.norms.extend(norms)
    last = norms[-spikes.WINDOW :]
    mean = sum(last) / len(last)
    deviation = math.sqrt(sum((norm - mean) ** 2 for norm in last) / len(last))
    limit = mean + deviations * max(deviation, 0.05 * mean)
    assert judge.update(1.0, limit * 1.0001).endswith(f"deviations above its mean {mean:.4f}")
    assert judge.update(1.0, limit * 0.9999) == ""
    assert judge.update(1.0, 0.0) == ""


def test_the_reason_says_how_far_above() -> None:
    judge = Spikes(4)
    judge.norms.extend([2.0, 6.0] * spikes.ENOUGH)  # mean 4, standard deviation 2
    assert judge.update(1.0, 4.0 + 4 * 2.0) == ""  # at the limit
    judge.norms.pop()
    assert judge.update(1.0, 15.0) == "norm is 5.5 deviations above its mean 4.0000"


def test_nothing_is_a_spike_before_enough_is_known_or_if_nobody_asks() -> None:
    judge, silent = Spikes(3), Spikes(0)
    for step in range(100):
        norm = 1.0 + step % 2 / 10
        assert judge.update(1.0, norm * (50 if step == spikes.ENOUGH - 1 else 1)) == ""
        assert silent.update(1.0, norm * (50 if step == 90 else 1)) == ""


def test_spikes_do_not_widen_the_rule_that_found_them() -> None:
    judge = Spikes(4)
    for _ in range(40):
        judge.update(1.0, 1.0)
    before = list(judge.norms)
    assert judge.update(1.0, 7.0) == judge.update(1.0, 7.0) != ""
    assert list(judge.norms) == before


def test_ten_in_a_row_are_too_many() -> None:
    judge = Spikes(0)
    for _ in range(3):
        for _ in range(9):
            judge.update(math.nan, 1.0)
            judge.raise_if_diverged()
        judge.update(1.0, 1.0)
    for _ in range(10):
        judge.update(math.nan, 1.0)
    with pytest.raises(ValueError, match=r"^10 steps in a row .*windows they read.*--max-lr$"):
        judge.raise_if_diverged()


def test_a_resumed_rule_forgets_as_a_straight_one_does() -> None:
    straight, resumed = Spikes(2), Spikes(2)
    straight.norms.extend([1.0] * spikes.WINDOW)
    resumed.load_state_dict({"norms": [1.0] * spikes.WINDOW, "in_a_row": 0})
    for judge in (straight, resumed):
        judge.update(1.0, 1.01)
        assert list(judge.norms) == [1.0] * (spikes.WINDOW - 1) + [1.01]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "reason"),
    [
        (1.0, math.inf, 64.0, "fp16 overflow at loss scale 64"),
        (1.0, math.nan, 1.5, "fp16 overflow at loss scale 1.5"),
        (1.0, math.inf, 1.0, ""),  # no scale mends that
        (math.nan, math.inf, 64.0, ""),  # nor that
        (1.0, 1.0, 64.0, ""),
        (1.0, math.inf, None, ""),
    ],
)
def test_what_only_the_loss_scale_is_to_blame_for(
    loss: float, norm: float, scale: float | None, reason: str
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 64.0, enabled=scale is not None)
    scaler.scale(torch.ones(1))  # only then it has its scale
    assert spikes.fp16_overflow(scaler, loss, norm) == reason


@given(st.lists(st.floats(0.1, 3.0), max_size=300), st.integers(0, 300))
def test_what_it_remembers_comes_back(norms: list[float], at: int) -> None:
    straight, first, second = Spikes(2), Spikes(2), Spikes(2)
    reasons = [straight.update(1.0, norm) for norm in norms]
    found = [first.update(1.0, norm) for norm in norms[:at]]
    second.load_state_dict(first.state_dict())
    found += [second.update(1.0, norm) for norm in norms[at:]]
    assert found == reasons
    assert second.state_dict() == straight.state_dict()
