"""The training loop: bitwise resume, ranks that agree, what it keeps and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from mygpt import checkpoint, command_line, log, run_config
from mygpt.evaluate import Loss
from mygpt.schedule import learning_rate
from mygpt.settings import TrainConfig
from mygpt.start import start_or_resume
from mygpt.stopping import Stop
from mygpt.train_state import TrainState
from shards.loader import TokenLoader
from shards.manifest import Manifest
from tests.dataset import VOCABULARY, write_dataset
from tests.training import (
    BATCH,
    FLAGS,
    MODEL,
    ROOT,
    arguments,
    environment,
    final_bytes,
    on_ranks,
    one_job,
    one_thread,
    refused,
    start,
)


@pytest.fixture(autouse=True, scope="module")
def thread() -> Iterator[None]:
    with one_thread(pictures=True):
        yield


# --- resume


def test_stop_and_resume_is_bitwise(data: Path, straight: Path, tmp_path: Path) -> None:
    assert start(data, tmp_path, "--stop-at", "10") == 0
    assert checkpoint.steps(tmp_path)[-1] == 10
    assert start(data, tmp_path) == 0
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path) == log.read(straight)


def test_resume_is_bitwise_with_muon(data: Path, tmp_path: Path) -> None:
    muon = ("--optimizer", "muon", "--schedule", "wsd")
    start(data, tmp_path / "straight", *muon)
    for stop in ("7", "8", "20"):
        start(data, tmp_path / "stopped", *muon, "--stop-at", stop)
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "straight")


KILLED = """
import os, signal, sys, train
take_step = train.train_step
def take_step_or_die(job, stop):
    if job.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(job, stop)
