"""Sharding of optimizer state (ZeRO-1) or of everything (FSDP2), for models too large for a GPU.

    torchrun --standalone --nproc_per_node=4 train.py gpt2-large --shard optimizer
    torchrun --standalone --nproc_per_node=4 train.py gpt2-xl --shard full

Bytes per parameter and GPU, of n GPUs, in fp32 with AdamW: "none" 16, "optimizer" 8 + 8 / n,
"full" 16 / n and one block's weights; and 2 more on any GPU, since autocast keeps the 16-bit copies
of the weights until the backward pass. Checkpoints hold full tensors under plain names, so a run
can resume with another --shard or another number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mygpt.distributed import DistributedContext, compute_dtype
from mygpt.model import GPT


def shard_optimizers(optimizers: Sequence[Optimizer], ranks: DistributedContext) -> None:
    """Let each rank update its part of the parameters and hold only that part's state (ZeRO-1).

    ZeRO's first stage (arXiv 1910.02054), as two hooks of the step. Unlike with torch's
    ZeroRedundancyOptimizer the state can be saved as tensors, without pickle. Gradients must be
    equal on all ranks, as DDP leaves them, and all ranks must step together.
    """
    for optimizer in optimizers:
        owners = _owners(optimizer, ranks.world_size)
        optimizer.register_step_pre_hook(partial(_drop_other_gradients, owners, ranks.rank))
        optimizer.register_step_post_hook(partial(_broadcast_parameters, owners))


def own_parameters(optimizers: Iterable[Optimizer], ranks: DistributedContext) -> set[Tensor]:
    """Return the parameters that this rank updates under `shard_optimizers`."""
    owners = [_owners(optimizer, ranks.world_size) for optimizer in optimizers]
    return {p for each in owners for p, owner in each.items() if owner == ranks.rank}


def _owners(optimizer: Optimizer, world_size: int) -> dict[Tensor, int]:
    """Assign each parameter, largest first, to the rank with the fewest elements so far."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loads, owners = [0] * world_size, {}
    for p in sorted(parameters, key=Tensor.numel, reverse=True):
        owners[p] = loads.index(min(loads))
        loads[owners[p]] += p.numel()
    return owners


def _drop_other_gradients(owners: Mapping[Tensor, int], rank: int, *_: Any) -> None:
    # Optimizers skip a parameter without a gradient, and keep no state of it.
    for p, owner in owners.items():
        if owner != rank:
            p.grad = None


def _broadcast_parameters(owners: Mapping[Tensor, int], *_: Any) -> None:
    pending = [dist.broadcast(p.detach(), owner, async_op=True) for p, owner in owners.items()]
    for work in pending:
        work.wait()


def shard_model(model: GPT, ranks: DistributedContext) -> None:
    """Shard every parameter over the ranks in place with FSDP2, one group per block.

    Gradients are reduce-scattered block by block in every backward pass. A model on the CPU moves
    to the ranks' device one block at a time. Raises ValueError if the device computes in fp16,
    whose loss scaler would look at each rank's gradients alone.
    """
    if compute_dtype(ranks.device) == torch.float16:
        raise ValueError("--shard full needs bfloat16, this GPU has none: give --shard optimizer")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("token_losses", "next_logits"):
        register_fsdp_forward_method(model, method)


@contextmanager
def unsharded(model: GPT) -> Iterator[None]:
    """Keep all weights on every rank inside the block, so that ranks run forward independently.

    For validation and samples, without gradients. Does nothing to a model that is not sharded.
    """
    parts: list[Any] = [module for module in (*model.h, model) if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def full_tensors(tensors: Mapping[str, Tensor], ranks: DistributedContext) -> dict[str, Tensor]:
    """Gather all ranks' tensors on the main rank, in full and on the CPU; others get nothing.

    Collective: all ranks must call it. A name on several ranks is a sharded tensor, or the same
    tensor on all of them.
    """
    if ranks.world_size == 1:
        return dict(tensors)
    held = ranks.all_gather_object({name: (t.shape, t.dtype) for name, t in tensors.items()})
    result = {}
    for owner, names in enumerate(held):
        for name, (shape, dtype) in names.items():
            if any(name in before for before in held[:owner]):
                continue
            tensor = tensors.get(name)
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype, device=ranks.device)
            tensor = full_tensor(tensor)
            if owner:  # the main rank does not have it
                dist.broadcast(tensor := tensor.to(ranks.device), owner)
            if ranks.is_main:
                result[name] = tensor.detach().cpu()
    return result


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, sharded as `like`.

    Returns `full` itself if `like` is not sharded, or `full` is a scalar, such as AdamW's step.
    """
    if not _is_sharded(like) or not full.dim():
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    here = full.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def shard_tensors(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Shard optimizer state ("PARAMETER.KEY" -> full tensor) as the parameters are.

    What is of no parameter stays as it is.
    """
    parameters = dict(model.named_parameters())
    return {
        name: shard_like(tensor, parameters.get(name.rpartition(".")[0], tensor))
        for name, tensor in tensors.items()
    }


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, on all ranks; return any other as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    # Not isinstance: importing DTensor takes a second that unsharded runs need not wait for.
    return hasattr(tensor, "full_tensor")
