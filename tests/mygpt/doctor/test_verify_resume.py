"""`make verify-resume`: what it runs, and that it finds the first difference."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mygpt import checkpoint, command_line
from mygpt.doctor import verify_resume
from mygpt.doctor.verify_resume import first_bit_difference, first_loss_difference
from tests.training import FLAGS, environment, start

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_the_command_finds_no_difference(data: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mygpt.doctor.verify_resume",
        "tiny",
        "--data",
        str(data),
        *FLAGS,
    ]
    done = subprocess.run(
        [*command, "--steps", "3"], env=environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    told = [line for line in done.stdout.splitlines() if "training" not in line]
    assert told == [
        "6 steps against 3 + 3, bit by bit: equal",
        "6 steps on one rank against two, to rounding: equal",
    ]


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As if they had been trained: the checkpoint is whole."""
    optimizer, state = checkpoint.load_optimizer(folder), checkpoint.read_state(folder)
    shutil.rmtree(folder)
    checkpoint.save(folder.parents[1], state["step"], tensors, optimizer, state)


def test_the_first_difference_is_named(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint that is not what was trained, and ranks that read other data."""
    asked: list[list[str]] = []

    def train(flags: Sequence[str], run: Path, ranks: int = 1) -> None:
        asked.append([run.name, str(ranks)])
        flags = [*flags, *(["--seed", "2"] if ranks == 2 else [])]
        first = flags.index("--max-steps")
        assert start(data, run, *flags[first:]) == 0
        folder = checkpoint.find(run)
        if "--stop-at" in flags:
            tensors = checkpoint.load_weights(folder)
            tensors["ln_f.weight"] *= 2
            replace_weights(folder, tensors)

    monkeypatch.setattr(verify_resume, "train", train)
    flags = ["tiny", "--data", str(data), *FLAGS, "--steps", "2"]
    assert verify_resume.main(flags) == 1
    names = [["straight", "1"], ["stopped", "1"], ["stopped", "1"], ["straight", "1"]]
    assert asked == [*names, ["two-ranks", "2"]]
    told = capsys.readouterr().out.splitlines()
    bits, ranks = (line for line in told if " against " in line)
    assert bits.startswith("4 steps against 2 + 2, bit by bit: step 3 is the first to differ, loss")
    assert ranks.startswith(
        "4 steps on one rank against two, to rounding: step 1 is the first to differ, loss"
    )


def test_what_no_loss_shows_is_found_in_the_checkpoint(data: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    start(data, one, "--stop-at", "2")
    shutil.copytree(one, other)
    assert first_bit_difference(one, other) == first_loss_difference(one, other) == ""
    folder = checkpoint.find(other)
    tensors = checkpoint.load_weights(folder)
    tensors["ln_f.weight"][3] += 1e-7
    replace_weights(folder, tensors)
    assert first_bit_difference(one, other).startswith("ln_f.weight differs in the last checkpoint")
    start(data, other, "--stop-at", "3")
    assert first_loss_difference(one, other) == "only one of them has step 3"


def test_rows_that_two_ranks_can_share(capsys: pytest.CaptureFixture[str]) -> None:

    small = command_line.parse(["small", "--micro-batch", "12", "--total-batch-size", "16384"], "")
    assert verify_resume.micro_batch_of_two_ranks(small) == 8  # 32 rows a rank
    odd = command_line.parse(["small", "--total-batch-size", str(3 * 256)], "")
    with pytest.raises(ValueError, match=r"= 256 \* 2 = 512, got 768: nearest is 512"):
        verify_resume.micro_batch_of_two_ranks(odd)


def test_a_training_that_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        verify_resume.main(["tiny", "--data", str(tmp_path), *FLAGS, "--steps", "1"])
    assert exit_.value.code == 2
    assert "train.py ended with 2, see above" in capfd.readouterr().err