train.train_step = take_step_or_die
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_kill_and_resume_is_bitwise(data: Path, straight: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *arguments(data, tmp_path)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert checkpoint.steps(tmp_path)[-1] == 10
    assert max(log.read(tmp_path).train) == 13
    (tmp_path / "checkpoints" / ".step_00000012.tmp").mkdir()  # what an unfinished write leaves
    assert start(data, tmp_path) == 0
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path) == log.read(straight)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_at_a_checkpoint(
    data: Path,
    straight: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_step = train.train_step

    def take_step_and_hear(job: TrainState, stop: Stop) -> train.StepResult:
        if job.step == 6:
            signal.raise_signal(number)
        return take_step(job, stop)

    monkeypatch.setattr(train, "train_step", take_step_and_hear)
    assert start(data, tmp_path) == code
    assert checkpoint.steps(tmp_path)[-1] == 6
    monkeypatch.undo()
    assert start(data, tmp_path) == 0
    assert final_bytes(tmp_path) == final_bytes(straight)


def test_a_finished_run_says_so_and_stays(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    capsys.readouterr()
    assert start(data, run) == 0
    assert re.search(r"nothing left to do: .* is finished, step 20 of 20", capsys.readouterr().out)
    assert start(data, run, "--micro-batch", "3") == 0  # 8 sequences don't divide so, nor need they
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_the_log_of_a_run_is_never_truncated(data: Path, straight: Path) -> None:
    before = (straight / "log.txt").read_text("utf-8")
    start(data, straight)
    assert (straight / "log.txt").read_text("utf-8").startswith(before)


def test_dropout_draws_anew_for_every_forward_pass() -> None:
    places = list(product(range(5), range(20), range(4), range(4)))
    low_bits = {train.dropout_seed(*place) & 0xFFFFFFFF for place in places}
    assert len(low_bits) == len(places)


# --- ranks


def test_two_ranks_are_one_rank(data: Path, tmp_path: Path) -> None:
    """Same losses, with accumulation, and a run moves from two ranks to one."""
    flags = ("--dropout", "0")
    start(data, tmp_path / "one", *flags)
    two = tmp_path / "two"
    command = [*on_ranks(2), str(ROOT / "train.py"), *arguments(data, two, *flags)]
    stop = ["--micro-batch", "2", "--stop-at", "10"]
    subprocess.run(command + stop, env=environment(), check=True)
    start(data, two, *flags, "--micro-batch", "8")
    expected, found = log.read(tmp_path / "one"), log.read(two)
    assert list(found.train) == list(range(1, 21))
    assert found.train == pytest.approx(expected.train, abs=1e-5)
    assert found.val == pytest.approx(expected.val, abs=1e-5)
    assert final_bytes(two)[2] == final_bytes(tmp_path / "one")[2]


def test_gradients_are_averaged_over_the_ranks_once_a_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = one_job(data, tmp_path)
    entered: list[int] = []

    class Unsynchronised:
        def __enter__(self) -> None:
            entered.append(job.loader.state_dict()["position"])

        def __exit__(self, *_: object) -> None:
            pass

    class FakeDDP:
        no_sync = Unsynchronised

        def __call__(self, *inputs: torch.Tensor) -> Any:
            return job.model(*inputs)

    assert job.grad_accum_steps == 2
    monkeypatch.setattr(job, "ddp", FakeDDP())
    train.train_step(job, Stop(job.ranks))
    assert entered == [4]  # after the first micro-batch of four rows, not after the second


# --- one step


def test_a_step_is_that_of_plain_autograd(data: Path, tmp_path: Path) -> None:
    """Two micro-batches make the step of their union: loss, clipped gradient, AdamW, schedule."""
    flags = ("--dropout", "0", "--grad-clip", "0.5", "--warmup-steps", "4")
    job, other = one_job(data, tmp_path, *flags), one_job(data, tmp_path, *flags)
    rows = [next(other.loader) for _ in range(2)]
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    logits, _ = other.model(x)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    expected.backward()
    gradients = [p.grad for p in other.model.parameters() if p.grad is not None]
    expected_norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    for gradient in gradients:
        gradient.mul_(0.5 / expected_norm)
    decay = [p for p in other.model.parameters() if p.dim() >= 2]
    rest = [p for p in other.model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=3e-3 / 4, betas=(0.9, 0.95)).step()

    outcome = train.train_step(job, Stop(job.ranks))
    found = (outcome.loss, outcome.norm)
    assert found == pytest.approx((expected.item(), expected_norm), rel=1e-5)
    assert (outcome.lr, outcome.windows, outcome.skip_reason) == (3e-3 / 4, range(8), "")
    for ours, theirs in zip(job.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)


def test_the_loop_reads_the_dataset(data: Path, tmp_path: Path, straight: Path) -> None:
    """The ancestor's loop ran with loaders that were None."""
    assert isinstance(one_job(data, tmp_path).loader, TokenLoader)
    assert final_bytes(straight)[2]["position"] == 20 * 128 // 16
    losses = list(log.read(straight).train.values())
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.1)
    assert losses[-1] < losses[0] - 0.05


def test_a_training_beyond_help_stops(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(data, tmp_path, "--max-lr", "1e30", "--checkpoint-interval", "1")
    assert re.fullmatch(r"error: 10 steps in a row .* --max-lr\n", capsys.readouterr().err)
    skipped = log.read(tmp_path).skipped
    assert len(skipped) == 10
    assert set(skipped.values()) <= {"loss is nan", "loss is inf", "norm is nan", "norm is inf"}


# --- validation and checkpoints


def test_the_best_is_kept_and_never_overwritten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([4.0, 3.0, 5.0, 3.5])
    monkeypatch.setattr(train, "validate", lambda *_: Loss(next(losses), 1))
    flags = ("--keep", "1", "--checkpoint-interval", "100")
    start(data, tmp_path, *flags, "--stop-at", "15")
    assert checkpoint.steps(tmp_path) == [10, 15]
    start(data, tmp_path, *flags)
    assert checkpoint.steps(tmp_path) == [10, 20]
    best = checkpoint.best_of(tmp_path)
    assert best == checkpoint.folder_of(tmp_path, 10)
    assert checkpoint.read_state(best)["val_loss"] == 3.0
    written = (tmp_path / "log.txt").read_text("utf-8")
    assert re.findall(r"checkpoint (\d+)/20  best so far", written) == ["5", "10"]


def test_validation_is_on_a_fixed_even_subset(data: Path, tmp_path: Path, straight: Path) -> None:
    job = one_job(data, tmp_path, "--val-tokens", "64", "--seed", "3")
    again = one_job(data, tmp_path, "--val-tokens", "64")
    pairs = zip(job.val_windows, again.val_windows, strict=True)
    assert all((one == other).all() for one, other in pairs)
    assert len(job.val_windows) == 4
    assert list(log.read(straight).val) == [5, 10, 15, 20]
    assert (straight / "loss.png").is_file()


def test_a_checkpoint_says_what_it_is(data: Path, straight: Path) -> None:
    folder = checkpoint.find(straight)
    state = checkpoint.read_state(folder)
    assert state["fingerprint"] == Manifest.load(data).fingerprint
    assert (state["step"], list(state["generations"].values())) == (20, [0])
    model = run_config.from_dict(state["config"]).model
    assert (model.n_embed, model.dropout) == (16, 0.2)
    assert state["val_loss"] == pytest.approx(log.read(straight).val[20], abs=1e-6)


# --- what is refused, and how long a run is


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n-embed 64", "n_embed 16, this command asks for 64: give --n-embed 16"),
        ("--seed 1", "seed 1337, this command asks for 1:"),
        ("--max-steps 30", "max_steps 20, this command asks for 30:"),
        ("--total-batch-size 256", "total_batch_size 128, this command asks for 256:"),
        ("--optimizer muon", "optimizer adamw, this command asks for muon:"),
    ],
)
def test_another_configuration_is_refused_in_one_line(
    data: Path, straight: Path, flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(data, straight, *flags.split())
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_another_dataset_is_refused(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(write_dataset(tmp_path / "other", seed=1).folder, straight)
    assert "expected the dataset with fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--fp8"], ["--no-fp8"], ["--attention", "flash"]])
