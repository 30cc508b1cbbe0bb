"""bench.train: the contenders do the same work, and the table says what was measured."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import steps, table, train, worker
from bench.steps import Workload
from bench.train import OURS, PEER, PLAIN, Options
from mygpt.config import GPTConfig
from mygpt.settings import TrainConfig
from tests.bench.support import InThisProcess

SMALL = Options(preset="tiny", block_size=8, micro_batch=2, rounds=2, seconds=0)
SHAPE = GPTConfig(block_size=8, vocab_size=131, n_layers=2, n_heads=2, n_embed=16)


@pytest.fixture
def work(tmp_path: Path) -> Workload:
    made = Workload(SHAPE, 4, "cpu", tmp_path)
    made.build_data()
    return made


@pytest.fixture(scope="module")
def found() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "Worker", InThisProcess)
        patch.setitem(train.PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
        rates = {"burst": 2e10, "sustained": 1e10}
        patch.setattr(steps, "product_rates", lambda device, size: rates)
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
            "start": 1.5,
        }

    turns = {
        OURS: [turn(0.5, 100, [5.0, 4.0]), turn(5, 200, [3.0])],
        PLAIN: [turn(1, 300, [5.1]), turn(10, 400, [4.1])],
    }
    products = [{"sustained": 1e6, "burst": 2e6, "datasheet": 5e6}] * 2
    expected = {
        "what": OURS,
        "tokens_s": {"median": 110.0, "low": 20.0, "high": 200.0, "runs": [200.0, 20.0]},
        "ms": {"median": 2750.0, "low": 500.0, "high": 5000.0, "runs": [500.0, 5000.0]},
        "of_plain": 2.0,
        "cpu_of_plain": 0.708,
        "megabytes": 200,
        "memory_of_plain": 0.5,
        "of_products": 0.11,
        "of_datasheet": 0.022,
        "start_seconds": 1.5,
        "steps": 2,
        "loss": 4.0,
    }
    assert train.row(OURS, turns, products, tokens=100, flops_per_token=1000) == expected
    # Nothing to compare with, since all the others failed.
    alone = train.row(OURS, {OURS: turns[OURS]}, [], tokens=100, flops_per_token=1000)
    none = ("of_plain", "cpu_of_plain", "memory_of_plain", "of_products", "of_datasheet")
    assert alone == expected | dict.fromkeys(none) | {"steps": 3, "loss": 3.0}


def test_the_text(found: Any) -> None:
    text = train.as_text(found)
    rates = "0.01 TFLOP/s sustained, 0.02 TFLOP/s burst"
    for name in (OURS, PLAIN, PEER, "× plain", rates, "relative to plain;"):
        assert name in text


def test_a_contender_that_fails_loses_only_its_own_row(
    found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single one, the product that the others are divided by included."""
    noted: list[Any] = []
    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setitem(train.PRESETS, "tiny", ("small", TrainConfig(SHAPE)))

    def out_of_memory(*_: Any) -> Any:
        raise ValueError("expected it to run, found no memory")

    monkeypatch.setattr(steps, "product_rates", out_of_memory)
    monkeypatch.setattr(steps, "plain", out_of_memory)
    left = train.run(SMALL, noted.append)
    assert list(left["failed"]) == [train.PRODUCT, PLAIN]
    assert [row["what"] for row in left["rows"]] == [OURS, PEER]
    assert all(row["of_plain"] is row["of_products"] is None for row in left["rows"])
    text = train.as_text(left)
    assert "product: not measured" in text and "failed: plain: expected it to run" in text
    # What was noted on the way gives the same table.
    assert train.comparison(left, *table.records_of(noted)) == {
        name: left[name] for name in ("tflops_of_products", "rows", "failed")
    }


def test_on_a_gpu_the_plain_step_is_measured_alone(work: Workload) -> None:
    options = Options(device="cuda", rounds=3, steps=67)
    (alone, once), (together, rounds) = train.groups(options, work)
    compiled = [f"{PLAIN}, compiled", f"{PEER}, compiled"]
    assert (list(together), rounds) == ([train.PRODUCT, OURS, *compiled], 3)
    assert (list(alone), once) == ([PLAIN], 1)
    assert [maker[3] for name, maker in together.items() if name != train.PRODUCT] == [67, 67, 1]
    assert [list(makers) for makers, _ in train.groups(Options(), work)] == [
        [train.PRODUCT, OURS, PLAIN, PEER]
    ]


def test_a_turn_takes_so_many_steps_at_least(work: Workload) -> None:
    turn = train.contender(work, 0.0, 3, "plain", compiled=False)
    assert len(turn()["losses"]) == 1 + 3 and len(turn()["losses"]) == 3


