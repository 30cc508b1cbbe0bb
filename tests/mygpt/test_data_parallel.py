"""Several ranks take the steps of one: losses, gradients, and when the ranks talk to each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from mygpt import autotune, command_line
from mygpt.distributed import DistributedContext
from mygpt.start import start_or_resume
from mygpt.stopping import Stop
from mygpt.train_state import TrainState
from tests.dataset import VOCABULARY
from tests.ranks import run_ranks
from train import train_step, validate

pytestmark = pytest.mark.usefixtures("quick")

FLAGS = f"""--vocab-size {VOCABULARY} --block-size 16 --n-layers 1 --n-heads 2 --n-embed 8
    --total-batch-size 256 --max-steps 20 --device cpu --dropout 0 --optimizer adamw""".split()

# What each rank runs.
SCRIPT = """
import json, sys, torch
from mygpt.distributed import init_distributed
from tests.mygpt.test_data_parallel import two_steps

torch.set_num_threads(1)
with init_distributed("cpu") as ranks:
    found = two_steps(ranks, json.loads(sys.argv[2]))
    torch.save(found, f"{sys.argv[1]}/{ranks.world_size}-{ranks.rank}.pt")
"""


def two_steps(ranks: DistributedContext, flags: list[str]) -> dict[str, Any]:
    """Of two steps of a run: what is logged, what the optimizer is given, who talked when."""
    record, dataset = start_or_resume(command_line.parse(flags, "Train."))
    record = replace(record, config=record.config.resolved(20))
    job, stop = train.build_train_state(record, dataset, ranks), Stop(ranks)
    passes: list[int] = []  # the step of each forward pass
    buckets: list[tuple[int, bool]] = []  # passes before a piece of the gradient travels; the last?
    gradients: list[dict[str, torch.Tensor]] = []

    def noted(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append((len(passes), bucket.is_last()))
        return allreduce_hook(group, bucket)

    def given(*_: Any) -> None:
        named = job.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    if job.ddp is not None:
        job.ddp.register_comm_hook(None, noted)
    job.model.register_forward_pre_hook(lambda *_: passes.append(job.step))
    job.optimizers[0].register_step_pre_hook(given)
    outcomes = [train_step(job, stop) for _ in range(2)]
    val_loss = validate(job, stop)
    return {
        "logged": [(outcome.loss, outcome.norm) for outcome in outcomes],
        "validation": (val_loss.nats, val_loss.tokens),
        "gradients": list(gradients),
        "passes": list(passes),
        "buckets": list(buckets),
        "rows that fit": rows_that_fit(job),
    }


def rows_that_fit(job: TrainState) -> int:
    """What `--micro-batch auto` would find if the last of several ranks had room for 3 rows."""
    forward, is_last = job.model.forward, job.ranks.rank == job.ranks.world_size - 1

    def limited(idx: torch.Tensor, targets: torch.Tensor) -> Any:
        if len(idx) > (3 if is_last else 100):
            raise torch.OutOfMemoryError
        return forward(idx, targets)

    job.model.forward = limited  # type: ignore[method-assign]
    return autotune.by_trying(job.model, job.optimizers, [1, 2, 4, 8], job.ranks)


def flags(data: Path, run: Path, micro_batch: int) -> list[str]:
    where = ["--data", str(data), "--log-dir", str(run), "--micro-batch", str(micro_batch)]
    return ["tiny", *FLAGS, *where]


def test_two_ranks_take_the_steps_of_one(data: Path, tmp_path: Path) -> None:
    compare(2, data, tmp_path)


@pytest.mark.slow
def test_four_ranks_take_the_steps_of_one(data: Path, tmp_path: Path) -> None:
    compare(4, data, tmp_path)


def compare(world_size: int, data: Path, tmp_path: Path) -> None:
    alone = two_steps(DistributedContext(0, 0, 1, torch.device("cpu")), flags(data, tmp_path, 16))
    shared = flags(data, tmp_path, 8 // world_size)
    run_ranks(world_size, SCRIPT, str(tmp_path), json.dumps(shared))
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{world_size}-{rank}.pt")
        for step in range(2):
            assert found["logged"][step] == pytest.approx(alone["logged"][step], abs=1e-6)
            for name, gradient in alone["gradients"][step].items():
                close = torch.allclose(found["gradients"][step][name], gradient, rtol=0, atol=1e-7)
                assert close, name
        assert found["rows that fit"] == 2
        assert found["validation"] == pytest.approx(alone["validation"], rel=1e-6)
        # Two micro-steps each; the gradient travels after the second alone, every piece once.
        assert found["passes"] == [0, 0, 1, 1]
        assert {passes for passes, _ in found["buckets"]} == {2, 4}
        assert [passes for passes, is_last in found["buckets"] if is_last] == [2, 4]
