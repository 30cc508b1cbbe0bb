"""Everything the next optimizer step depends on, and how it is built, saved and restored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mygpt import checkpoint, optim, run_config, schedule, sharding
from mygpt.distributed import DistributedContext, autocast, compute_dtype, peak_flops
from mygpt.model import GPT
from mygpt.pretrained import from_pretrained
from mygpt.run_config import RunRecord
from mygpt.settings import TrainConfig
from mygpt.spikes import Spikes
from shards.loader import TokenLoader
from shards.mixture import Mixture
from shards.reader import EvalWindows


@dataclass
class TrainState:
    """A model in training after `step` finished steps."""

    record: RunRecord
    ranks: DistributedContext
    model: GPT
    ddp: DistributedDataParallel | None  # the same model, averaging gradients over the ranks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # loss scaler of fp16; disabled for other dtypes
    loader: TokenLoader
    val_windows: Sequence[np.ndarray]  # the fixed validation subset
    grad_accum_steps: int  # forward and backward passes per step
    ideal_seconds: float | None  # per step at the peak of the hardware, if known
    spikes: Spikes = field(init=False)
    step: int = 0
    saved_step: int = 0  # step of the checkpoint written or restored last
    best_val_loss: float = math.inf

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.config.skip_spikes)

    @property
    def config(self) -> TrainConfig:
        """Settings of the run."""
        return self.record.config

    @property
    def own_parameters(self) -> set[Tensor] | None:
        """Parameters whose optimizer state only this rank holds (ZeRO-1); None: all of them."""
        if self.config.shard != "optimizer":
            return None
        return sharding.own_parameters(self.optimizers, self.ranks)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def build_train_state(
    record: RunRecord, dataset: Mixture, ranks: DistributedContext, init_weights: bool = True
) -> TrainState:
    """Return the state before the first step, the same on all ranks but for the data they read.

    `init_weights=False` if a checkpoint will be loaded over the weights.
    """
    config = record.config
    loader = TokenLoader(
        dataset,
        "train",
        config.micro_batch,
        config.model.block_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        device=ranks.device,
        shuffle_shards=config.shuffle_shards,
    )
    return assemble(record, ranks, loader, validation_windows(config, dataset), init_weights)


def assemble(
    record: RunRecord,
    ranks: DistributedContext,
    loader: TokenLoader,
    val_windows: Sequence[np.ndarray],
    init_weights: bool = True,
) -> TrainState:
    """Return the state before the first step of a run that reads from `loader`."""
    config, device = record.config, ranks.device
    if config.init_from and init_weights:
        model = from_pretrained(config.init_from, config.model.block_size, config.model.dropout)
    else:
        torch.manual_seed(config.seed)
        model = GPT(config.model)
    model.gradient_checkpointing = config.gradient_checkpointing
    shard = config.shard if ranks.world_size > 1 else "none"
    if shard == "full":
        sharding.shard_model(model, ranks)
    model.to(device)
    if config.compile and device.type == "cuda":
        compile_blocks(model)
    optimizers = optim.configure_optimizers(
        model,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
    )
    if shard == "optimizer":
        sharding.shard_optimizers(optimizers, ranks)
    ddp = None
    if ranks.world_size > 1 and shard != "full":
        own_gpu = [ranks.local_rank] if device.type == "cuda" else None
        # Gradients are views of the all-reduce buckets instead of copies beside them.
        ddp = DistributedDataParallel(model, device_ids=own_gpu, gradient_as_bucket_view=True)
    flops, peak = model.flops_per_token() * config.total_batch_size, peak_flops(device)
    return TrainState(
        record=record,
        ranks=ranks,
        model=model,
        ddp=ddp,
        optimizers=optimizers,
        scaler=torch.amp.GradScaler(device.type, enabled=compute_dtype(device) == torch.float16),
        loader=loader,
        val_windows=val_windows,
        grad_accum_steps=schedule.grad_accum_steps(config, ranks.world_size),
        ideal_seconds=peak and flops / (peak * ranks.world_size),
    )


def compile_blocks(model: GPT, backend: str = "inductor") -> None:
    """Compile a model in place, for DDP as well."""
    # A block is a graph of its own, so gradients are ready to travel block by block anyway. DDP's
    # optimizer would cut it in two, and copy what lies between.
    torch._dynamo.config.optimize_ddp = False
    # Reductions are otherwise chosen by timing them, which may turn out differently on a resume.
    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    model.compile(backend)  # in place: a wrapper would prefix the names of the parameters


def trial_pass(model: GPT, micro_batch: int, device: torch.device) -> None:
    """Take a forward and a backward pass over random tokens, without communication."""
    shape = (micro_batch, model.config.block_size + 1)
    tokens = torch.randint(model.config.vocab_size, shape, device=device)  # (B, T + 1)
    with autocast(device):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()


def validation_windows(config: TrainConfig, dataset: Mixture) -> list[np.ndarray]:
    """Return the fixed validation subset, from each source in proportion to its weight."""
    chosen: list[np.ndarray] = []
    for manifest, weight in zip(dataset.manifests, dataset.weights, strict=True):
        windows = EvalWindows(manifest, "val", config.model.block_size)
        tokens = config.val_tokens * weight // sum(dataset.weights)
        # Copies: a view would keep its shard mapped for the whole run.
        chosen += [windows[i].copy() for i in windows.spread(tokens)]
    return chosen


def save_checkpoint(state: TrainState, run_dir: Path, val_loss: float | None) -> None:
    """Write the checkpoint of the current step and remove those no longer to be kept."""
    weights = sharding.full_tensors(checkpoint.parameters(state.model), state.ranks)
    tensors = sharding.full_tensors(optim.state_tensors(state.optimizers, state.model), state.ranks)
    if state.ranks.is_main:
        record = {
            "val_loss": val_loss,
            "loader": state.loader.state_dict(),
            "scaler": state.scaler.state_dict(),
            "spikes": state.spikes.state_dict(),
            "fingerprint": state.record.fingerprint,
            "generations": state.record.generations,
            "config": run_config.to_dict(state.config),
        }
        checkpoint.save(run_dir, state.step, weights, tensors, record)
        state.record.prune(run_dir)
    state.saved_step = state.step
    state.ranks.barrier()


def load_checkpoint(state: TrainState, step: int) -> None:
    """Load the checkpoint of `step` into a newly built state.

    Raises ValueError if the checkpoint belongs to another dataset or has other settings.
    """
    run_dir = state.config.log_dir
    folder = checkpoint.folder_of(run_dir, step)
    stored = checkpoint.read_state(folder)
    _check_identity(state, folder, stored)
    checkpoint.load_model(folder, state.model, sharding.shard_like)
    tensors = sharding.shard_tensors(checkpoint.load_optimizer(folder), state.model)
    if tensors:  # none before the first step
        optim.load_state_tensors(state.optimizers, state.model, tensors, state.own_parameters)
    earlier = [former.fingerprint for former in state.record.earlier]
    state.loader.load_state_dict(stored["loader"], earlier)
    if stored["scaler"]:  # empty if written on a device that needs none
        state.scaler.load_state_dict(stored["scaler"])
    if stored["spikes"]:
        state.spikes.load_state_dict(stored["spikes"])
    best = checkpoint.best_of(run_dir)
    state.step = state.saved_step = step
    state.best_val_loss = math.inf if best is None else checkpoint.read_state(best)["val_loss"]


def _check_identity(state: TrainState, folder: Path, stored: dict[str, Any]) -> None:
    """Check the chain from the checkpoint to the run's config.json to the dataset (promise 10)."""
    record = state.record
    known = {record.fingerprint, *(former.fingerprint for former in record.earlier)}
    if stored["fingerprint"] not in known:
        raise ValueError(
            f"{folder} was trained on the dataset {stored['fingerprint'][:12]}, its run's "
            f"config.json says {record.fingerprint[:12]}: one of them is of another run; put the "
            "right one back"
        )
    expected = stored["step"] * state.config.total_batch_size // state.config.model.block_size
    if stored["loader"].get("position") != expected:
        raise ValueError(
            f"expected the stream position {expected} after {stored['step']} steps in {folder}, "
            f"found {stored['loader'].get('position')}: it was altered; use another checkpoint"
        )
    former = run_config.from_dict(stored["config"], folder)
    config = state.config
    if former.max_steps in record.lengths or former.extend < config.extend:
        former = replace(former, max_steps=config.max_steps, extend=config.extend)
    try:
        run_config.resume(former, state.config)
    except ValueError as error:
        raise ValueError(f"{folder} and its run's config.json differ: {error}") from None
