"""bench.gpu's checks pass where the arithmetic is right, and fail where it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import worker
from bench.gpu import micro, smoke
from bench.gpu.runner import Setting, read
from mygpt.doctor import verify_resume
from mygpt.loss import LinearCrossEntropy
from mygpt.model import KeyValueCache
from mygpt.settings import PRESETS, TrainConfig
from shards.loader import TokenLoader
from tests.bench.support import SHAPE, InThisProcess


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("smoke", "tiny", "cpu", tmp_path, tmp_path)


CHECKS = [check for check in smoke.CHECKS if check is not smoke.resume]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_on_a_cpu(check: Any, setting: Setting) -> None:
    found = smoke.judged(check, setting)
    assert found["passed"] and 0 < len(found["errors"]) <= 6
    assert max(found["errors"].values()) <= found["bound"] == 1e-4


def wrong_mean(self: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scale = 1 if x.dtype == torch.float64 else 1.001  # the oracle's is right
    return torch.nn.functional.cross_entropy(scale * x @ weight.T, targets, ignore_index=-1)


def wrong_update(method: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: KeyValueCache, layer: int, k: Tensor, v: Tensor) -> Any:
        return method(self, layer, k.roll(1, 0) if k.size(2) == 1 else k, v)

    return update


next_batch = TokenLoader.__next__


@pytest.mark.parametrize(
    ("check", "where", "name", "fault"),
    [
        (smoke.gradients, LinearCrossEntropy, "mean", wrong_mean),
        (smoke.cross_entropy, LinearCrossEntropy, "mean", wrong_mean),
        (smoke.attention, smoke, "manual_attention", lambda q, k, v, *_, **__: 1.001 * v),
        (smoke.decoding, KeyValueCache, "update", wrong_update(KeyValueCache.update)),
        (smoke.resume, verify_resume, "differences", lambda *_, **__: iter([("a", "step 5")])),
    ],
)
def test_a_fault_is_found(
    check: Any, where: Any, name: str, fault: Any, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault)
    assert not smoke.judged(check, setting)["passed"]


def test_a_batch_that_differs_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = iter([next_batch, lambda self: tuple(part.flip(0) for part in next_batch(self))])

    def build(self: TokenLoader, *args: Any, **options: Any) -> None:
        initialise(self, *args, **options)
        self.deliver = next(loaders)  # type: ignore[attr-defined]

    initialise = TokenLoader.__init__
    monkeypatch.setattr(TokenLoader, "__init__", build)
    monkeypatch.setattr(TokenLoader, "__next__", lambda self: self.deliver(self))
    assert smoke.judged(smoke.loader, setting)["errors"] == {"differing batches": 1}


def test_what_is_not_a_number_is_no_small_error() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert smoke.error_of(nan, torch.ones(2)) == float("inf")


def test_checks_are_noted_as_they_end(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting) -> smoke.Errors:
        raise ValueError("no such device")

    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setattr(smoke, "CHECKS", (smoke.attention, failing))
    smoke.run(setting)
    found = {finding["contender"]: finding for finding in read(setting.out)}
    assert found["attention"]["passed"] is True
    assert found["failing"]["failed"] == "no such device"


def test_every_operation_is_measured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setitem(PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
    monkeypatch.setattr(micro, "SECONDS", 0.0)
    monkeypatch.setattr(micro, "MICRO_BATCH", {"cpu": 1})
    monkeypatch.setattr(micro, "chunk_rows", lambda device: 4)
    micro.run(setting)
    groups = {f["contender"]: [g["what"] for g in f["figures"]] for f in read(setting.out)}
    assert list(groups) == ["rates", "block_products", "head_products", "attention", "losses"]
    assert len(groups["block_products"]) == len(set(groups["block_products"])) == 12
    assert groups["head_products"][:2] == ["logits 4 × 131", "logits 4 × 256"]
    assert any(name.startswith("math") for name in groups["attention"])
    losses = ["torch's", "ours"]
    assert [name.rpartition(", ")[2] for name in groups["losses"]] == losses
    figures = [g for f in read(setting.out) for g in f["figures"]]
    assert all(figure["ms"] > 0 for figure in figures)
