"""A training job as it is before its first step: model, optimizers, and how ranks share them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from mygpt import settings, sharding
from mygpt.distributed import Ranks, compute_dtype, peak_flops
from mygpt.fp8 import check_fp8, use_fp8
from mygpt.model import GPT
from mygpt.optim import configure_optimizers
from mygpt.pretrained import from_pretrained
from mygpt.runs import RunRecord
from mygpt.settings import TrainConfig
from mygpt.training.job import Job, Stream


def assemble(
    record: RunRecord, ranks: Ranks, loader: Stream, val_windows: Sequence[np.ndarray], fresh: bool
) -> Job:
    """The job of a run that reads from `loader`, the same on all ranks but for the rows read.

    `fresh` tells that the weights are those to begin with; else a checkpoint will replace them.
    """
    config, device = record.config, ranks.device
    model, shard = first_model(config, fresh), config.shard if ranks.world_size > 1 else "none"
    model.recompute = config.gradient_checkpointing
    if config.fp8:
        check_fp8(device)
        use_fp8(model)
    if shard == "full":
        sharding.shard_model(model, ranks)
    model.to(device)
    if config.compile and device.type == "cuda":
        model.compile()  # in place: a wrapper would put its prefix before every parameter's name
    optimizers = configure_optimizers(
        model,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
    )
    if shard == "optimizer":
        sharding.shard_optimizers(optimizers, ranks)
    flops, peak = model.flops_per_token() * config.total_batch_size, peak_flops(device)
    return Job(
        record=record,
        ranks=ranks,
        model=model,
        ddp=averaging(model, ranks) if ranks.world_size > 1 and shard != "full" else None,
        optimizers=optimizers,
        scaler=torch.amp.GradScaler(device.type, enabled=compute_dtype(device) == torch.float16),
        loader=loader,
        val_windows=val_windows,
        micro_steps=settings.accumulation(config, ranks.world_size),
        ideal_seconds=peak and flops / (peak * ranks.world_size),
    )


def first_model(config: TrainConfig, fresh: bool) -> GPT:
    """The model, with the weights of --init-from if it begins with them, else freshly drawn."""
    if config.init_from and fresh:
        return from_pretrained(config.init_from, config.model.block_size, config.model.dropout)
    torch.manual_seed(config.seed)
    return GPT(config.model)


def averaging(model: GPT, ranks: Ranks) -> DistributedDataParallel:
    """The model, averaging its gradients over the ranks."""
    own_gpu = [ranks.local_rank] if ranks.device.type == "cuda" else None
    # The gradients lie in the buffers that are sent, instead of beside them.
    return DistributedDataParallel(model, device_ids=own_gpu, gradient_as_bucket_view=True)