def test_what_is_measured_where() -> None:
    assert list(train.variants(Options())) == [OURS, PLAIN, PEER]
    cpu = train.variants(Options(compile=True))
    assert {f"{name}, compiled" for name in (OURS, PLAIN, PEER)} <= cpu.keys()
    gpu = train.variants(Options(device="cuda"))
    assert list(gpu) == [OURS, PLAIN, f"{PLAIN}, compiled", f"{PEER}, compiled"]
    assert gpu[OURS] == ("ours", True) and gpu[PLAIN] == ("plain", False)


def test_ours_and_the_plain_step_learn_the_same(work: Workload) -> None:
    """Same weights, batches, clipping and AdamW: the losses agree step by step."""
    ours, plain = steps.ours(work, compiled=False), steps.plain(work, compiled=False)
    losses = [(ours(), plain()) for _ in range(40)]
    assert losses[-1][0] < losses[0][0] - 0.1
    for a, b in losses:
        assert a == pytest.approx(b, abs=2e-4)


def test_hugging_faces_learns_as_well(work: Workload) -> None:
    step = steps.hugging_face(work, compiled=False)
    losses = [step() for _ in range(16)]
    assert losses[15] < losses[7] < 5.2


def test_the_same_batches_for_everyone(work: Workload) -> None:
    batches, others = work.batches(), work.batches()
    seen = [next(batches) for _ in range(2 * steps.BATCHES)]
    for x, y in seen:
        assert x.shape == (4, 8) and torch.equal(x[:, 1:], y[:, :-1])
        assert all(map(torch.equal, (x, y), next(others)))
    first, second = (torch.cat([x for x, _ in part]) for part in (seen[:8], seen[8:]))
    assert torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 4 * steps.BATCHES


def test_batches_lie_in_memory_before_the_clock_starts(work: Workload) -> None:
    batches = work.batches()
    for path in work.data.glob("train_*"):
        path.unlink()
    position = batches.state_dict()
    assert [len(x) for x, _ in (next(batches) for _ in range(20))] == [4] * 20
    assert batches.wait_seconds == 0 and batches.state_dict() == position


def test_our_step_is_compiled_by_train_py_itself_on_a_gpu(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whatever train.py does for a GPU when it compiles is measured too."""
    calls: list[bool] = []

    class Assembled(Exception):
        pass

    def assemble(record: Any, *_: Any) -> Any:
        calls.append(record.config.compile)
        raise Assembled

    monkeypatch.setattr(steps, "assemble", assemble)
    for compiled in (True, False):
        with pytest.raises(Assembled):
            steps.ours(work, compiled)
    assert calls == [True, False]


def test_the_rate_of_products() -> None:
    rates = steps.product_rates("cpu", 64, seconds=0.1)
    assert 1e7 < rates["sustained"] < 1e13 and 1e7 < rates["burst"] < 1e13


@pytest.mark.parametrize(
    ("operator", "sizes", "expected"),
    [
        ("aten::mm", {131, 16, 8}, steps.HEAD_PRODUCTS),
        ("aten::addmm", {48, 16}, steps.BLOCK_PRODUCTS),
        ("aten::_softmax", {192, 8}, steps.HEAD_LOSS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", {8, 2}, steps.ATTENTION),
        ("aten::_fused_adamw_", {131}, steps.OPTIMIZER),
        ("aten::_foreach_mul_", {131}, steps.CLIPPING),
        ("aten::native_layer_norm", {16}, steps.NORMS),
        ("aten::embedding_dense_backward", {16}, steps.OTHER),
    ],
)
def test_parts(operator: str, sizes: set[int], expected: str) -> None:
    assert steps.part_of_step(operator, sizes, SHAPE) == expected


def test_a_profile_adds_up(work: Workload) -> None:
    found = steps.profile(work, compiled=False)
    parts, kernels = found["parts"], found["kernels"]
    assert sum(part["share"] for part in parts) == pytest.approx(1, abs=0.01)
    assert {part["part"] for part in parts} >= {steps.HEAD_PRODUCTS, steps.OPTIMIZER}
    assert len(kernels) == steps.LONGEST_KERNELS
    assert [k["ms"] for k in kernels] == sorted((k["ms"] for k in kernels), reverse=True)
    assert "aten::addmm" in {kernel["kernel"] for kernel in kernels}
    text = train.as_text({"profile": found})
    assert steps.HEAD_LOSS in text and "aten::addmm" in text


def test_the_command_profiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train.PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "tiny", "--micro-batch", "1", "--profile"])
    train.main()
    assert steps.HEAD_PRODUCTS in capsys.readouterr().out


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
