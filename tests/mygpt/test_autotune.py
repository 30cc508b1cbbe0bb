"""`--micro-batch auto`: divisors only, the largest with room on every rank, or as the rule says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from mygpt import autotune, checkpoint, command_line, optim, schedule, settings, time_budget
from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext
from mygpt.log import RunLog
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.start import start_or_resume
from mygpt.time_budget import BudgetClock
from shards.mixture import Mixture
from tests.dataset import VOCABULARY, write_dataset

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


def model_with_room(monkeypatch: pytest.MonkeyPatch, rows: int) -> tuple[GPT, list[int]]:
    """A model that runs out of memory beyond so many rows, and the list of what is tried on it."""
    model, tried = GPT(GPTConfig(block_size=8, vocab_size=16, n_layers=1, n_heads=1, n_embed=4)), []
    forward = model.forward

    def limited(idx: torch.Tensor, targets: torch.Tensor) -> Any:
        tried.append(len(idx))
        if len(idx) > rows:
            raise torch.OutOfMemoryError
        return forward(idx, targets)

    monkeypatch.setattr(model, "forward", limited)
    return model, tried


def test_sizes_divide_a_ranks_rows() -> None:
    assert schedule.micro_batch_sizes(12 * 8, 8, 1) == [1, 2, 3, 4, 6, 12]
    assert schedule.micro_batch_sizes(12 * 8, 8, 4) == [1, 3]
    with pytest.raises(ValueError, match=r"8 \* 5 = 40, got 96: nearest is 80"):
        schedule.micro_batch_sizes(12 * 8, 8, 5)
    with pytest.raises(ValueError, match="got 4: nearest is 8"):
        schedule.micro_batch_sizes(4, 8, 1)


def test_the_rule_bounds_the_tokens() -> None:
    assert autotune.by_rule([1, 2, 4, 8, 16, 32], 128) == 16
    assert autotune.by_rule([1, 3, 9], 1024) == 1
    assert autotune.by_rule([5, 10], 1024) == 5


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (5, 4), (6, 6), (100, 12)])
def test_the_largest_with_room_is_found(
    rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = model_with_room(monkeypatch, rows)
    optimizers = optim.configure_optimizers(model)
    assert autotune.by_trying(model, optimizers, [1, 2, 3, 4, 6, 12], ALONE) == expected
    assert tried == sorted(tried)
    # What a step fills is filled while the sizes are tried.
    assert len(optim.state_tensors(optimizers, model)) == 3 * len(list(model.parameters()))
    assert all(p.grad is not None for p in model.parameters())


def test_no_room_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_with_room(monkeypatch, 0)
    with pytest.raises(ValueError, match="not even --micro-batch 1 fits into the memory of cpu"):
        autotune.by_trying(model, optim.configure_optimizers(model), [1, 2], ALONE)


@pytest.mark.parametrize("room", [[], [1]])
def test_no_room_for_what_the_optimizers_remember_is_refused(
    room: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this rank, or on another, of which this one hears."""
    model, tried = model_with_room(monkeypatch, 100)
    optimizers = optim.configure_optimizers(model)
    if room:
        ranks, answers = DistributedContext(0, 0, 2, torch.device("cpu")), iter(room)
        monkeypatch.setattr(
            DistributedContext, "all_reduce_sum", lambda self, values: [next(answers)]
        )
    else:
        ranks = ALONE
        for name in ("zeros_like", "Tensor.new_zeros"):
            monkeypatch.setattr(f"torch.{name}", full)
    with pytest.raises(ValueError, match="not even --micro-batch 1 fits into the memory of cpu"):
        autotune.by_trying(model, optimizers, [1, 2], ranks)
    assert tried == []


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError


