"""What a job takes from a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mygpt import optim
from mygpt.distributed import DistributedContext
from mygpt.train_state import load_checkpoint
from tests.training import one_job


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_rank_restores_only_what_it_will_move(
    world_size: int, data: Path, straight: Path
) -> None:
    """Together they have all; that one of them could not hold it is why there are several."""
    job, kept = one_job(data, straight, "--shard", "optimizer"), []
    for rank in range(world_size):
        ranks = DistributedContext(rank, rank, world_size, torch.device("cpu"))
        for optimizer in job.optimizers:
            optimizer.state.clear()
        load_checkpoint(replace(job, ranks=ranks), 20)
        kept.append(optim.state_tensors(job.optimizers, job.model))
    names = [name for each in kept for name in each]
    parameters = dict(job.model.named_parameters())
    assert len(set(names)) == len(names) == 3 * len(parameters)
    sizes = [sum(tensor.numel() for tensor in each.values()) for each in kept]
    assert max(sizes) < 1.2 * sum(sizes) / world_size
