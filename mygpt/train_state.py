"""A model in training and all that its next step depends on, and how that is saved and restored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mygpt import checkpoint, optim, run_config, settings, sharding
from mygpt.distributed import Ranks, compute_dtype, peak_flops
from mygpt.model import GPT
from mygpt.optim import configure_optimizers
from mygpt.pretrained import from_pretrained
from mygpt.run_config import RunRecord
from mygpt.settings import TrainConfig
from mygpt.spikes import Spikes


class Stream(Protocol):
    """Where batches come from: what `shards.loader.TokenLoader` does."""

    wait_seconds: float  # spent inside `next` so far

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the training split."""

    @property
    def unused_tokens(self) -> int:
        """Its tokens that no window of an epoch holds."""

    def __next__(self) -> tuple[Tensor, Tensor]: ...
    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON, with one "position" counted in windows."""

    def load_state_dict(self, state: dict[str, Any], earlier: Sequence[str] = ()) -> None:
        """Go to such a place; ValueError if it is of another stream."""


@dataclass
class Job:
    """A model in training, after `step` finished steps."""

    record: RunRecord
    ranks: Ranks
    model: GPT
    ddp: DistributedDataParallel | None  # the same model, averaging gradients over the ranks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of the loss, for fp16; else it does nothing
    loader: Stream
    val_windows: Sequence[np.ndarray]
    micro_steps: int  # forward and backward passes of one step
    ideal_seconds: float | None  # of a step at the peak of the hardware, where that is known
    spikes: Spikes = field(init=False)
    step: int = 0
    saved_step: int = 0  # of the checkpoint that was written or read last
    best_loss: float = math.inf  # of all validations so far

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.config.skip_spikes)

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return self.record.config

    @property
    def own_parameters(self) -> set[Tensor] | None:
        """Those whose optimizer state lies on this rank alone; None where every rank has all."""
        if self.config.shard != "optimizer":
            return None
        return sharding.own_parameters(self.optimizers, self.ranks)


def save(job: Job, run: Path, val_loss: float | None) -> None:
    """Write the checkpoint of the steps finished so far, and drop what is no longer to be kept."""
    weights = sharding.full_tensors(checkpoint.parameters(job.model), job.ranks)
    tensors = sharding.full_tensors(optim.state_tensors(job.optimizers, job.model), job.ranks)
    if job.ranks.is_main:
        state = {
            "val_loss": val_loss,
            "loader": job.loader.state_dict(),
            "scaler": job.scaler.state_dict(),
            "spikes": job.spikes.state_dict(),
            "fingerprint": job.record.fingerprint,
            "generations": job.record.generations,
            "config": run_config.to_json(job.config),
        }
        checkpoint.save(run, job.step, weights, tensors, state)
        checkpoint.prune(run, job.config.keep, job.config.keep_every)
    job.saved_step = job.step
    job.ranks.barrier()


def restore(job: Job, step: int) -> float | None:
    """Put the job where the checkpoint of `step` was, and return the validation loss it holds.

    Raises ValueError if the checkpoint is of another dataset or of other settings than the run.
    """
    run = job.config.log_dir
    folder = checkpoint.folder_of(run, step)
    state = checkpoint.read_state(folder)
    _check_identity(job, folder, state)
    checkpoint.load_model(folder, job.model, sharding.shard_like)
    tensors = sharding.shard_tensors(checkpoint.load_optimizer(folder), job.model)
    if tensors:  # none before the first step
        optim.load_state_tensors(job.optimizers, job.model, tensors, job.own_parameters)
    earlier = [one["fingerprint"] for one in job.record.earlier]
    job.loader.load_state_dict(state["loader"], earlier)
    if state["scaler"]:  # empty when it was not in use: the device may have been another one
        job.scaler.load_state_dict(state["scaler"])
    if state["spikes"]:
        job.spikes.load_state_dict(state["spikes"])
    best = checkpoint.best_of(run)
    job.step = job.saved_step = step
    job.best_loss = math.inf if best is None else checkpoint.read_state(best)["val_loss"]
    return state["val_loss"]


def _check_identity(job: Job, folder: Path, state: dict[str, Any]) -> None:
    """The chain from the checkpoint to the run's config.json to the dataset (promise 10)."""
    known = {job.record.fingerprint, *(one["fingerprint"] for one in job.record.earlier)}
    if state["fingerprint"] not in known:
        raise ValueError(
            f"{folder} was trained on the dataset {state['fingerprint'][:12]}, its run's "
            f"config.json says {job.record.fingerprint[:12]}: one of them is of another run; put "
            "the right one back"
        )
    try:
        run_config.continued(run_config.from_json(state["config"]), job.config)
    except ValueError as error:
        raise ValueError(f"{folder} and its run's config.json differ: {error}") from None


# --- A training job as it is before its first step: model, optimizers, and how ranks share them.


def assemble(
    record: RunRecord, ranks: Ranks, loader: Stream, val_windows: Sequence[np.ndarray], fresh: bool
) -> Job:
    """The job of a run that reads from `loader`, the same on all ranks but for the rows read.

    `fresh` tells that the weights are those to begin with; else a checkpoint will replace them.
    """
    config, device = record.config, ranks.device
    model, shard = first_model(config, fresh), config.shard if ranks.world_size > 1 else "none"
    model.gradient_checkpointing = config.gradient_checkpointing
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
