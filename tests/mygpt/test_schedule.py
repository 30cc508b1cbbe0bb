"""The learning rate of every step, by either schedule."""

import math
from dataclasses import replace
from typing import Literal

import pytest

from mygpt.schedule import learning_rate
from mygpt.settings import TrainConfig

RATES = TrainConfig(max_lr=6e-4, min_lr=6e-5, warmup_steps=10, max_steps=110)


def test_cosine() -> None:
    lr = [learning_rate(step, RATES) for step in range(200)]
    assert lr[0] == pytest.approx(6e-5) and lr[9] == pytest.approx(6e-4)  # warm-up never is at 0
    assert lr[10] == 6e-4
    assert lr[60] == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr[35] == pytest.approx(6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4)
    assert lr[:10] == sorted(lr[:10]) and lr[10:] == sorted(lr[10:], reverse=True)
    assert set(lr[110:]) == {6e-5}


def test_the_ancestors_missing_star() -> None:
    """`min_lr + coeff (max_lr - min_lr)` calls a float; the decay must multiply."""
    assert learning_rate(60, RATES) == pytest.approx(6e-5 + 0.5 * (6e-4 - 6e-5))


def test_warmup_stable_decay() -> None:
    wsd = replace(RATES, schedule="wsd")
    lr = [learning_rate(step, wsd) for step in range(120)]
    assert lr[9:56] == [pytest.approx(6e-4)] * 47  # 55 = 110 - half of 110
    assert lr[82] == pytest.approx(6e-5 + 28 / 55 * 5.4e-4)
    assert lr[55] > lr[56] > lr[109] > lr[110] == lr[119] == 6e-5


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_warmup_and_nothing_but_warmup(schedule: Literal["cosine", "wsd"]) -> None:
    none = replace(RATES, warmup_steps=0, schedule=schedule)
    assert learning_rate(0, none) == 6e-4
    only = replace(RATES, warmup_steps=110, schedule=schedule)
    assert learning_rate(109, only) == 6e-4
    assert learning_rate(110, only) == 6e-5