def test_a_retired_flag_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    refused(data, tmp_path, *flags)
    assert f"remove --{flags[0].split('-')[-1]}" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in [
        (("--vocab-size", "32"), "found 64 in"),
        (("--micro-batch", "3"), "or keep it and give --micro-batch 2"),
        (("--data", str(tmp_path / "nowhere")), "python -m prepare"),
        (("--n-heads", "3"), "n_embed must be a multiple of n_heads"),
    ]:
        refused(data, tmp_path / "run", *flags)
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_second_process_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.locked(tmp_path):
        refused(data, tmp_path)
    assert "another process is training in" in capsys.readouterr().err


def test_the_only_dataset_is_taken_and_named(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["tiny", *FLAGS, "--stop-at", "1"]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert f"no dataset under data/ in {tmp_path}: " in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "data" / "mine")
    assert train.main(flags) == 0
    assert "taking data/mine, the only dataset there" in capsys.readouterr().out
    assert (tmp_path / "log" / "mine-tiny" / "log.txt").is_file()


def test_a_time_budget_becomes_steps_that_are_kept(data: Path, tmp_path: Path) -> None:
    """The calibration leaves no trace: as many steps without it give the same weights."""
    base = ["tiny", "--data", str(data), *MODEL.split(), *BATCH.split(), "--dropout", "0.2"]
    base += ["--schedule", "cosine"]  # "wsd": tests/mygpt/test_time_budget.py
    budget = [*base, "--time-budget", "30", "--log-dir", str(tmp_path / "budget")]
    assert train.main([*budget, "--stop-at", "4"]) == 0
    record = run_config.read_run(tmp_path / "budget")
    assert record is not None
    steps = record.config.max_steps
    assert 4 < steps < 100_000
    assert record.config.val_interval == record.config.checkpoint_interval == max(1, steps // 10)
    assert train.main([*budget, "--stop-at", "5"]) == 0
    assert json.loads((tmp_path / "budget" / "config.json").read_text())["config"] == (
        run_config.to_dict(record.config) | {"stop_at": 5}
    )
    same = ["--max-steps", str(steps), "--stop-at", "5", "--log-dir", str(tmp_path / "steps")]
    assert train.main([*base, *same]) == 0
    assert final_bytes(tmp_path / "steps") == final_bytes(tmp_path / "budget")


def test_the_schedule_is_set_on_every_group(data: Path, tmp_path: Path) -> None:
    job = one_job(data, tmp_path, "--optimizer", "muon", "--warmup-steps", "5")
    job.step = 8
    lr = train.train_step(job, Stop(job.ranks)).lr
    expected = learning_rate(
        8, TrainConfig(max_lr=3e-3, min_lr=1.5e-4, warmup_steps=5, max_steps=20)
    )
    assert lr == expected
    groups = [group for optimizer in job.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [lr] * len(groups)


def test_a_run_is_named_after_its_data_and_preset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "books")
    flags = ["tiny", *FLAGS, "--data", "books", "--stop-at", "1"]
    for line in ("start 0/20", "nothing left to do"):
        assert train.main(flags) == 0
        assert line in capsys.readouterr().out
    assert checkpoint.newest_run(Path("log")) == Path("log/books-tiny")
    mixed = ["--data", "web=1:books", "--data", f"code=2:{data}"]
    for given, name in (
        (mixed, "log/code-web-tiny"),
        (["--data", "books", "--log-dir", "runs/{data}-x"], "runs/books-x"),
    ):
        config = command_line.parse(["tiny", *FLAGS, *given], "")
        assert start_or_resume(config)[0].config.log_dir == Path(name)


@pytest.mark.parametrize(("epochs", "warned"), [("19.9", False), ("21", True)])
def test_many_epochs_are_warned_of(
    epochs: str, warned: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(data, tmp_path, "--max-steps", "0", "--epochs", epochs, "--stop-at", "1") == 0
    told = capsys.readouterr().out
    assert (
        f"warning {epochs} epochs of {data}: the model will learn it by heart" in told
    ) == warned


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_does_not_wait_for_torch(script: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout
    assert not re.search(r"\| +(torch|transformers|matplotlib)$", done.stderr, re.MULTILINE)
