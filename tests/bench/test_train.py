"""bench.train: the contenders do the same work, and the table says what was measured."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import profile, steps, train
from bench.train import OURS, PEER, PLAIN, PRODUCT, Options
from mygpt.config import GPTConfig
from mygpt.settings import TrainConfig

SMALL = Options(preset="tiny", block_size=8, micro_batch=2, rounds=2, seconds=0)
SHAPE = GPTConfig(block_size=8, vocab_size=131, n_layers=2, n_heads=2, n_embed=16)


class Here:
    """A worker without a process."""

    def __init__(self, name: str, make: Callable[..., Any], *args: Any) -> None:
        self.name, self.make, self.args, self.made = name, make, args, None

    def turn(self) -> Any:
        self.made = self.made or self.make(*self.args)
        return self.made()

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def found() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Worker", Here)
        patch.setitem(train.PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
        patch.setattr(steps, "matrix_rate", lambda device, size: 1e10)
        return train.run(SMALL)


def test_every_contender_has_a_row(found: Any) -> None:
    assert [row["what"] for row in found["rows"]] == [OURS, PLAIN, PEER]
    assert found["batch"] == [2, 8]
    for row in found["rows"]:
        assert row["tokens_s"]["low"] <= row["tokens_s"]["median"] <= row["tokens_s"]["high"]
        assert row["of_datasheet"] is None and row["steps"] == 3
    assert found["rows"][1]["of_plain"] == found["rows"][1]["memory_of_plain"] == 1
    assert json.loads(json.dumps(found)) == found


def test_a_row_compares_within_each_round() -> None:
    def turn(seconds: float, megabytes: float, losses: list[float]) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "cpu_seconds": seconds / 2 + 1,
            "megabytes": megabytes,
            "losses": losses,
            "begin": 1.5,
        }

    turns = {
        OURS: [turn(0.5, 100, [5.0, 4.0]), turn(5, 200, [5.0, 4.0, 3.0])],
        PLAIN: [turn(1, 300, [5.1]), turn(10, 400, [5.1, 4.1])],
    }
    products = [{"rate": 1e6, "datasheet": 5e6, "of_token": 1000}] * 2
    assert train.row(OURS, turns, products, tokens=100) == {
        "what": OURS,
        "tokens_s": {"median": 110.0, "low": 20.0, "high": 200.0, "runs": [200.0, 20.0]},
        "ms": {"median": 2750.0, "low": 500.0, "high": 5000.0, "runs": [500.0, 5000.0]},
        "of_plain": 2.0,
        "cpu_of_plain": 0.708,
        "megabytes": 200,
        "memory_of_plain": 0.5,
        "of_products": 0.11,
        "of_datasheet": 0.022,
        "begin_seconds": 1.5,
        "steps": 2,
        "loss": 4.0,
    }


def test_the_text(found: Any) -> None:
    text = train.as_text(found)
    for name in (OURS, PLAIN, PEER, "tokens/s ÷ plain step", "0.01 TFLOP/s"):
        assert name in text


def test_what_is_measured_where() -> None:
    assert list(train.variants(Options())) == [OURS, PLAIN, PEER]
    cpu = train.variants(Options(compile=True))
    assert {f"{name}, compiled" for name in (OURS, PLAIN, PEER)} <= cpu.keys()
    gpu = train.variants(Options(device="cuda"))
    assert list(gpu) == [OURS, PLAIN, f"{PLAIN}, compiled", f"{PEER}, compiled"]
    assert gpu[OURS][1] == {"compiled": True}


def test_marks_of_a_gpu() -> None:
    row = {"of_plain": 2.0, "of_products": 0.65, "memory_of_plain": 0.4, "steps": 9, "loss": 3.0}
    names = (OURS, PLAIN, f"{PLAIN}, compiled", f"{PEER}, compiled")
    rows = {name: row | {"of_plain": i + 1.0} for i, name in enumerate(names)}
    marks = {mark["what"]: mark["found"] for mark in train.marks(rows, "cuda")}
    assert marks["tokens/s ÷ plain, compiled"] == 0.33
    assert marks["share of products"] == 0.65 and marks["loss beside plain step after 9 steps"] == 0


def test_ours_and_the_plain_step_learn_the_same() -> None:
    """Same weights, batches, clipping and AdamW: the losses agree step by step."""
    size = steps.Size(SHAPE, 4, "cpu")
    ours, plain = steps.ours(size, compiled=False), steps.plain(size, compiled=False)
    losses = [(ours(number), plain(number)) for number in range(40)]
    assert losses[-1][0] < losses[0][0] - 0.1
    for a, b in losses:
        assert a == pytest.approx(b, abs=2e-4)


def test_hugging_faces_learns_as_well() -> None:
    step = steps.hugging_face(steps.Size(SHAPE, 4, "cpu"), compiled=False)
    losses = [step(number) for number in range(16)]
    assert losses[15] < losses[7] < 5.2


def test_batches_come_again() -> None:
    size = steps.Size(SHAPE, 4, "cpu")
    x, y = size.batch(3)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, size.batch(3 + steps.BATCHES)[0]) and not torch.equal(x, size.batch(4)[0])


def test_the_rate_of_products() -> None:
    assert 1e7 < steps.matrix_rate("cpu", 64) < 1e13


# --- where the time goes


@pytest.mark.parametrize(
    ("operator", "sizes", "expected"),
    [
        ("aten::mm", {131, 16, 8}, profile.HEAD_PRODUCTS),
        ("aten::addmm", {48, 16}, profile.BLOCK_PRODUCTS),
        ("aten::_softmax", {192, 8}, profile.HEAD_LOSS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", {8, 2}, profile.ATTENTION),
        ("aten::_fused_adamw_", {131}, profile.OPTIMIZER),
        ("aten::_foreach_mul_", {131}, profile.CLIPPING),
        ("aten::native_layer_norm", {16}, profile.NORMS),
        ("aten::embedding_dense_backward", {16}, profile.OTHER),
    ],
)
def test_parts(operator: str, sizes: set[int], expected: str) -> None:
    assert profile.part(operator, sizes, SHAPE) == expected


def test_a_profile_adds_up() -> None:
    parts = profile.profile(SHAPE, 2, "cpu", compiled=False)
    assert sum(part["share"] for part in parts) == pytest.approx(1, abs=0.01)
    assert {part["part"] for part in parts} >= {profile.HEAD_PRODUCTS, profile.OPTIMIZER}
    assert profile.HEAD_LOSS in profile.as_text(parts)


# --- the command


def test_the_command_profiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train.PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "tiny", "--micro-batch", "1", "--profile"])
    train.main()
    assert profile.HEAD_PRODUCTS in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["bench.train", "--device", "cuda"])
    with pytest.raises(SystemExit) as leaving:
        train.main()
    assert leaving.value.code == 2
    assert "expected a GPU" in capsys.readouterr().err


def test_the_command_answers_in_json(
    found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", lambda options: found)
    monkeypatch.setattr(sys, "argv", ["bench.train", "--json"])
    train.main()
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.slow
def test_in_processes_of_their_own() -> None:
    rows = {row["what"]: row for row in train.run(SMALL)["rows"]}
    assert rows.keys() == {OURS, PLAIN, PEER}
    assert all(50 < row["megabytes"] < 20_000 for row in rows.values())


def test_the_reference_product_is_no_variant() -> None:
    assert PRODUCT not in train.variants(SMALL)
