"""Runs of a tiny model on random tokens, in this process or in others."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import train
from mygpt import checkpoint, command_line, plot
from mygpt.distributed import DistributedContext
from mygpt.start import start_or_resume
from mygpt.train_state import TrainState
from tests.dataset import VOCABULARY

ROOT = Path(train.__file__).parent
MODEL = f"--vocab-size {VOCABULARY} --block-size 16 --n-layers 2 --n-heads 2 --n-embed 16"
BATCH = "--total-batch-size 128 --micro-batch 4 --device cpu"  # two micro-steps
WHEN = "--max-steps 20 --val-interval 5 --checkpoint-interval 10 --log-interval 4"
OPTIMIZER = "--optimizer adamw --schedule cosine --max-lr 3e-3 --min-lr 1.5e-4"
FLAGS = f"{MODEL} {BATCH} {WHEN} {OPTIMIZER} --dropout 0.2".split()
ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


@contextmanager
def one_thread(pictures: bool = False) -> Iterator[None]:
    """Sums of one thread are the same in every process, and small models are no work for two.

    Most of the time of such runs is drawing, which is left out unless one asks for `pictures`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with nullcontext() if pictures else patch.object(plot, "draw_or_explain", str):
            yield
    finally:
        torch.set_num_threads(before)


def arguments(data: Path, run: Path, *flags: str) -> list[str]:
    shape, rest = ["--block-size", "16"], FLAGS[len(MODEL.split()) :]
    own = [*shape, *rest] if "--init-from" in flags else FLAGS  # with it, no other shape
    return ["tiny", "--data", str(data), "--log-dir", str(run), *own, *flags]


def start(data: Path, run: Path, *flags: str) -> int:
    return train.main(arguments(data, run, *flags))


def refused(data: Path, run: Path, *flags: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        start(data, run, *flags)
    assert exit_.value.code == 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def on_ranks(count: int) -> list[str]:
    """The beginning of a command that starts `count` ranks."""
    nproc = f"--nproc_per_node={count}"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", nproc]


def final_bytes(run: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """The last checkpoint: all weights, all of the optimizer, the place in the data."""
    folder = checkpoint.find(run)
    names = ("model.safetensors", "optimizer.safetensors")
    weights, optimizer = ((folder / name).read_bytes() for name in names)
    return weights, optimizer, checkpoint.read_state(folder)["loader"]


def one_job(data: Path, run: Path, *flags: str) -> TrainState:
    """What a run begins with, without the run."""
    config = command_line.parse(arguments(data, run, *flags), "Train.")
    record, dataset = start_or_resume(config)
    record = replace(record, config=record.config.resolved(20))
    return train.build_train_state(record, dataset, ALONE)