def test_the_rank_with_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has room for everything; of the other it hears that it has none beyond 4 rows."""
    model, tried = model_with_room(monkeypatch, 100)
    answers: Iterator[float] = iter([2, 2, 2, 2, 2, 1])  # the first of them of the state
    ranks = DistributedContext(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(DistributedContext, "all_reduce_sum", lambda self, values: [next(answers)])
    assert (
        autotune.by_trying(model, optim.configure_optimizers(model), [1, 2, 4, 8, 16], ranks) == 4
    )
    assert tried == [1, 1, 2, 4, 8]


def test_auto_is_found_once_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 12 rows a step under a rule of 100 tokens: 6 rows of 16 tokens, twice."""
    data, run = write_dataset(tmp_path / "data").folder, tmp_path / "run"
    shape = f"--vocab-size {VOCABULARY} --block-size 16 --n-layers 1 --n-heads 1 --n-embed 4"
    flags = [*shape.split(), "--max-steps", "4", "--total-batch-size", "192", "--device", "cpu"]
    command = ["tiny", "--data", str(data), "--log-dir", str(run), "--micro-batch", "auto", *flags]
    monkeypatch.setattr(autotune, "UNTRIED_TOKENS", 100)
    assert train.main([*command, "--stop-at", "2"]) == 0
    monkeypatch.setattr(autotune, "UNTRIED_TOKENS", 20)
    assert train.main(command) == 0
    written = json.loads((run / "config.json").read_text("utf-8"))["config"]
    assert written["micro_batch"] == 6
    assert "batch  192 tokens = 6 sequences * 16 tokens * 2 accumulation steps" in (
        run / "log.txt"
    ).read_text("utf-8")
    assert checkpoint.steps(run)[-1] == 4
    # What was found for one rank is found anew for four, which it can't be shared out over.
    for world_size, rows in ((2, 6), (4, 0)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        record, _ = start_or_resume(command_line.parse(command, ""))
        assert record.config.micro_batch == rows


@pytest.mark.parametrize("preset", ["small", "gpt2"])
def test_every_preset_can_be_tried_on_a_gpu(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the length of the run and its warm-up are known; the trial itself stands in here."""
    job = SimpleNamespace(model=0, optimizers=[], own_parameters=None)
    monkeypatch.setattr(autotune, "build_train_state", lambda *_: job)
    monkeypatch.setattr(autotune, "by_trying", lambda model, optimizers, sizes, *_: sizes[-1])
    config = command_line.parse([preset, "--micro-batch", "auto"], "")
    record = RunRecord(config, "", {})
    ranks, run = DistributedContext(0, 0, 1, torch.device("cuda", 0)), RunLog(tmp_path)
    dataset = Mixture.load([str(write_dataset(tmp_path / "data").folder)])
    found = autotune.resolve_micro_batch(record, dataset, ranks, run).config
    assert found == replace(config, micro_batch=config.total_batch_size // config.model.block_size)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--micro-batch", "auto", "--shard", "full", "--optimizer", "adamw"], "give a number"),
        (["--optimizer", "muon", "--shard", "full"], "muon needs whole matrices"),
        (["--micro-batch", "-1"], "--micro-batch must be 0 to"),
    ],
)
def test_what_cannot_go_together_is_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["tiny", *flags])
    assert words in capsys.readouterr().err


class Machine:
    """A fake clock, and a run on it whose first step and first validation take longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, device: str) -> None:
        self.now, self.calls = 0.0, {"step": 0, "validation": 0}
        self.ranks = DistributedContext(0, 0, 1, torch.device(device))
        self.log = RunLog(folder)
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(time_budget.time, name, lambda: self.now)
        monkeypatch.setattr(time_budget, "save_checkpoint", lambda *_: None)

    def takes(self, name: str, first: float, later: float) -> None:
        self.now += later if self.calls[name] else first
        self.calls[name] += 1

    def steps_in_budget(self, *flags: str, step: float, first: float) -> tuple[int, int]:
        config = command_line.parse(["tiny", *flags], "")
        return time_budget.steps_in_budget(
            config,
            BudgetClock(self.log.path.parent, config.time_budget, started=0.0),
            lambda: SimpleNamespace(ranks=self.ranks),  # type: ignore[arg-type, return-value]
            lambda _: self.takes("step", first, step),
            lambda _: self.takes("validation", first, 0.1),
            self.log,
        )


@pytest.mark.parametrize(("schedule", "most_steps"), [("cosine", 103), ("wsd", 102)])
def test_what_a_process_pays_once_is_not_paid_for_every_validation(
    schedule: str, most_steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A first step and a first validation of 15 seconds, compilation; then 5 ms and 0.1 s each."""
    machine = Machine(monkeypatch, tmp_path, "cuda")
    monkeypatch.setattr(time_budget, "_estimate_step", lambda _: 0.005)
    flags = ("--time-budget", "290", "--schedule", schedule)
    steps, validations = machine.steps_in_budget(*flags, step=0.005, first=15)
    trained = 290 - machine.now
    assert validations == settings.VALIDATIONS
    assert steps * 0.005 + validations * 0.1 == pytest.approx(0.95 * trained, rel=0.01)
    assert machine.calls["validation"] == 2
    assert machine.calls["step"] <= most_steps


@pytest.mark.parametrize(
    ("estimate", "first", "taken"), [(80.0, 0, 0), (0.5, 80.0, 2)], ids=["one pass", "two steps"]
)
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_budget_of_too_few_steps_is_refused_at_once(
    schedule: str,
    estimate: float,
    first: float,
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """After one pass of a micro-batch; or, if that was fast, as soon as a step has been timed."""
    machine = Machine(monkeypatch, tmp_path, "cpu")
    monkeypatch.setattr(time_budget, "_estimate_step", lambda _: estimate)
    with pytest.raises(ValueError, match=r"one step takes about 80 s here: --time-budget 100") as e:
        machine.steps_in_budget(
            "--time-budget", "100", "--schedule", schedule, step=80, first=first
        )
    assert "is too short for 20 steps; give --time-budget " in str(e.value)
    assert machine.calls["validation"] == 0
    assert machine.calls["step"] <= taken + (schedule == "cosine")


def test_a_step_is_estimated_from_one_micro_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tried = model_with_room(monkeypatch, 100)
    state = SimpleNamespace(
        model=model,
        ranks=ALONE,
        config=SimpleNamespace(micro_batch=4),
        grad_accum_steps=1000,
        zero_grad=lambda: model.zero_grad(),
    )
    seconds = time_budget._estimate_step(state)  # type: ignore[arg-type]
    assert tried == [4, 4]
    assert seconds > 1000 * 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
